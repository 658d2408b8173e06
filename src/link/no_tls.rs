//! In the place of `tls` where that feature is left out: nobody can speak TLS, so none of these exists.

use std::io;
use std::net::TcpStream;

use super::LinkError;
use super::endpoint::Endpoint;
use super::stream::Deadline;

/// Who wants to speak TLS.
pub enum Client {}

impl Client {
    /// # Errors
    /// Always. Before anything is asked of the network, so that this is what is heard of.
    pub fn new(_: &Endpoint) -> Result<Self, LinkError> {
        Err(LinkError::Tls("built without TLS, only http servers can be reached".to_owned()))
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
#[derive(Debug)]
pub enum Writer {}

impl Writer {
    pub fn write(&mut self, _: &[u8], _: &TcpStream) -> io::Result<usize> {
        match *self {}
    }

    pub fn write_now(&mut self, _: &[u8], _: impl Fn(&[u8]) -> io::Result<usize>) -> io::Result<usize> {
        match *self {}
    }

    pub fn has_rest(&self) -> bool {
        match *self {}
    }

    pub fn flush(&mut self, _: &TcpStream) -> io::Result<()> {
        match *self {}
    }
}
