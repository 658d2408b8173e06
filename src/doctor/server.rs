//! The steps to the server, as the daemon dials, and advice for each error.

use std::io::ErrorKind;
use std::time::{Duration, Instant, UNIX_EPOCH};

use super::{Break, Report, expiry, span};
use crate::auth::Credentials;
use crate::link::{IN_CLEAR, LinkError, PROXY_VARIABLES, Progress, ProxyKind, TlsFault, trial};
use crate::sys::clock;
use crate::sys::names::Query;

const CLOCK_TOLERANCE: Duration = Duration::from_secs(60);

/// Opens a websocket with `upgrade`; otherwise stops at the server's answer.
pub(crate) fn reach(
    report: &mut Report,
    credentials: &Credentials,
    by_mender_auth: bool,
    upgrade: bool,
) -> Result<(), Break> {
    let (mut host, mut is_local, mut is_forwarder, mut has_proxy) = (String::new(), false, false, false);
    let (mut step, mut to_https) = ("server", false);
    // The two queries of a look-up run in parallel, as do attempts to connect.
    let (mut begun, mut answered, mut failures) = (Instant::now(), Vec::new(), Vec::new());
    let outcome = trial(credentials, upgrade, &mut |progress| {
        let (found, next) = match progress {
            Progress::Server(endpoint) => {
                if endpoint.sends_in_clear() {
                    report.warn(IN_CLEAR);
                }
                (host, is_local) = (endpoint.host.clone(), endpoint.is_loopback());
                is_forwarder = by_mender_auth && is_local && !endpoint.tls;
                let scheme = if endpoint.tls { "https" } else { "http" };
                let forwarder = if is_forwarder { ", mender-auth's forwarder" } else { "" };
                (format!("{scheme}://{}{forwarder}", endpoint.authority()), "dns")
            }
            Progress::Proxy(proxy) => {
                has_proxy = proxy;
                if !is_local {
                    report.good("routes", &default_routes());
                }
                begun = Instant::now();
                return;
            }
            Progress::Resolved(host, query, addresses) => {
                let what = if has_proxy { "the proxy, " } else { "" };
                let addresses: Vec<_> = addresses.iter().map(|a| a.ip().to_string()).collect();
                let is = query.map(|query| format!("{}{}", addresses.join(", "), source(query)));
                answered.extend(query);
                report.since = begun;
                step = "tcp";
                return report
                    .good("dns", &format!("{what}{host} is {}", is.as_deref().unwrap_or("an address")));
            }
            Progress::Failed(query, e) => {
                answered.extend(query);
                let (took, by) = (begun.elapsed().as_millis(), query.map_or("", source));
                return failures.push(format!("{e}{by} (after {took} ms)"));
            }
            Progress::Connected(address) => {
                if let [query @ (Query::A | Query::Aaaa)] = answered[..] {
                    let other = if query == Query::A { Query::Aaaa } else { Query::A };
                    failures.push(format!("no answer yet{}", source(other)));
                }
                failures.drain(..).for_each(|failure| report.warn(failure));
                report.good("tcp", &format!("connected to {address}"));
                step = "tls";
                if !has_proxy {
                    let is_set = |name: &&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
                    let set: Vec<_> = PROXY_VARIABLES.into_iter().filter(is_set).collect();
                    let found = match set.iter().all(|name| name.eq_ignore_ascii_case("NO_PROXY")) {
                        true => "none, no variable names one".to_owned(),
                        false => format!("none for this server, {} notwithstanding", set.join(", ")),
                    };
                    report.good("proxy", &found);
                }
                return;
            }
            Progress::Tunnel(kind, proxy) => {
                let how = if kind == ProxyKind::Http { "HTTP CONNECT" } else { "SOCKS5" };
                return report.good("proxy", &format!("{} leads to the server, by {how}", proxy.authority()));
            }
            Progress::Secured(Some(version)) => {
                (format!("{version}; issuer, name and dates are right"), "upgrade")
            }
            Progress::Secured(None) if is_forwarder => {
                ("none here: from its forwarder on, names and TLS are mender-auth's".to_owned(), "upgrade")
            }
            Progress::Secured(None) => ("none, by http".to_owned(), "upgrade"),
            Progress::Answered(answer) => {
                to_https = answer.redirects_to_https;
                let off = answer.date.map(|date| date.abs_diff(clock::now()));
                if let Some(off) = off.filter(|off| *off > CLOCK_TOLERANCE) {
                    let off = span(off.as_secs());
                    report.warn(format!("this device's clock is off by {off}: it says {}", now()));
                }
                return;
            }
            Progress::Opened => ("a websocket was opened, HTTP status 101".to_owned(), "round-trip"),
        };
        report.good(step, &found);
        step = next;
    });

    let error = match outcome {
        Ok(()) => {
            report.good("round-trip", "a ping came back, the websocket was closed");
            return Ok(());
        }
        // The server checks the token before it complains about missing headers, and the forwarder of a Mender client
        // before 4.0 takes one websocket at a time.
        Err(LinkError::Refused { status, .. })
            if !upgrade && (matches!(status, 400 | 426) || status == 503 && is_forwarder) =>
        {
            let found = match status {
                503 => "the forwarder takes no second websocket",
                _ => "the token is accepted. No websocket was asked for, it would end the agent's",
            };
            let took = report.since.elapsed();
            report.good("upgrade", &format!("{found}: HTTP status {status}"));
            report.since -= took;
            report.good("round-trip", "of that request");
            return Ok(());
        }
        Err(error) => error,
    };
    match error {
        LinkError::Token => step = "token",
        LinkError::Proxy(_) => step = "proxy",
        LinkError::Tls(..) => step = "tls",
        _ => {}
    }
    // The last failure is the error of the step.
    let text = error.to_string();
    failures.retain(|failure| !failure.starts_with(&text));
    failures.drain(..).for_each(|failure| report.warn(failure));
    let host = if let LinkError::Resolve { host, .. } = &error { host } else { &host };
    let advice = advice(&error, step, is_forwarder, to_https);
    let mut advice = advice.replace("{now}", &now()).replace("{host}", host);
    let expired = expiry(credentials.token.reveal()).is_some_and(|at| at <= clock::now().as_secs());
    if expired && matches!(error, LinkError::Refused { status: 401, .. }) {
        advice += &format!("\nThe token has expired by this device's clock, which says {}", now());
    }
    Err(report.bad(step, &error.to_string(), &advice))
}

fn default_routes() -> String {
    let interfaces = |table: &str, interface: usize, zeros: [usize; 2]| {
        let table = std::fs::read_to_string(table).unwrap_or_default();
        let rows = table.lines().map(|row| row.split_ascii_whitespace().collect::<Vec<_>>());
        let is_zero =
            |row: &[&str], at: usize| row.get(at).is_some_and(|text| text.bytes().all(|b| b == b'0'));
        let rows = rows.filter(|row| zeros.iter().all(|at| is_zero(row, *at)));
        // Rejecting routes are on the loopback interface (IPv6), or on none (IPv4).
        let names = rows.filter_map(|row| Some((*row.get(interface)?).to_owned()));
        let mut names: Vec<_> = names.filter(|name| name != "lo" && name != "*").collect();
        names.dedup();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    };
    // Columns of destination and mask, or of destination and prefix length.
    let (v4, v6) = (interfaces("/proc/net/route", 0, [1, 7]), interfaces("/proc/net/ipv6_route", 9, [0, 1]));
    format!("IPv4's default is by {v4}, IPv6's by {v6}")
}

fn source(query: Query) -> &'static str {
    match query {
        Query::Both => " (/etc/hosts)",
        Query::A => " (A, IPv4)",
        Query::Aaaa => " (AAAA, IPv6)",
    }
}

const FORWARDER_CUT_OFF: &str = "The forwarder does that when it can't reach its server: its log says why, journalctl -u \
     mender-authd (mender-client before 4.0)";

/// `{host}` and `{now}` are placeholders. `local`: the server is mender-auth's forwarder.
fn advice(error: &LinkError, step: &str, local: bool, to_https: bool) -> &'static str {
    match error {
        LinkError::Url(_) => {
            "The URL comes from mender-auth's configuration, or from Auth.ServerURL: https://NAME is its \
             usual form."
        }
        LinkError::Token => "It isn't one: whoever fetches it has to be asked.",
        LinkError::Resolve { .. } => {
            "Is there a network, is a name server in /etc/resolv.conf, and does {host} exist (getent hosts \
             {host})?"
        }
        LinkError::TimedOut(_) if step == "dns" => {
            "The name servers in /etc/resolv.conf don't answer: is there a network, and does a firewall let \
             DNS through?"
        }
        LinkError::Connect { .. } if local => {
            "Nothing listens there. mender-auth takes a new port whenever it gets a token: is it running? \
             systemctl status mender-authd"
        }
        LinkError::Connect { .. } => {
            "Is there a route (ip route), and do firewalls let this connection through? If there is a proxy, \
             HTTPS_PROXY or HTTP_PROXY has to name it, for the daemon and in this shell."
        }
        LinkError::Proxy(_) => {
            "HTTP_PROXY (http), HTTPS_PROXY (https) and NO_PROXY say which proxy counts; it has to be \
             http://[USER:PASSWORD@]HOST:PORT, which allows CONNECT to the server, or socks5://… in its place."
        }
        LinkError::Tls(_, fault) => match fault {
            TlsFault::LeftOut => "Use an executable that was built with TLS, or mender-auth's forwarder.",
            TlsFault::NoRoots => "Install ca-certificates, or set SSL_CERT_FILE for the daemon.",
            TlsFault::Issuer => {
                "The certificate's issuer has to be among the system's trusted ones (ca-certificates; \
                 update-ca-certificates takes /usr/local/share/ca-certificates/*.crt) or, if SSL_CERT_FILE is \
                 set, in that file, which counts alone.\n\
                 Something in between that opens TLS, such as a proxy, would show a certificate of its own."
            }
            TlsFault::Name => {
                "The server's URL has to have a name that the certificate is for; {host} isn't one."
            }
            TlsFault::Dates => {
                "This device's clock says {now}. If that is wrong, set it (timedatectl, NTP); else the \
                 server needs a new certificate."
            }
            TlsFault::Kind => {
                "It and its issuers need keys of RSA with 2048 bits or more, of ECDSA on P-256 or P-384 with \
                 SHA-256 or SHA-384, or of Ed25519, and X.509 version 3: whoever is trusted, others are refused.\n\
                 Policies must not be critical, and name constraints only be on DNS names and addresses.\n\
                 It has to be for servers (serverAuth, if it has an extendedKeyUsage), and one with CA:TRUE has \
                 to be among the system's trusted ones itself."
            }
            TlsFault::NotTls => {
                "No TLS is spoken on that port: is it the right one, or has the URL to begin with http://?"
            }
            TlsFault::Other => "The server has to speak TLS 1.2 or newer on that port.",
        },
        LinkError::TimedOut(_) if step == "tls" => {
            "Something accepts connections there but speaks no TLS, or a firewall drops what is said."
        }
        LinkError::Refused { status, .. } => match status {
            401 => {
                "The server doesn't accept the token: is the device accepted there, neither rejected nor \
                 decommissioned, and is this its server? A new one comes from mender-auth (systemctl restart \
                 mender-authd), or from what writes Auth.TokenFile."
            }
            400 => {
                "Does something in between (proxy, load balancer) take away the headers of a websocket \
                 (Upgrade, Connection)?"
            }
            300..=399 if to_https => {
                "It leads to https, and redirects aren't followed: the server's URL has to begin with https://"
            }
            300..=399 => "Redirects aren't followed: the server's URL has to be what it leads to.",
            403 => "Something forbids it: the server's plan or settings, or a firewall in between.",
            200..=299 | 404 | 511 => "Is it a Mender server? A network's login page may answer in its place.",
            413 => "The request is too large for something in between: the token is in its header.",
            429 => "The server has too much to do; the daemon tries again later.",
            503 if local => FORWARDER_CUT_OFF,
            500..=599 => {
                "The server, or what is before it, has a problem: see its log. The daemon tries again later."
            }
            _ => "Is it a Mender server?",
        },
        LinkError::NoAnswer(e) if local && e.kind() == ErrorKind::UnexpectedEof => FORWARDER_CUT_OFF,
        LinkError::NoAnswer(e) if e.kind() == ErrorKind::InvalidData => {
            "Something else listens on that port: is it the right one in the server's URL?"
        }
        LinkError::Broken(_) | LinkError::Closed { .. } | LinkError::TimedOut(_) if step == "round-trip" => {
            "A websocket is opened but nothing goes through it: does something in between (proxy, load \
             balancer) know websockets?"
        }
        LinkError::TimedOut(_) if local => {
            "mender-auth's forwarder waits for its server: its log says more, journalctl -u mender-authd"
        }
        LinkError::NoAnswer(_) | LinkError::Broken(_) | LinkError::TimedOut(_) => {
            "The server, or something in between (firewall, proxy, load balancer), doesn't answer the \
             request. Is it a Mender server?"
        }
        _ => "Try again when the device has more room.",
    }
}

fn now() -> String {
    httpdate::fmt_http_date(UNIX_EPOCH + clock::now())
}
