//! TLS towards the server, when mender-auth's local forwarder isn't in between.

use std::sync::Arc;

use rustls::pki_types::{ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use super::LinkError;
use super::endpoint::Endpoint;
use super::stream::{Deadline, Tls};
use crate::sys::clock;

/// Shakes hands with `server`, which has to prove its name by a certificate of the system's store
/// (SSL_CERT_FILE and SSL_CERT_DIR are honoured). The store is read anew each time: it may have been
/// mended since, and costs memory while loaded.
///
/// # Errors
/// [`LinkError::Tls`] with the reason, or a time-out.
pub fn handshake(mut socket: Deadline<'_>, server: &Endpoint) -> Result<Tls, LinkError> {
    let tls = |e: String| LinkError::Tls(e);
    let name = ServerName::try_from(server.host.clone()).map_err(|e| tls(e.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_details(provider, Arc::new(WallClock))
        .with_safe_default_protocol_versions()
        .map_err(|e| tls(e.to_string()))?
        .with_root_certificates(roots()?)
        .with_no_client_auth();
    let mut connection = ClientConnection::new(Arc::new(config), name).map_err(|e| tls(e.to_string()))?;
    while connection.is_handshaking() {
        connection.complete_io(&mut socket).map_err(|e| match e.kind() {
            std::io::ErrorKind::TimedOut => LinkError::TimedOut("the TLS handshake"),
            std::io::ErrorKind::UnexpectedEof => tls("the server closed the connection".to_owned()),
            _ => tls(e.to_string()),
        })?;
    }
    Ok(Tls::new(connection))
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
        return Err(LinkError::Tls(format!(
            "no trusted certificates on this system (install ca-certificates or set SSL_CERT_FILE){why}"
        )));
    }
    Ok(store)
}
