//! One websocket's life, in two threads: the first dials and then reads, handing on each frame without waiting; the
//! second, the writer, starts with the open websocket and is the only one that writes to it.

mod dial;
mod endpoint;
mod error;
mod halves;
mod http;
#[cfg(fuzzing)]
#[path = "../../tests/fuzz/models/link.rs"]
pub(crate) mod model;
mod pace;
mod proxy;
mod reader;
mod socket;
#[cfg(feature = "tls")]
mod tls;
mod writer;

use std::convert::Infallible;
use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use log::debug;
use tungstenite::WebSocket;

use self::halves::Half;
use self::socket::{ATTEMPT_LIMIT, Cancel, FAREWELL_LIMIT};
use crate::auth::Credentials;
use crate::outbox::{Outbox, Queue, Work};
use crate::proto::Frame;
use crate::sys::thread;

pub(crate) use dial::{Progress, trial};
pub(crate) use endpoint::{Endpoint, IN_CLEAR, PATH};
pub use error::LinkError;
pub(crate) use error::TlsFault;
pub(crate) use proxy::{Kind as ProxyKind, PROXY_VARIABLES};

/// A dial that exceeds its deadline by this long is stuck: trusted certificates may come from slow storage.
const OVERTIME: Duration = ATTEMPT_LIMIT.saturating_mul(3);

/// Dropping it ends the link: a dial at once, an open websocket after a short goodbye that nobody waits for.
pub(crate) struct Link {
    cancel: Arc<Cancel>,
    outbox: Outbox,
}

impl Link {
    /// Dials in a new thread. `accept` is called when the websocket is open; the handler that it returns gets each
    /// frame, must not wait, and is dropped when the link ends. `report` gets `Ok` then and, last and in any case, the
    /// error that ended the link.
    pub(crate) fn dial<F: FnMut(Frame)>(
        credentials: Credentials,
        heartbeat: Duration,
        accept: impl FnOnce(&Outbox) -> F + Send + 'static,
        report: impl Fn(Result<(), LinkError>) + Send + 'static,
    ) -> io::Result<Self> {
        let cancel = Arc::new(Cancel::new()?);
        let (outbox, queue) = Outbox::new();
        let link = Link { cancel: Arc::clone(&cancel), outbox: outbox.clone() };
        thread::spawn("link", thread::LARGE_STACK, move || {
            let dialled = dial::dial(&credentials, &cancel, true, &mut |_| {});
            let result =
                dialled.and_then(|socket| run(socket, &cancel, heartbeat, (outbox, queue), accept, &report));
            let Err(lost) = result;
            let lost = cancel.take_end().unwrap_or(lost);
            debug!("the link has ended: {lost}");
            report(Err(lost));
        })?;
        Ok(link)
    }

    /// The route may have changed: ends the link unless the server answers soon. A dial tries the new one.
    pub(crate) fn ping(&self) {
        self.cancel.again.store(true, Ordering::SeqCst);
        self.cancel.wake.notify();
        self.outbox.signal(Work::Ping(true));
    }

    /// Ends the link or dial if this machine has lost its local address; returns whether it has.
    pub(crate) fn ends_without_address(&self) -> bool {
        let lost = self.cancel.lost_address();
        let why = lost.map(|address| LinkError::Dead(format!("its address {address} is gone")));
        why.map(|why| self.cancel.end(why)).is_some()
    }

    /// False if the reader has ignored readable data since the last call, or the dial is stuck.
    pub(crate) fn makes_progress(&self, now: Instant) -> bool {
        self.cancel.reads().unwrap_or_else(|| now < self.cancel.deadline + OVERTIME)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.cancel.end(LinkError::Cancelled);
    }
}

fn run<F: FnMut(Frame)>(
    mut socket: WebSocket<Half>,
    cancel: &Arc<Cancel>,
    heartbeat: Duration,
    (outbox, queue): (Outbox, Queue),
    accept: impl FnOnce(&Outbox) -> F,
    report: &impl Fn(Result<(), LinkError>),
) -> Result<Infallible, LinkError> {
    let write_half = socket.get_mut().open()?;
    let (sender, ended) = crossbeam_channel::bounded(1);
    let theirs = Arc::clone(cancel);
    thread::spawn("link-writer", thread::LARGE_STACK, move || {
        let result = writer::run(write_half, queue, heartbeat);
        // End the reader, too.
        theirs.shut_down(Shutdown::Read);
        let _ = sender.send(result);
    })?;
    let mut inbound = accept(&outbox);
    report(Ok(()));
    let Err(lost) = reader::run(&mut socket, &outbox, &mut inbound, cancel);
    let too_large = matches!(lost, LinkError::TooLarge);
    let lost_by_itself = !too_large && !cancel.is_cancelled();
    let farewell = Instant::now() + FAREWELL_LIMIT;
    outbox.close(if too_large { 1009 } else { 1000 }, farewell);
    let mut writer = ended.recv_deadline(farewell);
    // If we end the link, the kernel still delivers what was written, unless the link is dead or slow, or data from the
    // server that nobody reads any more has the kernel reset it. A link that ended by itself has lost what was on the
    // way. A session that goes on has to know how much.
    if lost_by_itself || !cancel.sends_all(farewell) {
        // A write blocked by a dead server ends only now, and then counts what it has written.
        let waits = writer.is_err();
        if waits {
            cancel.shut_down(Shutdown::Write);
            writer = ended.recv_timeout(FAREWELL_LIMIT);
        }
        outbox.set_delivered(cancel.abandon(waits));
    }
    // Drops the router, which ends the sessions. Not before the writer has ended: what it still writes would be sent
    // again by the next link.
    drop(inbound);
    cancel.shut_down(Shutdown::Both);
    // If the writer failed, that is why the reader did.
    Err(writer.ok().and_then(Result::err).unwrap_or(lost))
}
