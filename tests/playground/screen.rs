//! The live shell: keystrokes to the agent, output to the screen.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::Signal;

use crate::harness::client::{Terminal, size};
use crate::harness::device::Device;
use crate::harness::msg::SHELL;
use crate::harness::wait::{SOON, Watched, secs, spawn};
use crate::keyboard::{RawMode, Signals, window_size};

/// Ctrl-] and Ctrl-^.
const LEAVE: u8 = 0x1d;
const CUT: u8 = 0x1e;

/// A key's command to the playground.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Leave,
    Cut,
}

/// What the output thread found out.
#[derive(Debug, Default)]
struct Progress {
    /// The shell has written something: it reads its input now.
    output: bool,
    /// Why the session is over; `Ok` when it ended as it should.
    over: Option<Result<String, String>>,
    /// A full-screen program has the alternate screen.
    alternate: bool,
}

/// Opens a shell and connects it with the caller's terminal until either ends. When the caller cuts the connection, `next`
/// waits for the agent's next one, in which the same user opens a shell.
pub fn run(
    mut terminal: Terminal,
    signals: &Signals,
    next: impl Fn() -> Result<Device, String>,
) -> Result<(), String> {
    let raw = RawMode::enter()?;
    let mut alternate = false;
    let end = loop {
        match session(&terminal, signals, raw.is_raw(), &mut alternate) {
            Ok(None) => {
                eprint!("\r\nplayground: the connection is cut, waiting for the agent\r\n");
                terminal = Terminal::of_user(&next()?, &terminal.user);
            }
            Ok(Some(end)) => break Ok(end),
            Err(why) => break Err(why),
        }
    };
    if raw.is_raw() {
        tidy(alternate);
    }
    drop(raw);
    eprintln!("playground: {}", end?);
    Ok(())
}

/// Returns how the session ended, `None` if the caller has cut the connection.
fn session(
    terminal: &Terminal,
    signals: &Signals,
    raw: bool,
    alternate: &mut bool,
) -> Result<Option<String>, String> {
    let (width, height) = window_size();
    terminal.send("new", &size(width, height), b"");
    let answer = terminal.next(SOON);
    if (answer.typ.as_str(), answer.status()) != ("new", Some(1)) {
        return Err(format!("no shell: {}", answer.text()));
    }
    let progress = Arc::new(Watched::new(Progress::default()));
    let wake = Arc::new(
        EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).map_err(|e| e.to_string())?,
    );
    let show = {
        let (terminal, progress, wake) = (terminal.clone(), Arc::clone(&progress), Arc::clone(&wake));
        spawn("screen", move || {
            let end = show(&terminal, &progress, &wake);
            progress.update(|p| p.over = Some(end));
            let _ = wake.write(1);
        })
    };
    let wish = type_in(terminal, signals, &progress, &wake, raw);
    let cut = wish == Ok(Wish::Cut);
    if cut {
        terminal.device.reset();
    } else if progress.peek(|p| p.over.is_none()) {
        terminal.ask_stop();
    }
    let over = progress.wait(secs(10), |p| p.over.clone());
    if over.is_some() {
        let _ = show.join();
    }
    *alternate = progress.peek(|p| p.alternate);
    match (wish, over) {
        (_, Some(_)) if cut => Ok(None),
        (Err(why), _) | (_, Some(Err(why))) => Err(why),
        (_, Some(Ok(end))) => Ok(Some(end)),
        (_, None) => Err("the agent did not answer the stop".to_owned()),
    }
}

/// Sends what is typed until the caller leaves, cuts the connection, or the session is over.
fn type_in(
    terminal: &Terminal,
    signals: &Signals,
    progress: &Watched<Progress>,
    wake: &EventFd,
    raw: bool,
) -> Result<Wish, String> {
    let mut stdin = std::io::stdin();
    let mut buffer = [0; 4096];
    let mut open = true;
    let mut complete_line = true;
    if !raw {
        // Input that arrives before the shell has set its terminal up could be lost.
        progress.wait(secs(10), |p| (p.output || p.over.is_some()).then_some(()));
    }
    loop {
        if progress.peek(|p| p.over.is_some()) {
            return Ok(Wish::Leave);
        }
        let mut fds =
            vec![PollFd::new(signals.fd(), PollFlags::POLLIN), PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        if open {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        poll(&mut fds, PollTimeout::NONE).map_err(|e| format!("poll: {e}"))?;
        let typed = fds.get(2).and_then(PollFd::any) == Some(true);
        let _ = wake.read();
        while let Some(signal) = signals.next() {
            if signal != Signal::SIGWINCH {
                return Ok(Wish::Leave);
            }
            let (width, height) = window_size();
            terminal.resize(width, height);
        }
        if !typed {
            continue;
        }
        let count = match stdin.read(&mut buffer) {
            Ok(0) if raw => return Ok(Wish::Leave),
            Ok(0) => {
                open = false;
                terminal.input(if complete_line { "exit\n" } else { "\nexit\n" });
                continue;
            }
            Ok(count) => count,
            Err(e) => return Err(format!("standard input: {e}")),
        };
        let mut keys = &buffer[..count];
        let wish = if raw { keys.iter().position(|&key| [LEAVE, CUT].contains(&key)) } else { None };
        keys = &keys[..wish.unwrap_or(count)];
        if let Some(last) = keys.last() {
            complete_line = *last == b'\n';
            let message_sent = progress.peek(|p| p.over.is_none());
            if message_sent {
                terminal.input(keys);
            }
        }
        if let Some(at) = wish {
            return Ok(if buffer[at] == CUT { Wish::Cut } else { Wish::Leave });
        }
    }
}

/// Writes output until the session ends; returns how it ended.
fn show(terminal: &Terminal, progress: &Watched<Progress>, wake: &EventFd) -> Result<String, String> {
    let mut stdout = std::io::stdout();
    let mut tail = Vec::new();
    loop {
        let next = terminal.device.try_take(secs(3600), |m| m.sid.as_deref() == Some(&terminal.sid));
        let msg = match next {
            None => continue,
            Some(Err(why)) => return Err(why),
            Some(Ok(msg)) if msg.proto != SHELL => continue,
            Some(Ok(msg)) => msg,
        };
        match (msg.typ.as_str(), msg.status()) {
            ("shell", Some(1)) => {
                let bytes = msg.body.unwrap_or_default();
                if let Err(e) = stdout.write_all(&bytes).and_then(|()| stdout.flush()) {
                    return Err(format!("standard output: {e}"));
                }
                tail.extend_from_slice(&bytes);
                progress.update(|p| {
                    p.output = true;
                    p.alternate = alternate(&tail).unwrap_or(p.alternate);
                });
                tail.drain(..tail.len().saturating_sub(ALTERNATE_ON.len() - 1));
                let _ = wake.write(1);
            }
            ("ping", _) => terminal.send("pong", &[], b""),
            ("stop", Some(1)) => return Ok("you left, the shell was stopped".to_owned()),
            // As clients in the field do, answer with a stop; there's no need to wait for the reply.
            ("stop", _) => {
                terminal.ask_stop();
                return Ok("the shell ended".to_owned());
            }
            _ => {}
        }
    }
}

const ALTERNATE_ON: &[u8] = b"\x1b[?1049h";
const ALTERNATE_OFF: &[u8] = b"\x1b[?1049l";

/// Which of the two switches came last in this output, if any.
fn alternate(output: &[u8]) -> Option<bool> {
    let last = |needle: &[u8]| output.windows(needle.len()).rposition(|window| window == needle);
    match (last(ALTERNATE_ON), last(ALTERNATE_OFF)) {
        (None, None) => None,
        (on, off) => Some(on > off),
    }
}

/// Takes back what a full-screen program that was left alone had switched on.
fn tidy(alternate: bool) {
    let mut text = String::new();
    if alternate {
        text.push_str("\x1b[?1049l");
    }
    // Colours, cursor, cursor keys, keypad, bracketed paste, mouse.
    text.push_str("\x1b[0m\x1b[?25h\x1b[?1l\x1b>\x1b[?2004l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\r\n");
    let mut stdout = std::io::stdout();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}
