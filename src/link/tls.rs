//! TLS to the server, for use without mender-auth's local forwarder.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::CertificateError::{
    BadSignature, Expired, ExpiredContext, InvalidPurposeContext, NotValidForNameContext, NotValidYetContext,
    Other, UnknownIssuer, UnsupportedSignatureAlgorithmContext as Signature,
    UnsupportedSignatureAlgorithmForPublicKeyContext as ForKey,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, KeyProvider, ring};
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, ServerName, SignatureVerificationAlgorithm, UnixTime,
};
use rustls::server::ParsedCertificate;
use rustls::sign::SigningKey;
use rustls::time_provider::TimeProvider;
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, DigitallySignedStruct, Error, InvalidMessage,
    OtherError, RootCertStore, SignatureScheme,
};
use time::OffsetDateTime;
use webpki::{EndEntityCert, KeyUsage};

use super::endpoint::Endpoint;
use super::error::{LinkError, TlsFault};
use super::halves::{Handshake, Tls};
use super::socket::Socket;
use crate::sys::{clock, lock};

/// Fails before connecting if no certificate can be for this name.
pub(super) fn client(server: &Endpoint) -> Result<Handshake, LinkError> {
    let name = ServerName::try_from(server.bare_host().to_owned()).map_err(failed)?;
    Ok(Box::new(|socket| handshake(name, socket)))
}

/// Loads the system's certificates (or SSL_CERT_FILE, SSL_CERT_DIR) each time: they may have been repaired, and take
/// memory while loaded.
fn handshake(name: ServerName<'static>, socket: &mut Socket) -> Result<(Arc<dyn Tls>, String), LinkError> {
    let provider = Arc::new(CryptoProvider { key_provider: &NoKeys, ..ring::default_provider() });
    let roots = Arc::new(roots()?);
    let inner = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
    let algorithms = provider.signature_verification_algorithms.all;
    let verifier = Verifier { inner: inner.build().map_err(failed)?, roots, algorithms };
    let config = ClientConfig::builder_with_details(provider, Arc::new(WallClock))
        .with_safe_default_protocol_versions()
        .map_err(failed)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    let mut connection = ClientConnection::new(Arc::new(config), name).map_err(failed)?;
    while connection.is_handshaking() {
        connection.complete_io(socket).map_err(|e| match e.kind() {
            io::ErrorKind::TimedOut => LinkError::TimedOut("the TLS handshake"),
            io::ErrorKind::UnexpectedEof => failed("the server closed the connection"),
            _ => explained(&e),
        })?;
    }
    let version = connection.protocol_version().map_or_else(String::new, |version| format!("{version:?}"));
    let certificate =
        connection.peer_certificates().and_then(|all| described(all.first()?)).unwrap_or_default();
    Ok((Arc::new(Mutex::new(connection)), version + &certificate))
}

fn described(certificate: &CertificateDer<'_>) -> Option<String> {
    let certificate = EndEntityCert::try_from(certificate).ok()?;
    let names: Vec<_> = certificate.valid_dns_names().collect();
    let names = if names.is_empty() { "no DNS name".to_owned() } else { names.join(", ") };
    // webpki tells dates only in the error for a date, which it checks first.
    let refused = |at| {
        let at = UnixTime::since_unix_epoch(Duration::from_secs(at));
        certificate.verify_for_usage(&[], &[], &[], at, KeyUsage::server_auth(), None, None).err()
    };
    let Some(webpki::Error::CertExpired { not_after, .. }) = refused(u64::MAX) else { return None };
    let from = match refused(0) {
        Some(webpki::Error::CertNotValidYet { not_before, .. }) => not_before.as_secs(),
        _ => 0,
    };
    let day = |at| Some(OffsetDateTime::from_unix_timestamp(i64::try_from(at).ok()?).ok()?.date());
    Some(format!("; the certificate is for {names}, from {} to {}", day(from)?, day(not_after.as_secs())?))
}

fn failed(reason: impl ToString) -> LinkError {
    LinkError::Tls(reason.to_string(), TlsFault::Other)
}

/// Accepts what rustls does and, as Go does, a certificate that is itself trusted, whoever signed it, and one that is for
/// any purpose or for `*.lan`.
#[derive(Debug)]
struct Verifier {
    inner: Arc<WebPkiServerVerifier>,
    roots: Arc<RootCertStore>,
    algorithms: &'static [&'static dyn SignatureVerificationAlgorithm],
}

/// Refused even if trusted.
#[derive(Debug, thiserror::Error)]
#[error("the server's certificate is of a kind that can't be verified: {0}")]
struct Unverifiable(&'static str);

impl Verifier {
    /// webpki doesn't know anyExtendedKeyUsage (RFC 5280, 4.2.1.12).
    fn is_for_anything(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> bool {
        let usage = KeyUsage::required_if_present(b"\x55\x1d\x25\x00");
        EndEntityCert::try_from(certificate).is_ok_and(|certificate| {
            certificate
                .verify_for_usage(self.algorithms, &self.roots.roots, others, now, usage, None, None)
                .is_ok()
        })
    }

    /// Explains the error if ring cannot verify `certificate` or one of its issuers.
    fn named<T>(
        &self,
        result: Result<T, Error>,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
    ) -> Result<T, Error> {
        let small = |key: &[u8]| key.len() < SMALL_RSA_KEY && has(key, RSA);
        let uses_small = |certificate: &CertificateDer<'_>| {
            let Ok(certificate) = EndEntityCert::try_from(certificate) else { return false };
            let mut issuers = self.roots.roots.iter().filter(|root| *root.subject == *certificate.issuer());
            small(&certificate.subject_public_key_info())
                || issuers.any(|root| small(&root.subject_public_key_info))
        };
        result.map_err(|error| {
            let Error::InvalidCertificate(cause) = &error else { return error };
            let what = match cause {
                Signature { signature_algorithm_id: signature, .. } => algorithm(signature, &[]),
                ForKey { signature_algorithm_id: signature, public_key_algorithm_id: key } => {
                    algorithm(signature, key)
                }
                // ring reports small keys as bad signatures.
                BadSignature if uses_small(certificate) || others.iter().any(uses_small) => {
                    "an RSA key below 2048 bits"
                }
                Other(e) => match e.0.downcast_ref() {
                    Some(webpki::Error::UnsupportedCertVersion) => "X.509 before version 3",
                    Some(webpki::Error::CaUsedAsEndEntity) => {
                        "an authority's (CA:TRUE), which has to be trusted itself"
                    }
                    Some(webpki::Error::UnsupportedCriticalExtension) => {
                        "a critical extension that is unknown here, such as policies"
                    }
                    Some(webpki::Error::NameConstraintViolation) => {
                        "an issuer's name constraints, which exclude it or are on URIs or directories"
                    }
                    _ => return error,
                },
                _ => return error,
            };
            Other(OtherError(Arc::new(Unverifiable(what)))).into()
        })
    }
}

/// Names the algorithm that ring lacks.
fn algorithm(signature: &[u8], key: &[u8]) -> &'static str {
    // OIDs of RFC 5480 and RFC 5758.
    let has = |oid| has(signature, oid) || has(key, oid);
    if has(b"\x2b\x81\x04\x00\x23") {
        "a key on the curve P-521"
    } else if has(b"\x2a\x86\x48\xce\x3d\x04\x03\x04") {
        "ECDSA with SHA-512"
    } else {
        "a signature of an unusual algorithm, or with SHA-1"
    }
}

/// rsaEncryption (RFC 8017), in DER.
const RSA: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01";
/// Bytes of DER around the key. A key of 2048 bits takes at least 288.
const SMALL_RSA_KEY: usize = 280;

fn has(der: &[u8], oid: &[u8]) -> bool {
    der.windows(oid.len()).any(|part| part == oid)
}

/// Whether a star stands for the name's only label in front of the top-level domain: webpki wants two behind a star.
/// `presented` is in webpki's words.
fn in_top_level(presented: &[String], name: &ServerName<'_>) -> bool {
    let name = name.to_str();
    let domain = name.trim_end_matches('.').split_once('.').filter(|(_, domain)| !domain.contains('.'));
    domain.is_some_and(|(_, domain)| {
        let star = format!("DnsName(\"*.{domain}\")");
        presented.iter().any(|name| name.eq_ignore_ascii_case(&star))
    })
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.inner.verify_server_cert(end_entity, intermediates, name, ocsp_response, now);
        let verified = verified.or_else(|error| {
            let Error::InvalidCertificate(cause) = &error else { return Err(error) };
            let is_good = match cause {
                // webpki reports these errors after it has checked the dates; they are about the issuer, or a CA
                // certificate used by a server. Reading the store again is for rare cases cheaper than keeping it.
                BadSignature | UnknownIssuer | Signature { .. } | ForKey { .. } | Other(_) => {
                    rustls_native_certs::load_native_certs().certs.contains(end_entity)
                }
                InvalidPurposeContext { .. } => self.is_for_anything(end_entity, intermediates, now),
                // Checked last.
                NotValidForNameContext { .. } => true,
                _ => false,
            };
            if !is_good {
                return Err(error);
            }
            match verify_server_name(&ParsedCertificate::try_from(end_entity)?, name) {
                Err(Error::InvalidCertificate(NotValidForNameContext { presented, .. }))
                    if in_top_level(&presented, name) => {}
                other => other?,
            }
            Ok(ServerCertVerified::assertion())
        });
        self.named(verified, end_entity, intermediates)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.named(self.inner.verify_tls12_signature(message, certificate, signed), certificate, &[])
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.named(self.inner.verify_tls13_signature(message, certificate, signed), certificate, &[])
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

fn explained(error: &io::Error) -> LinkError {
    let (fault, text) = match error.get_ref().and_then(|e| e.downcast_ref()) {
        Some(Error::InvalidCertificate(e)) => match e {
            Expired | ExpiredContext { .. } | NotValidYetContext { .. } => (TlsFault::Dates, None),
            NotValidForNameContext { .. } => (TlsFault::Name, None),
            Other(e) if e.0.is::<Unverifiable>() => (TlsFault::Kind, Some(e.to_string())),
            // Such as a self-signed certificate.
            UnknownIssuer | BadSignature => (TlsFault::Issuer, None),
            // Such as one that is not for servers.
            _ => (TlsFault::Kind, None),
        },
        // The alert of a server that has no other certificate.
        Some(Error::AlertReceived(AlertDescription::HandshakeFailure)) => {
            let why =
                "handshake_failure, as if its key is on P-521, TLS below 1.2, or a client certificate wanted";
            (TlsFault::Kind, Some(format!("the server has no certificate or cipher for this agent: {why}")))
        }
        Some(Error::InvalidMessage(InvalidMessage::InvalidContentType)) => (TlsFault::NotTls, None),
        _ => (TlsFault::Other, None),
    };
    LinkError::Tls(text.unwrap_or_else(|| error.to_string()), fault)
}

/// There is no client certificate: ring's provider would add code to sign with any kind of key.
#[derive(Debug)]
struct NoKeys;

impl KeyProvider for NoKeys {
    fn load_private_key(&self, _: PrivateKeyDer<'static>) -> Result<Arc<dyn SigningKey>, Error> {
        Err(Error::General("no client certificates".to_owned()))
    }
}

/// rustls's clock panics from 2038 on 32-bit musl, as `SystemTime::now` does.
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
                // The TLS goodbye may be missing: the websocket has its own.
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                other => return other,
            }
            connection.read_tls(ciphertext)?;
            connection.process_new_packets().map_err(io::Error::other)?;
        }
    }

    fn encrypt(&self, plaintext: &[u8], ciphertext: &mut Vec<u8>) -> io::Result<()> {
        let mut connection = lock(self);
        connection.writer().write_all(plaintext)?;
        while connection.wants_write() {
            connection.write_tls(ciphertext)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    #[test]
    fn dates_and_names_of_a_certificate() {
        let describe = |names: &[&str], from, to| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let mut params = CertificateParams::new(names).unwrap();
            (params.not_before, params.not_after) = (date_time_ymd(from, 2, 3), date_time_ymd(to, 12, 31));
            let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
            let der = certificate.der().clone();
            // Cut anywhere, it is no certificate.
            assert!((0..der.len()).all(|length| described(&CertificateDer::from(&der[..length])).is_none()));
            described(&der).unwrap()
        };
        assert_eq!(
            describe(&["a.example", "*.b.example"], 1999, 2049),
            "; the certificate is for a.example, *.b.example, from 1999-02-03 to 2049-12-31"
        );
        let far = "; the certificate is for no DNS name, from 2026-02-03 to 2050-12-31";
        assert_eq!(describe(&["127.0.0.1"], 2026, 2050), far);
    }
}
