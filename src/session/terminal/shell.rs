//! A running shell: its process, its terminal, what was typed and not read yet.

use std::collections::VecDeque;
use std::io;

use crate::config;
use crate::permits::Permit;
use crate::sys::process::SessionLeader;
use crate::sys::pty::{Pty, WindowSize};

/// Input that waits for a program to read it.
const MAX_INPUT: usize = 1 << 20;
/// Room for what is typed by hand.
const SMALL_INPUT: usize = 4096;

#[derive(Debug)]
pub(crate) struct Shell {
    pub(crate) process: SessionLeader,
    pub(crate) pty: Pty,
    input: VecDeque<u8>,
}

/// Whether there may be more output at once, none for now or none ever again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    More,
    Wait,
    End,
}

impl Shell {
    /// The error is the text that follows "failed to start shell: ".
    pub(crate) fn start(shell: &config::Shell, size: WindowSize) -> Result<Self, String> {
        let words = |e: io::Error| crate::sys::reason(&e);
        let owner = nix::unistd::geteuid().is_root().then_some(shell.user.uid);
        let (pty, tty) = Pty::open(size, owner).map_err(words)?;
        let config::Shell { command, arguments, user, no_new_privileges } = shell;
        let process = SessionLeader::spawn(command, arguments, user, *no_new_privileges, tty)
            .map_err(|e| format!("fork/exec {}: {}", command.display(), words(e)))?;
        Ok(Shell { process, pty, input: VecDeque::new() })
    }

    pub(crate) fn has_input(&self) -> bool {
        !self.input.is_empty()
    }

    /// Types `bytes`, all or, when too much waits already, nothing. `memory` is for what waits beyond [`SMALL_INPUT`].
    pub(crate) fn type_in(&mut self, bytes: &[u8], memory: &mut Permit) -> Result<(), String> {
        let waiting = self.input.len() + bytes.len();
        if waiting > MAX_INPUT || !memory.resize(waiting.saturating_sub(SMALL_INPUT)) {
            return Err(format!(
                "input queue full: the program does not read, {} bytes wait, {} were dropped",
                self.input.len(),
                bytes.len()
            ));
        }
        self.input.extend(bytes);
        self.pass_input(memory).map_err(|e| crate::sys::reason(&e))
    }

    /// Passes on what the terminal takes. Fails when it never will again; the input is gone then.
    pub(crate) fn pass_input(&mut self, memory: &mut Permit) -> io::Result<()> {
        let result = self.write_input();
        memory.resize(self.input.len().saturating_sub(SMALL_INPUT));
        result
    }

    fn write_input(&mut self) -> io::Result<()> {
        while !self.input.is_empty() {
            match self.pty.write(self.input.as_slices().0) {
                Ok(n) => drop(self.input.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => {
                    self.input = VecDeque::new();
                    return Err(e);
                }
            }
        }
        // A pasted megabyte shouldn't cost memory for ever.
        self.input.shrink_to(SMALL_INPUT);
        Ok(())
    }

    /// Fills `place` as far as there is output; returns the number of bytes and what to expect then.
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
