//! The status document: durations in seconds, sizes in bytes, "in" is to the device. docs/operations.md describes each
//! field.

use std::time::Instant;

// Not serde: its derived code makes a release build for x86_64 40 KiB larger.
use miniserde::{Deserialize, Serialize};

use crate::config::Auth;
use crate::proto::{FILE_TRANSFER, PORT_FORWARD, SHELL, clipped};
use crate::session::stats::{Figures, Info, seconds};
use crate::session::{Device, MAX_SHELLS};

/// Forwards listed, over all sessions.
const MAX_FORWARDS: usize = 1024;

/// A daemon of another version may write it: fields added later are `Option`s.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) connection: Connection,
    pub(crate) pid: u32,
    pub(crate) sessions: Vec<Session>,
    pub(crate) shells: Shells,
    pub(crate) token: Token,
    pub(crate) transferred: Transferred,
    pub(crate) uptime: f64,
    pub(crate) version: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Connection {
    pub(crate) failed_attempts: u64,
    pub(crate) r#for: f64,
    pub(crate) last_error: Option<String>,
    pub(crate) last_error_age: Option<f64>,
    pub(crate) next_attempt_in: Option<f64>,
    pub(crate) server: Option<String>,
    pub(crate) state: State,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Token {
    pub(crate) length: Option<usize>,
    pub(crate) source: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Shells {
    pub(crate) max: usize,
    pub(crate) running: usize,
}

/// Files since the daemon's start. The limits apply to the averages.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Transferred {
    pub(crate) average_in: f64,
    pub(crate) average_out: f64,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Session {
    pub(crate) age: f64,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
    /// Time without a client.
    pub(crate) detached: Option<f64>,
    pub(crate) forwards: Vec<Forward>,
    /// Including those not listed.
    pub(crate) forwards_open: usize,
    pub(crate) id: String,
    pub(crate) idle: f64,
    pub(crate) kinds: Vec<String>,
    pub(crate) shell: Option<Shell>,
    /// At most one.
    pub(crate) transfers: Vec<Transfer>,
    pub(crate) user: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Shell {
    pub(crate) age: f64,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
    pub(crate) idle: f64,
    pub(crate) pid: i32,
    pub(crate) user: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Transfer {
    pub(crate) age: f64,
    pub(crate) bytes: u64,
    pub(crate) direction: String,
    pub(crate) path: String,
    pub(crate) size: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Forward {
    pub(crate) address: Option<String>,
    pub(crate) age: f64,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
    pub(crate) idle: f64,
    pub(crate) protocol: String,
    pub(crate) target: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum State {
    /// The authentication manager will announce a token.
    #[serde(rename = "unauthorized")]
    Unauthorized,
    #[serde(rename = "waiting")]
    Waiting,
    /// The manager was asked for the token of the next attempt.
    #[serde(rename = "asking")]
    Asking,
    #[serde(rename = "connecting")]
    Dialling,
    #[serde(rename = "connected")]
    Connected,
    #[serde(rename = "stopping")]
    Stopping,
}

impl State {
    /// As in the document.
    pub(crate) fn name(self) -> String {
        miniserde::json::to_string(&self).trim_matches('"').to_owned()
    }
}

impl Status {
    pub(crate) fn new(
        connection: Connection,
        token_length: Option<usize>,
        uptime: f64,
        device: &Device,
        now: Instant,
    ) -> Self {
        let mut room = MAX_FORWARDS;
        let source = if device.config().auth == Auth::Dbus { "dbus" } else { "file" };
        let attached = device.sessions().into_iter().map(|info| (info, None));
        let detached = device.shells.kept().into_iter().map(|kept| (kept.info, Some(kept.since)));
        let sessions = attached.chain(detached).map(|(info, since)| {
            let detached = since.map(|since| seconds(since, now));
            Session { detached, ..Session::new(&info, &mut room, now) }
        });
        let [sent, received] = device.transferred.figures(now);
        Status {
            connection,
            pid: std::process::id(),
            sessions: sessions.collect(),
            shells: Shells { max: MAX_SHELLS, running: device.shells.running() },
            token: Token { length: token_length, source: source.to_owned() },
            transferred: Transferred {
                average_in: received.average,
                average_out: sent.average,
                bytes_in: received.total,
                bytes_out: sent.total,
            },
            uptime,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

impl Session {
    /// Lists at most `room` forwards, and subtracts their number.
    fn new(info: &Info, room: &mut usize, now: Instant) -> Self {
        let shell = info.shell().map(|shell| {
            let Figures { age, idle, bytes_in, bytes_out } = shell.traffic.figures(now);
            Shell { age, bytes_in, bytes_out, idle, pid: shell.pid, user: shell.user.as_str().to_owned() }
        });
        let transfer = info.transfer().map(|transfer| {
            let Figures { age, bytes_in, bytes_out, .. } = transfer.traffic.figures(now);
            let direction = transfer.direction.name().to_owned();
            let path = transfer.path.to_string_lossy().into_owned();
            Transfer { age, bytes: bytes_in + bytes_out, direction, path, size: transfer.size }
        });
        let (forwards_open, forwards) = info.forwards(*room);
        *room -= forwards.len();
        let forwards = forwards.iter().map(|forward| {
            let Figures { age, idle, bytes_in, bytes_out } = forward.traffic.figures(now);
            let address = forward.address.get().map(ToString::to_string);
            let protocol = forward.target.transport.name().to_owned();
            let target = format!("{}:{}", clipped(&forward.target.host), forward.target.port);
            Forward { address, age, bytes_in, bytes_out, idle, protocol, target }
        });
        let kinds = [(SHELL, "terminal"), (FILE_TRANSFER, "files"), (PORT_FORWARD, "forwards")];
        let kinds = kinds.into_iter().filter(|(protocol, _)| info.spoke(*protocol));
        let Figures { age, idle, bytes_in, bytes_out } = info.traffic.figures(now);
        Session {
            age,
            bytes_in,
            bytes_out,
            detached: None,
            forwards: forwards.collect(),
            forwards_open,
            id: info.id.as_str().to_owned(),
            idle,
            kinds: kinds.map(|(_, kind)| kind.to_owned()).collect(),
            shell,
            transfers: transfer.into_iter().collect(),
            user: info.user.as_str().to_owned(),
        }
    }
}
