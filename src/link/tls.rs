//! TLS towards the server, when mender-auth's local forwarder isn't in between. Without the feature `tls` its
//! place is taken by `no_tls.rs`.
//!
//! Both halves of a connection share its state. The lock is held to move bytes in or out of it, never while
//! waiting for the network.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::pki_types::{ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{CertificateError, ClientConfig, ClientConnection, Error, InvalidMessage, RootCertStore};

use super::endpoint::Endpoint;
use super::stream::{Deadline, timed_out};
use super::{LinkError, TlsFault};
use crate::sys::clock;

/// A TLS record and its framing.
const RECORD: usize = 16 * 1024 + 512;

/// Who wants to speak TLS, and with whom.
pub struct Client {
    name: ServerName<'static>,
}

impl Client {
    /// Nothing is asked of the network yet.
    ///
    /// # Errors
    /// [`LinkError::Tls`] for a name that no certificate can be for.
    pub fn new(server: &Endpoint) -> Result<Self, LinkError> {
        let name = ServerName::try_from(server.host.clone()).map_err(failed)?;
        Ok(Client { name })
    }

    /// Shakes hands with the server, which has to prove its name by a certificate of the system's store
    /// (SSL_CERT_FILE and SSL_CERT_DIR are honoured). The store is read anew each time: it may have been
    /// mended since, and costs memory while loaded.
    ///
    /// # Errors
    /// [`LinkError::Tls`] with the reason, or a time-out.
    pub fn handshake(self, mut socket: Deadline<'_>) -> Result<Reader, LinkError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_details(provider, Arc::new(WallClock))
            .with_safe_default_protocol_versions()
            .map_err(failed)?
            .with_root_certificates(roots()?)
            .with_no_client_auth();
        let mut connection = ClientConnection::new(Arc::new(config), self.name).map_err(failed)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut socket).map_err(|e| match e.kind() {
                io::ErrorKind::TimedOut => LinkError::TimedOut("the TLS handshake"),
                io::ErrorKind::UnexpectedEof => failed("the server closed the connection"),
                _ => LinkError::Tls(e.to_string(), fault(&e)),
            })?;
        }
        Ok(Reader::new(Shared(Arc::new(Mutex::new(connection)))))
    }
}

fn failed(why: impl ToString) -> LinkError {
    LinkError::Tls(why.to_string(), TlsFault::Other)
}

fn fault(error: &io::Error) -> TlsFault {
    use CertificateError::{
        Expired, ExpiredContext, NotValidForName, NotValidForNameContext, NotValidYet, NotValidYetContext,
    };
    match error.get_ref().and_then(|e| e.downcast_ref()) {
        Some(Error::InvalidCertificate(e)) => match e {
            Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. } => TlsFault::Dates,
            NotValidForName | NotValidForNameContext { .. } => TlsFault::Name,
            // As a certificate that signs itself.
            _ => TlsFault::Issuer,
        },
        Some(Error::InvalidMessage(InvalidMessage::InvalidContentType)) => TlsFault::NotTls,
        _ => TlsFault::Other,
    }
}

/// For the dates in certificates.
#[derive(Debug)]
struct WallClock;

impl TimeProvider for WallClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(clock::now()))
    }
}

fn roots() -> Result<RootCertStore, LinkError> {
    let found = rustls_native_certs::load_native_certs();
    let mut store = RootCertStore::empty();
    let (usable, _) = store.add_parsable_certificates(found.certs);
    if usable == 0 {
        let why = found.errors.first().map_or_else(String::new, |e| format!(": {e}"));
        let why = format!(
            "no trusted certificates on this system (install ca-certificates or set SSL_CERT_FILE){why}"
        );
        return Err(LinkError::Tls(why, TlsFault::NoRoots));
    }
    Ok(store)
}

/// A TLS connection as its halves share it.
#[derive(Clone)]
struct Shared(Arc<Mutex<ClientConnection>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, ClientConnection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The half that reads; until the websocket is open it also writes.
pub struct Reader {
    tls: Shared,
    /// Ciphertext that has come and wasn't taken yet: `bytes[taken..filled]`.
    bytes: Box<[u8]>,
    taken: usize,
    filled: usize,
}

impl Reader {
    fn new(tls: Shared) -> Self {
        Reader { tls, bytes: vec![0; RECORD].into_boxed_slice(), taken: 0, filled: 0 }
    }

    /// The half that writes from now on.
    pub fn writer(&self) -> Writer {
        Writer { tls: self.tls.clone(), ciphertext: Vec::new() }
    }

    /// The version of TLS that was agreed on.
    pub fn version(&self) -> String {
        self.tls.lock().protocol_version().map_or_else(String::new, |version| format!("{version:?}"))
    }

    /// Reads plaintext. `fetch` gets more ciphertext; `answer` is called when the TLS layer has something of
    /// its own to say.
    ///
    /// # Errors
    /// Those of `fetch`, and what the TLS layer doesn't accept.
    pub fn read(
        &mut self,
        buffer: &mut [u8],
        fetch: impl Fn(&mut [u8]) -> io::Result<usize>,
        answer: impl Fn(),
    ) -> io::Result<usize> {
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
                    answer();
                }
                continue;
            }
            drop(connection);
            self.filled = fetch(&mut self.bytes)?;
            self.taken = 0;
            if self.filled == 0 {
                return Ok(0);
            }
        }
    }

    /// Writes the websocket's handshake.
    ///
    /// # Errors
    /// As the socket's writing.
    pub fn write(&self, bytes: &[u8], mut socket: Deadline<'_>) -> io::Result<usize> {
        let mut connection = self.tls.lock();
        let n = connection.writer().write(bytes)?;
        while connection.wants_write() {
            connection.write_tls(&mut socket)?;
        }
        Ok(n)
    }
}

/// The half that writes.
pub struct Writer {
    tls: Shared,
    ciphertext: Vec<u8>,
}

impl Writer {
    /// Writes plaintext.
    ///
    /// # Errors
    /// As the socket's writing.
    pub fn write(&mut self, bytes: &[u8], socket: &TcpStream) -> io::Result<usize> {
        let mut connection = self.tls.lock();
        let n = connection.writer().write(bytes)?;
        drain(&mut connection, &mut self.ciphertext)?;
        drop(connection);
        self.send(socket)?;
        Ok(n)
    }

    /// Sends what the TLS layer has to say of its own, if anything.
    ///
    /// # Errors
    /// As the socket's writing.
    pub fn flush(&mut self, socket: &TcpStream) -> io::Result<()> {
        drain(&mut self.tls.lock(), &mut self.ciphertext)?;
        self.send(socket)
    }

    fn send(&mut self, mut socket: &TcpStream) -> io::Result<()> {
        let result = socket.write_all(&self.ciphertext).map_err(timed_out);
        self.ciphertext.clear();
        // A burst shouldn't cost memory for ever.
        self.ciphertext.shrink_to(2 * RECORD);
        result
    }
}

/// Moves what is ready to be sent out of the connection, so that the lock needn't be held to send it.
fn drain(connection: &mut ClientConnection, ciphertext: &mut Vec<u8>) -> io::Result<()> {
    while connection.wants_write() {
        connection.write_tls(ciphertext)?;
    }
    Ok(())
}
