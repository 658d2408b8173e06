//! check-update and send-inventory. The programs lie at fixed places below /usr/bin, so the agent runs in a
//! mount namespace of its own where that folder is the test's; this takes root.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;

use crate::control::complaint;
use crate::harness::aftermath::assert_comes_back;
use crate::harness::client::{Style, Terminal, new_sid};
use crate::harness::device::{Device, Reading};
use crate::harness::msg::{COMMANDS, Msg};
use crate::harness::proc;
use crate::harness::program;
use crate::harness::rig::{Rig, Setup, is_root};
use crate::harness::server::Server;
use crate::harness::wait::{SOON, eventually, millis, skip};

/// Fills the folder `bin` with links to all programs there are and puts it in the place of /usr/bin. Of
/// this nobody else sees anything.
const NAMESPACE: &str = r#"exec unshare --mount --propagation private /bin/sh -c '
    set -e
    mount --bind /usr/bin /mnt
    mkdir bin
    ln -s /mnt/* bin/
    rm -f bin/mender-update bin/mender
    mount --bind bin /usr/bin
    exec "$@"' sh "$@""#;

const MISSING: &str = "Cannot find Mender client binary, tried [/usr/bin/mender-update /usr/bin/mender]";
const KINDS: [&str; 2] = ["check-update", "send-inventory"];

/// Why these tests can't run here.
pub fn obstacle() -> Option<&'static str> {
    if !is_root() {
        return Some("only root can put programs into /usr/bin of a mount namespace");
    }
    let probe = "mount --bind /usr/bin /mnt";
    let made = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "/bin/sh", "-c", probe])
        .output()
        .is_ok_and(|output| output.status.success());
    (!made).then_some("no mount namespace can be made here")
}

/// An agent that sees only the programs the test gives it.
pub struct Fakes {
    pub rig: Rig,
    pub device: Device,
}

impl Fakes {
    pub fn start(setup: Setup) -> Option<Fakes> {
        if let Some(why) = obstacle() {
            skip(why);
            return None;
        }
        let (rig, device) = setup.wrapper(NAMESPACE).connected();
        Some(Fakes { rig, device })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.rig.dir.path().join(name)
    }

    /// Puts a script into the agent's /usr/bin. First it writes its name and arguments into `calls`.
    fn install(&self, name: &str, script: &str) {
        let calls = self.path("calls");
        let text = format!("#!/bin/sh\necho \"{name} $*\" >>'{}'\n{script}\n", calls.display());
        program::write(&self.path("bin").join(name), text.as_bytes());
    }

    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    pub fn wait_calls(&self, count: usize) {
        let what = format!("call {count}: {:?}", self.calls());
        eventually(SOON, &what, || (self.calls().len() >= count).then_some(()));
    }

    /// Asks within a session; the whole answer must come within it.
    fn ask(&self, typ: &str) -> Msg {
        let sid = new_sid();
        self.device.send(COMMANDS, typ, &sid, &[("user_id", "u".into())], b"");
        self.device.next_of(&sid, SOON)
    }

    /// Asks as the server does: no session, and for the internal service's part no user.
    pub fn order(&self, typ: &str) {
        self.device.send(COMMANDS, typ, "", &[], b"");
    }

    fn next_without_sid(&self) -> Msg {
        self.device.take(SOON, "an answer without sid", |m| m.sid.is_none())
    }

    /// A program that waits until the test lets it go, which is what the returned function does once.
    pub fn install_waiting(&self, name: &str, end: &str) -> impl Fn() + use<> {
        let gate = self.path(&format!("{name}.gate"));
        nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
        self.install(name, &format!("case $1 in check-update) read x <'{}';; esac\n{end}", gate.display()));
        move || fs::write(&gate, "go\n").expect("open the gate")
    }
}

fn assert_answer(msg: &Msg, typ: &str, status: i64, text: Option<&str>) {
    assert_eq!(
        (msg.proto, msg.typ.as_str(), msg.status(), msg.body.as_deref()),
        (COMMANDS, typ, Some(status), text.map(str::as_bytes)),
        "{}",
        msg.summary()
    );
    assert_eq!(msg.props.len(), 1, "only the status: {}", msg.summary());
    // Eight bytes wide, as clients insist on elsewhere.
    let wide = [b"\xa6status\xd3\0\0\0\0\0\0\0".as_slice(), &[status as u8]].concat();
    assert!(msg.raw.windows(wide.len()).any(|w| w == wide), "the status isn't int64: {}", msg.summary());
}

#[test]
fn a_missing_client_is_reported() {
    let Some(fakes) = Fakes::start(Setup::new()) else { return };
    for typ in KINDS {
        assert_answer(&fakes.ask(typ), typ, 2, Some(MISSING));
        fakes.order(typ);
        assert_answer(&fakes.next_without_sid(), typ, 2, Some(MISSING));
    }
}

#[test]
fn an_unknown_command_is_refused() {
    let (_rig, device) = Rig::connected();
    for typ in ["bogus", "daemon", "check-update "] {
        let sid = new_sid();
        device.send(COMMANDS, typ, &sid, &[], b"");
        assert_answer(&device.next_of(&sid, SOON), typ, 2, Some("unknown message type"));
        device.send(COMMANDS, typ, "", &[], b"");
        let answer = device.take(SOON, "an answer without sid", |m| m.sid.is_none());
        assert_answer(&answer, typ, 2, Some("unknown message type"));
    }
}

#[test]
fn commands_run_with_and_without_a_session() {
    let Some(fakes) = Fakes::start(Setup::new()) else { return };
    fakes.install("mender-update", "exit 0");
    for typ in KINDS {
        let answer = fakes.ask(typ);
        assert_answer(&answer, typ, 1, None);
        fakes.order(typ);
        let answer = fakes.next_without_sid();
        assert_answer(&answer, typ, 1, None);
    }
    let expected =
        KINDS.iter().flat_map(|typ| [format!("mender-update {typ}"), format!("mender-update {typ}")]);
    assert_eq!(fakes.calls(), expected.collect::<Vec<_>>());
    fakes.device.nothing(millis(150), "one answer each", |_| true);
}

#[test]
fn the_first_client_that_exists_is_run() {
    let Some(fakes) = Fakes::start(Setup::new()) else { return };
    fakes.install("mender", "exit 0");
    assert_answer(&fakes.ask("check-update"), "check-update", 1, None);
    assert_eq!(fakes.calls(), ["mender check-update"]);
    // It is looked for each time anew.
    fakes.install("mender-update", "exit 0");
    assert_answer(&fakes.ask("send-inventory"), "send-inventory", 1, None);
    assert_eq!(fakes.calls()[1..], ["mender-update send-inventory"]);
    // A failure of the first is a failure: the second isn't tried.
    fakes.install("mender-update", "exit 1");
    assert_answer(&fakes.ask("check-update"), "check-update", 2, Some("exit status 1"));
    assert_eq!(fakes.calls()[2..], ["mender-update check-update"]);
}

#[test]
fn failures_have_the_known_words() {
    let Some(fakes) = Fakes::start(Setup::new()) else { return };
    for (script, text) in
        [("exit 1", "exit status 1"), ("exit 77", "exit status 77"), ("kill -9 $$", "signal: killed")]
    {
        fakes.install("mender-update", script);
        for typ in KINDS {
            assert_answer(&fakes.ask(typ), typ, 2, Some(text));
            fakes.order(typ);
            assert_answer(&fakes.next_without_sid(), typ, 2, Some(text));
        }
    }
    let path = fakes.path("bin/mender-update");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
    let answer = fakes.ask("check-update");
    assert_eq!((answer.typ.as_str(), answer.status()), ("check-update", Some(2)));
    assert!(answer.text().ends_with("permission denied"), "{}", answer.summary());
}

#[test]
fn output_goes_nowhere_and_input_is_empty() {
    let Some(fakes) = Fakes::start(Setup::new()) else { return };
    let noise = "head -c 1000000 /dev/zero | tr '\\000' 'x'; echo noise >&2; cat";
    fakes.install("mender-update", noise);
    assert_answer(&fakes.ask("check-update"), "check-update", 1, None);
    fakes.install("mender-update", "echo this is the reason >&2; exit 3");
    assert_answer(&fakes.ask("check-update"), "check-update", 2, Some("exit status 3"));
    assert_eq!(fakes.rig.daemon.count_log("noise") + fakes.rig.daemon.count_log("xxxxxxxx"), 0);
}

/// A daemon the client leaves behind must not keep the answer back.
#[test]
fn what_the_client_leaves_running_is_not_waited_for() {
    let Some(fakes) = Fakes::start(Setup::new()) else { return };
    let gate = fakes.path("gate");
    nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
    fakes.install("mender-update", &format!("(read x <'{}') & exit 0", gate.display()));
    assert_answer(&fakes.ask("check-update"), "check-update", 1, None);
    fs::write(&gate, "go\n").expect("open the gate");
    eventually(SOON, "no zombie to be left", || {
        proc::children(fakes.rig.daemon.pid()).is_empty().then_some(())
    });
}

#[test]
fn nothing_waits_for_a_command() {
    let Some(fakes) = Fakes::start(Setup::new()) else { return };
    let release = fakes.install_waiting("mender-update", "exit 0");
    let threads = proc::threads(fakes.rig.daemon.pid());
    fakes.order("check-update");
    fakes.wait_calls(1);
    let mut terminal = Terminal::new(&fakes.device, Style::Cli);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("echo still echoing"), "still echoing");
    // The other command isn't in its way either.
    fakes.order("send-inventory");
    assert_answer(&fakes.next_without_sid(), "send-inventory", 1, None);
    assert_answer(&fakes.ask("send-inventory"), "send-inventory", 1, None);
    fakes.device.ping(b"are you there");
    fakes.device.wait_pong(b"are you there", SOON);
    terminal.stop();
    release();
    assert_answer(&fakes.next_without_sid(), "check-update", 1, None);
    // Without a session id there is no session afterwards, and so no timer.
    let sessions = || proc::threads(fakes.rig.daemon.pid()) <= threads + 1;
    eventually(SOON, "the command's thread to end", || sessions().then_some(()));
}

#[test]
fn a_repeat_is_answered_from_the_run_under_way() {
    let Some(fakes) = Fakes::start(Setup::new()) else { return };
    for (round, (end, status, text)) in
        [("exit 0", 1, None), ("exit 5", 2, Some("exit status 5"))].into_iter().enumerate()
    {
        let _ = fs::remove_file(fakes.path("mender-update.gate"));
        let release = fakes.install_waiting("mender-update", end);
        fakes.order("check-update");
        fakes.wait_calls(round * 2 + 1);
        let sids: Vec<String> = (0..50).map(|_| new_sid()).collect();
        for sid in &sids {
            fakes.device.send(COMMANDS, "check-update", sid, &[], b"");
        }
        for _ in 0..5 {
            fakes.order("check-update");
        }
        // They have all been read when this is answered.
        assert_answer(&fakes.ask("bogus"), "bogus", 2, Some("unknown message type"));
        fakes.device.nothing(millis(150), "nothing is answered before its time", |_| true);
        release();
        for sid in &sids {
            assert_answer(&fakes.device.next_of(sid, SOON), "check-update", status, text);
        }
        for _ in 0..6 {
            assert_answer(&fakes.next_without_sid(), "check-update", status, text);
        }
        assert_eq!(fakes.calls().len(), round * 2 + 1, "all had one run");
        // After it there is another.
        let release = (release, fakes.order("check-update")).0;
        fakes.wait_calls(round * 2 + 2);
        release();
        assert_answer(&fakes.next_without_sid(), "check-update", status, text);
    }
}

#[test]
fn a_flood_of_requests_starts_no_flood_of_programs() {
    let Some(fakes) = Fakes::start(Setup::new()) else { return };
    let release = fakes.install_waiting("mender-update", "exit 0");
    fakes.order("check-update");
    fakes.wait_calls(1);
    let (threads, children) = (proc::threads(fakes.rig.daemon.pid()), 1);
    for _ in 0..3000 {
        fakes.order("check-update");
    }
    let mut terminal = Terminal::new(&fakes.device, Style::Cli);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("echo alive"), "alive");
    terminal.stop();
    eventually(SOON, "the terminal's shell to go", || {
        (proc::children(fakes.rig.daemon.pid()).len() == children).then_some(())
    });
    let now = proc::threads(fakes.rig.daemon.pid());
    assert!(now <= threads + 2, "{now} threads, {threads} before");
    release();
    assert_answer(&fakes.next_without_sid(), "check-update", 1, None);
    assert_eq!(fakes.calls().len(), 1);
}

/// Each run on a link that took no answers left a thread that waited with its own: at 2 kB/s 8,000 in 25 s.
#[test]
fn answers_that_the_link_does_not_take_keep_no_threads() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let setup = Setup::new().wrapper(NAMESPACE);
    let rig = setup.start_with(|server: &Server| server.small_receive_buffer(4 << 10));
    let device = rig.device();
    let before = proc::threads(rig.daemon.pid());
    device.set_reading(Reading::Rate(2000));
    let threads = (0..3000).map(|_| {
        device.send(COMMANDS, "check-update", "", &[], b"");
        proc::threads(rig.daemon.pid())
    });
    let most = threads.max().unwrap_or_default();
    // Threads that are just ending count, too.
    assert!(most < before + 50, "{most} threads, {before} before");
    device.set_reading(Reading::Full);
    assert!(device.answers(b"the same link", SOON));
}

#[test]
fn the_link_and_the_agent_may_end_meanwhile() {
    let Some(mut fakes) = Fakes::start(Setup::new()) else { return };
    let release = fakes.install_waiting("mender-update", "exit 0");
    fakes.order("check-update");
    fakes.wait_calls(1);
    fakes.device.hang_up();
    fakes.device = fakes.rig.next_link();
    release();
    // One that has been reaped may still be joined.
    fakes.rig.daemon.wait_for_log("event=command", SOON);
    assert!(proc::children(fakes.rig.daemon.pid()).is_empty());
    // Answered or not, the old request doesn't stand in the way of a new one.
    fakes.order("check-update");
    fakes.wait_calls(2);
    fakes.rig.daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(fakes.rig.daemon.wait_exit(SOON).code(), Some(0));
    release();
}

/// A kill of the agent isn't one of an update under way. What is started anew knows nothing of it.
#[test]
fn a_command_outlives_a_killed_agent() {
    let setup = || Setup::new().wrapper(NAMESPACE);
    let Some(mut fakes) = Fakes::start(Setup::new()) else { return };
    let done = fakes.path("done");
    let release = fakes.install_waiting("mender-update", &format!("echo done >'{}'", done.display()));
    fakes.order("check-update");
    fakes.wait_calls(1);
    let command = proc::children(fakes.rig.daemon.pid());
    assert_eq!(command.len(), 1);
    fakes.rig.daemon.signal(nix::sys::signal::Signal::SIGKILL);
    fakes.rig.daemon.wait_exit(SOON);
    assert!(!proc::has_ended(command[0]));
    release();
    eventually(SOON, "the command to end", || proc::has_ended(command[0]).then_some(()));
    assert_eq!(fs::read_to_string(done).unwrap(), "done\n");
    fs::remove_dir_all(fakes.path("bin")).unwrap();
    assert_comes_back(&mut fakes.rig, &setup());
}

#[test]
fn what_is_disabled_is_not_there() {
    let (_rig, device) = Setup::new().set("MenderClient", json!({ "Disable": true })).connected();
    let sid = new_sid();
    device.send(0xffff, "open", &sid, &[], b"\x81\xa8versions\x91\x01");
    let accept = device.next_of(&sid, SOON);
    let protocols = accept.field("protocols").expect("protocols");
    assert!(!protocols.as_array().expect("an array").contains(&COMMANDS.into()), "{protocols}");
    device.send(COMMANDS, "check-update", &sid, &[], b"");
    let (text, close, proto, typ) = complaint(&device.next_of(&sid, SOON));
    assert_eq!(text, "no handler registered for protocol: 0x0004");
    assert_eq!((close, proto, typ.as_deref()), (false, Some(4), Some("check-update")));
    let (_rig, device) = Rig::connected();
    device.send(0xffff, "open", &sid, &[], b"\x81\xa8versions\x91\x01");
    let protocols = device.next_of(&sid, SOON).field("protocols").expect("protocols");
    assert!(protocols.as_array().expect("an array").contains(&COMMANDS.into()), "{protocols}");
}
