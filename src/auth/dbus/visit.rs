//! A blocking client of the authentication manager for doctor. It sends the calls that [`Manager`](super::Manager)
//! sends.

use std::sync::Arc;

use dbus::Message;
use dbus::channel::Channel;

use super::{ANSWER_LIMIT, BUS, BUS_PATH, Bus, INTERFACE, MANAGER, PATH, describe};
use crate::auth::Credentials;
use crate::sys::reason;
use crate::sys::wake::Wake;
use crate::sys::wipe::wipe_texts;

/// A blocking connection to the bus, for doctor.
pub(crate) struct Visit {
    channel: Channel,
}

#[derive(Debug)]
pub(crate) enum Refusal {
    /// The bus's policy denies the call.
    Denied(String),
    /// Nobody owns the manager's name.
    Absent(String),
    /// No answer in time.
    Silent,
    Failed(String),
}

impl Visit {
    /// Connects to the system bus and says hello.
    pub(crate) fn begin() -> Result<Self, String> {
        let bus = Wake::new().and_then(|wake| Bus::connect(&Arc::new(wake))).map_err(|e| reason(&e))?;
        let Bus::Connecting(answer) = bus else { return Err(String::new()) };
        match answer.recv_timeout(ANSWER_LIMIT) {
            Ok(Ok(channel)) => Ok(Visit { channel }),
            Ok(Err(e)) => Err(describe(&e)),
            Err(_) => Err(format!("no answer within {} s", ANSWER_LIMIT.as_secs())),
        }
    }

    /// Our unique name on the bus.
    pub(crate) fn name(&self) -> &str {
        self.channel.unique_name().unwrap_or_default()
    }

    /// The unique name of the manager's owner.
    pub(crate) fn owner(&self) -> Option<String> {
        self.ask_bus("GetNameOwner", &[MANAGER])?.get1()
    }

    /// D-Bus activation starts the manager when it is called.
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

    /// Asks the manager for the token. `Err(true)` inside if it answers without a token, `Err(false)` if without a
    /// URL.
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
