//! The live shell: keystrokes to the agent, output to the screen.

use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::Signal;

use crate::display::Display;
use crate::harness::client::{Terminal, size};
use crate::harness::device::Device;
use crate::harness::msg::SHELL;
use crate::harness::wait::{SOON, Watched, secs, spawn};
use crate::keyboard::{RawMode, Signals};
use crate::status::{Link, Status};
use crate::transfer::Load;

/// Ctrl-], Ctrl-^ and Ctrl-_: in most terminals Ctrl-5, Ctrl-6 and Ctrl-7, too.
const LEAVE: u8 = 0x1d;
const CUT: u8 = 0x1e;
const LOAD: u8 = 0x1f;

/// A key's command to the playground.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Leave,
    Cut,
    Load,
}

/// What the output thread found out.
#[derive(Debug, Default)]
struct Progress {
    /// The shell has written something: it reads its input now.
    output: bool,
    /// Why the session is over; `Ok` when it ended as it should.
    over: Option<Result<String, String>>,
}

/// The surroundings of the shell.
pub struct Stage<'a> {
    pub signals: &'a Signals,
    /// A file of the device that a key downloads.
    pub file: &'a Path,
    /// Ends the agent's link, and refuses others.
    pub cut: &'a dyn Fn(&Device),
    /// Refuses no more and waits for the agent's next link.
    pub give_back: &'a dyn Fn() -> Result<Device, String>,
}

/// Opens a shell and connects it with the caller's terminal until either ends. When the caller has cut the link and
/// given it back, the same user opens a shell on the next one.
pub fn run(mut terminal: Terminal, stage: &Stage) -> Result<(), String> {
    let raw = RawMode::enter()?;
    let display = Arc::new(Display::new(raw.is_raw()));
    let status = Arc::new(Status::new(&display));
    let keyboard = Keyboard { stage, display: &display, status: &status, raw: raw.is_raw() };
    let end = loop {
        match keyboard.session(&terminal) {
            Ok(None) => {}
            Ok(Some(end)) => break Ok(end),
            Err(why) => break Err(why),
        }
        match keyboard.outage() {
            Ok(Some(device)) => terminal = Terminal::of_user(&device, &terminal.user),
            Ok(None) => break Ok("you left, the shell was stopped".to_owned()),
            Err(why) => break Err(why),
        }
    };
    status.end();
    display.close();
    drop(raw);
    eprintln!("playground: {}", end?);
    Ok(())
}

/// Keys, and all that they act upon.
struct Keyboard<'a> {
    stage: &'a Stage<'a>,
    display: &'a Arc<Display>,
    status: &'a Arc<Status>,
    raw: bool,
}

/// The event that ends the keyboard's wait.
enum Event {
    Keys(Vec<u8>),
    /// No more keys.
    End,
    Resized,
    Signal,
    /// The output thread has something to tell.
    Woken,
}

impl Keyboard<'_> {
    /// Returns how the session ended, `None` if the caller has cut the link.
    fn session(&self, terminal: &Terminal) -> Result<Option<String>, String> {
        let (width, height) = self.display.size();
        terminal.send("new", &size(width, height), b"");
        let answer = terminal.next(SOON);
        if (answer.typ.as_str(), answer.status()) != ("new", Some(1)) {
            return Err(format!("no shell: {}", answer.text()));
        }
        self.status.session(&terminal.sid);
        let progress = Arc::new(Watched::new(Progress::default()));
        let wake = Arc::new(
            EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).map_err(|e| e.to_string())?,
        );
        let show = {
            let (terminal, progress, wake) = (terminal.clone(), Arc::clone(&progress), Arc::clone(&wake));
            let (display, status) = (Arc::clone(self.display), Arc::clone(self.status));
            spawn("screen", move || {
                let end = show(&terminal, &progress, &wake, &display, &status);
                progress.update(|p| p.over = Some(end));
                let _ = wake.write(1);
            })
        };
        let wish = self.type_in(terminal, &progress, &wake);
        let cut = wish == Ok(Wish::Cut);
        if cut {
            (self.stage.cut)(&terminal.device);
        } else if progress.peek(|p| p.over.is_none()) {
            terminal.ask_stop();
        }
        let over = progress.wait(secs(10), |p| p.over.clone());
        if over.is_some() {
            let _ = show.join();
        }
        match (wish, over) {
            (_, Some(_)) if cut => Ok(None),
            (Err(why), _) | (_, Some(Err(why))) => Err(why),
            (_, Some(Ok(end))) => Ok(Some(end)),
            (_, None) => Err("the agent did not answer the stop".to_owned()),
        }
    }

    /// Waits until the caller gives the link back; `None` if the caller leaves.
    fn outage(&self) -> Result<Option<Device>, String> {
        let tell =
            |text: &str| self.display.write(text.as_bytes()).map_err(|e| format!("standard output: {e}"));
        self.status.link(Link::Cut);
        tell("\r\nplayground: the link is cut, the shell goes on. Ctrl-^ gives the link back.\r\n")?;
        loop {
            let wish = match self.next(None)? {
                Event::Keys(keys) => keys.into_iter().find_map(Wish::of),
                Event::End | Event::Signal => Some(Wish::Leave),
                Event::Resized | Event::Woken => None,
            };
            match wish {
                Some(Wish::Leave) => return Ok(None),
                Some(Wish::Cut) => break,
                Some(Wish::Load) | None => {}
            }
        }
        self.status.link(Link::Awaited);
        tell("playground: the agent connects again\r\n")?;
        let device = (self.stage.give_back)()?;
        self.status.link(Link::Back);
        Ok(Some(device))
    }

    /// Waits for keys, a signal, or the descriptor. Without one there is no session.
    fn next(&self, wake: Option<(&EventFd, bool)>) -> Result<Event, String> {
        let mut stdin = std::io::stdin();
        let (wake, open) = wake.map_or((None, true), |(wake, open)| (Some(wake), open));
        let mut fds = vec![PollFd::new(self.stage.signals.fd(), PollFlags::POLLIN)];
        if open {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        if let Some(wake) = wake {
            fds.push(PollFd::new(wake.as_fd(), PollFlags::POLLIN));
        }
        poll(&mut fds, PollTimeout::NONE).map_err(|e| format!("poll: {e}"))?;
        let typed = open && fds[1].any() == Some(true);
        let _ = wake.map(EventFd::read);
        if let Some(signal) = self.stage.signals.next() {
            if signal != Signal::SIGWINCH {
                return Ok(Event::Signal);
            }
            self.display.resize();
            return Ok(Event::Resized);
        }
        if !typed {
            return Ok(Event::Woken);
        }
        let mut buffer = vec![0; 4096];
        match stdin.read(&mut buffer) {
            Ok(0) => Ok(Event::End),
            Ok(count) => {
                buffer.truncate(count);
                Ok(Event::Keys(buffer))
            }
            Err(e) => Err(format!("standard input: {e}")),
        }
    }

    /// Sends what is typed until the caller leaves, cuts the link, or the session is over.
    fn type_in(
        &self,
        terminal: &Terminal,
        progress: &Watched<Progress>,
        wake: &EventFd,
    ) -> Result<Wish, String> {
        let mut open = true;
        let mut complete_line = true;
        if !self.raw {
            // Input that arrives before the shell has set its terminal up could be lost.
            progress.wait(secs(10), |p| (p.output || p.over.is_some()).then_some(()));
        }
        let over = || progress.peek(|p| p.over.is_some());
        while !over() {
            let keys = match self.next(Some((wake, open)))? {
                Event::Signal => return Ok(Wish::Leave),
                Event::End if self.raw => return Ok(Wish::Leave),
                Event::End => {
                    open = false;
                    terminal.input(if complete_line { "exit\n" } else { "\nexit\n" });
                    continue;
                }
                Event::Resized => {
                    let (width, height) = self.display.size();
                    terminal.resize(width, height);
                    continue;
                }
                Event::Woken => continue,
                Event::Keys(keys) => keys,
            };
            // The playground's keys end what goes to the shell in one message.
            for keys in keys.split_inclusive(|&key| self.raw && Wish::of(key).is_some()) {
                let wish = keys.last().copied().filter(|_| self.raw).and_then(Wish::of);
                let input = &keys[..keys.len() - usize::from(wish.is_some())];
                if let Some(last) = input.last() {
                    complete_line = *last == b'\n';
                    if !over() {
                        self.status.typed();
                        terminal.input(input);
                    }
                }
                match wish {
                    Some(Wish::Load) => {
                        self.status.toggle_load(|| Load::start(&terminal.device, self.stage.file))
                    }
                    Some(wish) => return Ok(wish),
                    None => {}
                }
            }
        }
        Ok(Wish::Leave)
    }
}

impl Wish {
    fn of(key: u8) -> Option<Wish> {
        match key {
            LEAVE => Some(Wish::Leave),
            CUT => Some(Wish::Cut),
            LOAD => Some(Wish::Load),
            _ => None,
        }
    }
}

/// Writes output until the session ends; returns how it ended.
fn show(
    terminal: &Terminal,
    progress: &Watched<Progress>,
    wake: &EventFd,
    display: &Display,
    status: &Status,
) -> Result<String, String> {
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
                status.answered();
                let bytes = msg.body.unwrap_or_default();
                display.write(&bytes).map_err(|e| format!("standard output: {e}"))?;
                progress.update(|p| p.output = true);
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
