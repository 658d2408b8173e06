//! What is between the agent and its server: proxies, and what they make of the upgrade.

use crate::harness::device::Generation;
use crate::harness::doctor::Office;
use crate::harness::front::Socks;
use crate::harness::rig::Setup;
use crate::harness::server::{Reply, Server};
use crate::harness::wait::SOON;
use crate::remote::FAILED;

const SERVER: &str = "http://device.example";

/// Balancers and proxies answer with lists, with headers twice, in any case, and with many of their own (RFC 6455, 4.1).
/// The agent refused most of these, Mender's own takes them.
#[test]
fn an_upgrade_may_be_worded_in_many_ways() {
    let accept = "Sec-WebSocket-Accept: {accept}\r\n";
    let plain =
        format!("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n{accept}");
    let heads = [
        format!("HTTP/1.1 101 x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n{accept}\r\n"),
        format!(
            "HTTP/1.1 101 x\r\nCONNECTION: keep-alive\r\nconnection: UPGRADE\r\nupgrade: h2c\r\n\
             UPGRADE: websocket\r\n{accept}\r\n"
        ),
        format!("{plain}{}\r\n", "X-Via: balancer\r\n".repeat(200)),
        format!("{plain}\r\n").replace('\r', ""),
        format!("{plain}\r\n").replace("HTTP/1.1 101", "HTTP/1.1  101"),
        format!("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n{plain}\r\n"),
        format!("{plain}Sec-WebSocket-Protocol: binary\r\n\r\n"),
        // More than 16 KiB were too long an answer.
        format!("{plain}Content-Security-Policy: {}\r\n\r\n", "x".repeat(60 << 10)),
        // golang/go#34540
        format!("{plain}X-Powered-By : balancer\r\n\r\n"),
    ];
    let server = Server::start(Generation::New);
    for head in heads {
        let warned = usize::from(head.contains("Protocol: binary"));
        server.script([Reply::Head(head)]);
        let rig = Setup::new().url(&server.url()).start();
        server.next_device(SOON);
        rig.daemon.wait_for_log("Connection established", SOON);
        assert_eq!((rig.daemon.count_log(FAILED), rig.daemon.count_log("subprotocol")), (0, warned));
    }
}

/// A server's http URL that leads beyond the device means that the token goes out in clear. Only doctor said so.
#[test]
fn a_token_in_clear_is_warned_of_once_a_connection() {
    let server = Server::start(Generation::New);
    let proxy = Socks::start(server.address(), None, 0);
    let rig = Setup::new().url(SERVER).env("HTTP_PROXY", &format!("socks5://{}", proxy.authority())).start();
    server.next_device(SOON);
    rig.daemon.wait_for_log("Connection established", SOON);
    assert_eq!(rig.daemon.count_log("level=warning msg=\"http: whoever is in between"), 1);
    let (rig, _device) = Setup::new().connected();
    assert_eq!(rig.daemon.count_log("whoever is in between"), 0, "the device itself is no stranger");
}

/// Go's clients take a SOCKS5 proxy where they take any, so devices behind one were lost by the migration.
#[test]
fn socks_proxies_lead_to_the_server() {
    let server = Server::start(Generation::New);
    let open = Socks::start(server.address(), None, 0);
    let _rig = Setup::new().url(SERVER).env("HTTP_PROXY", &format!("socks5://{}", open.authority())).start();
    server.next_device(SOON);
    assert_eq!(open.asked(), ["device.example:80"], "the proxy looks the name up");
    let closed = Socks::start(server.address(), Some(("us@er", "p:w")), 0);
    let url = format!("socks5h://us%40er:p%3Aw@{}", closed.authority());
    let rig = Setup::new().url(&format!("{SERVER}:81")).env("http_proxy", &url).start();
    server.next_device(SOON);
    assert_eq!(closed.asked(), ["device.example:81"]);
    drop(rig);
}

/// Each refusal names the proxy and its reason, and no password.
#[test]
fn refusals_of_socks_proxies_are_told() {
    let server = Server::start(Generation::New);
    for (login, code, why) in [
        (Some(("user", "other")), 0, "user or password is wrong"),
        (None, 2, "connection not allowed by ruleset"),
        (None, 4, "host unreachable"),
    ] {
        let proxy = Socks::start(server.address(), login, code);
        let url = format!("socks5://user:secret@{}", proxy.authority());
        let rig = Setup::new().url(SERVER).env("HTTP_PROXY", &url).start();
        let line = rig.daemon.wait_for_log(&format!("proxy: {}: {why}", proxy.authority()), SOON);
        assert!(!line.contains("secret"), "{line}");
        let findings = Office::at(SERVER).env("HTTP_PROXY", &url).ask();
        let (found, advice) = findings.assert_break("proxy");
        assert!(found.contains(why) && advice.contains("socks5://"), "{found}: {advice}");
        assert!(!findings.0.to_string().contains("secret"), "{findings:?}");
    }
    let proxy = Socks::start(server.address(), None, 0);
    let findings = Office::at(SERVER).env("HTTP_PROXY", &format!("socks5://{}", proxy.authority())).ask();
    assert_eq!(findings.found("proxy"), format!("{} leads to the server, by SOCKS5", proxy.authority()));
}
