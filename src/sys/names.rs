//! Host names to addresses. IPv4 and IPv6 addresses are asked for in two queries: with one for both, musl lets the
//! worse answer win, and glibc waits for the slower one. Name servers that refuse, deny or drop AAAA queries are common.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use std::{mem, ptr};

use crossbeam_channel::Receiver;
use nix::libc;
use nix::sys::socket::{SockType, SockaddrIn, SockaddrIn6, SockaddrLike};

use super::{net, thread};

/// The resolution delay of RFC 8305, section 3: how long an answer waits for the other family's.
const GRACE: Duration = Duration::from_millis(50);

type Answer = io::Result<Vec<SocketAddr>>;

struct LookUp<P> {
    state: Mutex<State>,
    answered: Condvar,
    /// Dropped by the thread that ends last.
    _permit: P,
}

struct State {
    /// For IPv4 and for IPv6.
    answers: [Option<Answer>; 2],
    /// Taken by the thread that reports the result.
    report: Option<Box<dyn FnOnce(Answer) + Send>>,
}

/// Resolves `host` in threads, because getaddrinfo(3) can't be interrupted: it may go on after the caller has given
/// up. Drops `permit` when it has ended. Calls `done` when the result can be received. Fails if no thread can be
/// started.
pub(crate) fn look_up(
    host: &str,
    port: u16,
    permit: impl Send + Sync + 'static,
    done: impl FnOnce() + Send + 'static,
) -> io::Result<Receiver<Answer>> {
    let (sender, result) = crossbeam_channel::bounded(1);
    let report = Box::new(move |answer| {
        // Fails when the caller has given up.
        let _ = sender.send(answer);
        done();
    });
    let state = Mutex::new(State { answers: [None, None], report: Some(report) });
    let look_up = Arc::new(LookUp { state, answered: Condvar::new(), _permit: permit });
    let host = host.to_owned();
    thread::spawn("resolver", thread::LARGE_STACK, move || {
        if is_in_hosts_file(&host) {
            // An entry for one family overrides DNS for both; two queries would find the other family's in DNS.
            look_up.set(1, Ok(Vec::new()));
            return look_up.set(0, resolve(&host, port, libc::AF_UNSPEC));
        }
        let (theirs, name) = (Arc::clone(&look_up), host.clone());
        let other = thread::spawn("resolver", thread::LARGE_STACK, move || {
            theirs.set(1, resolve(&name, port, libc::AF_INET6));
        });
        if let Err(e) = other {
            look_up.set(1, Err(e));
        }
        look_up.set(0, resolve(&host, port, libc::AF_INET));
    })?;
    Ok(result)
}

impl<P> LookUp<P> {
    /// Stores one family's answer, and reports the result unless the other family may still bring a better one.
    fn set(&self, family: usize, answer: Answer) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let usable = answer.as_ref().is_ok_and(|addresses| !addresses.is_empty());
        state.answers[family] = Some(answer);
        self.answered.notify_all();
        let pending = |state: &mut State| state.answers.iter().any(Option::is_none);
        if usable {
            let waited = self.answered.wait_timeout_while(state, GRACE, pending);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        } else if pending(&mut state) {
            return;
        }
        let (report, answers) = (state.report.take(), mem::take(&mut state.answers));
        drop(state);
        if let Some(report) = report {
            report(merge(answers));
        }
    }
}

/// The addresses of both families in the order to try them; if there are none, the first error, so IPv4's.
fn merge(answers: [Option<Answer>; 2]) -> Answer {
    let (mut addresses, mut error) = (Vec::new(), None);
    for answer in answers.into_iter().flatten() {
        match answer {
            Ok(found) => addresses.extend(found),
            Err(e) => error = error.or(Some(e)),
        }
    }
    addresses.sort_by_cached_key(rank);
    match error {
        Some(e) if addresses.is_empty() => Err(e),
        _ => Ok(addresses),
    }
}

/// RFC 6724, section 6, as far as it saves time-outs: addresses without a route come last (rule 1), IPv6 whose source
/// address is of another scope after IPv4 (rules 2 and 5), else IPv6 first (rule 6).
fn rank(address: &SocketAddr) -> u8 {
    let scope = |a: Ipv6Addr| (a.is_loopback(), a.is_unicast_link_local(), a.is_unique_local());
    // Sends nothing: the kernel looks for a route and a source address.
    let source =
        net::begin_connect(*address, SockType::Datagram).and_then(|fd| UdpSocket::from(fd).local_addr());
    match (source.map(|source| source.ip()), address.ip()) {
        (Err(_), _) => 3,
        (Ok(IpAddr::V6(from)), IpAddr::V6(to)) if scope(from) == scope(to) => 0,
        (Ok(_), IpAddr::V4(_)) => 1,
        (Ok(_), IpAddr::V6(_)) => 2,
    }
}

fn is_in_hosts_file(host: &str) -> bool {
    let Ok(hosts) = File::open("/etc/hosts") else { return false };
    BufReader::new(hosts).split(b'\n').map_while(Result::ok).any(|line| {
        let names = line.split(|byte| *byte == b'#').next().unwrap_or_default();
        names.split(u8::is_ascii_whitespace).skip(1).any(|name| name.eq_ignore_ascii_case(host.as_bytes()))
    })
}

/// getaddrinfo(3), with the error texts of std's `ToSocketAddrs`.
#[allow(unsafe_code)]
fn resolve(host: &str, port: u16, family: libc::c_int) -> Answer {
    let host = CString::new(host)?;
    // SAFETY: addrinfo consists of integers and pointers, for which zero is a valid value.
    let mut hints: libc::addrinfo = unsafe { mem::zeroed() };
    hints.ai_family = family;
    // Else there is an entry per address and type.
    hints.ai_socktype = libc::SOCK_STREAM;
    let mut list = ptr::null_mut();
    // SAFETY: the name ends with NUL, no service is named, and all three pointers are valid during the call.
    let code = unsafe { libc::getaddrinfo(host.as_ptr(), ptr::null(), &raw const hints, &raw mut list) };
    if code == libc::EAI_SYSTEM {
        return Err(io::Error::last_os_error());
    }
    if code != 0 {
        // SAFETY: for any code, gai_strerror returns a string that is never freed.
        let text = unsafe { CStr::from_ptr(libc::gai_strerror(code)) }.to_string_lossy();
        return Err(io::Error::other(format!("failed to lookup address information: {text}")));
    }
    let mut addresses = Vec::new();
    let mut next = list.cast_const();
    // SAFETY: `next` is an entry of the list, which is freed below, or null.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.ai_next;
        let length = Some(entry.ai_addrlen);
        // SAFETY: `ai_addr` points to an address of `ai_addrlen` bytes; from_raw checks family and length.
        let v4 = unsafe { SockaddrIn::from_raw(entry.ai_addr, length) };
        // SAFETY: as above.
        let v6 = unsafe { SockaddrIn6::from_raw(entry.ai_addr, length) };
        addresses.extend(v4.map(|a| SocketAddr::from(SocketAddrV4::from(a))));
        addresses.extend(v6.map(|a| SocketAddr::from(SocketAddrV6::from(a))));
    }
    // SAFETY: getaddrinfo succeeded, and nothing borrows from the list any more.
    unsafe { libc::freeaddrinfo(list) };
    addresses.iter_mut().for_each(|address| address.set_port(port));
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn v4() -> Answer {
        Ok(vec!["127.0.0.1:1".parse().unwrap()])
    }

    fn v6() -> Answer {
        Ok(vec!["[::1]:1".parse().unwrap()])
    }

    fn failed(text: &str) -> Answer {
        Err(io::Error::other(text.to_owned()))
    }

    fn texts(answer: Answer) -> Result<Vec<String>, String> {
        answer.map(|all| all.iter().map(ToString::to_string).collect()).map_err(|e| e.to_string())
    }

    #[test]
    fn one_good_answer_is_enough() {
        let found = |address: &str| Ok(vec![address.to_owned()]);
        assert_eq!(texts(merge([Some(v4()), Some(failed("6"))])), found("127.0.0.1:1"));
        assert_eq!(texts(merge([Some(v4()), None])), found("127.0.0.1:1"));
        assert_eq!(texts(merge([Some(failed("4")), Some(v6())])), found("[::1]:1"));
        assert_eq!(texts(merge([Some(failed("4")), Some(failed("6"))])), Err("4".to_owned()));
        assert_eq!(texts(merge([Some(failed("4")), Some(Ok(Vec::new()))])), Err("4".to_owned()));
    }

    #[test]
    fn a_good_answer_waits_shortly_and_an_error_until_the_other_comes() {
        let look_up = |family, answer| {
            let (sender, result) = crossbeam_channel::bounded(1);
            let report: Box<dyn FnOnce(Answer) + Send> = Box::new(move |answer| sender.send(answer).unwrap());
            let state = Mutex::new(State { answers: [None, None], report: Some(report) });
            let look_up = LookUp { state, answered: Condvar::new(), _permit: () };
            look_up.set(family, answer);
            (look_up, result)
        };
        let start = Instant::now();
        let (late, result) = look_up(0, v4());
        assert!(start.elapsed() >= GRACE);
        assert_eq!(texts(result.try_recv().unwrap()), texts(v4()));
        late.set(1, v6());
        assert!(result.try_recv().is_err(), "reported once");
        let (late, result) = look_up(1, failed("6"));
        assert!(result.try_recv().is_err());
        late.set(0, v4());
        assert_eq!(texts(result.try_recv().unwrap()), texts(v4()));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no getaddrinfo")]
    fn literals_keep_port_and_zone() {
        assert_eq!(texts(resolve("127.0.0.1", 80, libc::AF_INET)), Ok(vec!["127.0.0.1:80".to_owned()]));
        assert_eq!(texts(resolve("::1", 80, libc::AF_INET6)), Ok(vec!["[::1]:80".to_owned()]));
        assert_eq!(texts(resolve("fe80::1%7", 80, libc::AF_INET6)), Ok(vec!["[fe80::1%7]:80".to_owned()]));
        let error = texts(resolve("::1", 80, libc::AF_INET)).unwrap_err();
        assert!(error.starts_with("failed to lookup address information: "), "{error}");
        assert!(resolve("nul\0", 80, libc::AF_INET).is_err());
    }
}
