//! The daemon's state, as JSON in one line: durations in seconds, sizes in bytes, "in" is to the device.
//! The README describes each field.

use std::time::Instant;

use serde_json::{Value, json};

use crate::config::Auth;
use crate::proto::{FILE_TRANSFER, MAX_TEXT, PORT_FORWARD, SHELL, SessionId, clipped};
use crate::session::stats::{Figures, Info, Traffic};
use crate::session::{Device, Direction, MAX_SHELLS};

/// Forwards listed, of all sessions together.
const MAX_FORWARDS: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// There is no token; the authentication manager will announce one.
    Unauthorized,
    /// The next attempt's time has not come.
    Waiting,
    /// The manager was asked for the next attempt's token.
    Asking,
    Dialling,
    Connected,
    Stopping,
}

impl State {
    const NAMES: [(State, &'static str); 6] = [
        (State::Unauthorized, "unauthorized"),
        (State::Waiting, "waiting"),
        (State::Asking, "asking"),
        (State::Dialling, "connecting"),
        (State::Connected, "connected"),
        (State::Stopping, "stopping"),
    ];

    pub(crate) fn name(self) -> &'static str {
        State::NAMES.iter().find(|(state, _)| *state == self).map_or("", |(_, name)| name)
    }

    /// `None` if the daemon is of another version, and in a state that this one doesn't know.
    pub(crate) fn of(status: &Value) -> Option<State> {
        let found = &status["connection"]["state"];
        State::NAMES.iter().find(|(_, name)| found == name).map(|(state, _)| *state)
    }
}

/// The supervisor's part, and what the device's sessions do.
// Not serde's traits for structs: what they derive makes a release build for x86_64 40 KiB larger.
pub(crate) fn document(
    connection: Value,
    token_length: Option<usize>,
    uptime: f64,
    device: &Device,
    now: Instant,
) -> Value {
    let mut room = MAX_FORWARDS;
    let source = if device.config().auth == Auth::Dbus { "dbus" } else { "file" };
    let sessions = device.sessions();
    let received = device.transferred.figures(Direction::Received, now);
    let sent = device.transferred.figures(Direction::Sent, now);
    json!({
        "connection": connection,
        "pid": std::process::id(),
        "sessions": sessions.iter().map(|(id, info)| session(id, info, &mut room, now)).collect::<Value>(),
        "shells": { "max": MAX_SHELLS, "running": device.shells.running() },
        "token": { "length": token_length, "source": source },
        // All files since the daemon's start. The averages are what the limits are about.
        "transferred": {
            "average_in": received.average,
            "average_out": sent.average,
            "bytes_in": received.total,
            "bytes_out": sent.total,
        },
        "uptime": uptime,
        "version": env!("CARGO_PKG_VERSION"),
    })
}

/// Lists at most `room` forwards and takes their number off `room`.
fn session(id: &SessionId, info: &Info, room: &mut usize, now: Instant) -> Value {
    let shell = info.shell().map(|shell| {
        let fields = json!({ "pid": shell.pid, "user": shell.user.as_str() });
        with_figures(fields, &shell.traffic, now)
    });
    let transfer = info.transfer().map(|transfer| {
        let Figures { age, bytes_in, bytes_out, .. } = transfer.traffic.figures(now);
        let direction = if transfer.direction == Direction::Sent { "download" } else { "upload" };
        let (path, size) = (&transfer.path, transfer.size);
        json!({ "age": age, "bytes": bytes_in + bytes_out, "direction": direction, "path": path, "size": size })
    });
    let (forwards_open, forwards) = info.forwards(*room);
    *room -= forwards.len();
    let forwards = forwards.iter().map(|forward| {
        let fields = json!({
            "address": forward.address.get().map(ToString::to_string),
            "protocol": forward.target.transport.name(),
            "target": format!("{}:{}", clipped(&forward.target.host, MAX_TEXT), forward.target.port),
        });
        with_figures(fields, &forward.traffic, now)
    });
    let kinds = [(SHELL, "terminal"), (FILE_TRANSFER, "files"), (PORT_FORWARD, "forwards")];
    let kinds = kinds.into_iter().filter(|(protocol, _)| info.spoke(*protocol));
    let fields = json!({
        "forwards": forwards.collect::<Value>(),
        // Including those not listed.
        "forwards_open": forwards_open,
        "id": id.as_str(),
        "kinds": kinds.map(|(_, kind)| kind).collect::<Value>(),
        "shell": shell,
        "transfers": transfer.into_iter().collect::<Value>(),
        "user": info.user.as_str(),
    });
    with_figures(fields, &info.traffic, now)
}

fn with_figures(mut fields: Value, traffic: &Traffic, now: Instant) -> Value {
    let Figures { age, idle, bytes_in, bytes_out } = traffic.figures(now);
    (fields["age"], fields["idle"]) = (age.into(), idle.into());
    (fields["bytes_in"], fields["bytes_out"]) = (bytes_in.into(), bytes_out.into());
    fields
}
