//! A certificate authority of our own, and a front that ends TLS before the loopback server.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{RootCertStore, ServerConfig, ServerConnection};

use super::front::Acceptor;
use super::wait::{Watched, secs};

/// Signs the certificates of one test.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate and its key.
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Authority {
    pub fn new() -> Authority {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, "Test Authority");
        let key = KeyPair::generate().expect("a key");
        Authority { issuer: CertifiedIssuer::self_signed(params, key).expect("a CA certificate") }
    }

    /// Writes the CA certificate for SSL_CERT_FILE.
    pub fn write(&self, dir: &Path) -> PathBuf {
        let file = dir.join("ca.pem");
        std::fs::write(&file, self.issuer.pem()).expect("write the CA certificate");
        file
    }

    /// The CA certificate, for a client.
    #[allow(dead_code, reason = "for the benchmark")]
    pub fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).expect("a CA certificate");
        roots
    }

    /// A certificate valid now for these names.
    pub fn identity(&self, names: &[&str]) -> Identity {
        self.sign(params(names))
    }

    /// One valid on the first days of these years and in between.
    pub fn valid(&self, names: &[&str], from: i32, until: i32) -> Identity {
        let mut params = params(names);
        params.not_before = rcgen::date_time_ymd(from, 1, 1);
        params.not_after = rcgen::date_time_ymd(until, 1, 1);
        self.sign(params)
    }

    fn sign(&self, params: CertificateParams) -> Identity {
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        Identity { certificate: certificate.der().clone(), key: der(&key) }
    }
}

impl Identity {
    /// PEM files, as openssl writes them.
    pub fn read(certificate: &Path, key: &Path) -> Identity {
        let certificate = CertificateDer::from_pem_file(certificate).expect("a certificate");
        Identity { certificate, key: PrivateKeyDer::from_pem_file(key).expect("a key") }
    }

    /// A certificate that signs itself.
    pub fn self_signed(names: &[&str]) -> Identity {
        let key = KeyPair::generate().expect("a key");
        let certificate = params(names).self_signed(&key).expect("a certificate");
        Identity { certificate: certificate.der().clone(), key: der(&key) }
    }
}

fn der(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()))
}

fn params(names: &[&str]) -> CertificateParams {
    CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>()).expect("valid names")
}

/// A server's, with this identity.
pub fn config(identity: &Identity) -> ServerConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("TLS versions")
        .with_no_client_auth()
        .with_single_cert(vec![identity.certificate.clone()], identity.key.clone_key())
        .expect("a usable certificate")
}

/// Accepts TLS and relays what's inside to the loopback server.
pub struct TlsFront {
    acceptor: Acceptor,
    failures: Arc<Watched<Vec<String>>>,
}

impl TlsFront {
    pub fn start(identity: &Identity, target: SocketAddr) -> TlsFront {
        let config = Arc::new(config(identity));
        let failures = Arc::new(Watched::new(Vec::new()));
        let failed = Arc::clone(&failures);
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen on loopback");
        let acceptor = Acceptor::start("tls-front", listener, move |stream| {
            let connection = ServerConnection::new(Arc::clone(&config)).expect("a TLS connection");
            if let Err(why) = relay(connection, stream, target) {
                failed.update(|f| f.push(why.to_string()));
            }
        });
        TlsFront { acceptor, failures }
    }

    pub fn port(&self) -> u16 {
        self.acceptor.address().port()
    }

    /// Waits for a handshake that failed.
    pub fn wait_failure(&self, limit: std::time::Duration) -> String {
        let found = self.failures.wait(limit, |f| f.first().cloned());
        found.unwrap_or_else(|| panic!("waited {limit:?} in vain for a failed TLS handshake"))
    }
}

fn relay(mut tls: ServerConnection, mut outer: TcpStream, target: SocketAddr) -> std::io::Result<()> {
    outer.set_nodelay(true)?;
    outer.set_read_timeout(Some(secs(20)))?;
    while tls.is_handshaking() {
        if tls.complete_io(&mut outer)? == (0, 0) {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    outer.set_nonblocking(true)?;
    let mut inner = TcpStream::connect(target)?;
    inner.set_nodelay(true)?;
    let mut buffer = vec![0; 32 << 10];
    loop {
        loop {
            match tls.reader().read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => inner.write_all(&buffer[..count])?,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        while tls.wants_write() {
            match tls.write_tls(&mut outer) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        let writing = tls.wants_write();
        let outer_events = if writing { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let inner_events = if writing { PollFlags::empty() } else { PollFlags::POLLIN };
        let mut fds = [PollFd::new(outer.as_fd(), outer_events), PollFd::new(inner.as_fd(), inner_events)];
        poll(&mut fds, PollTimeout::NONE).map_err(std::io::Error::from)?;
        let [outer_ready, inner_ready] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        if outer_ready.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            match tls.read_tls(&mut outer) {
                Ok(0) => return Ok(()),
                Ok(_) => {
                    tls.process_new_packets().map_err(std::io::Error::other)?;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        if inner_ready.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) && !writing {
            match inner.read(&mut buffer)? {
                0 => {
                    tls.send_close_notify();
                    let _ = tls.write_tls(&mut outer);
                    return Ok(());
                }
                count => tls.writer().write_all(&buffer[..count])?,
            }
        }
    }
}
