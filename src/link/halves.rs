//! The two halves of a connection, plain or TLS.
//!
//! During the handshakes the read half is the whole connection. Afterwards it only reads: tungstenite answers pings and
//! closes on the half that it reads from, so what it writes there is dropped, and the writer thread sends those answers.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::Arc;

use super::error::LinkError;
use super::socket::Socket;
use crate::outbox::{Outbox, Work};

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
}

/// Also returns the version of TLS.
pub(super) type Handshake = Box<dyn FnOnce(&mut Socket) -> Result<(Arc<dyn Tls>, String), LinkError>>;

/// The half that tungstenite's handshake gets and the reader keeps.
pub(super) struct ReadHalf {
    source: BufReader<Socket>,
    /// For the handshakes.
    write_half: WriteHalf,
    /// Of the open websocket.
    outbox: Option<Outbox>,
}

impl ReadHalf {
    pub(super) fn new(socket: Socket, tls: Option<Arc<dyn Tls>>) -> Self {
        let capacity = if tls.is_some() { RECORD } else { BUFFER };
        let source = BufReader::with_capacity(capacity, socket.clone());
        ReadHalf { source, write_half: WriteHalf::new(socket, tls), outbox: None }
    }

    /// Ends the handshakes: from now on this half only reads, and has no deadline.
    pub(super) fn open(&mut self, outbox: &Outbox) -> io::Result<WriteHalf> {
        let socket = self.write_half.socket.without_deadline()?;
        *self.source.get_mut() = socket.clone();
        self.outbox = Some(outbox.clone());
        Ok(WriteHalf::new(socket, self.write_half.tls.clone()))
    }
}

impl Read for ReadHalf {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &self.write_half.tls else { return self.source.read(buffer) };
        loop {
            let mut ciphertext = self.source.buffer();
            let before = ciphertext.len();
            let result = tls.decrypt(&mut ciphertext, buffer);
            let taken = before - ciphertext.len();
            self.source.consume(taken);
            if let Some(outbox) = &self.outbox
                && taken > 0
                && tls.wants_write()
            {
                outbox.signal(Work::FlushTls);
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
        if self.outbox.is_some() { Ok(bytes.len()) } else { self.write_half.write(bytes) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The writer's half.
#[derive(Clone)]
pub(super) struct WriteHalf {
    socket: Socket,
    tls: Option<Arc<dyn Tls>>,
    ciphertext: Vec<u8>,
}

impl WriteHalf {
    pub(super) fn new(socket: Socket, tls: Option<Arc<dyn Tls>>) -> Self {
        WriteHalf { socket, tls, ciphertext: Vec::new() }
    }
}

/// tungstenite requires it of a stream, but never calls it on a websocket that only writes.
impl Read for WriteHalf {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Write for WriteHalf {
    /// Writes some of `bytes`, with TLS all of them and what TLS has to say itself.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(tls) = &self.tls else { return self.socket.write(bytes) };
        let mut written = 0;
        loop {
            written += tls.encrypt(&bytes[written..], &mut self.ciphertext)?;
            self.socket.write_all(&self.ciphertext)?;
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
