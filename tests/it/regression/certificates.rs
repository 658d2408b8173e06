//! Servers' certificates as openssl makes them.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::harness::device::Generation;
use crate::harness::doctor::{Office, text};
use crate::harness::front::Proxy;
use crate::harness::rig::Setup;
use crate::harness::server::{Server, closed_port};
use crate::harness::tls::{Identity, TlsFront};
use crate::harness::wait::{SOON, eventually, skip};
use crate::remote::{FAILED, shell_works};

/// A folder in which openssl makes certificates for 127.0.0.1.
struct Forge(tempfile::TempDir);

impl Forge {
    fn new() -> Option<Forge> {
        let there =
            Command::new("openssl").arg("version").output().is_ok_and(|output| output.status.success());
        if !there {
            skip("openssl is needed for certificates");
            return None;
        }
        Some(Forge(tempfile::tempdir().expect("a temporary directory")))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn openssl(&self, arguments: &str) {
        let mut command = Command::new("openssl");
        let output = command.args(arguments.split(' ')).current_dir(self.0.path()).output().expect("openssl");
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// NAME.pem, which signs itself, and NAME.key.
    fn own(&self, name: &str, key: &str, more: &str) -> Identity {
        self.openssl(&format!(
            "req -x509 -newkey {key} -nodes -days 30 -keyout {name}.key -out {name}.pem -subj /CN={name} \
             -addext subjectAltName=IP:127.0.0.1{more}"
        ));
        Identity::read(&self.path(&format!("{name}.pem")), &self.path(&format!("{name}.key")))
    }

    /// NAME.pem and NAME.key, signed by the issuer.
    fn signed(&self, name: &str, key: &str, issuer: &str, more: &str) -> (PathBuf, PathBuf) {
        std::fs::write(self.path("names"), "subjectAltName=IP:127.0.0.1\n").expect("write");
        self.openssl(&format!(
            "req -newkey {key} -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}"
        ));
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA {issuer}.pem -CAkey {issuer}.key -CAcreateserial -out {name}.pem{more}"
        ));
        (self.path(&format!("{name}.pem")), self.path(&format!("{name}.key")))
    }
}

const P256: &str = "ec -pkeyopt ec_paramgen_curve:P-256";
const EXTENSIONS: &str = " -extfile names";

/// What `openssl req -x509` makes is a CA's certificate, which rustls refuses at a server. Go takes any that is itself
/// among the trusted ones.
#[test]
fn a_certificate_that_is_itself_trusted_is_accepted() {
    let Some(forge) = Forge::new() else { return };
    let server = Server::start(Generation::New);
    forge.own("authority", P256, "");
    forge.signed("leaf", P256, "authority", EXTENSIONS);
    forge.signed("old", P256, "authority", " -extfile names -days -1");
    forge.own("ca", P256, "");
    forge.own("no-ca", "rsa:2048", " -addext basicConstraints=CA:FALSE");
    forge.own("sha512", P256, " -sha512");
    let attempt = |name: &str, host: &str, trusted: &str| {
        let identity =
            Identity::read(&forge.path(&format!("{name}.pem")), &forge.path(&format!("{name}.key")));
        let front = TlsFront::start(&identity, server.address());
        let url = format!("https://{host}:{}", front.port());
        let store = forge.path(&format!("{trusted}.pem"));
        let rig = Setup::new().url(&url).env("SSL_CERT_FILE", text(&store)).start();
        (front, rig)
    };
    // The leaf's issuer isn't trusted here.
    for name in ["ca", "no-ca", "sha512", "leaf"] {
        let _running = attempt(name, "127.0.0.1", name);
        shell_works(&server.next_device(SOON));
    }
    let before = server.requests().len();
    for (name, host, trusted) in [
        ("ca", "localhost", "ca"),
        ("ca", "127.0.0.1", "no-ca"),
        ("old", "127.0.0.1", "old"),
        ("old", "127.0.0.1", "ca"),
    ] {
        let (_front, rig) = attempt(name, host, trusted);
        let line = rig.daemon.wait_for_log(FAILED, SOON);
        assert!(line.contains("certificate"), "{name}: {line}");
    }
    assert_eq!(server.requests().len(), before, "the token was sent to a stranger");
}

/// `openssl s_server`, for keys that rustls can't serve, and its port, which no other test gets before it listens.
struct Served(Child, #[allow(dead_code, reason = "kept until the end")] TcpListener);

impl Served {
    fn start(certificate: &Path, key: &Path) -> (Served, u16) {
        let (closed, port) = closed_port();
        let child = Command::new("openssl")
            .args([
                "s_server",
                "-quiet",
                "-accept",
                &format!("127.0.0.1:{port}"),
                "-cipher",
                "ALL:@SECLEVEL=0",
            ])
            .args(["-cert", text(certificate), "-key", text(key)])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl s_server");
        let served = Served(child, closed);
        eventually(SOON, "openssl to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
        (served, port)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// ring verifies less than Go. The log called such certificates untrusted, though they were trusted.
#[test]
fn kinds_that_cannot_be_verified_are_named() {
    let Some(forge) = Forge::new() else { return };
    forge.own("authority", "rsa:2048", "");
    forge.own("p521", "ec -pkeyopt ec_paramgen_curve:P-521", "");
    forge.own("small", "rsa:1024", "");
    forge.own("strong", P256, "");
    let p521 = "ec -pkeyopt ec_paramgen_curve:P-521";
    for (name, key, issuer, more, words) in [
        ("key-p521", p521, "authority", EXTENSIONS, "P-521"),
        ("by-p521", P256, "p521", " -sha256 -extfile names", "P-521"),
        ("by-sha512", P256, "strong", " -sha512 -extfile names", "ECDSA with SHA-512"),
        ("key-1024", "rsa:1024", "authority", EXTENSIONS, "RSA key below 2048 bits"),
        ("by-1024", P256, "small", EXTENSIONS, "RSA key below 2048 bits"),
        ("version-1", P256, "authority", "", "X.509 before version 3"),
    ] {
        let (certificate, private) = forge.signed(name, key, issuer, more);
        let (_served, port) = Served::start(&certificate, &private);
        let store = forge.path(&format!("{issuer}.pem"));
        let url = format!("https://127.0.0.1:{port}");
        let rig = Setup::new().url(&url).env("SSL_CERT_FILE", text(&store)).start();
        let line = rig.daemon.wait_for_log(FAILED, SOON);
        assert!(line.contains(words), "{name}: {line}");
        let (found, advice) = Office::at(&url).env("SSL_CERT_FILE", text(&store)).ask().assert_break("tls");
        assert!(found.contains(words) && advice.contains("P-384"), "{name}: {found}: {advice}");
    }
}

/// doctor told to trust an issuer that was trusted, whatever else was wrong with a certificate. The one of a CA is what
/// some of openssl's own examples make of a server's. Policies and constraints had the advice on keys alone.
#[test]
fn a_trusted_issuer_is_not_said_to_be_unknown() {
    let Some(forge) = Forge::new() else { return };
    forge.own("authority", P256, "");
    forge.own("bound", P256, " -addext nameConstraints=permitted;URI:.example");
    for (name, issuer, extension, words) in [
        ("ca", "authority", "basicConstraints=CA:TRUE", "an authority's (CA:TRUE), which has to be trusted"),
        ("client", "authority", "extendedKeyUsage=clientAuth", "client authentication"),
        ("policies", "authority", "certificatePolicies=critical,2.5.29.32.0", "a critical extension"),
        ("uri", "bound", "subjectAltName=IP:127.0.0.1,URI:https://a.example/", "name constraints"),
    ] {
        std::fs::write(forge.path("more"), format!("subjectAltName=IP:127.0.0.1\n{extension}\n")).unwrap();
        let (certificate, key) = forge.signed(name, P256, issuer, " -extfile more");
        let (_served, port) = Served::start(&certificate, &key);
        let office = Office::at(&format!("https://127.0.0.1:{port}"));
        let store = forge.path(&format!("{issuer}.pem"));
        let (found, advice) = office.env("SSL_CERT_FILE", text(&store)).ask().assert_break("tls");
        assert!(found.contains(words) && advice.contains("serverAuth"), "{name}: {found}: {advice}");
        assert!(advice.contains("name constraints"), "{name}: {advice}");
    }
}

/// webpki refuses both, Go takes them.
#[test]
fn a_certificate_may_be_for_any_purpose_or_for_all_of_a_top_level_domain() {
    let Some(forge) = Forge::new() else { return };
    let server = Server::start(Generation::New);
    forge.own("authority", P256, "");
    let attempt = |name: &str, host: &str, trusted: &str| {
        let identity =
            Identity::read(&forge.path(&format!("{name}.pem")), &forge.path(&format!("{name}.key")));
        let front = TlsFront::start(&identity, server.address());
        let proxy = Proxy::start(([127, 0, 0, 1], front.port()).into());
        let store = forge.path(&format!("{trusted}.pem"));
        let setup = Setup::new().url(&format!("https://{host}")).env("SSL_CERT_FILE", text(&store));
        let rig = setup.env("HTTPS_PROXY", &format!("http://{}", proxy.authority())).start();
        (front, proxy, rig)
    };
    for (name, extensions) in [
        ("any", "subjectAltName=DNS:server.lan\nextendedKeyUsage=anyExtendedKeyUsage\n"),
        ("domain", "subjectAltName=DNS:*.LAN\n"),
    ] {
        std::fs::write(forge.path("more"), extensions).expect("write");
        forge.signed(name, P256, "authority", " -extfile more");
        let _running = attempt(name, "server.lan", "authority");
        shell_works(&server.next_device(SOON));
    }
    let _running = attempt("domain", "Server.lan", "domain");
    shell_works(&server.next_device(SOON));

    forge.own("stranger", P256, "");
    let before = server.requests().len();
    for (name, host, trusted) in [
        ("any", "other.lan", "authority"),
        ("any", "server.lan", "stranger"),
        ("domain", "server.lan", "stranger"),
        ("domain", "lan", "authority"),
        ("domain", "a.server.lan", "authority"),
        ("domain", "server.example", "authority"),
    ] {
        let (_front, _proxy, rig) = attempt(name, host, trusted);
        let line = rig.daemon.wait_for_log(FAILED, SOON);
        assert!(line.contains("certificate"), "{name}: {line}");
    }
    assert_eq!(server.requests().len(), before, "the token was sent to a stranger");
}
