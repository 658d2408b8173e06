//! Servers that only a proxy leads to.

use data_encoding::BASE64;

use crate::harness::aftermath::assert_healthy;
use crate::harness::client::{Style, Terminal};
use crate::harness::device::{Device, Generation};
use crate::harness::front::Proxy;
use crate::harness::rig::{Rig, Setup};
use crate::harness::server::Server;
use crate::harness::wait::{SOON, millis, secs};

pub const FAILED: &str = "connection manager failed to connect";

pub fn shell_works(device: &Device) {
    let mut terminal = Terminal::new(device, Style::Gui);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("seq 1 2000 | tail -n 1"), "2000");
    terminal.stop();
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
        let mut rig = Setup::new()
            .url("http://device.example")
            .set("ReconnectIntervalSeconds", 1)
            .env("HTTP_PROXY", &format!("http://{}", proxy.authority()))
            .start();
        let line = rig.daemon.wait_for_log(FAILED, SOON);
        assert!(line.contains(&status.to_string()), "the status is named: {line}");
        proxy.refuse(None);
        let device = server.next_device(secs(20));
        assert_healthy(&mut rig, &device);
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
fn a_proxy_that_is_away_is_reported() {
    let rig = Setup::new().url("http://device.example").env("HTTP_PROXY", "http://127.0.0.1:9").start();
    rig.daemon.wait_for_log(FAILED, SOON);
    rig.server.no_device(millis(100), "there is no way to it");
}
