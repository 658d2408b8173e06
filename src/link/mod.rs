//! One websocket's life: dial, read until it ends, say how it ended.
//!
//! A link has two threads. The first dials and then becomes the reader; it blocks in read and hands
//! each frame on without waiting. The second, the writer, starts when the websocket is open and is the
//! only one that writes to it.

mod dial;
mod endpoint;
mod http;
mod pace;
mod proxy;
mod reader;
mod stream;
#[cfg(feature = "tls")]
mod tls;
#[cfg(not(feature = "tls"))]
#[path = "no_tls.rs"]
mod tls;
mod trial;
mod writer;

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use log::debug;
use thiserror::Error;

use crate::auth::Credentials;
use crate::outbox::Outbox;
use crate::proto::Frame;
use crate::sys::{net, thread};

pub use dial::Progress;
pub use endpoint::{Endpoint, PATH};
pub use proxy::{PROXY_VARIABLES, ProxySettings};
#[cfg(fuzzing)]
pub use reader::read;
pub use trial::trial;

/// A link without an inbound byte for so long is dead: the peers' own measure.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// How often the server hears from us; the released one needs a ping within 60 s.
const PING_INTERVAL: Duration = Duration::from_secs(25);
/// A write without progress for so long means a dead link.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// A dial that takes longer hangs. More than its own limit, for machines that are overloaded and for trusted
/// certificates that are read from slow storage.
const DIAL_LIMIT: Duration = dial::ATTEMPT_LIMIT.saturating_mul(4);
/// How long a goodbye may take.
const FAREWELL_LIMIT: Duration = Duration::from_millis(500);
/// Gateways and proxies with a web application firewall refuse requests without one.
const USER_AGENT: &str = concat!("mender-connect/", env!("CARGO_PKG_VERSION"));
/// The largest inbound message: a pasted text comes as one, of up to 1 MiB.
const MAX_MESSAGE: usize = (1 << 20) + (1 << 10);

/// Takes the frames that come in. Must not block; dropped when the link ends.
pub trait Inbound {
    /// A frame has come.
    fn frame(&mut self, frame: Frame);

    /// No more of them have come yet.
    fn pause(&mut self);
}

/// What becomes of a link.
#[derive(Debug)]
pub enum LinkEvent {
    /// The websocket is open.
    Connected,
    /// The link has ended, or never came to be.
    Lost(LinkError),
}

/// Why there is no link (any more).
#[derive(Debug, Error)]
pub enum LinkError {
    /// The server URL can't be used.
    #[error("malformed server URL: {0}")]
    Url(String),
    /// The token can't be put into a header.
    #[error("the token has characters that no HTTP header can carry")]
    Token,
    /// The host's addresses couldn't be had.
    #[error("lookup {host}: {reason}")]
    Resolve {
        /// The name.
        host: String,
        /// The resolver's words.
        reason: String,
    },
    /// No address accepted a connection; this is the last one's reason.
    #[error("dial tcp {address}: connect: {reason}")]
    Connect {
        /// Host and port.
        address: String,
        /// The system's words.
        reason: String,
    },
    /// The proxy is misconfigured or refused.
    #[error("proxy: {0}")]
    Proxy(String),
    /// No secure connection.
    #[error("tls: {0}")]
    Tls(String, TlsFault),
    /// The server answered, but not with a websocket. Try again later.
    #[error("websocket: bad handshake: HTTP status {status}")]
    Refused {
        /// The HTTP status; 401 says that the token isn't good any more.
        status: u16,
        /// The server's wish.
        retry_after: Option<Duration>,
    },
    /// No HTTP answer came where the server's is expected.
    #[error("connection lost: {0}")]
    NoAnswer(AnswerFault),
    /// A step took too long.
    #[error("{0} timed out")]
    TimedOut(&'static str),
    /// Nothing was heard for too long.
    #[error("nothing heard from the server for {} s", SILENCE_LIMIT.as_secs())]
    Silent,
    /// The server closed the websocket.
    #[error("closed by the server: {code} {reason:?}")]
    Closed {
        /// The close code (RFC 6455, 7.4); 1005 stands for none.
        code: u16,
        /// The server's words.
        reason: String,
    },
    /// The connection ended without a goodbye.
    #[error("connection lost: {0}")]
    Broken(String),
    /// The link was closed from this side.
    #[error("closed")]
    Cancelled,
    /// The system refused a thread or a descriptor.
    #[error("out of resources: {}", crate::sys::reason(.0))]
    Resources(#[from] io::Error),
}

/// What kind of thing stands in the way of a secure connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsFault {
    /// This program was built without TLS.
    LeftOut,
    /// There are no certificates to trust on this system.
    NoRoots,
    /// The server's certificate isn't vouched for by any of them.
    Issuer,
    /// It is for other names.
    Name,
    /// It isn't valid yet, or any more, by this system's clock.
    Dates,
    /// What came isn't TLS.
    NotTls,
    /// Anything else.
    Other,
}

/// Why there is no HTTP answer.
#[derive(Debug, Error)]
pub enum AnswerFault {
    #[error("closed without an answer")]
    Closed,
    #[error("the answer is no HTTP")]
    NotHttp,
    #[error("the answer is too long")]
    TooLong,
    #[error("{}", crate::sys::reason(.0))]
    Io(#[from] io::Error),
}

/// A link as its owner holds it.
#[derive(Debug)]
pub struct Link {
    cancel: Arc<Cancel>,
    since: Instant,
    /// Whether something waited to be read when that was looked at last.
    had_news: bool,
    /// Dropped to tell a dial that waits for names.
    _alive: Sender<()>,
}

impl Link {
    /// Starts dialling. `accept` is called when the websocket is open, and what it returns gets the
    /// frames; `events` hears of the link's fate, last of all [`LinkEvent::Lost`], whatever happens.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn dial(
        credentials: Credentials,
        proxies: Arc<ProxySettings>,
        accept: impl FnOnce(&Arc<Outbox>) -> io::Result<Box<dyn Inbound>> + Send + 'static,
        events: impl Fn(LinkEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let (alive, gone) = crossbeam_channel::bounded(0);
        let cancel = Arc::new(Cancel::default());
        let theirs = Arc::clone(&cancel);
        thread::spawn("link", thread::LARGE_STACK, move || {
            let lost = run(&credentials, &proxies, &theirs, &gone, accept, &events);
            debug!("the link has ended: {lost}");
            events(LinkEvent::Lost(lost));
        })?;
        Ok(Link { cancel, since: Instant::now(), had_news: false, _alive: alive })
    }

    /// Whether the link makes progress: `false` if its thread hasn't read in the whole time since this was asked last,
    /// though there was something to read, or has dialled for longer than any dial can take.
    pub fn goes_on(&mut self, now: Instant) -> bool {
        let (established, heard, socket) = self.cancel.with(|state| {
            (state.established, state.heard.swap(false, Ordering::Relaxed), state.socket.clone())
        });
        if !established {
            return now.saturating_duration_since(self.since) < DIAL_LIMIT;
        }
        let has_news = socket.is_some_and(|socket| net::has_news(socket.as_fd()));
        let had_news = std::mem::replace(&mut self.had_news, has_news);
        heard || !had_news || !has_news
    }

    /// Ends the link: at once where it still dials, else with a short goodbye that nobody waits for.
    pub fn close(&self) {
        self.cancel.cancel();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close();
    }
}

fn run(
    credentials: &Credentials,
    proxies: &ProxySettings,
    cancel: &Arc<Cancel>,
    gone: &Receiver<()>,
    accept: impl FnOnce(&Arc<Outbox>) -> io::Result<Box<dyn Inbound>>,
    events: &impl Fn(LinkEvent),
) -> LinkError {
    let outbox = Arc::new(Outbox::default());
    let (mut socket, write_half) = match dial::dial(credentials, proxies, cancel, gone, &outbox) {
        Ok(open) => open,
        Err(_) if cancel.is_cancelled() => return LinkError::Cancelled,
        Err(e) => return e,
    };
    let (report, ended) = crossbeam_channel::bounded(1);
    let theirs = Arc::clone(&outbox);
    let writer = thread::spawn("link-writer", thread::LARGE_STACK, move || {
        let _ = report.send(writer::run(write_half, &theirs));
    });
    if let Err(e) = writer {
        return e.into();
    }
    let mut inbound = match accept(&outbox) {
        Ok(inbound) => inbound,
        Err(e) => {
            outbox.close(1000, "");
            return e.into();
        }
    };
    cancel.established();
    events(LinkEvent::Connected);
    let mut lost = reader::run(&mut socket, &outbox, &mut *inbound, cancel);
    // The sessions end here, whether or not the server still takes a goodbye.
    drop(inbound);
    outbox.close(lost.close_code(), "");
    if let Ok(Err(reason)) = ended.recv_deadline(Instant::now() + FAREWELL_LIMIT) {
        // A writer that failed is why the reader did.
        lost = reason;
    }
    cancel.shutdown(Shutdown::Both);
    if cancel.is_cancelled() { LinkError::Cancelled } else { lost }
}

impl LinkError {
    /// With which code to say goodbye.
    fn close_code(&self) -> u16 {
        match self {
            LinkError::Broken(reason) if reason == reader::TOO_LARGE => 1009,
            _ => 1000,
        }
    }
}

/// Lets another thread end a dial or a link, whatever it waits for.
#[derive(Debug, Default)]
pub(crate) struct Cancel {
    state: Mutex<CancelState>,
}

#[derive(Debug, Default)]
struct CancelState {
    cancelled: bool,
    established: bool,
    socket: Option<Arc<TcpStream>>,
    /// Set by the reader.
    heard: Arc<AtomicBool>,
}

impl Cancel {
    fn with<T>(&self, f: impl FnOnce(&mut CancelState) -> T) -> T {
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn cancel(&self) {
        self.with(|state| {
            state.cancelled = true;
            // An open websocket is only deafened: the reader then ends and the writer says goodbye.
            let how = if state.established { Shutdown::Read } else { Shutdown::Both };
            if let Some(socket) = &state.socket {
                let _ = socket.shutdown(how);
            }
        });
    }

    fn is_cancelled(&self) -> bool {
        self.with(|state| state.cancelled)
    }

    /// From here on `socket` is what there is to shut down.
    fn register(&self, socket: &Arc<TcpStream>) -> Result<(), LinkError> {
        self.with(|state| {
            state.socket = Some(Arc::clone(socket));
            if state.cancelled { Err(LinkError::Cancelled) } else { Ok(()) }
        })
    }

    /// To be set whenever something was read.
    fn heard(&self) -> Arc<AtomicBool> {
        self.with(|state| Arc::clone(&state.heard))
    }

    fn established(&self) {
        self.with(|state| state.established = true);
    }

    fn shutdown(&self, how: Shutdown) {
        self.with(|state| {
            if let Some(socket) = &state.socket {
                let _ = socket.shutdown(how);
            }
        });
    }
}
