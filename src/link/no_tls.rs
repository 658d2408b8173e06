//! In the place of `tls` where that feature is left out: nobody can speak TLS, so none of these exists.

use std::io;
use std::net::TcpStream;

use super::endpoint::Endpoint;
use super::stream::Deadline;
use super::{LinkError, TlsFault};

/// Who wants to speak TLS.
pub enum Client {}

impl Client {
    /// # Errors
    /// Always. Before anything is asked of the network, so that this is what is heard of.
    pub fn new(_: &Endpoint) -> Result<Self, LinkError> {
        let why = "built without TLS, only http servers can be reached";
        Err(LinkError::Tls(why.to_owned(), TlsFault::LeftOut))
    }

    pub fn handshake(self, _: Deadline<'_>) -> Result<Reader, LinkError> {
        match self {}
    }
}

/// The half that reads.
pub enum Reader {}

impl Reader {
    pub fn writer(&self) -> Writer {
        match *self {}
    }

    pub fn version(&self) -> String {
        match *self {}
    }

    pub fn read(
        &mut self,
        _: &mut [u8],
        _: impl Fn(&mut [u8]) -> io::Result<usize>,
        _: impl Fn(),
    ) -> io::Result<usize> {
        match *self {}
    }

    pub fn write(&self, _: &[u8], _: Deadline<'_>) -> io::Result<usize> {
        match *self {}
    }
}

/// The half that writes.
pub enum Writer {}

impl Writer {
    pub fn write(&mut self, _: &[u8], _: &TcpStream) -> io::Result<usize> {
        match *self {}
    }

    pub fn flush(&mut self, _: &TcpStream) -> io::Result<()> {
        match *self {}
    }
}
