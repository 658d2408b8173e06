//! Credentials: a token, and the server that accepts it.

#[cfg(feature = "dbus")]
mod dbus;
mod token_file;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;

use crate::config;
use crate::sys::PollSet;
use crate::sys::wake::Wake;

#[cfg(feature = "dbus")]
pub(crate) use dbus::{ANSWER_LIMIT, Manager};
use token_file::TokenFile;
pub(crate) use token_file::look_into;

/// A JSON web token. Debug shows only its length.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Token(String);

impl Token {
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({} bytes)", self.0.len())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Credentials {
    pub(crate) token: Token,
    /// Usually mender-auth's forwarder on this device.
    pub(crate) server_url: String,
}

impl Credentials {
    /// `None` if either is empty: the device is not authorised.
    pub(crate) fn new(token: &str, server_url: &str) -> Option<Self> {
        // Such as the line feed of a script's `echo`, which Go's HTTP client drops, too.
        let (token, server_url) = (token.trim(), server_url.trim());
        let there = !token.is_empty() && !server_url.is_empty();
        there.then(|| Credentials { token: Token(token.to_owned()), server_url: server_url.to_owned() })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AuthEvent {
    Changed(Option<Credentials>),
    /// The answer to [`Source::ask`].
    Answered(Result<Option<Credentials>, Refusal>),
}

#[cfg_attr(not(feature = "dbus"), allow(dead_code, reason = "a file always answers"))]
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub(crate) enum Refusal {
    /// By the policy of the bus.
    Denied(String),
    /// Nobody owns the name of the manager, and the bus cannot start it.
    Absent(String),
    Silent(String),
    Failed(String),
}

/// Used by the supervisor, which it never blocks.
pub(crate) trait Source {
    fn watch<'a>(&'a self, set: &mut PollSet<'a>);

    /// Call it after an event on the descriptor, after a wake-up and at the deadline. Fails only until the source is up
    /// for the first time.
    fn process(&mut self, now: Instant) -> io::Result<Vec<AuthEvent>>;

    /// [`AuthEvent::Answered`] follows.
    fn ask(&mut self, now: Instant);

    /// Fetches a new token from the server, unless that happened recently.
    fn fetch(&mut self, now: Instant);
}

/// Notifies `wake` when `process` is due for another reason than descriptor and deadline. A `required` source fails if
/// its bus is missing at first; otherwise it waits.
pub(crate) fn source(auth: &config::Auth, wake: &Arc<Wake>, required: bool) -> io::Result<Box<dyn Source>> {
    match auth {
        config::Auth::File { token, server_url } => Ok(Box::new(TokenFile::new(token, server_url))),
        #[cfg(feature = "dbus")]
        config::Auth::Dbus => Ok(Box::new(dbus::Manager::new(Arc::clone(wake), required))),
        #[cfg(not(feature = "dbus"))]
        config::Auth::Dbus => {
            let _ = (wake, required);
            let why = "built without D-Bus, a token can only come from a file: Auth.Source must be \"file\"";
            Err(io::Error::other(why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_needed_and_the_token_is_not_shown() {
        assert_eq!(Credentials::new("", "http://x"), None);
        assert_eq!(Credentials::new("secret", ""), None);
        let shown = format!("{:?}", Credentials::new("secret", "http://x"));
        assert!(shown.contains("Token(6 bytes)") && !shown.contains("secret"), "{shown}");
    }
}
