//! The command `doctor` on its way to the server: each step that can fail, and what it says then.

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};

use crate::harness::dns::{self, NameServer};
use crate::harness::doctor::{Findings, Office, now, token};
use crate::harness::front::{Acceptor, Proxy};
use crate::harness::http;
use crate::harness::server::{Reply, closed_port};
use crate::harness::wait::{skip, spawn};
use crate::harness::wire;

#[test]
fn urls_that_mean_nothing() {
    for (url, words) in [
        ("nonsense", "malformed server URL: no scheme"),
        ("ftp://127.0.0.1", "unknown scheme \"ftp\""),
        ("http://", "malformed server URL"),
        ("http://a\x1b[2Jb", "malformed server URL"),
    ] {
        let (found, advice) = Office::at(url).ask().assert_break("server");
        assert!(found.contains(words) && advice.contains("https://NAME"), "{found}: {advice}");
    }
}

#[test]
fn a_password_in_the_url_is_not_told() {
    let office = Office::open();
    let address = office.server.address();
    office.manager.set(&office.token, &format!("http://user:password@{address}/path"));
    let findings = office.ask();
    findings.assert_good();
    assert!(!findings.0.to_string().contains("password"), "{findings:?}");
}

#[test]
fn names() {
    let (found, advice) = Office::at("https://device.invalid").ask().assert_break(if cfg!(feature = "tls") {
        "dns"
    } else {
        "tls"
    });
    assert!(!found.is_empty() && !advice.is_empty());

    let office = Office::open();
    office.manager.set(&office.token, &office.server.url().replace("127.0.0.1", "localhost"));
    let findings = office.ask();
    findings.assert_good();
    assert!(findings.found("dns").contains("127.0.0.1"), "{findings:?}");
}

#[test]
fn names_of_a_name_server() {
    if let Some(why) = dns::obstacle() {
        return skip(why);
    }
    let elsewhere = Ipv4Addr::new(127, 0, 0, 2);
    let known = dns::Answer::Addresses(vec![elsewhere, Ipv4Addr::LOCALHOST]);
    let names = NameServer::start(&[("both.test", known)]);
    let office = Office::open();
    let port = office.server.address().port();
    let findings = office.ask_by_name("both.test", &names);
    findings.assert_good();
    for address in ["127.0.0.1", "127.0.0.2"] {
        assert!(findings.found("dns").contains(address), "{findings:?}");
    }
    assert_eq!(findings.found("tcp"), format!("connected to 127.0.0.1:{port}"));
    assert!(findings.warnings("server").contains("http: whoever is in between"), "{findings:?}");
    let (found, advice) = office.ask_by_name("none.test", &names).assert_break("dns");
    assert!(found.starts_with("lookup none.test: ") && advice.contains("getent hosts none.test"), "{advice}");
}

#[test]
fn ports_where_nobody_listens() {
    let (_closed, port) = closed_port();
    for host in ["127.0.0.1", "localhost"] {
        let findings = Office::at(&format!("http://{host}:{port}")).ask();
        let (found, advice) = findings.assert_break("tcp");
        assert!(!findings.warnings("tcp").contains(&found), "it is said once: {findings:?}");
        assert!(found.contains("connection refused") && advice.contains("mender-authd"), "{found}: {advice}");
    }
}

#[test]
fn proxies() {
    let office = Office::at("http://device.example");
    let proxy = Proxy::start(office.server.address());
    let office = office.env("HTTP_PROXY", &format!("http://user:word@{}", proxy.authority()));
    let findings = office.ask();
    findings.assert_good();
    assert_eq!(
        findings.found("proxy"),
        format!("{} leads to the server, by HTTP CONNECT", proxy.authority())
    );
    assert!(findings.found("dns").contains("the proxy"), "{findings:?}");
    assert!(!findings.0.to_string().contains("word"), "{findings:?}");
    proxy.refuse(Some(407));
    let (found, advice) = office.ask().assert_break("proxy");
    assert!(found.contains("HTTP status 407") && advice.contains("HTTP_PROXY"), "{found}: {advice}");

    let wrong = Office::at("http://device.example").env("http_proxy", "ftp://127.0.0.1");
    let (found, _) = wrong.ask().assert_break("proxy");
    assert!(found.contains("scheme other than http, socks5"), "{found}");
    let (_closed, port) = closed_port();
    let away = Office::at("http://device.example").env("HTTP_PROXY", &format!("127.0.0.1:{port}"));
    let (found, advice) = away.ask().assert_break("tcp");
    assert!(found.contains("connection refused") && advice.contains("HTTPS_PROXY"), "{found}: {advice}");
    let around = Office::open().env("HTTP_PROXY", "127.0.0.1:1").env("NO_PROXY", "*").ask();
    around.assert_good();
    assert_eq!(around.found("proxy"), "none for this server, HTTP_PROXY, NO_PROXY notwithstanding");
    let unset = Office::open().env("HTTP_PROXY", "").env("no_proxy", "localhost").ask();
    assert_eq!(unset.found("proxy"), "none, no variable names one");
}

/// What a handshake gets, the words of what was found, those of the advice.
fn answers() -> Vec<(Reply, &'static str, &'static str)> {
    let to = |place| Reply::with(301, "Location", place);
    vec![
        (Reply::status(401), "HTTP status 401", "accepted there"),
        (Reply::status(403), "HTTP status 403", "firewall"),
        (Reply::status(404), "HTTP status 404", "Is it a Mender server?"),
        (Reply::status(413), "HTTP status 413", "too large"),
        (Reply::status(429), "HTTP status 429", "too much to do"),
        (Reply::status(500), "HTTP status 500", "see its log"),
        // RFC 6585, section 6.
        (Reply::status(511), "HTTP status 511", "login page"),
        (Reply::status(200), "HTTP status 200", "login page"),
        (to("https://elsewhere"), "HTTP status 301", "begin with https://"),
        (to("http://elsewhere"), "HTTP status 301", "Redirects aren't followed"),
        (Reply::Close, "closed without an answer", "can't reach its server"),
        (Reply::Garbage, "no HTTP", "Something else listens"),
    ]
}

#[test]
fn answers_that_are_no_websocket() {
    let office = Office::open();
    let more = [
        (Reply::status(400), "HTTP status 400", "headers of a websocket"),
        (Reply::status(503), "HTTP status 503", "mender-client before 4.0"),
        (Reply::WrongAccept, "Sec-WebSocket-Accept", "Is it a Mender server?"),
    ];
    for (reply, words, hint) in answers().into_iter().chain(more) {
        office.server.always(reply);
        let (found, advice) = office.ask().assert_break("upgrade");
        assert!(found.contains(words) && advice.contains(hint), "{found}: {advice}");
    }
}

/// The same beside an agent that is connected.
#[test]
fn answers_to_a_plain_request() {
    let office = Office::open();
    for (reply, words, hint) in answers() {
        office.server.always(reply);
        let (found, advice) = office.ask_beside("connected").assert_break("upgrade");
        assert!(found.contains(words) && advice.contains(hint), "{found}: {advice}");
    }
    // The forwarder of a Mender client before 4.0 says 503 to a second websocket.
    for status in [400, 426, 503] {
        office.server.always(Reply::status(status));
        office.ask_beside("connected").assert_good();
    }
}

/// Each takes 45 s, so they are asked at the same time.
#[test]
fn servers_that_do_not_answer() {
    let asked = ["waiting", "connected"].map(|state| {
        spawn("doctor", move || {
            let office = Office::open();
            office.server.always(Reply::Silence);
            let (found, advice) = office.ask_beside(state).assert_break("upgrade");
            assert!(found.contains("timed out") && advice.contains("journalctl"), "{found}: {advice}");
        })
    });
    match dns::obstacle() {
        Some(why) => skip(why),
        None => {
            let names = NameServer::start(&[("silent.test", dns::Answer::Silence)]);
            let office = Office::at("http://silent.test").env("RESOLVER", dns::PATIENT);
            office.tells("waiting");
            let (found, advice) = office.run(names.asked_by(&office.command(&[]))).assert_break("dns");
            assert!(found.contains("timed out") && advice.contains("resolv.conf"), "{found}: {advice}");
        }
    }
    asked.into_iter().for_each(|asked| asked.join().expect("doctor"));
}

#[test]
fn a_refused_token_that_has_expired() {
    let mut office = Office::open();
    office.token = token(now() - 100);
    office.manager.set(&office.token, &office.server.url());
    office.server.always(Reply::status(401));
    let (_, advice) = office.ask().assert_break("upgrade");
    assert!(
        advice.contains("has expired by this device's clock, which says ") && advice.contains("GMT"),
        "{advice}"
    );
}

#[test]
fn clocks_that_differ() {
    let office = Office::open();
    for (date, off) in [("Sun, 06 Nov 1994 08:49:37 GMT", true), ("nonsense", false)] {
        for (status, state) in [(400, "connected"), (401, "connected"), (401, "waiting")] {
            office.server.always(Reply::with(status, "Date", date));
            let findings = office.ask_beside(state);
            assert_eq!(findings.warnings("upgrade").contains("clock is off by"), off, "{findings:?}");
        }
    }
}

/// A server may say anything.
#[test]
fn words_of_the_server_are_not_repeated() {
    let office = Office::open();
    for place in [format!("https://{}", office.token), "https://\x1b[2J".to_owned()] {
        office.server.always(Reply::with(302, "Location", &place));
        for state in ["waiting", "connected"] {
            // Which looks for the token.
            let findings = office.ask_beside(state);
            findings.assert_break("upgrade");
            assert!(!findings.0.to_string().contains("[2J"), "{findings:?}");
        }
    }
}

/// Which something in between does that knows no websockets.
#[test]
fn websockets_that_lead_nowhere() {
    let ask = |then: &'static [u8]| -> Findings {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let nowhere = Acceptor::start("nowhere", listener, move |mut stream| {
            let request = http::read_request(&mut stream).expect("a request");
            let key = request.header("Sec-WebSocket-Key").expect("a key");
            let accept = tungstenite::handshake::derive_accept_key(key.as_bytes());
            let headers =
                [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", &accept)];
            let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned()));
            http::respond(&mut stream, 101, &headers, None);
            stream.write_all(then).expect("write");
        });
        Office::at(&format!("http://{}", nowhere.address())).ask()
    };
    let reason = b"\x03\xf0go away";
    let close = wire::encode(true, wire::CLOSE, reason).leak();
    for (then, words) in [(&b""[..], "lost"), (close, "closed by the server: 1008")] {
        let (found, advice) = ask(then).assert_break("round-trip");
        assert!(found.contains(words) && !found.contains("go away"), "{found}");
        assert!(advice.contains("know websockets"), "{advice}");
    }
}

#[cfg(feature = "tls")]
mod tls {
    use super::*;
    use crate::harness::doctor::text;
    use crate::harness::tls::{Authority, Identity, TlsFront};
    use crate::harness::wait::SOON;

    /// A device whose server shows this, and who trusts this authority.
    fn office(identity: &Identity, authority: &Authority, host: &str) -> (Office, TlsFront) {
        let office = Office::open();
        let front = TlsFront::start(identity, office.server.address());
        office.manager.set(&office.token, &format!("https://{host}:{}", front.port()));
        let ca = authority.write(office.dir.path());
        (office.env("SSL_CERT_FILE", text(&ca)), front)
    }

    #[test]
    fn a_good_certificate() {
        let authority = Authority::new();
        let (office, _front) = office(&authority.identity(&["localhost"]), &authority, "localhost");
        let findings = office.ask();
        findings.assert_good();
        let tls = "TLSv1_3; the certificate is for localhost, from 1975-01-01 to 4096-01-01; issuer, name and dates";
        assert!(findings.found("tls").starts_with(tls), "{findings:?}");
        assert!(office.server.device().wait_close(SOON).is_some());
        office.ask_beside("connected").assert_good();
    }

    #[test]
    fn certificates_that_are_no_good() {
        let (authority, names) = (Authority::new(), ["127.0.0.1"]);
        for (identity, hint) in [
            (authority.valid(&names, 2019, 2020), "This device's clock says"),
            (authority.valid(&names, 2090, 2091), "This device's clock says"),
            (authority.identity(&["device.example"]), "127.0.0.1 isn't one"),
            (Identity::self_signed(&names), "trusted ones"),
            (Authority::new().identity(&names), "that file, which counts alone"),
        ] {
            let (office, _front) = office(&identity, &authority, "127.0.0.1");
            let (found, advice) = office.ask().assert_break("tls");
            assert!(found.contains("certificate") && advice.contains(hint), "{found}: {advice}");
            assert!(office.server.requests().is_empty(), "the token was sent to a stranger");
        }
    }

    #[test]
    fn systems_without_certificates() {
        let authority = Authority::new();
        let (office, _front) = office(&authority.identity(&["127.0.0.1"]), &authority, "127.0.0.1");
        let office = office.env("SSL_CERT_FILE", "/dev/null");
        let (found, advice) = office.ask().assert_break("tls");
        assert!(found.contains("no trusted certificates") && advice.contains("ca-certificates"), "{advice}");
    }

    #[test]
    fn ports_without_tls() {
        let says = |words: &'static [u8]| {
            let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
            let other = Acceptor::start("other", listener, move |mut stream| {
                // Read first: closing with something unread resets the connection.
                let _ = std::io::Read::read(&mut stream, &mut [0; 4096]);
                let _ = stream.write_all(words);
            });
            let office = Office::at(&format!("https://{}", other.address()));
            let ca = Authority::new().write(office.dir.path());
            office.env("SSL_CERT_FILE", text(&ca)).ask().assert_break("tls")
        };
        let (_, advice) = says(b"HTTP/1.0 400 Bad Request\r\n\r\n");
        assert!(advice.contains("http://"), "{advice}");
        let (found, advice) = says(b"");
        assert!(found.contains("closed") && advice.contains("TLS 1.2"), "{found}: {advice}");
    }
}
