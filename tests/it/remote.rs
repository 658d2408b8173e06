//! Servers that aren't on loopback: TLS and proxies.

use std::path::Path;

use data_encoding::BASE64;

use crate::harness::client::{Style, Terminal};
use crate::harness::device::{Device, Generation};
use crate::harness::front::Proxy;
use crate::harness::rig::{Rig, Setup};
use crate::harness::server::Server;
use crate::harness::tls::{Authority, Identity, TlsFront};
use crate::harness::wait::{SOON, millis, secs};

const FAILED: &str = "connection manager failed to connect";

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn shell_works(device: &Device) {
    let mut terminal = Terminal::new(device, Style::Gui);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("seq 1 2000 | tail -n 1"), "2000");
    terminal.stop();
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

#[test]
fn untrusted_certificates_are_refused() {
    let authority = Authority::new();
    let names = ["127.0.0.1"];
    for (what, identity) in [
        ("expired", authority.expired(&names)),
        ("another name", authority.identity(&["device.example"])),
        ("self-signed", Identity::self_signed(&names)),
        ("another authority", Authority::new().identity(&names)),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let ca = authority.write(dir.path());
        let server = Server::start(Generation::New);
        let front = TlsFront::start(&identity, server.address());
        let url = format!("https://127.0.0.1:{}", front.port());
        let rig = Setup::new().url(&url).env("SSL_CERT_FILE", text(&ca)).start();
        let line = rig.daemon.wait_for_log(FAILED, SOON);
        assert!(line.to_lowercase().contains("certificate"), "{what}: the log says why: {line}");
        front.wait_failure(SOON);
        assert!(server.requests().is_empty(), "{what}: the token was sent to a stranger");
    }
}

#[test]
fn a_plain_server_behind_https_is_refused() {
    let server = Server::start(Generation::New);
    let rig = Setup::new().url(&server.url().replace("http:", "https:")).start();
    rig.daemon.wait_for_log(FAILED, SOON);
    assert!(server.requests().is_empty());
}

/// A rig whose server is reached through a proxy only; variables are NAME=value with the proxy's
/// address for `{}`.
fn proxied(url: &str, variables: &[(&str, &str)]) -> (Rig, Server, Proxy) {
    let server = Server::start(Generation::New);
    let proxy = Proxy::start(server.address());
    let mut setup = Setup::new().url(url).set("ReconnectIntervalSeconds", 1);
    for (name, value) in variables {
        setup = setup.env(name, &value.replace("{}", &proxy.authority()));
    }
    (setup.start(), server, proxy)
}

#[test]
fn a_proxy_leads_to_a_remote_server() {
    let remote = "http://device.example:8080";
    for variable in ["HTTP_PROXY", "http_proxy"] {
        let (rig, server, proxy) = proxied(remote, &[(variable, "http://{}")]);
        let device = server.device();
        let request = proxy.wait_requests(1, SOON).remove(0);
        assert_eq!((request.method.as_str(), request.path.as_str()), ("CONNECT", "device.example:8080"));
        assert_eq!(request.header("Host"), Some("device.example:8080"));
        assert_eq!(request.header("Proxy-Authorization"), None);
        assert_eq!(request.header("Authorization"), None, "the token is not for the proxy");
        assert_eq!(device.request().header("Host"), Some("device.example:8080"));
        assert_eq!(device.request().header("Proxy-Authorization"), None);
        rig.daemon.wait_for_log(&format!("Connection established with {remote}"), SOON);
        shell_works(&device);
    }
}

#[test]
fn the_default_port_is_spelled_out_for_the_proxy() {
    let (_rig, server, proxy) = proxied("http://device.example", &[("HTTP_PROXY", "{}")]);
    assert_eq!(proxy.wait_requests(1, SOON)[0].path, "device.example:80");
    assert_eq!(server.device().request().header("Host"), Some("device.example"));
}

#[test]
fn proxy_credentials_are_sent_and_kept_secret() {
    let (rig, server, proxy) =
        proxied("http://device.example", &[("HTTP_PROXY", "http://user:p%40ss%3Aword@{}")]);
    server.device();
    let expected = format!("Basic {}", BASE64.encode(b"user:p@ss:word"));
    assert_eq!(proxy.requests()[0].header("Proxy-Authorization"), Some(expected.as_str()));
    let log = rig.daemon.log().join("\n");
    assert!(!log.contains("p@ss") && !log.contains("p%40ss"), "the password is in the log");
}

#[test]
fn a_refusing_proxy_is_reported_and_retried() {
    for status in [403, 407, 502] {
        let server = Server::start(Generation::New);
        let proxy = Proxy::start(server.address());
        proxy.refuse(Some(status));
        let rig = Setup::new()
            .url("http://device.example")
            .set("ReconnectIntervalSeconds", 1)
            .env("HTTP_PROXY", &format!("http://{}", proxy.authority()))
            .start();
        let line = rig.daemon.wait_for_log(FAILED, SOON);
        assert!(line.contains(&status.to_string()), "the status is named: {line}");
        proxy.refuse(None);
        server.next_device(secs(20));
    }
}

#[test]
fn loopback_is_never_proxied() {
    let proxy_target = Server::start(Generation::New);
    let proxy = Proxy::start(proxy_target.address());
    let server = Server::start(Generation::New);
    let port = server.address().port();
    for url in [format!("http://127.0.0.1:{port}"), format!("http://localhost:{port}")] {
        let address = format!("http://{}", proxy.authority());
        let _rig = Setup::new().url(&url).env("HTTP_PROXY", &address).env("HTTPS_PROXY", &address).start();
        server.device();
        assert!(proxy.requests().is_empty(), "{url}");
    }
}

#[test]
fn no_proxy_exempts_hosts() {
    for (exempt, url) in [
        ("device.invalid", "http://device.invalid"),
        ("other.invalid, .invalid", "http://device.invalid"),
        ("invalid", "http://sub.device.invalid"),
        ("device.invalid:81", "http://device.invalid:81"),
        ("*", "http://device.invalid"),
    ] {
        let (_rig, server, proxy) = proxied(url, &[("HTTP_PROXY", "http://{}"), ("NO_PROXY", exempt)]);
        // The failure itself may take as long as the resolver likes.
        server.no_device(millis(1000), "nothing but the proxy leads there");
        assert!(proxy.requests().is_empty(), "NO_PROXY={exempt} exempts {url}");
    }
    for (exempt, url) in [
        ("other.example", "http://device.example"),
        ("vice.example", "http://device.example"),
        ("device.example:81", "http://device.example"),
    ] {
        let (_rig, server, proxy) = proxied(url, &[("HTTP_PROXY", "http://{}"), ("NO_PROXY", exempt)]);
        server.device();
        assert_eq!(proxy.requests().len(), 1, "NO_PROXY={exempt} says nothing about {url}");
    }
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

#[test]
fn a_proxy_that_is_away_is_reported() {
    let rig = Setup::new().url("http://device.example").env("HTTP_PROXY", "http://127.0.0.1:9").start();
    rig.daemon.wait_for_log(FAILED, SOON);
    rig.server.no_device(millis(100), "there is no way to it");
}
