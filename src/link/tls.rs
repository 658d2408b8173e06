//! TLS towards the server, when mender-auth's local forwarder isn't in between.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex};

use rustls::crypto::{CryptoProvider, KeyProvider, ring};
use rustls::pki_types::{PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::SigningKey;
use rustls::time_provider::TimeProvider;
use rustls::{CertificateError, ClientConfig, ClientConnection, Error, InvalidMessage, RootCertStore};

use super::endpoint::Endpoint;
use super::error::{LinkError, TlsFault};
use super::halves::{Handshake, Tls};
use super::socket::Socket;
use crate::sys::{clock, lock};

/// Fails for a name that no certificate can be for, before anything is connected.
pub(super) fn client(server: &Endpoint) -> Result<Handshake, LinkError> {
    let name = ServerName::try_from(server.bare_host().to_owned()).map_err(failed)?;
    Ok(Box::new(|socket| handshake(name, socket)))
}

/// Reads the system's store of certificates (or SSL_CERT_FILE, SSL_CERT_DIR) anew each time: it may have been repaired
/// since, and costs memory while loaded.
fn handshake(name: ServerName<'static>, socket: &mut Socket) -> Result<(Arc<dyn Tls>, String), LinkError> {
    let provider = Arc::new(CryptoProvider { key_provider: &NoKeys, ..ring::default_provider() });
    let config = ClientConfig::builder_with_details(provider, Arc::new(WallClock))
        .with_safe_default_protocol_versions()
        .map_err(failed)?
        .with_root_certificates(roots()?)
        .with_no_client_auth();
    let mut connection = ClientConnection::new(Arc::new(config), name).map_err(failed)?;
    while connection.is_handshaking() {
        connection.complete_io(socket).map_err(|e| match e.kind() {
            io::ErrorKind::TimedOut => LinkError::TimedOut("the TLS handshake"),
            io::ErrorKind::UnexpectedEof => failed("the server closed the connection"),
            _ => LinkError::Tls(e.to_string(), fault(&e)),
        })?;
    }
    let version = connection.protocol_version().map_or_else(String::new, |version| format!("{version:?}"));
    Ok((Arc::new(Mutex::new(connection)), version))
}

fn failed(reason: impl ToString) -> LinkError {
    LinkError::Tls(reason.to_string(), TlsFault::Other)
}

fn fault(error: &io::Error) -> TlsFault {
    use CertificateError::{
        Expired, ExpiredContext, NotValidForName, NotValidForNameContext, NotValidYet, NotValidYetContext,
    };
    match error.get_ref().and_then(|e| e.downcast_ref()) {
        Some(Error::InvalidCertificate(e)) => match e {
            Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. } => TlsFault::Dates,
            NotValidForName | NotValidForNameContext { .. } => TlsFault::Name,
            // Such as a certificate that signs itself.
            _ => TlsFault::Issuer,
        },
        Some(Error::InvalidMessage(InvalidMessage::InvalidContentType)) => TlsFault::NotTls,
        _ => TlsFault::Other,
    }
}

/// The device has no certificate. ring's provider would bring along the code to sign with any kind of key.
#[derive(Debug)]
struct NoKeys;

impl KeyProvider for NoKeys {
    fn load_private_key(&self, _: PrivateKeyDer<'static>) -> Result<Arc<dyn SigningKey>, Error> {
        Err(Error::General("no client certificates".to_owned()))
    }
}

/// rustls's own clock panics from 2038 on 32-bit musl, as `SystemTime::now` does.
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
    if usable > 0 {
        return Ok(store);
    }
    let reason = found.errors.first().map_or_else(String::new, |e| format!(": {e}"));
    let text = "no trusted certificates on this system (install ca-certificates or set SSL_CERT_FILE)";
    Err(LinkError::Tls(format!("{text}{reason}"), TlsFault::NoRoots))
}

impl Tls for Mutex<ClientConnection> {
    fn decrypt(&self, ciphertext: &mut &[u8], plaintext: &mut [u8]) -> io::Result<usize> {
        let mut connection = lock(self);
        loop {
            match connection.reader().read(plaintext) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && !ciphertext.is_empty() => {}
                // Closed without a goodbye of the TLS layer: the websocket has its own.
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                other => return other,
            }
            connection.read_tls(ciphertext)?;
            connection.process_new_packets().map_err(io::Error::other)?;
        }
    }

    fn encrypt(&self, plaintext: &[u8], ciphertext: &mut Vec<u8>) -> io::Result<usize> {
        let mut connection = lock(self);
        let n = connection.writer().write(plaintext)?;
        while connection.wants_write() {
            connection.write_tls(ciphertext)?;
        }
        Ok(n)
    }

    fn wants_write(&self) -> bool {
        lock(self).wants_write()
    }
}
