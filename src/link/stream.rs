//! The two halves of a connection, plain or TLS.
//!
//! During the handshakes the read half is the whole connection and every operation has to be done by a
//! deadline. Afterwards it only reads: tungstenite answers pings and closes on the half that it reads from,
//! so what it writes there is dropped, and the writer says it instead.
//!
//! With TLS both halves share the state of the connection. The lock is held to move bytes in or out of it,
//! never while waiting for the network.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::ClientConnection;

use super::{SILENCE_LIMIT, WRITE_LIMIT};
use crate::outbox::Outbox;
use crate::sys::net;

/// A TLS record and its framing.
const RECORD: usize = 16 * 1024 + 512;

/// A TLS connection as its halves share it.
#[derive(Clone)]
pub struct Tls(Arc<Mutex<ClientConnection>>);

impl Tls {
    pub fn new(connection: ClientConnection) -> Self {
        Tls(Arc::new(Mutex::new(connection)))
    }

    fn lock(&self) -> MutexGuard<'_, ClientConnection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

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
fn timed_out(error: io::Error) -> io::Error {
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

/// The half that tungstenite's handshake gets and the reader keeps.
pub struct ReadHalf {
    socket: Arc<TcpStream>,
    tls: Option<TlsReader>,
    phase: Phase,
}

struct TlsReader {
    tls: Tls,
    /// Ciphertext that has come and wasn't taken yet: `bytes[taken..filled]`.
    bytes: Box<[u8]>,
    taken: usize,
    filled: usize,
}

enum Phase {
    Handshake { deadline: Instant },
    Open { quick_ack: bool, outbox: Arc<Outbox> },
}

impl ReadHalf {
    /// For a handshake that has to end by `deadline`.
    pub fn new(socket: Arc<TcpStream>, tls: Option<Tls>, deadline: Instant) -> Self {
        let tls =
            tls.map(|tls| TlsReader { tls, bytes: vec![0; RECORD].into_boxed_slice(), taken: 0, filled: 0 });
        ReadHalf { socket, tls, phase: Phase::Handshake { deadline } }
    }

    /// The handshake is over: from now on this half only reads, and waits as long as a live peer may be silent.
    ///
    /// # Errors
    /// What setting socket options may say.
    pub fn open(&mut self, outbox: &Arc<Outbox>) -> io::Result<WriteHalf> {
        self.socket.set_read_timeout(Some(SILENCE_LIMIT))?;
        self.socket.set_write_timeout(Some(WRITE_LIMIT))?;
        // A peer on this machine, mender-auth's forwarder, writes with Nagle's algorithm on: a delayed
        // acknowledgement would cost 40 ms a keystroke.
        let quick_ack = self.socket.peer_addr()?.ip().is_loopback();
        self.phase = Phase::Open { quick_ack, outbox: Arc::clone(outbox) };
        let tls = self.tls.as_ref().map(|reader| reader.tls.clone());
        Ok(WriteHalf { socket: Arc::clone(&self.socket), tls, ciphertext: Vec::new() })
    }
}

impl Phase {
    fn read(&self, socket: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Phase::Handshake { deadline } => Deadline { socket, deadline: *deadline }.read(buffer),
            Phase::Open { quick_ack, .. } => {
                let mut socket = socket;
                let n = uninterrupted(|| socket.read(buffer)).map_err(timed_out)?;
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
        match &mut self.tls {
            None => self.phase.read(&self.socket, buffer),
            Some(reader) => reader.read(&self.phase, &self.socket, buffer),
        }
    }
}

impl TlsReader {
    fn read(&mut self, phase: &Phase, socket: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut connection = self.tls.lock();
            match connection.reader().read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // Closed without a goodbye of the TLS layer: the websocket has its own.
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                other => return other,
            }
            if self.taken < self.filled {
                let mut rest = &self.bytes[self.taken..self.filled];
                let n = connection.read_tls(&mut rest)?;
                self.taken += n;
                connection.process_new_packets().map_err(io::Error::other)?;
                if connection.wants_write() {
                    match phase {
                        Phase::Open { outbox, .. } => outbox.flush(),
                        Phase::Handshake { .. } => {}
                    }
                }
                continue;
            }
            drop(connection);
            self.filled = phase.read(socket, &mut self.bytes)?;
            self.taken = 0;
            if self.filled == 0 {
                return Ok(0);
            }
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
                    Some(reader) => {
                        let mut connection = reader.tls.lock();
                        let n = connection.writer().write(bytes)?;
                        while connection.wants_write() {
                            connection.write_tls(&mut socket)?;
                        }
                        Ok(n)
                    }
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
    tls: Option<Tls>,
    ciphertext: Vec<u8>,
}

impl WriteHalf {
    /// Sends what the TLS layer has to say of its own, if anything.
    ///
    /// # Errors
    /// As writing does.
    pub fn flush_tls(&mut self) -> io::Result<()> {
        if let Some(tls) = &self.tls {
            drain(&mut tls.lock(), &mut self.ciphertext)?;
            send(&self.socket, &mut self.ciphertext)?;
        }
        Ok(())
    }
}

impl WriteHalf {
    /// Ends the connection for both halves.
    pub fn shut_down(&self) {
        // Fails when it has ended already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// Moves what is ready to be sent out of the connection, so that the lock needn't be held to send it.
fn drain(connection: &mut ClientConnection, ciphertext: &mut Vec<u8>) -> io::Result<()> {
    while connection.wants_write() {
        connection.write_tls(ciphertext)?;
    }
    Ok(())
}

fn send(mut socket: &TcpStream, ciphertext: &mut Vec<u8>) -> io::Result<()> {
    let result = socket.write_all(ciphertext).map_err(timed_out);
    ciphertext.clear();
    // A burst shouldn't cost memory for ever.
    ciphertext.shrink_to(2 * RECORD);
    result
}

impl Write for WriteHalf {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(tls) = &self.tls else {
            return uninterrupted(|| (&*self.socket).write(bytes)).map_err(timed_out);
        };
        let n = {
            let mut connection = tls.lock();
            let n = connection.writer().write(bytes)?;
            drain(&mut connection, &mut self.ciphertext)?;
            n
        };
        send(&self.socket, &mut self.ciphertext)?;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for WriteHalf {
    /// tungstenite wants a stream that could read. The writer never does.
    fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
