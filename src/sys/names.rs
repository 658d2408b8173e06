//! Resolves host names with one query per family: in a joint query musl lets the worse answer win, and glibc waits for
//! the slower one. Name servers that refuse, deny or drop AAAA queries are common.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{mem, ptr};

use crossbeam_channel::Receiver;
use nix::libc;
use nix::sys::socket::{SockaddrIn, SockaddrIn6, SockaddrLike};

use super::wake::Wake;
use super::{net, thread};

/// Name servers that take longer to fail are silent, and aren't asked again.
const ANSWERED: Duration = Duration::from_secs(1);

pub(crate) type Answer = io::Result<Vec<SocketAddr>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Query {
    /// Both families: for a name in /etc/hosts, and with glibc.
    Both,
    A,
    Aaaa,
}

/// Resolves `host` in threads, since getaddrinfo(3) cannot be interrupted and may outlast the caller. The last thread
/// drops `permit`. Notifies `wake` for each answer, and once the channel is disconnected. Fails if no thread can be
/// started.
pub(crate) fn look_up(
    host: &str,
    port: u16,
    permit: impl Send + Sync + 'static,
    wake: Arc<Wake>,
) -> io::Result<Receiver<(Query, Answer)>> {
    let (sender, answers) = crossbeam_channel::bounded(2);
    let permit = Arc::new(permit);
    let tell = move |query, answer| {
        // Fails if the caller has given up.
        let _ = sender.send((query, answer));
        drop(sender);
        wake.notify();
        drop(permit);
    };
    let host = host.to_owned();
    thread::spawn("resolver", thread::LARGE_STACK, move || {
        let mut known = in_hosts_file(&host, port);
        if known.is_empty() && host.eq_ignore_ascii_case("localhost") {
            // Name servers must not be asked for it (RFC 6761, 6.3): a wildcard of theirs is another host.
            known = vec![(Ipv6Addr::LOCALHOST, port).into(), (Ipv4Addr::LOCALHOST, port).into()];
        }
        if !known.is_empty() {
            // An entry for one family overrides DNS for both; two queries would find the other family in DNS.
            return tell(Query::Both, Ok(known));
        }
        let (other, name) = (tell.clone(), host.clone());
        let ask = move || other(Query::Aaaa, resolve(&name, port, Query::Aaaa));
        // Without a second thread there is only IPv4's answer.
        let _ = thread::spawn("resolver", thread::LARGE_STACK, ask);
        tell(Query::A, resolve(&host, port, Query::A));
    })?;
    Ok(answers)
}

/// Addresses of the name, in any case and without the dot at its end. musl passes over lines that begin with a space, what
/// is behind the first 511 bytes of a line, and names in another case.
fn in_hosts_file(host: &str, port: u16) -> Vec<SocketAddr> {
    let host = host.strip_suffix('.').unwrap_or(host);
    let lines = File::open("/etc/hosts").map(|file| BufReader::new(file).split(b'\n').map_while(Result::ok));
    let address = |line: Vec<u8>| {
        let line = String::from_utf8_lossy(&line);
        let mut words = line.split('#').next()?.split_ascii_whitespace();
        let address = net::literal(words.next()?, port)?;
        words.any(|name| name.eq_ignore_ascii_case(host)).then_some(address)
    };
    lines.into_iter().flatten().filter_map(address).collect()
}

fn resolve(host: &str, port: u16, query: Query) -> Answer {
    let musl = cfg!(target_env = "musl");
    let is_dotted = host.contains('.') && host.ends_with(|last: char| last.is_ascii_alphabetic());
    // With more dots asked for, search domains come first, as in containers. musl does that by itself.
    if is_dotted && (musl || host.matches('.').count() >= ndots()) {
        // First without the search domains: where the name has no address of this family, glibc goes on to them, and a
        // wildcard there is another host.
        let name = host.to_owned() + if musl { "" } else { "." };
        let begun = Instant::now();
        let itself = |query| get_addresses(&name, port, query);
        let answer = itself(query);
        // An answer that there is no such name may come late: from a second server, or on a slow link.
        let is_denied = matches!(answer, Err((libc::EAI_NONAME, _)));
        if !is_denied && (!is_missing(&answer) || begun.elapsed() >= ANSWERED) {
            return answer.map_err(|(_, e)| e);
        }
        if musl {
            // It never goes on to them, and older ones say the same of a name that has only the other family.
            let other = if query == Query::A { Query::Aaaa } else { Query::A };
            let domains = Some(search_domains()).filter(|all| !all.is_empty() && is_missing(&itself(other)));
            let below = |domain: &String| get_addresses(&format!("{host}.{domain}"), port, query);
            let found = domains.iter().flatten().map(below).find(|answer| !is_missing(answer));
            return found.unwrap_or(answer).map_err(|(_, e)| e);
        }
    }
    let is_single = host.starts_with(|first: char| first.is_ascii_alphabetic()) && !host.contains(['.', ':']);
    if musl && is_single {
        // It ends at the first search domain whose name server fails.
        let domains = search_domains().into_iter();
        let mut answers = domains.map(|domain| get_addresses(&format!("{host}.{domain}"), port, query));
        let itself = || get_addresses(&format!("{host}."), port, query);
        return answers.find(|answer| !is_missing(answer)).unwrap_or_else(itself).map_err(|(_, e)| e);
    }
    // IPv6 in a joint query: where the name has only IPv4 addresses, glibc takes one for IPv6 alone on to the next search
    // domain, and a wildcard there is another host.
    let family = if musl || query == Query::A { query } else { Query::Both };
    let mut found = get_addresses(host, port, family).map_err(|(_, e)| e)?;
    found.retain(|address| address.is_ipv4() == (query == Query::A));
    if found.is_empty() { Err(io::Error::other("there are only IPv4 addresses")) } else { Ok(found) }
}

fn is_missing<T>(answer: &Result<T, (i32, io::Error)>) -> bool {
    answer.as_ref().is_err_and(|(code, _)| *code != libc::EAI_NODATA)
}

fn ndots() -> usize {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let options = text.lines().filter(|line| line.starts_with("options"));
    let mut words = options.flat_map(str::split_ascii_whitespace).rev();
    words.find_map(|word| word.strip_prefix("ndots:")?.parse().ok()).unwrap_or(1)
}

/// The last line that has domains counts (resolv.conf(5)).
fn search_domains() -> Vec<String> {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let mut lines = text.lines().rev().map(|line| line.split_ascii_whitespace());
    let words = lines.find_map(|mut words| matches!(words.next()?, "search" | "domain").then_some(words));
    words.into_iter().flatten().map(str::to_owned).collect()
}

/// getaddrinfo(3), with its code and the error texts of std's `ToSocketAddrs`.
fn get_addresses(host: &str, port: u16, query: Query) -> Result<Vec<SocketAddr>, (i32, io::Error)> {
    let family = match query {
        Query::Both => libc::AF_UNSPEC,
        Query::A => libc::AF_INET,
        Query::Aaaa => libc::AF_INET6,
    };
    let host = CString::new(host).map_err(|e| (libc::EAI_FAIL, e.into()))?;
    // SAFETY: addrinfo consists of integers and pointers, for which zero is a valid value.
    let zero: libc::addrinfo = unsafe { mem::zeroed() };
    // With a type, or there is an entry per address and type.
    let hints = libc::addrinfo { ai_family: family, ai_socktype: libc::SOCK_STREAM, ..zero };
    let mut list = ptr::null_mut();
    // SAFETY: the name ends with NUL, no service is named, and all three pointers are valid during the call.
    let code = unsafe { libc::getaddrinfo(host.as_ptr(), ptr::null(), &raw const hints, &raw mut list) };
    if code == libc::EAI_SYSTEM {
        return Err((code, io::Error::last_os_error()));
    }
    if code != 0 {
        // SAFETY: for any code, gai_strerror returns a string that is never freed.
        let text = unsafe { CStr::from_ptr(libc::gai_strerror(code)) }.to_string_lossy();
        return Err((code, io::Error::other(format!("failed to lookup address information: {text}"))));
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

    fn texts(answer: Answer) -> Result<Vec<String>, String> {
        answer.map(|all| all.iter().map(ToString::to_string).collect()).map_err(|e| e.to_string())
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no getaddrinfo")]
    fn literals_keep_port_and_zone() {
        assert_eq!(texts(resolve("127.0.0.1", 80, Query::A)), Ok(vec!["127.0.0.1:80".to_owned()]));
        assert_eq!(texts(resolve("::1", 80, Query::Aaaa)), Ok(vec!["[::1]:80".to_owned()]));
        assert_eq!(texts(resolve("fe80::1%7", 80, Query::Aaaa)), Ok(vec!["[fe80::1%7]:80".to_owned()]));
        let error = texts(resolve("::1", 80, Query::A)).unwrap_err();
        assert!(error.starts_with("failed to lookup address information: "), "{error}");
        assert!(resolve("nul\0", 80, Query::A).is_err());
    }
}
