//! What lets the device in: a token and the server to show it to, from a [`Source`].

#[cfg(feature = "dbus")]
mod dbus;
mod file;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use nix::poll::PollFlags;
use thiserror::Error;

use crate::config;
use crate::sys::wake::Wake;

#[cfg(feature = "dbus")]
pub(crate) use dbus::visit::{Refusal, Visit};
pub(crate) use file::look_into;

/// A device's JSON web token. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Token(String);

impl Token {
    /// For the one header that carries it.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }

    /// Its length in bytes, all that a log may say of it.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({} bytes)", self.len())
    }
}

/// A token and where it counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Credentials {
    /// The token.
    pub(crate) token: Token,
    /// The server's URL, usually that of mender-auth's forwarder on this machine.
    pub(crate) server_url: String,
}

impl Credentials {
    /// `None` when either is empty: the device isn't authorised.
    pub(crate) fn new(token: &str, server_url: &str) -> Option<Self> {
        let there = !token.is_empty() && !server_url.is_empty();
        there.then(|| Credentials { token: Token(token.to_owned()), server_url: server_url.to_owned() })
    }

    /// The server's URL as it may be logged: without user and password.
    pub(crate) fn shown_server_url(&self) -> String {
        config::without_password(&self.server_url)
    }
}

/// What a source lets know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AuthEvent {
    /// The source says on its own account what holds from now on.
    Announced(Option<Credentials>),
    /// The source's answer to our question.
    Answered(Option<Credentials>),
    /// The question found no answer, for this reason.
    #[cfg_attr(not(feature = "dbus"), allow(dead_code, reason = "a file always answers"))]
    Unanswered(String),
}

/// Where credentials come from. Lives in the supervisor's thread and never blocks it.
pub(crate) trait Source {
    /// The descriptor to poll, and for what.
    fn watch(&self) -> Option<(BorrowedFd<'_>, PollFlags)>;

    /// When [`Source::process`] wants to be called though nothing happened.
    fn deadline(&self) -> Option<Instant>;

    /// Does what is to be done now and tells what became known. To be called when something happened on
    /// the descriptor, after a wake-up and at the deadline.
    ///
    /// # Errors
    /// Only before the source was there for the first time.
    fn process(&mut self, now: Instant) -> Result<Vec<AuthEvent>, SourceError>;

    /// Asks for the token. The answer comes as [`AuthEvent::Answered`] or [`AuthEvent::Unanswered`] in time.
    fn ask(&mut self, now: Instant);

    /// Asks for a new token from the server, unless that was asked a short while ago.
    fn fetch(&mut self, now: Instant);
}

/// Why there is no source.
#[derive(Debug, Error)]
pub(crate) enum SourceError {
    /// There is no bus, or it doesn't let us in.
    #[error("mender-connect dbus failed to connect, error: {0}")]
    #[cfg(feature = "dbus")]
    Bus(String),
    /// No thread to connect with.
    #[error("mender-connect dbus failed to connect, error: {}", crate::sys::reason(.0))]
    Thread(#[from] io::Error),
    /// The authentication manager is asked for, which takes D-Bus.
    #[error("built without D-Bus, a token can only come from a file: Auth.Source must be \"file\"")]
    #[cfg(not(feature = "dbus"))]
    LeftOut,
}

/// The source of this device. `wake` is called when there is something to process beside the descriptor and the
/// deadline. Unless it's `required`, a bus that isn't there at first is waited for, as it is later.
///
/// # Errors
/// When there can't be one.
pub(crate) fn source(
    auth: &config::Auth,
    wake: &Arc<Wake>,
    required: bool,
) -> Result<Box<dyn Source>, SourceError> {
    match auth {
        config::Auth::File { token, server_url } => Ok(Box::new(file::TokenFile::new(token, server_url))),
        config::Auth::Dbus => manager(wake, required),
    }
}

#[cfg(feature = "dbus")]
fn manager(wake: &Arc<Wake>, required: bool) -> Result<Box<dyn Source>, SourceError> {
    Ok(Box::new(dbus::Manager::connect(Arc::clone(wake), required)?))
}

#[cfg(not(feature = "dbus"))]
fn manager(_: &Arc<Wake>, _: bool) -> Result<Box<dyn Source>, SourceError> {
    Err(SourceError::LeftOut)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_needed_and_the_token_is_not_shown() {
        assert_eq!(Credentials::new("", "http://x"), None);
        assert_eq!(Credentials::new("secret", ""), None);
        let shown = format!("{:?}", Credentials::new("secret", "http://x"));
        let url = |url| Credentials::new("t", url).unwrap().shown_server_url();
        assert_eq!(url("https://a:b@host:1/p@th"), "https://host:1/p@th");
        assert_eq!(url("http://localhost:5000"), "http://localhost:5000");
        assert!(shown.contains("Token(6 bytes)") && !shown.contains("secret"), "{shown}");
    }
}
