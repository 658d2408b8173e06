//! The two halves of a connection, plain or TLS.
//!
//! During the handshakes the read half is the whole connection and every operation has to be done by a
//! deadline. Afterwards it only reads: tungstenite answers pings and closes on the half that it reads from,
//! so what it writes there is dropped, and the writer says it instead.

use std::cell::Cell;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{SILENCE_LIMIT, WRITE_LIMIT, tls};
use crate::outbox::Outbox;
use crate::sys::net;

/// A socket on which each read and write has to end by `deadline`.
pub struct Deadline<'a> {
    pub socket: &'a TcpStream,
    pub deadline: Instant,
}

impl Deadline<'_> {
    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

/// What the kernel calls "again" is a time-out on a blocking socket.
pub fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

/// A process that is stopped and continued finds its waits on sockets with time-outs interrupted.
fn uninterrupted(mut operation: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match operation() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

impl Read for Deadline<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(self.left()?))?;
        uninterrupted(|| self.socket.read(buffer)).map_err(timed_out)
    }
}

impl Write for Deadline<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(Some(self.left()?))?;
        uninterrupted(|| self.socket.write(bytes)).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is read of a plain connection at a time: many small messages cost one system call.
const BUFFER: usize = 32 * 1024;

/// The half that tungstenite's handshake gets and the reader keeps.
pub struct ReadHalf {
    socket: Arc<TcpStream>,
    tls: Option<tls::Reader>,
    phase: Phase,
    /// Bytes of a plain connection that have come and weren't taken yet: `bytes[taken..filled]`.
    bytes: Box<[u8]>,
    taken: usize,
    filled: usize,
}

enum Phase {
    Handshake {
        deadline: Instant,
    },
    Open {
        quick_ack: bool,
        outbox: Arc<Outbox>,
        /// Whether the reader knows that the next read may take long.
        told: Cell<bool>,
        /// Set whenever the reader has read.
        heard: Arc<AtomicBool>,
    },
}

impl ReadHalf {
    /// For a handshake that has to end by `deadline`.
    pub fn new(socket: Arc<TcpStream>, tls: Option<tls::Reader>, deadline: Instant) -> Self {
        // The TLS layer has a buffer of its own.
        let bytes = if tls.is_some() { Box::default() } else { vec![0; BUFFER].into_boxed_slice() };
        ReadHalf { socket, tls, phase: Phase::Handshake { deadline }, bytes, taken: 0, filled: 0 }
    }

    /// The version of TLS, if that is spoken.
    pub fn tls_version(&self) -> Option<String> {
        self.tls.as_ref().map(tls::Reader::version)
    }

    /// The handshake is over: from now on this half only reads, and waits as long as a live peer may be silent.
    /// Before each wait `WouldBlock` is returned once. `heard` is set after each.
    ///
    /// # Errors
    /// What setting socket options may say.
    pub fn open(&mut self, outbox: &Arc<Outbox>, heard: Arc<AtomicBool>) -> io::Result<WriteHalf> {
        self.socket.set_read_timeout(Some(SILENCE_LIMIT))?;
        self.socket.set_write_timeout(Some(WRITE_LIMIT))?;
        // A peer on this machine, mender-auth's forwarder, writes with Nagle's algorithm on: a delayed
        // acknowledgement would cost 40 ms a keystroke.
        let quick_ack = self.socket.peer_addr()?.ip().is_loopback();
        self.phase = Phase::Open { quick_ack, outbox: Arc::clone(outbox), told: Cell::new(false), heard };
        let tls = self.tls.as_ref().map(tls::Reader::writer);
        Ok(WriteHalf { socket: Arc::clone(&self.socket), tls })
    }
}

impl Phase {
    fn read(&self, socket: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Phase::Handshake { deadline } => Deadline { socket, deadline: *deadline }.read(buffer),
            Phase::Open { quick_ack, told, heard, .. } => {
                if !told.replace(true) {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                told.set(false);
                let mut socket = socket;
                let n = uninterrupted(|| socket.read(buffer)).map_err(timed_out)?;
                heard.store(true, Ordering::Relaxed);
                if *quick_ack {
                    // Only a hint; a socket that can't do it still works.
                    let _ = net::rearm_quick_ack(socket.as_fd());
                }
                Ok(n)
            }
        }
    }

    /// The TLS layer has something to say, which is the writer's to send once there is one.
    fn answer(&self) {
        if let Phase::Open { outbox, .. } = self {
            outbox.flush();
        }
    }
}

impl Read for ReadHalf {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (socket, phase) = (&self.socket, &self.phase);
        match &mut self.tls {
            None => {
                if self.taken == self.filled {
                    self.taken = 0;
                    self.filled = 0;
                    self.filled = phase.read(socket, &mut self.bytes)?;
                }
                let n = (&self.bytes[self.taken..self.filled]).read(buffer)?;
                self.taken += n;
                Ok(n)
            }
            Some(tls) => tls.read(buffer, |buffer| phase.read(socket, buffer), || phase.answer()),
        }
    }
}

impl Write for ReadHalf {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.phase {
            Phase::Open { .. } => Ok(bytes.len()),
            Phase::Handshake { deadline } => {
                let mut socket = Deadline { socket: &self.socket, deadline };
                match &self.tls {
                    None => socket.write(bytes),
                    Some(tls) => tls.write(bytes, socket),
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The writer's half.
pub struct WriteHalf {
    socket: Arc<TcpStream>,
    tls: Option<tls::Writer>,
}

impl WriteHalf {
    /// Of a plain connection without a reader.
    #[cfg(test)]
    pub fn plain(socket: TcpStream) -> Self {
        WriteHalf { socket: Arc::new(socket), tls: None }
    }

    /// Sends what the TLS layer has to say of its own, if anything.
    ///
    /// # Errors
    /// As writing does.
    pub fn flush_tls(&mut self) -> io::Result<()> {
        self.tls.as_mut().map_or(Ok(()), |tls| tls.flush(&self.socket))
    }

    /// Ends the connection for both halves.
    pub fn shut_down(&self) {
        // Fails when it has ended already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Write for WriteHalf {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.tls {
            None => uninterrupted(|| (&*self.socket).write(bytes)).map_err(timed_out),
            Some(tls) => tls.write(bytes, &self.socket),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
