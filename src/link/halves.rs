//! The two halves of a connection, plain or TLS.
//!
//! During the handshakes the read half is the whole connection, with a deadline for every operation. Afterwards it only
//! reads: tungstenite answers pings and closes on the half that it reads from, so what it writes there is dropped, and
//! the writer thread sends those answers.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use super::cancel::Cancel;
use super::deadline::{Deadline, SILENCE_LIMIT, WRITE_LIMIT};
use crate::outbox::{Outbox, Signal};
use crate::sys::net;

/// Read buffer of a plain connection in bytes: many small messages cost one system call.
const BUFFER: usize = 32 * 1024;
/// Read buffer of a TLS connection in bytes: a record and its framing.
const RECORD: usize = 16 * 1024 + 512;

/// A TLS connection, shared by the two halves. It does no I/O: a lock is held while bytes are moved into or out of it,
/// never while a half waits for the network.
pub(super) trait Tls: Send + Sync {
    /// Reads plaintext, taking as much of `ciphertext` as that needs. `WouldBlock`: all of it was taken, and there is no
    /// plaintext yet.
    fn decrypt(&self, ciphertext: &mut &[u8], plaintext: &mut [u8]) -> io::Result<usize>;

    /// Appends to `ciphertext` everything that is ready to be sent. Returns how many bytes of `plaintext` it took.
    fn encrypt(&self, plaintext: &[u8], ciphertext: &mut Vec<u8>) -> io::Result<usize>;

    /// Whether TLS has something of its own to send, such as an answer to a key update.
    fn wants_write(&self) -> bool;

    fn version(&self) -> String;
}

/// The half that tungstenite's handshake gets and the reader keeps.
pub(super) struct ReadHalf {
    source: BufReader<Source>,
    tls: Option<Arc<dyn Tls>>,
}

struct Source {
    socket: Arc<TcpStream>,
    phase: Phase,
}

enum Phase {
    Handshake {
        deadline: Instant,
    },
    Open {
        /// A server on this machine, mender-auth's forwarder, writes with Nagle's algorithm on: a delayed
        /// acknowledgement would cost 40 ms a keystroke.
        quick_ack: bool,
        outbox: Outbox,
        cancel: Arc<Cancel>,
    },
}

impl ReadHalf {
    /// For a handshake that has to end by `deadline`.
    pub(super) fn new(socket: Arc<TcpStream>, tls: Option<Arc<dyn Tls>>, deadline: Instant) -> Self {
        let capacity = if tls.is_some() { RECORD } else { BUFFER };
        let source = Source { socket, phase: Phase::Handshake { deadline } };
        ReadHalf { source: BufReader::with_capacity(capacity, source), tls }
    }

    pub(super) fn tls_version(&self) -> Option<String> {
        self.tls.as_ref().map(|tls| tls.version())
    }

    /// Ends the handshake: from now on this half only reads, for at most [`SILENCE_LIMIT`] at a time, and tells `cancel`
    /// of each read.
    pub(super) fn open(&mut self, outbox: &Outbox, cancel: &Arc<Cancel>) -> io::Result<WriteHalf> {
        let Source { socket, phase } = self.source.get_mut();
        socket.set_read_timeout(Some(SILENCE_LIMIT))?;
        socket.set_write_timeout(Some(WRITE_LIMIT))?;
        let quick_ack = socket.peer_addr()?.ip().is_loopback();
        let (outbox, cancel) = (outbox.clone(), Arc::clone(cancel));
        *phase = Phase::Open { quick_ack, outbox, cancel };
        Ok(self.write_half(None))
    }

    fn write_half(&self, deadline: Option<Instant>) -> WriteHalf {
        let socket = Arc::clone(&self.source.get_ref().socket);
        WriteHalf { socket, deadline, tls: self.tls.clone(), ciphertext: Vec::new() }
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let socket = &self.socket;
        match &self.phase {
            Phase::Handshake { deadline } => Deadline { socket, deadline: Some(*deadline) }.read(buffer),
            Phase::Open { quick_ack, cancel, .. } => {
                let n = Deadline { socket, deadline: None }.read(buffer)?;
                cancel.heard();
                if *quick_ack {
                    // Only a hint; a socket that can't do it still works.
                    let _ = net::rearm_quick_ack(socket.as_fd());
                }
                Ok(n)
            }
        }
    }
}

impl Read for ReadHalf {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &self.tls else { return self.source.read(buffer) };
        loop {
            let mut ciphertext = self.source.buffer();
            let before = ciphertext.len();
            let result = tls.decrypt(&mut ciphertext, buffer);
            let taken = before - ciphertext.len();
            self.source.consume(taken);
            if let Phase::Open { outbox, .. } = &self.source.get_ref().phase
                && taken > 0
                && tls.wants_write()
            {
                outbox.signal(Signal::FlushTls);
            }
            match result {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            if self.source.fill_buf()?.is_empty() {
                return Ok(0);
            }
        }
    }
}

impl Write for ReadHalf {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.source.get_ref().phase {
            Phase::Handshake { deadline } => self.write_half(Some(deadline)).write(bytes),
            Phase::Open { .. } => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The writer's half.
#[derive(Clone)]
pub(super) struct WriteHalf {
    socket: Arc<TcpStream>,
    deadline: Option<Instant>,
    tls: Option<Arc<dyn Tls>>,
    ciphertext: Vec<u8>,
}

impl WriteHalf {
    /// The writing half of a plain connection that has no reader.
    #[cfg(test)]
    pub(super) fn plain(socket: TcpStream) -> Self {
        WriteHalf { socket: Arc::new(socket), deadline: None, tls: None, ciphertext: Vec::new() }
    }

    /// Sends what the read half found that TLS wants to say.
    pub(super) fn flush_tls(&mut self) -> io::Result<()> {
        self.write(&[]).map(drop)
    }

    /// Ends the connection for both halves.
    pub(super) fn shut_down(&self) {
        // Fails when it has ended already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// tungstenite requires it of a stream, but never calls it on a websocket that only writes.
impl Read for WriteHalf {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Write for WriteHalf {
    /// Writes some of `bytes`, with TLS all of them.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut socket = Deadline { socket: &self.socket, deadline: self.deadline };
        let Some(tls) = &self.tls else { return socket.write(bytes) };
        let mut written = 0;
        loop {
            written += tls.encrypt(&bytes[written..], &mut self.ciphertext)?;
            socket.write_all(&self.ciphertext)?;
            self.ciphertext.clear();
            if written == bytes.len() {
                // One large message doesn't keep its memory.
                self.ciphertext.shrink_to(2 * RECORD);
                return Ok(written);
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
