//! Servers that speak TLS themselves, without mender-auth's forwarder in between.

use std::path::Path;

use crate::harness::aftermath::assert_healthy;
use crate::harness::client::{Style, Terminal};
use crate::harness::daemon::emulated;
use crate::harness::device::Generation;
use crate::harness::front::Proxy;
use crate::harness::rig::Setup;
use crate::harness::server::Server;
use crate::harness::tls::{Authority, Identity, TlsFront};
use crate::harness::wait::{SOON, secs, skip};
use crate::remote::{FAILED, shell_works};

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn tls_with_a_trusted_certificate() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let authority = Authority::new();
    let ca = authority.write(dir.path());
    let server = Server::start(Generation::New);
    let front = TlsFront::start(&authority.identity(&["localhost", "127.0.0.1"]), server.address());
    for host in ["localhost", "127.0.0.1"] {
        let url = format!("https://{host}:{}", front.port());
        let rig = Setup::new().url(&url).env("SSL_CERT_FILE", text(&ca)).start();
        let device = server.device();
        assert_eq!(device.request().header("Host"), Some(format!("{host}:{}", front.port()).as_str()));
        rig.daemon.wait_for_log(&format!("Connection established with {url}"), SOON);
        shell_works(&device);
    }
}

#[test]
fn tls_carries_long_output_whole() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let authority = Authority::new();
    let ca = authority.write(dir.path());
    let server = Server::start(Generation::New);
    let front = TlsFront::start(&authority.identity(&["127.0.0.1"]), server.address());
    let url = format!("https://127.0.0.1:{}", front.port());
    let _rig = Setup::new().url(&url).env("SSL_CERT_FILE", text(&ca)).start();
    let mut terminal = Terminal::new(&server.device(), Style::Cli);
    terminal.open_with_prompt();
    let output = terminal.run_within("seq 1 20000", secs(30));
    assert!(output.lines().map(str::to_owned).eq((1..=20_000).map(|n| n.to_string())));
}

#[test]
fn a_certificate_directory_is_honoured() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let certs = dir.path().join("certs");
    std::fs::create_dir(&certs).expect("a directory");
    let authority = Authority::new();
    // The name openssl's rehash would give it doesn't matter: every file counts or the hash does.
    let ca = authority.write(&certs);
    std::fs::rename(&ca, certs.join("00000000.0")).expect("rename");
    let server = Server::start(Generation::New);
    let front = TlsFront::start(&authority.identity(&["127.0.0.1"]), server.address());
    let url = format!("https://127.0.0.1:{}", front.port());
    let _rig = Setup::new().url(&url).env("SSL_CERT_DIR", text(&certs)).start();
    shell_works(&server.device());
}

/// Containers pass on a variable that isn't set as an empty one. It was taken for a file, so that nothing was trusted.
#[test]
fn an_empty_variable_leaves_the_systems_certificates() {
    if !Path::new("/etc/ssl/certs/ca-certificates.crt").exists() {
        return skip("ca-certificates isn't installed");
    }
    if emulated("it has threads of its own, and with threads no variable is unset") {
        return;
    }
    let server = Server::start(Generation::New);
    let front = TlsFront::start(&Authority::new().identity(&["127.0.0.1"]), server.address());
    let url = format!("https://127.0.0.1:{}", front.port());
    let rig = Setup::new().url(&url).env("SSL_CERT_FILE", "").start();
    let line = rig.daemon.wait_for_log(FAILED, SOON);
    assert!(line.contains("UnknownIssuer"), "{line}");
}

#[test]
fn untrusted_certificates_are_refused() {
    let authority = Authority::new();
    let names = ["127.0.0.1"];
    for (what, identity) in [
        ("expired", authority.valid(&names, 2019, 2020)),
        ("another name", authority.identity(&["device.example"])),
        ("self-signed", Identity::self_signed(&names)),
        ("another authority", Authority::new().identity(&names)),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let ca = authority.write(dir.path());
        let server = Server::start(Generation::New);
        let front = TlsFront::start(&identity, server.address());
        let url = format!("https://127.0.0.1:{}", front.port());
        let mut rig = Setup::new().url(&url).env("SSL_CERT_FILE", text(&ca)).start();
        let line = rig.daemon.wait_for_log(FAILED, SOON);
        assert!(line.to_lowercase().contains("certificate"), "{what}: the log says why: {line}");
        front.wait_failure(SOON);
        assert!(server.requests().is_empty(), "{what}: the token was sent to a stranger");
        let good = TlsFront::start(&authority.identity(&names), server.address());
        rig.manager.change("new", &format!("https://127.0.0.1:{}", good.port()));
        let device = server.device();
        assert_healthy(&mut rig, &device);
    }
}

#[test]
fn a_plain_server_behind_https_is_refused() {
    let server = Server::start(Generation::New);
    let rig = Setup::new().url(&server.url().replace("http:", "https:")).start();
    rig.daemon.wait_for_log(FAILED, SOON);
    assert!(server.requests().is_empty());
}

#[test]
fn https_goes_through_its_own_proxy_variable() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let authority = Authority::new();
    let ca = authority.write(dir.path());
    let server = Server::start(Generation::New);
    let front = TlsFront::start(&authority.identity(&["device.example"]), server.address());
    let proxy = Proxy::start(format!("127.0.0.1:{}", front.port()).parse().expect("an address"));
    let wrong = Proxy::start(server.address());
    let rig = Setup::new()
        .url("https://device.example")
        .env("SSL_CERT_FILE", text(&ca))
        .env("HTTPS_PROXY", &format!("http://{}", proxy.authority()))
        .env("HTTP_PROXY", &format!("http://{}", wrong.authority()))
        .start();
    let device = server.device();
    assert_eq!(proxy.requests()[0].path, "device.example:443");
    assert!(wrong.requests().is_empty());
    rig.daemon.wait_for_log("Connection established with https://device.example", SOON);
    shell_works(&device);
}
