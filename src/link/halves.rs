//! The two halves of a connection, plain or TLS.
//!
//! During the handshakes one half is the whole connection, afterwards it only reads. tungstenite answers pings and
//! closes on the half that it reads from; those writes are dropped, and the writer thread answers instead.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::Arc;

use super::error::LinkError;
use super::socket::Socket;

/// In bytes, without TLS: many small messages cost one system call.
const BUFFER: usize = 32 * 1024;
/// In bytes, with TLS: a record and its framing.
const RECORD: usize = 16 * 1024 + 512;
/// In bytes, of plaintext: two records. Half of what rustls buffers.
const PIECE: usize = 32 * 1024;

/// TLS state shared by both halves. It does no I/O, so that no half waits for the network while it holds the lock.
pub(super) trait Tls: Send + Sync {
    /// Takes as much of `ciphertext` as it needs. `WouldBlock`: it needs more.
    fn decrypt(&self, ciphertext: &mut &[u8], plaintext: &mut [u8]) -> io::Result<usize>;
    /// Appends all pending output to `ciphertext`, such as the answer to a key update.
    fn encrypt(&self, plaintext: &[u8], ciphertext: &mut Vec<u8>) -> io::Result<()>;
}

/// Returns the TLS version and what the certificate is for, too.
pub(super) type Handshake = Box<dyn FnOnce(&mut Socket) -> Result<(Arc<dyn Tls>, String), LinkError>>;

pub(super) struct Half {
    source: BufReader<Socket>,
    tls: Option<Arc<dyn Tls>>,
    ciphertext: Vec<u8>,
    only_reads: bool,
}

impl Half {
    pub(super) fn new(socket: Socket, tls: Option<Arc<dyn Tls>>) -> Self {
        let capacity = if tls.is_some() { RECORD } else { BUFFER };
        Half {
            source: BufReader::with_capacity(capacity, socket),
            tls,
            ciphertext: Vec::new(),
            only_reads: false,
        }
    }

    /// Ends the handshakes, and returns the writing half. This one only reads from now on; neither has a deadline.
    pub(super) fn open(&mut self) -> io::Result<Half> {
        self.socket().establish()?;
        self.only_reads = true;
        Ok(self.writing())
    }

    pub(super) fn socket(&self) -> &Socket {
        self.source.get_ref()
    }

    /// Without a read buffer.
    pub(super) fn writing(&self) -> Half {
        let source = BufReader::with_capacity(0, self.source.get_ref().clone());
        Half { source, tls: self.tls.clone(), ciphertext: Vec::new(), only_reads: false }
    }
}

impl Read for Half {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &self.tls else { return self.source.read(buffer) };
        loop {
            let mut ciphertext = self.source.buffer();
            let before = ciphertext.len();
            let result = tls.decrypt(&mut ciphertext, buffer);
            let taken = before - ciphertext.len();
            self.source.consume(taken);
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

impl Write for Half {
    /// With TLS, writes all of `bytes`.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.only_reads {
            return Ok(bytes.len());
        }
        let socket = self.source.get_mut();
        let Some(tls) = &self.tls else { return socket.write(bytes) };
        // In pieces: the memory that one of them takes is kept.
        for piece in bytes.chunks(PIECE) {
            tls.encrypt(piece, &mut self.ciphertext)?;
            socket.write_all(&self.ciphertext)?;
            self.ciphertext.clear();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
