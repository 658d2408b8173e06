//! The daemon's state, as JSON in one line: durations in seconds, sizes in bytes, "in" is to the device.
//! The README describes each field.

use std::time::Instant;

use serde_json::{Map, Value};

use crate::config::Auth;
use crate::proto::forward::Target;
use crate::proto::{FILE_TRANSFER, MAX_TEXT, PORT_FORWARD, SHELL, SessionId, clipped};
use crate::session::stats::{Figures, Info};
use crate::session::{Device, Direction, MAX_SHELLS};

/// Forwards listed, of all sessions together.
const MAX_FORWARDS: usize = 1024;

/// A part of the document. A daemon of another version may have written it: unknown fields are ignored, and those that
/// are missing or of another type read as their default.
// Not serde's traits: what they derive for these types makes a release build for x86_64 40 KiB larger.
pub(crate) trait Part: Sized {
    fn to_json(&self) -> Value;
    fn from_json(json: &Value) -> Option<Self>;
}

impl<T: Part> Part for Option<T> {
    fn to_json(&self) -> Value {
        self.as_ref().map_or(Value::Null, T::to_json)
    }

    fn from_json(json: &Value) -> Option<Self> {
        Some(T::from_json(json))
    }
}

impl<T: Part> Part for Vec<T> {
    fn to_json(&self) -> Value {
        self.iter().map(T::to_json).collect()
    }

    fn from_json(json: &Value) -> Option<Self> {
        Some(json.as_array()?.iter().filter_map(T::from_json).collect())
    }
}

macro_rules! values {
    ($($type:ty: $read:ident,)*) => { $(
        impl Part for $type {
            fn to_json(&self) -> Value {
                self.to_owned().into()
            }

            fn from_json(json: &Value) -> Option<Self> {
                json.$read().map(Into::into)
            }
        }
    )* };
}

values! { u64: as_u64, i64: as_i64, f64: as_f64, String: as_str, }

fn key(field: &str) -> &str {
    field.strip_prefix("r#").unwrap_or(field)
}

fn insert(fields: &mut Map<String, Value>, field: &str, value: Value) {
    fields.insert(key(field).to_owned(), value);
}

fn find<T: Part>(fields: &Map<String, Value>, field: &str) -> Option<T> {
    fields.get(key(field)).and_then(T::from_json)
}

macro_rules! objects {
    ($($(#[$doc:meta])* struct $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => { $(
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(crate) struct $name { $($(#[$field_doc])* pub(crate) $field: $type,)* }

        impl Part for $name {
            fn to_json(&self) -> Value {
                let mut fields = Map::new();
                $(insert(&mut fields, stringify!($field), self.$field.to_json());)*
                Value::Object(fields)
            }

            fn from_json(json: &Value) -> Option<Self> {
                let fields = json.as_object()?;
                Some($name { $($field: find(fields, stringify!($field)).unwrap_or_default(),)* })
            }
        }
    )* };
}

objects! {
    struct Status {
        connection: Connection,
        pid: u64,
        sessions: Vec<Session>,
        shells: Shells,
        token: Token,
        transferred: Transferred,
        uptime: f64,
        version: String,
    }

    struct Connection {
        failed_attempts: u64,
        r#for: f64,
        last_error: Option<String>,
        last_error_age: Option<f64>,
        next_attempt_in: Option<f64>,
        server: Option<String>,
        state: Option<State>,
    }

    struct Token {
        length: Option<u64>,
        source: String,
    }

    struct Shells {
        max: u64,
        running: u64,
    }

    /// All files since the daemon's start. The averages are what the limits are about.
    struct Transferred {
        average_in: f64,
        average_out: f64,
        bytes_in: u64,
        bytes_out: u64,
    }

    struct Session {
        age: f64,
        bytes_in: u64,
        bytes_out: u64,
        forwards: Vec<Forward>,
        /// Including those not listed.
        forwards_open: u64,
        id: String,
        idle: f64,
        kinds: Vec<String>,
        shell: Option<Shell>,
        /// At most one.
        transfers: Vec<Transfer>,
        user: String,
    }

    struct Shell {
        age: f64,
        bytes_in: u64,
        bytes_out: u64,
        idle: f64,
        pid: i64,
        user: String,
    }

    struct Transfer {
        age: f64,
        bytes: u64,
        direction: String,
        path: String,
        size: Option<u64>,
    }

    struct Forward {
        address: Option<String>,
        age: f64,
        bytes_in: u64,
        bytes_out: u64,
        idle: f64,
        protocol: String,
        target: String,
    }
}

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
}

impl Part for State {
    fn to_json(&self) -> Value {
        self.name().into()
    }

    fn from_json(json: &Value) -> Option<Self> {
        State::NAMES.iter().find(|(_, name)| json == *name).map(|(state, _)| *state)
    }
}

impl Status {
    /// The daemon's own part, and what the device's sessions do.
    pub(crate) fn new(
        connection: Connection,
        token_length: Option<u64>,
        uptime: f64,
        device: &Device,
        now: Instant,
    ) -> Self {
        let mut room = MAX_FORWARDS;
        let source = match device.config().auth {
            Auth::Dbus => "dbus",
            Auth::File { .. } => "file",
        };
        let sessions = device.sessions();
        let received = device.transferred.figures(Direction::Received, now);
        let sent = device.transferred.figures(Direction::Sent, now);
        Status {
            connection,
            pid: std::process::id().into(),
            sessions: sessions.iter().map(|(id, info)| Session::new(id, info, &mut room, now)).collect(),
            shells: Shells { max: MAX_SHELLS as u64, running: device.shells.running() as u64 },
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
    /// Lists at most `room` forwards and takes their number off `room`.
    fn new(id: &SessionId, info: &Info, room: &mut usize, now: Instant) -> Self {
        let shell = info.shell().map(|shell| {
            let Figures { age, idle, bytes_in, bytes_out } = shell.traffic.figures(now);
            Shell {
                age,
                bytes_in,
                bytes_out,
                idle,
                pid: shell.pid.into(),
                user: shell.user.as_str().to_owned(),
            }
        });
        let transfer = info.transfer().map(|transfer| {
            let Figures { age, bytes_in, bytes_out, .. } = transfer.traffic.figures(now);
            let direction = if transfer.direction == Direction::Sent { "download" } else { "upload" };
            let (direction, path) = (direction.to_owned(), transfer.path.clone());
            Transfer { age, bytes: bytes_in + bytes_out, direction, path, size: transfer.size }
        });
        let (forwards_open, forwards) = info.forwards(*room);
        *room -= forwards.len();
        let forwards = forwards.iter().map(|forward| {
            let Figures { age, idle, bytes_in, bytes_out } = forward.traffic.figures(now);
            let Target { host, port, transport } = &forward.target;
            let address = forward.address.get().map(ToString::to_string);
            let target = format!("{}:{port}", clipped(host, MAX_TEXT));
            Forward { address, age, bytes_in, bytes_out, idle, protocol: transport.name().to_owned(), target }
        });
        let kinds = [(SHELL, "terminal"), (FILE_TRANSFER, "files"), (PORT_FORWARD, "forwards")];
        let kinds = kinds.into_iter().filter(|(protocol, _)| info.spoke(*protocol));
        let Figures { age, idle, bytes_in, bytes_out } = info.traffic.figures(now);
        Session {
            age,
            bytes_in,
            bytes_out,
            forwards: forwards.collect(),
            forwards_open: forwards_open as u64,
            id: id.as_str().to_owned(),
            idle,
            kinds: kinds.map(|(_, kind)| kind.to_owned()).collect(),
            shell,
            transfers: transfer.into_iter().collect(),
            user: info.user.as_str().to_owned(),
        }
    }
}
