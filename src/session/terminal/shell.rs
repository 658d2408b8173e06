//! A running shell: its process, its terminal, what was typed and not read yet.

use std::collections::VecDeque;
use std::io;

use crate::config;
use crate::permits::Permit;
use crate::sys::process::SessionLeader;
use crate::sys::pty::{Pty, WindowSize};
use crate::sys::reason;

/// Bytes of input that may wait for a program to read them.
const MAX_INPUT: usize = 1 << 20;
/// Bytes of input that need no permit: what is typed by hand.
const SMALL_INPUT: usize = 4096;

/// A shell on its terminal.
#[derive(Debug)]
pub(crate) struct Shell {
    pub(crate) process: SessionLeader,
    pub(crate) pty: Pty,
    pub(crate) input: VecDeque<u8>,
    /// For the input beyond [`SMALL_INPUT`].
    memory: Permit,
}

/// Whether there may be more output at once, none for now, or none ever again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    More,
    Wait,
    End,
}

impl Shell {
    /// Starts the configured shell on a terminal of `size`. The error follows "failed to start shell: ".
    pub(crate) fn start(shell: &config::Shell, size: WindowSize, memory: Permit) -> Result<Self, String> {
        let owner = nix::unistd::geteuid().is_root().then_some(shell.user.uid);
        let (pty, tty) = Pty::open(size, owner).map_err(|e| reason(&e))?;
        let config::Shell { command, arguments, user, no_new_privileges } = shell;
        let process = SessionLeader::spawn(command, arguments, user, *no_new_privileges, tty)
            .map_err(|e| format!("fork/exec {}: {}", command.display(), reason(&e)))?;
        Ok(Shell { process, pty, input: VecDeque::new(), memory })
    }

    /// Types `bytes`, all or, when too much waits already, nothing.
    pub(crate) fn type_in(&mut self, bytes: &[u8]) -> Result<(), String> {
        let waiting = self.input.len() + bytes.len();
        if waiting > MAX_INPUT || !self.memory.resize(waiting.saturating_sub(SMALL_INPUT)) {
            return Err(format!(
                "input queue full: the program does not read, {} bytes wait, {} were dropped",
                self.input.len(),
                bytes.len()
            ));
        }
        self.input.extend(bytes);
        self.pass_input().map_err(|e| reason(&e))
    }

    /// Passes on what the terminal takes. Fails when it never will again; the input is gone then.
    pub(crate) fn pass_input(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        while !self.input.is_empty() {
            match self.pty.write(self.input.as_slices().0) {
                Ok(n) => drop(self.input.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => {
                    self.input.clear();
                    result = Err(e);
                }
            }
        }
        if self.input.is_empty() {
            // A pasted megabyte shouldn't cost memory for ever.
            self.input.shrink_to(SMALL_INPUT);
        }
        self.memory.resize(self.input.len().saturating_sub(SMALL_INPUT));
        result
    }

    /// Reads what there is, up to what `place` takes: how many bytes, and what is to be expected then.
    pub(crate) fn read_output(&self, place: &mut [u8]) -> (usize, Then) {
        let mut filled = 0;
        let then = loop {
            if filled == place.len() {
                break Then::More;
            }
            match self.pty.read(&mut place[filled..]) {
                Ok(0) => break Then::End,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break Then::Wait,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break Then::End,
            }
        };
        (filled, then)
    }
}
