//! How long a link may wait for what, and sockets whose operations end in time.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// A link without an inbound byte for this long is dead, as for the server and Mender's agent.
pub(super) const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// The released server closes a link without a ping within 60 s.
pub(super) const PING_INTERVAL: Duration = Duration::from_secs(25);
/// A link on which a write makes no progress for this long is dead.
pub(super) const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// For the close frame and what was queued before it.
pub(super) const FAREWELL_LIMIT: Duration = Duration::from_millis(500);
/// For all steps of a dial together, as in Mender's agent. No step has a shorter limit: on a slow link TLS alone may
/// need half of it.
pub(super) const ATTEMPT_LIMIT: Duration = Duration::from_secs(45);

/// A blocking socket on which each read and write has to end by `deadline`; without one, within the socket's time-outs.
pub(super) struct Deadline<'a> {
    pub(super) socket: &'a TcpStream,
    pub(super) deadline: Option<Instant>,
}

impl Deadline<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

/// The kernel calls a time-out "again". A process that is stopped and continued finds its waits interrupted.
fn uninterrupted(mut operation: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match operation() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            other => return other,
        }
    }
}

impl Read for Deadline<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(left) = self.left()? {
            self.socket.set_read_timeout(Some(left))?;
        }
        uninterrupted(|| self.socket.read(buffer))
    }
}

impl Write for Deadline<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(left) = self.left()? {
            self.socket.set_write_timeout(Some(left))?;
        }
        uninterrupted(|| self.socket.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
