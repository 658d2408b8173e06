//! Host names to addresses. IPv4 and IPv6 addresses are asked for in two queries: with one for both, musl lets the
//! worse answer win, and glibc waits for the slower one. Name servers that refuse, deny or drop AAAA queries are common.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::sync::Arc;
use std::time::Duration;
use std::{mem, ptr};

use crossbeam_channel::Receiver;
use nix::libc;
use nix::sys::socket::{SockType, SockaddrIn, SockaddrIn6, SockaddrLike};

use super::{net, thread};

/// The resolution delay of RFC 8305, section 3: how long an answer waits for the other family's.
const GRACE: Duration = Duration::from_millis(50);

type Answer = io::Result<Vec<SocketAddr>>;

/// Resolves `host` in threads, because getaddrinfo(3) can't be interrupted: it may go on after the caller has given
/// up. The one that ends last drops `permit`. Calls `done` when the result can be received. Fails if no thread can be
/// started.
pub(crate) fn look_up(
    host: &str,
    port: u16,
    permit: impl Send + Sync + 'static,
    done: impl FnOnce() + Send + 'static,
) -> io::Result<Receiver<Answer>> {
    let (report, result) = crossbeam_channel::bounded(1);
    let (sender, answers) = crossbeam_channel::bounded(2);
    let (turn, turns) = crossbeam_channel::bounded(1);
    let _ = turn.send((report, done));
    let (name, permit) = (host.to_owned(), Arc::new(permit));
    let query = move |place: usize, family| {
        let _ = sender.send((place, resolve(&name, port, family)));
        drop(sender);
        // The first one to get an answer waits for the other's.
        if let Ok((report, done)) = turns.try_recv() {
            // Fails when the caller has given up.
            let _ = report.send(gather(&answers));
            done();
        }
        drop(permit);
    };
    let host = host.to_owned();
    thread::spawn("resolver", thread::LARGE_STACK, move || {
        if is_in_hosts_file(&host) {
            // An entry for one family overrides DNS for both; two queries would find the other family's in DNS.
            return query(0, libc::AF_UNSPEC);
        }
        let other = query.clone();
        // Without a thread for it the look-up uses IPv4's answer alone.
        let _ = thread::spawn("resolver", thread::LARGE_STACK, move || other(1, libc::AF_INET6));
        query(0, libc::AF_INET);
    })?;
    Ok(result)
}

/// The addresses of all answers in the order to try them; if there are none, the first error, so IPv4's. Waits for the
/// last answer, but only shortly once there is an address.
fn gather(answers: &Receiver<(usize, Answer)>) -> Answer {
    let (mut addresses, mut errors) = (Vec::new(), [None, None]);
    loop {
        let limit = if addresses.is_empty() { Duration::MAX } else { GRACE };
        match answers.recv_timeout(limit) {
            Ok((_, Ok(found))) => addresses.extend(found),
            Ok((place, Err(e))) => errors[place] = Some(e),
            Err(_) => break,
        }
    }
    addresses.sort_by_cached_key(|address| (rank(address), address.is_ipv6()));
    match errors.into_iter().flatten().next() {
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
    let zero: libc::addrinfo = unsafe { mem::zeroed() };
    // A type, else there is an entry per address and type.
    let hints = libc::addrinfo { ai_family: family, ai_socktype: libc::SOCK_STREAM, ..zero };
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
        let gathered = |all: [Answer; 2]| {
            let (sender, answers) = crossbeam_channel::bounded(2);
            // The second one comes first.
            all.into_iter().enumerate().rev().for_each(|answer| sender.send(answer).unwrap());
            drop(sender);
            texts(gather(&answers))
        };
        let found = |address: &str| Ok(vec![address.to_owned()]);
        assert_eq!(gathered([v4(), failed("6")]), found("127.0.0.1:1"));
        assert_eq!(gathered([failed("4"), v6()]), found("[::1]:1"));
        assert_eq!(gathered([failed("4"), failed("6")]), Err("4".to_owned()));
        assert_eq!(gathered([failed("4"), Ok(Vec::new())]), Err("4".to_owned()));
        assert_eq!(gathered([v4(), v6()]).map(|all| all.len()), Ok(2));
    }

    #[test]
    fn a_good_answer_waits_shortly_and_an_error_until_the_other_comes() {
        let (sender, answers) = crossbeam_channel::bounded(2);
        let start = Instant::now();
        sender.send((0, v4())).unwrap();
        assert_eq!(texts(gather(&answers)), texts(v4()));
        assert!(start.elapsed() >= GRACE);
        sender.send((1, failed("6"))).unwrap();
        let late = thread::spawn("late", thread::SMALL_STACK, move || {
            std::thread::park_timeout(GRACE * 2);
            sender.send((0, v4())).unwrap();
        });
        assert_eq!(texts(gather(&answers)), texts(v4()));
        late.unwrap().join().unwrap();
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
