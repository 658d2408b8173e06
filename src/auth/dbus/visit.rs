//! The authentication manager as [`Manager`](super::Manager) asks it, one question after the other, for one who can
//! wait for the answers.

use std::sync::Arc;

use dbus::Message;
use dbus::channel::Channel;

use super::{ANSWER_LIMIT, BUS, BUS_PATH, Bus, INTERFACE, MANAGER, PATH, describe};
use crate::auth::Credentials;
use crate::sys::reason;
use crate::sys::wake::Wake;
use crate::sys::wipe::wipe_texts;

/// A connection to the bus.
pub(crate) struct Visit {
    channel: Channel,
}

/// Why there is no token.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The bus's policy doesn't let us ask.
    Denied(String),
    /// Nobody has the manager's name.
    Absent(String),
    /// No answer came in time.
    Silent,
    /// Anything else.
    Failed(String),
}

impl Visit {
    /// Connects to the system bus, and says hello.
    ///
    /// # Errors
    /// What libdbus says.
    pub(crate) fn begin() -> Result<Self, String> {
        let bus = Wake::new().and_then(|wake| Bus::connect(&Arc::new(wake))).map_err(|e| reason(&e))?;
        let Bus::Connecting(answer) = bus else { return Err(String::new()) };
        match answer.recv_timeout(ANSWER_LIMIT) {
            Ok(Ok(channel)) => Ok(Visit { channel }),
            Ok(Err(e)) => Err(describe(&e)),
            Err(_) => Err(format!("no answer within {} s", ANSWER_LIMIT.as_secs())),
        }
    }

    /// Our name on the bus.
    pub(crate) fn name(&self) -> &str {
        self.channel.unique_name().unwrap_or_default()
    }

    /// Who has the manager's name.
    pub(crate) fn owner(&self) -> Option<String> {
        self.ask_bus("GetNameOwner", &[MANAGER])?.get1()
    }

    /// Whether the bus starts the manager when it is called.
    pub(crate) fn can_start_manager(&self) -> bool {
        let names = self.ask_bus("ListActivatableNames", &[]).and_then(|answer| answer.get1::<Vec<String>>());
        names.is_some_and(|names| names.iter().any(|name| name == MANAGER))
    }

    fn ask_bus(&self, method: &str, arguments: &[&str]) -> Option<Message> {
        let mut message = Message::new_method_call(BUS, BUS_PATH, BUS, method).ok()?;
        for argument in arguments {
            message = message.append1(argument);
        }
        self.channel.send_with_reply_and_block(message, ANSWER_LIMIT).ok()
    }

    /// Asks the manager for the token. With no credentials, whether it was the token that was missing.
    ///
    /// # Errors
    /// Why there is no answer.
    pub(crate) fn token(&self) -> Result<Result<Credentials, bool>, Refusal> {
        let message =
            Message::new_method_call(MANAGER, PATH, INTERFACE, "GetJwtToken").map_err(Refusal::Failed)?;
        let mut answer =
            self.channel.send_with_reply_and_block(message, ANSWER_LIMIT).map_err(|e| {
                match e.name().and_then(|name| name.strip_prefix("org.freedesktop.DBus.Error.")) {
                    Some("AccessDenied") => Refusal::Denied(describe(&e)),
                    Some("ServiceUnknown" | "NameHasNoOwner") => Refusal::Absent(describe(&e)),
                    Some("NoReply" | "Timeout" | "TimedOut") => Refusal::Silent,
                    _ => Refusal::Failed(describe(&e)),
                }
            })?;
        let credentials = match answer.read2::<&str, &str>() {
            Ok((token, url)) => Ok(Credentials::new(token, url).ok_or(token.is_empty())),
            Err(e) => Err(Refusal::Failed(format!("unexpected types: {e}"))),
        };
        wipe_texts(&mut answer);
        credentials
    }
}
