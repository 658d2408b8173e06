//! The terminal clients found in the field, speaking through a device's connection.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rmpv::Value;

use super::device::Device;
use super::msg::{self, Ints, Msg, SHELL, map};
use super::wait::SOON;

/// Whose habits a client has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// The acceptance tests' Python client: nil for what is absent, an empty bin as body.
    Python,
    /// mender-cli: integers always eight bytes wide, dimensions in `new`.
    Cli,
    /// The web interface: keystrokes as str, short integers, `new` without dimensions.
    Gui,
}

/// One terminal session.
#[derive(Debug, Clone)]
pub struct Terminal {
    pub device: Device,
    pub sid: String,
    pub user: String,
    pub style: Style,
    pub commands: u64,
    /// Output received behind what the last helper returned.
    pub pending: String,
}

static SESSIONS: AtomicU64 = AtomicU64::new(1);

/// A new session id of the server's form.
pub fn new_sid() -> String {
    format!("00000000-0000-4000-8000-{:012x}", SESSIONS.fetch_add(1, Ordering::Relaxed))
}

impl Terminal {
    /// A session of a user of its own, so that MaxPerUser doesn't matter.
    pub fn new(device: &Device, style: Style) -> Terminal {
        let sid = new_sid();
        let user = format!("user-of-{sid}");
        Terminal { device: device.clone(), sid, user, style, commands: 0, pending: String::new() }
    }

    /// A session of this user.
    pub fn of_user(device: &Device, user: &str) -> Terminal {
        Terminal { user: user.to_owned(), ..Terminal::new(device, Style::Cli) }
    }

    /// The same client by the server's next connection to the device.
    pub fn on(self, device: &Device) -> Terminal {
        Terminal { device: device.clone(), ..self }
    }

    // ---- sending

    pub fn send(&self, typ: &str, props: &[(&str, Value)], body: &[u8]) {
        let mut props = props.to_vec();
        props.push(("user_id", self.user.as_str().into()));
        let message = match self.style {
            Style::Cli | Style::Gui => {
                let message = msg::message(SHELL, typ, &self.sid, &props, body);
                if self.style == Style::Gui { str_body(message) } else { message }
            }
            Style::Python => map(&[
                (
                    "hdr",
                    map(&[
                        ("proto", SHELL.into()),
                        ("typ", typ.into()),
                        ("sid", self.sid.as_str().into()),
                        ("props", map(&props)),
                    ]),
                ),
                ("body", Value::from(body)),
            ]),
        };
        let ints = if self.style == Style::Cli { Ints::Wide } else { Ints::Compact };
        self.device.send_value(&message, ints);
    }

    /// Asks for a shell as this client does.
    pub fn ask_new(&self) {
        match self.style {
            Style::Cli => self.send("new", &size(80, 24), b""),
            Style::Python => self.send("new", &[], b""),
            Style::Gui => {
                self.send("new", &[], b"");
                self.send("resize", &size(80, 24), b"");
            }
        }
    }

    pub fn resize(&self, width: u16, height: u16) {
        self.send("resize", &size(width, height), b"");
    }

    pub fn input(&self, keys: impl AsRef<[u8]>) {
        self.send("shell", &[], keys.as_ref());
    }

    pub fn ask_stop(&self) {
        self.send("stop", &[], b"");
    }

    /// The client answers a ping, as the server passes it on.
    pub fn pong(&self) {
        self.send("pong", &[], b"");
    }

    // ---- receiving

    /// The next message of this session, whatever it is.
    pub fn next(&self, limit: Duration) -> Msg {
        self.device.next_of(&self.sid, limit)
    }

    /// The next message must be this.
    pub fn expect(&self, typ: &str, status: i64, body: Option<&str>) -> Msg {
        let msg = self.next(SOON);
        assert_eq!(
            (msg.proto, msg.typ.as_str(), msg.status(), msg.body.as_deref()),
            (SHELL, typ, Some(status), body.map(str::as_bytes)),
            "not the expected message: {}",
            msg.summary()
        );
        msg
    }

    /// Skips output until a message of this type comes.
    pub fn expect_after_output(&self, typ: &str, limit: Duration) -> Msg {
        let deadline = Instant::now() + limit;
        loop {
            let msg = self.next(deadline.saturating_duration_since(Instant::now()));
            if msg.typ == typ {
                return msg;
            }
            assert_eq!((msg.typ.as_str(), msg.status()), ("shell", Some(1)), "{}", msg.summary());
        }
    }

    /// Collects output until `done` is content with all of it so far.
    pub fn output_until(&mut self, limit: Duration, what: &str, done: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + limit;
        let mut bytes = std::mem::take(&mut self.pending).into_bytes();
        loop {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            if done(&text) {
                return text;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let tail = text.len().saturating_sub(400);
            let tail = text.get(tail..).unwrap_or(&text).to_owned();
            let wanted = format!("{what}, after output ending in {tail:?}");
            let msg = self.device.take(left, &wanted, |m| m.sid.as_deref() == Some(&self.sid));
            assert_eq!(
                (msg.proto, msg.typ.as_str(), msg.status()),
                (SHELL, "shell", Some(1)),
                "not output: {}",
                msg.summary()
            );
            bytes.extend_from_slice(&msg.body.unwrap_or_default());
        }
    }

    /// Collects output up to the end of `text`; what came behind it is kept for the next reading.
    pub fn read_until(&mut self, text: &str, limit: Duration) -> String {
        let mut all = self.output_until(limit, &format!("output with {text:?}"), |all| all.contains(text));
        let end = all.find(text).expect("just seen") + text.len();
        self.pending = all.split_off(end);
        all
    }

    /// Waits for a prompt at the end of the output.
    pub fn prompt(&mut self) -> String {
        self.output_until(SOON, "a prompt", |all| all.ends_with("# ") || all.ends_with("$ "))
    }

    /// Appends output until `all` is longer than `wanted`, or nothing comes for `span`.
    pub fn collect(&self, all: &mut Vec<u8>, wanted: usize, span: Duration) {
        let ours = |msg: &Msg| msg.sid.as_deref() == Some(&self.sid);
        while all.len() <= wanted
            && let Some(Ok(msg)) = self.device.try_take(span, ours)
        {
            if msg.typ == "shell" {
                all.extend(msg.body.unwrap_or_default());
            }
        }
    }

    // ---- whole exchanges

    /// Asks for a shell; the next message must be the good answer.
    pub fn open(&self) {
        self.ask_new();
        self.expect("new", 1, Some("Shell started"));
    }

    pub fn open_with_prompt(&mut self) {
        self.open();
        self.prompt();
    }

    /// Opens a terminal, which must lead back to the user's shell. Returns the agent's notice.
    pub fn reattached(&mut self) -> String {
        self.open();
        let notice = self.read_until(" s ago\r\n", SOON);
        assert!(notice.starts_with("[mender-connect] Reattached to your shell of "), "{notice:?}");
        notice
    }

    /// Types a command at the prompt and returns what it printed, without echo and carriage returns.
    /// The next prompt has come, too: no output is under way behind this.
    pub fn run(&mut self, command: &str) -> String {
        self.run_within(command, SOON)
    }

    pub fn run_within(&mut self, command: &str, limit: Duration) -> String {
        self.commands += 1;
        let n = self.commands;
        // The quotes keep the echo of the command line from looking like its output.
        self.input(format!("echo 'beg''in{n}:'; {command}; echo ':e''nd{n}'\n"));
        let (begin, end) = (format!("begin{n}:\r\n"), format!(":end{n}\r\n"));
        let all = self.read_until(&end, limit);
        let from = all.find(&begin).expect("the begin mark precedes the end mark") + begin.len();
        let to = all.len() - end.len();
        self.prompt();
        let printed = all[from..to].replace("\r\n", "\n");
        printed.strip_suffix('\n').unwrap_or(&printed).to_owned()
    }

    /// Stops the shell; the next message must be the good reply.
    pub fn stop(&self) {
        self.ask_stop();
        self.expect("stop", 1, None);
    }

    /// Drops output that has arrived but matters to nobody.
    pub fn forget_output(&mut self) {
        self.pending.clear();
        self.device.drain(&self.sid);
    }
}

/// Window dimensions as properties.
pub fn size(width: u16, height: u16) -> [(&'static str, Value); 2] {
    [("terminal_width", width.into()), ("terminal_height", height.into())]
}

/// Turns a bin body into str, which msgpack libraries of JavaScript do to strings.
fn str_body(message: Value) -> Value {
    let Value::Map(entries) = message else { return message };
    let convert = |(key, value): (Value, Value)| match value {
        Value::Binary(bytes) => (key, Value::from(String::from_utf8_lossy(&bytes).into_owned())),
        other => (key, other),
    };
    Value::Map(entries.into_iter().map(convert).collect())
}
