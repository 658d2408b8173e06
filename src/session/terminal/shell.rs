//! A shell's process, its terminal, and the input that waits for it.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::io;

use crate::config::Config;
use crate::permits::Permit;
use crate::proto::UserId;
use crate::session::peer::Peer;
use crate::session::store::Place;
use crate::sys::process::SessionLeader;
use crate::sys::pty::{Pty, WindowSize};
use crate::sys::users::{self, User};
use crate::sys::{reason, trim};

const MAX_INPUT: usize = 1 << 20;
/// Bytes of input without a permit: what is typed by hand.
pub(super) const SMALL_INPUT: usize = 4096;

/// Debian, systemd.
const LOCALES: [&str; 2] = ["/etc/default/locale", "/etc/locale.conf"];
/// For shells that are not login shells: those read theirs from the system's profile.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(crate) struct Shell {
    pub(crate) process: SessionLeader,
    pub(crate) pty: Pty,
    pub(crate) size: WindowSize,
    pub(crate) input: VecDeque<u8>,
    /// Keeps the terminal when the agent ends.
    pub(crate) place: Option<Place>,
    pub(super) memory: Permit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    More,
    Wait,
    End,
}

impl Shell {
    /// Starts the configured shell for the user `of`. It outlives this agent if the device's store keeps it. The error
    /// follows "failed to start shell: ".
    pub(crate) fn start(peer: &Peer, of: &UserId, size: WindowSize) -> Result<Self, String> {
        let config = peer.device.config();
        let Config { shell, arguments, no_new_privileges: confined, user, .. } = &*config;
        let is_root = nix::unistd::geteuid().is_root();
        // Only root can set groups.
        let user = if is_root { &users::current(user).map_err(|e| e.to_string())? } else { user };
        let (pty, tty) = Pty::open(size, is_root.then_some(user.uid)).map_err(|e| reason(&e))?;
        let keeps = !config.keep_detached.is_zero() && !of.as_str().is_empty();
        let place = peer.device.store.as_ref().filter(|_| keeps).and_then(|store| store.keep(&pty));
        let environment = environment(&config, user, peer.id.as_str(), of.as_str());
        let outlives = place.is_some();
        let process = SessionLeader::spawn(shell, arguments, user, *confined, environment, outlives, tty)
            .map_err(|e| format!("fork/exec {}: {}", shell.display(), reason(&e)))?;
        Ok(Shell { process, pty, size, input: VecDeque::new(), place, memory: peer.share.memory.none() })
    }

    /// Types all of `bytes`, or nothing if too much waits.
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

    /// Fails if nobody can read the terminal any more; the input is dropped.
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
        // A pasted megabyte must not cost memory for ever.
        trim(&mut self.input, SMALL_INPUT);
        self.memory.resize(self.input.len().saturating_sub(SMALL_INPUT));
        result
    }

    /// For a terminal that nobody has open: while input waits, poll(2) reports the hang-up all the time, and write(2) may
    /// say EAGAIN.
    pub(crate) fn drop_input(&mut self) {
        self.input = VecDeque::new();
        self.memory.resize(0);
    }

    /// Fills `place` as far as there is output. Returns the number of bytes.
    pub(crate) fn read_output(&self, place: &mut [u8]) -> (usize, Then) {
        let mut filled = 0;
        let then = loop {
            if filled == place.len() {
                break Then::More;
            }
            match self.pty.read(&mut place[filled..]) {
                Ok(n @ 1..) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break Then::Wait,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => break Then::End,
            }
        };
        (filled, then)
    }
}

fn environment(config: &Config, user: &User, session: &str, of: &str) -> Vec<(String, OsString)> {
    let name = || Some(user.name.clone().into());
    // An id may hold a NUL, a variable can't.
    let id = |id: &str| Some(id.into()).filter(|_| !id.is_empty() && !id.contains('\0'));
    let is_login = config.arguments.iter().any(|argument| is_login_option(argument));
    let variables = [
        ("HOME", Some(user.home.clone().into())),
        ("TERM", Some("xterm-256color".into())),
        ("USER", name()),
        ("LOGNAME", name()),
        ("SHELL", Some(config.shell.clone().into())),
        ("LANG", LOCALES.into_iter().find_map(|file| lang(&fs::read_to_string(file).ok()?))),
        ("PATH", Some(PATH.into()).filter(|_| !is_login)),
        ("MENDER_SESSION_ID", id(session)),
        ("MENDER_USER_ID", id(of)),
    ];
    let variables = variables.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    variables.chain(config.environment.iter().map(|(name, value)| (name.clone(), value.into()))).collect()
}

fn is_login_option(argument: &str) -> bool {
    let letters = argument.strip_prefix('-').filter(|rest| !rest.starts_with('-'));
    argument == "--login" || letters.is_some_and(|letters| letters.contains('l'))
}

/// LANG in a file of shell assignments, which may be quoted.
fn lang(file: &str) -> Option<OsString> {
    let mut values = file.lines().filter_map(|line| line.trim().strip_prefix("LANG="));
    let value = values.next_back()?.trim().trim_matches(['"', '\'']);
    Some(value.into()).filter(|_| !value.is_empty() && !value.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_locale_is_read_as_shells_read_it() {
        for (file, expected) in [
            ("LANG=C.UTF-8\n", Some("C.UTF-8")),
            ("# LANG=x\nLC_TIME=de_DE\n LANG=\"de_DE.UTF-8\"\nLANGUAGE=de\n", Some("de_DE.UTF-8")),
            ("LANG=a\nLANG='b'", Some("b")),
            ("LANG=\n", None),
            ("", None),
        ] {
            assert_eq!(lang(file), expected.map(Into::into), "{file:?}");
        }
    }

    #[test]
    fn options_of_a_login_shell() {
        for (argument, expected) in [
            ("--login", true),
            ("-l", true),
            ("-il", true),
            ("-i", false),
            ("--posix-l", false),
            ("ls -l", false),
        ] {
            assert_eq!(is_login_option(argument), expected, "{argument}");
        }
    }
}
