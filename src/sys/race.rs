//! Connects to the first address that answers (RFC 8305, "Happy Eyeballs"). A state machine without a thread: its owner
//! polls the sockets.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};
use nix::libc;
use nix::poll::PollFlags;
use nix::sys::socket::{SockType, getsockopt, sockopt};

use super::names::{Answer, Query};
use super::{is_ready, net};

/// RFC 8305, section 3: IPv4 addresses wait this long for IPv6's answer.
const RESOLUTION_DELAY: Duration = Duration::from_millis(50);
/// RFC 8305, section 5: between attempts.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Concurrent attempts. Then the oldest makes room, but not before [`PATIENCE`]: a slow link takes seconds to answer.
const MOST: usize = 8;
const PATIENCE: Duration = Duration::from_secs(10);
/// Addresses taken of an answer: there is no time for more. A name may have thousands, and hundreds of forwards keep
/// them.
const MOST_ADDRESSES: usize = 64;

#[derive(Debug)]
pub(crate) struct Race {
    kind: SockType,
    /// `None` after the look-up.
    answers: Option<Receiver<(Query, Answer)>>,
    /// The best ones first.
    waiting: VecDeque<SocketAddr>,
    running: Vec<Attempt>,
    /// Whether the last attempt was IPv6.
    last: Option<bool>,
    /// When the next attempt begins.
    next: Instant,
}

#[derive(Debug)]
struct Attempt {
    socket: OwnedFd,
    address: SocketAddr,
    began: Instant,
}

pub(crate) enum Event<'a> {
    /// The observer may remove addresses from the answer.
    Answered(Query, &'a mut Answer),
    Failed(SocketAddr, io::Error),
}

impl Race {
    pub(crate) fn new(kind: SockType, addresses: Vec<SocketAddr>, now: Instant) -> Self {
        let (answers, running, last) = Default::default();
        Race { kind, answers, waiting: addresses.into(), running, last, next: now }
    }

    /// For the addresses that [`super::names::look_up`] finds.
    pub(crate) fn awaiting(kind: SockType, answers: Receiver<(Query, Answer)>, now: Instant) -> Self {
        Race { answers: Some(answers), ..Race::new(kind, Vec::new(), now) }
    }

    /// No attempt has won, and none will.
    pub(crate) fn is_over(&self) -> bool {
        self.answers.is_none() && self.waiting.is_empty() && self.running.is_empty()
    }

    /// Writable once their attempts succeed or fail.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = &OwnedFd> {
        self.running.iter().map(|attempt| &attempt.socket)
    }

    /// The address tried for longest.
    pub(crate) fn pending(&self) -> Option<SocketAddr> {
        self.running.first().map(|attempt| attempt.address)
    }

    /// When [`Race::advance`] is due without an event.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        (!self.waiting.is_empty()).then_some(self.next)
    }

    /// Returns the winner. `may` tells whether so many sockets are allowed; one always is.
    pub(crate) fn advance(
        &mut self,
        now: Instant,
        may: &mut dyn FnMut(usize) -> bool,
        observe: &mut dyn FnMut(Event<'_>),
    ) -> Option<(OwnedFd, SocketAddr)> {
        self.take_answers(now, observe);
        // Once connect(2) has succeeded or failed.
        let is_done = |attempt: &Attempt| is_ready(&attempt.socket, PollFlags::POLLOUT);
        while let Some(at) = self.running.iter().position(is_done) {
            let Attempt { socket, address, .. } = self.running.remove(at);
            let errno = match getsockopt(&socket, sockopt::SocketError).unwrap_or_else(|e| e as i32) {
                0 if net::meets_itself(&socket) => libc::ECONNREFUSED,
                0 => return Some((socket, address)),
                errno => errno,
            };
            observe(Event::Failed(address, io::Error::from_raw_os_error(errno)));
            self.next = now;
        }
        while now >= self.next && !self.waiting.is_empty() {
            if let Some(oldest) = self.running.first().map(|oldest| oldest.began + PATIENCE)
                && (self.running.len() >= MOST || !may(self.running.len() + 1))
            {
                if now < oldest {
                    self.next = oldest;
                    break;
                }
                let late = self.running.remove(0).address;
                observe(Event::Failed(late, io::Error::from_raw_os_error(libc::ETIMEDOUT)));
                continue;
            }
            let Some(address) = self.take() else { break };
            match net::begin_connect(address, self.kind) {
                Ok(socket) => {
                    self.running.push(Attempt { socket, address, began: now });
                    self.next = now + ATTEMPT_DELAY;
                }
                Err(e) => observe(Event::Failed(address, e)),
            }
        }
        None
    }

    /// Tries the addresses of the attempts under way once more, beside those: by a new route they have another source.
    pub(crate) fn try_again(&mut self, now: Instant) {
        self.add(self.running.iter().map(|attempt| attempt.address).collect());
        self.next = now;
    }

    fn take_answers(&mut self, now: Instant, observe: &mut dyn FnMut(Event<'_>)) {
        while let Some(answers) = &self.answers {
            match answers.try_recv() {
                Ok((query, mut answer)) => {
                    observe(Event::Answered(query, &mut answer));
                    let found = answer.unwrap_or_default();
                    if self.last.is_none() && !found.is_empty() {
                        let waits = matches!(query, Query::A) && self.waiting.is_empty();
                        self.next = if waits { now + RESOLUTION_DELAY } else { now };
                    }
                    self.add(found);
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    self.answers = None;
                    if self.last.is_none() {
                        self.next = now;
                    }
                }
            }
        }
    }

    fn add(&mut self, addresses: Vec<SocketAddr>) {
        self.waiting.extend(addresses.into_iter().take(MOST_ADDRESSES));
        self.waiting.make_contiguous().sort_by_cached_key(|address| (rank(address), address.is_ipv6()));
    }

    /// The first address, but families take turns (RFC 8305, section 4).
    fn take(&mut self) -> Option<SocketAddr> {
        let other = |address: &SocketAddr| Some(address.is_ipv6()) != self.last;
        let address = self.waiting.remove(self.waiting.iter().position(other).unwrap_or(0))?;
        self.last = Some(address.is_ipv6());
        Some(address)
    }
}

/// RFC 6724, section 6, as far as it saves time-outs: addresses without a route last (rule 1), IPv6 with a source of
/// another scope after IPv4 (rules 2 and 5), otherwise IPv6 first (rule 6).
fn rank(address: &SocketAddr) -> u8 {
    let scope = |a: Ipv6Addr| (a.is_loopback(), a.is_unicast_link_local(), a.is_unique_local());
    // Sends nothing: the kernel picks route and source address.
    let source =
        net::begin_connect(*address, SockType::Datagram).and_then(|fd| UdpSocket::from(fd).local_addr());
    match (source.map(|source| source.ip()), address.ip()) {
        (Err(_), _) => 3,
        (Ok(IpAddr::V6(from)), IpAddr::V6(to)) if scope(from) == scope(to) => 0,
        (Ok(_), IpAddr::V4(_)) => 1,
        (Ok(_), IpAddr::V6(_)) => 2,
    }
}

/// The error of an address without one misleads.
pub(crate) fn has_route(address: SocketAddr) -> bool {
    net::begin_connect(address, SockType::Datagram).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::poll_one;
    use std::net::TcpListener;

    fn all(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// A race whose look-up sends what the test sends.
    fn awaiting(now: Instant) -> (Race, crossbeam_channel::Sender<(Query, Answer)>) {
        let (sender, answers) = crossbeam_channel::bounded(2);
        (Race::awaiting(SockType::Datagram, answers, now), sender)
    }

    fn step(race: &mut Race, now: Instant) -> (Option<SocketAddr>, usize) {
        let mut failures = 0;
        let won = race.advance(now, &mut |_| true, &mut |event| {
            failures += usize::from(matches!(event, Event::Failed(..)));
        });
        (won.map(|(_, address)| address), failures)
    }

    #[test]
    fn families_take_turns() {
        let mut race = Race::new(SockType::Stream, Vec::new(), Instant::now());
        race.last = Some(true);
        race.add(all(&["[::1]:1", "127.0.0.1:1", "[::1]:2", "127.0.0.1:2", "127.0.0.1:3"]));
        let order = ["127.0.0.1:1", "[::1]:1", "127.0.0.1:2", "[::1]:2", "127.0.0.1:3"];
        assert_eq!(std::iter::from_fn(|| race.take()).collect::<Vec<_>>(), all(&order));
    }

    /// 128 KiB for each forward, and a socket for each address to sort them.
    #[test]
    fn a_name_has_no_thousands_of_addresses() {
        let (mut race, sender) = awaiting(Instant::now());
        let many = (1..=4000).map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        sender.send((Query::A, Ok(many.collect()))).unwrap();
        step(&mut race, Instant::now());
        assert!(race.waiting.len() <= MOST_ADDRESSES && race.waiting.capacity() < 4000);
    }

    #[test]
    fn ipv4_waits_for_ipv6_but_not_for_long() {
        let start = Instant::now();
        let v4 = || Ok(all(&["127.0.0.1:9"]));
        let (mut race, sender) = awaiting(start);
        assert_eq!((step(&mut race, start), race.deadline()), ((None, 0), None));
        sender.send((Query::A, v4())).unwrap();
        assert_eq!(step(&mut race, start), (None, 0));
        assert_eq!((race.deadline(), race.running.len()), (Some(start + RESOLUTION_DELAY), 0));
        step(&mut race, start + RESOLUTION_DELAY);
        assert_eq!((race.running.len(), race.is_over()), (1, false));
        assert_eq!(step(&mut race, start + RESOLUTION_DELAY).0, Some(all(&["127.0.0.1:9"])[0]));

        // The other answer ends the wait, whatever it is.
        let (mut race, sender) = awaiting(start);
        sender.send((Query::A, v4())).unwrap();
        step(&mut race, start);
        sender.send((Query::Aaaa, Err(io::ErrorKind::NotFound.into()))).unwrap();
        drop(sender);
        step(&mut race, start);
        assert_eq!((race.running.len(), race.answers.is_none()), (1, true));
    }

    #[test]
    fn a_new_route_is_tried_beside_the_attempts_under_way() {
        let (start, open) = (Instant::now(), TcpListener::bind("127.0.0.1:0").unwrap());
        let mut race = Race::new(SockType::Stream, vec![open.local_addr().unwrap()], start);
        step(&mut race, start);
        assert_eq!((race.running.len(), race.deadline()), (1, None));
        race.try_again(start);
        assert_eq!((race.running.len(), race.deadline()), (1, Some(start)));
    }

    #[test]
    fn a_failed_attempt_is_followed_at_once_and_a_silent_one_after_a_while() {
        let (start, open) = (Instant::now(), TcpListener::bind("127.0.0.1:0").unwrap());
        // A closed port that no other test gets.
        let closed = ([127, 0, 0, 1], 1).into();
        let mut race = Race::new(SockType::Stream, vec![closed, open.local_addr().unwrap()], start);
        assert_eq!(step(&mut race, start), (None, 0));
        assert_eq!(race.deadline(), Some(start + ATTEMPT_DELAY));
        // A busy kernel leaves loopback's packets to a thread of its own.
        let answered = |race: &Race| {
            let deadline = Instant::now() + Duration::from_secs(10);
            let found = poll_one(race.sockets().next().unwrap(), PollFlags::POLLOUT, Some(deadline)).unwrap();
            assert!(!found.is_empty(), "no answer on loopback");
        };
        answered(&race);
        assert_eq!((step(&mut race, start), race.running.len()), ((None, 1), 1));
        answered(&race);
        assert_eq!(step(&mut race, start).0, open.local_addr().ok());
        assert!(race.is_over());
    }
}
