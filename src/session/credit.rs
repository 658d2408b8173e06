//! How many messages may be in flight to a session's client. No I/O.
//!
//! The released server keeps 25 messages for a session's client and silently drops further ones. Messages keep their
//! order, so a client's answer to one, such as a `pong` or an `ack`, proves that all before it were delivered.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Messages in flight. The rest of the 25 is for answers and probes.
pub(crate) const LIMIT: usize = 16;
/// Further answers of forwards: their clients wait for these.
const ANSWERS: usize = 4;
/// Older messages have left the server's queue, one way or the other.
const PLACES: usize = 25;
/// Messages between probes. The first probe comes only when the credit is used up: the test client of Mender's servers
/// takes no ping between the lines of a short output.
const PROBE_EVERY: u64 = 6;
/// Unanswered probes. More would take the places of messages.
const MAX_PROBES: usize = 4;
/// A probe or its answer may get lost: a session without credit repeats it after this time.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// … after this one beside [`MAX_PROBES`] others, and after this one beside those of a link before, whose answers are lost
/// with it unless the client is slow.
const ASK_ANYWAY: Duration = Duration::from_secs(30);
const ASK_ANEW: Duration = Duration::from_secs(2);
/// Then an answer came because of a probe; a slow client answers at any time.
const QUICK: Duration = Duration::from_secs(1);
/// So often in a row it is no chance: the client has read all, and other answers were lost.
const QUICK_ANSWERS: u32 = 3;
/// A client that has never answered may not know `ping`. Its messages are presumed delivered: the first after this
/// time, the others when the client can have read them at this speed.
const PATIENCE: Duration = Duration::from_millis(300);
const BYTES_PER_SECOND: u32 = 1 << 20;
/// Time that a client takes for the smallest message.
const SHORTEST: Duration = Duration::from_millis(2);

#[derive(Clone)]
pub(crate) struct Credit {
    sent: u64,
    /// When each message in flight is presumed delivered, unless the client answers.
    on_the_way: VecDeque<Instant>,
    /// Numbers of the unanswered probes. Messages are numbered from 1.
    probes: VecDeque<u64>,
    last_probe: Instant,
    last_answer: Instant,
    /// Whether the last probe was a repeated one, for want of answers, and none has come since.
    repeated: bool,
    quick_answers: u32,
    answers: bool,
    /// The last message of the links before. Answers to probes up to it may be lost.
    former: u64,
}

impl Credit {
    pub(crate) fn new(now: Instant) -> Self {
        let (on_the_way, probes) = (VecDeque::new(), VecDeque::new());
        let (last_probe, last_answer) = (now, now);
        Credit {
            sent: 0,
            on_the_way,
            probes,
            last_probe,
            last_answer,
            repeated: false,
            quick_answers: 0,
            answers: false,
            former: 0,
        }
    }

    pub(crate) fn takes(&self, now: Instant) -> bool {
        self.unproved(now) < LIMIT
    }

    pub(crate) fn takes_answer(&self, now: Instant) -> bool {
        self.unproved(now) < LIMIT + ANSWERS
    }

    fn unproved(&self, now: Instant) -> usize {
        self.on_the_way.len() - self.presumed(now)
    }

    fn presumed(&self, now: Instant) -> usize {
        if self.answers { 0 } else { self.on_the_way.partition_point(|at| *at <= now) }
    }

    /// Returns the message's number.
    pub(crate) fn sent(&mut self, bytes: usize, now: Instant) -> u64 {
        self.on_the_way.drain(..self.presumed(now));
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let reading = (Duration::from_secs(1) * bytes / BYTES_PER_SECOND).max(SHORTEST);
        let presume_at = self.on_the_way.back().map_or(now + PATIENCE, |before| *before + reading);
        if self.on_the_way.len() == PLACES {
            self.on_the_way.pop_front();
        }
        self.on_the_way.push_back(presume_at);
        self.sent += 1;
        self.sent
    }

    /// The last message that was proved or presumed delivered.
    fn proved(&self) -> u64 {
        self.sent - self.on_the_way.len() as u64
    }

    pub(crate) fn wants_probe(&self, now: Instant) -> bool {
        let due = match self.probes.back() {
            None if !self.answers => !self.takes(now),
            // An answer would be taken for one to a probe of the link before, which may be lost.
            Some(_) if self.waits_for_former() => false,
            last => self.sent - self.proved().max(last.copied().unwrap_or(0)) >= PROBE_EVERY,
        };
        self.asked() < MAX_PROBES && due || self.repeats(now)
    }

    /// Unanswered probes of this link.
    fn asked(&self) -> usize {
        self.probes.iter().filter(|probe| **probe > self.former).count()
    }

    /// Probes of the links before are the oldest.
    fn waits_for_former(&self) -> bool {
        self.probes.front().is_some_and(|probe| *probe <= self.former)
    }

    /// When a probe is repeated, for want of credit.
    fn again(&self) -> Instant {
        match self.asked() {
            _ if self.waits_for_former() => self.last_probe.max(self.last_answer) + ASK_ANEW,
            MAX_PROBES.. => self.last_probe + ASK_ANYWAY,
            _ => self.last_probe + ASK_AGAIN,
        }
    }

    fn repeats(&self, now: Instant) -> bool {
        self.answers && !self.takes(now) && now >= self.again()
    }

    pub(crate) fn probed(&mut self, now: Instant) {
        let repeats = self.repeats(now);
        self.repeated = repeats && now >= self.last_answer + ASK_AGAIN;
        if repeats {
            self.probes.retain(|probe| *probe > self.former);
        }
        let probe = self.sent(0, now);
        self.last_probe = now;
        self.probes.push_back(probe);
    }

    /// A pong doesn't say which probe it answers: it is the oldest one's. Each one that was lost would have all later ones
    /// prove an older message, for ever.
    pub(crate) fn answered(&mut self, now: Instant) {
        if std::mem::take(&mut self.repeated) {
            let quick = now < self.last_probe + QUICK;
            self.quick_answers = if quick { self.quick_answers + 1 } else { 0 };
        }
        self.last_answer = now;
        let mut probe = self.probes.pop_front();
        if self.quick_answers >= QUICK_ANSWERS {
            self.quick_answers = 0;
            probe = std::mem::take(&mut self.probes).pop_back().or(probe);
        }
        if let Some(probe) = probe {
            self.prove(probe);
        }
    }

    /// The client has acted upon this message.
    pub(crate) fn prove(&mut self, number: u64) {
        self.answers = true;
        let proved = number.saturating_sub(self.proved()) as usize;
        self.on_the_way.drain(..proved.min(self.on_the_way.len()));
    }

    /// For the same client by another link, whose router has asked it. The released server keeps what waits for it: it may
    /// still answer the probes of the link before.
    pub(crate) fn resumed(&self) -> Self {
        let mut credit = self.clone();
        credit.probes.push_back(self.sent);
        credit.former = self.sent;
        credit
    }

    pub(crate) fn prove_all(&mut self) {
        self.on_the_way.clear();
    }

    /// When a session without credit may send or probe again.
    pub(crate) fn deadline(&self, now: Instant) -> Option<Instant> {
        match self.answers {
            _ if self.takes(now) => None,
            true => Some(self.again()),
            false => self.on_the_way.get(self.presumed(now)).copied(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends as the terminal does, as much as may be sent now.
    fn send_all(credit: &mut Credit, now: Instant) -> u64 {
        let before = credit.sent;
        while credit.takes(now) {
            credit.sent(32 << 10, now);
            if credit.wants_probe(now) {
                credit.probed(now);
            }
        }
        credit.sent - before
    }

    #[test]
    fn answers_give_back_what_they_prove() {
        let now = Instant::now();
        let mut credit = Credit::new(now);
        assert_eq!(send_all(&mut credit, now), LIMIT as u64 + 1);
        assert_eq!(credit.probes, [17]);
        credit.answered(now);
        assert_eq!(send_all(&mut credit, now), 16);
        assert_eq!(credit.probes, [24, 31]);
        credit.answered(now);
        assert_eq!(credit.proved(), 24);
        assert_eq!(send_all(&mut credit, now), 7);
        // Without a probe there is nothing to answer.
        let mut other = Credit::new(now);
        other.sent(1, now);
        other.answered(now);
        assert_eq!(other.proved(), 0);
    }

    #[test]
    fn there_are_never_more_on_the_way_than_the_server_has_places() {
        let start = Instant::now();
        for answering in [0, 1, 2, 5] {
            let (mut credit, mut delivered) = (Credit::new(start), 0);
            for turn in 0..1000_u32 {
                // A client that answers does so before it would be presumed not to.
                let now = if credit.answers { start + turn * ASK_AGAIN } else { start };
                send_all(&mut credit, now);
                if answering > 0 && credit.answers && credit.wants_probe(now) {
                    credit.probed(now);
                }
                if answering > 0 {
                    assert!(credit.sent - delivered <= 22, "{} on the way", credit.sent - delivered);
                    assert!(credit.deadline(now).is_some() || credit.probes.len() == MAX_PROBES);
                }
                // The client takes some messages each turn, and answers the probes among them.
                let taken = (delivered + answering).min(credit.sent);
                while credit.probes.front().is_some_and(|probe| *probe <= taken && answering > 0) {
                    credit.answered(now + ASK_AGAIN / 2);
                }
                delivered = taken;
            }
        }
    }

    #[test]
    fn a_client_that_never_answers_gets_a_megabyte_a_second() {
        let start = Instant::now();
        let mut credit = Credit::new(start);
        assert_eq!(send_all(&mut credit, start), LIMIT as u64 + 1);
        assert_eq!(credit.deadline(start), Some(start + PATIENCE));
        assert_eq!(send_all(&mut credit, start + PATIENCE - SHORTEST), 0);
        let mut sent = 0;
        for turn in 0..500 {
            sent += send_all(&mut credit, start + PATIENCE + turn * SHORTEST);
        }
        assert!((30..=38).contains(&sent), "{sent} messages of 32 KiB in a second");
        // It sees few questions that it doesn't understand.
        assert_eq!(credit.probes.len(), MAX_PROBES);
        // A pause counts as delivery, and after it a client is not asked for a word or two.
        let later = start + 10 * PATIENCE + Duration::from_secs(1);
        assert!(credit.takes(later) && credit.deadline(later).is_none());
        credit.sent(1, later);
        assert_eq!(credit.on_the_way.len(), 1);
        // It may have begun to answer late.
        credit.answered(later);
        assert!(credit.answers);
    }

    #[test]
    fn a_lost_answer_is_asked_for_again() {
        let start = Instant::now();
        let mut credit = Credit::new(start);
        send_all(&mut credit, start);
        credit.answered(start);
        send_all(&mut credit, start);
        let later = start + ASK_AGAIN;
        assert_eq!(credit.deadline(start), Some(later));
        assert!(!credit.wants_probe(start) && !credit.takes(later) && credit.wants_probe(later));
        credit.probed(later);
        credit.answered(later);
        assert!(credit.takes(later));
    }

    /// Each lost answer had all later ones prove an older message, and took one of the four probes for ever: after two a
    /// terminal stood still for five seconds every 16 messages, after four for good.
    #[test]
    fn lost_answers_are_found_out() {
        let (mut now, mut sent) = (Instant::now(), Vec::new());
        let mut credit = Credit::new(now);
        for _ in 0..10 {
            let (before, mut lose) = (credit.sent, true);
            for _ in 0..2400 {
                now += Duration::from_millis(100);
                let mut probes = 0;
                for _ in 0..10 {
                    if credit.takes(now) {
                        credit.sent(4096, now);
                    }
                    if credit.wants_probe(now) {
                        credit.probed(now);
                        probes += 1;
                    }
                }
                now += Duration::from_millis(1);
                // One answer is lost in four minutes.
                for _ in 0..probes {
                    if !(credit.answers && std::mem::take(&mut lose)) {
                        credit.answered(now);
                    }
                }
            }
            sent.push(credit.sent - before);
        }
        println!("{sent:?}");
        assert!(sent.iter().all(|sent| *sent > 5000), "messages in four minutes: {sent:?}");
    }

    /// Those of a client that had fallen silent: each answer by the next link was taken for one of them, until after 15 s it
    /// was no chance any more that answers had been lost.
    #[test]
    fn answers_lost_with_a_link_hold_the_next_up_for_two_seconds_at_most() {
        let mut now = Instant::now();
        for unanswered in 1..=30 {
            let mut credit = Credit::new(now);
            send_all(&mut credit, now);
            credit.answered(now);
            for _ in 0..unanswered {
                if credit.takes(now) {
                    credit.sent(32 << 10, now);
                }
                if credit.wants_probe(now) {
                    credit.probed(now);
                }
            }
            now += Duration::from_millis(500);
            credit = credit.resumed();
            credit.answered(now);
            let (end, mut last, mut longest) = (now + Duration::from_secs(60), now, Duration::ZERO);
            while now < end {
                let before = credit.sent;
                if send_all(&mut credit, now) > 0 {
                    longest = longest.max(now - last);
                    last = now;
                }
                now += Duration::from_millis(5);
                if credit.wants_probe(now) {
                    credit.probed(now);
                }
                let asked = credit.probes.iter().filter(|probe| **probe > before).count();
                (0..asked).for_each(|_| credit.answered(now));
            }
            longest = longest.max(now - last);
            assert!(longest <= ASK_ANEW + Duration::from_millis(20), "{unanswered}: {longest:?}");
        }
    }

    /// The released server keeps a session's messages when the device's link is replaced: the client comes to the probes of
    /// the former link then, and its answers were taken for those to the next link's.
    #[test]
    fn answers_to_a_former_link_prove_nothing_of_the_next() {
        let (mut now, mut places, mut dropped) = (Instant::now(), VecDeque::new(), 0);
        let mut credit = Credit::new(now);
        let mut put = |places: &mut VecDeque<bool>, probe| match places.len() {
            PLACES => dropped += 1,
            _ => places.push_back(probe),
        };
        let mut resumed = false;
        for turn in 0..600 {
            if turn == 100 {
                // The router of the next link asks.
                put(&mut places, true);
            }
            now += Duration::from_millis(20);
            if places.pop_front() == Some(true) {
                if turn >= 100 && !resumed {
                    (credit, resumed) = (credit.resumed(), true);
                    if credit.wants_probe(now) {
                        credit.probed(now);
                        put(&mut places, true);
                    }
                }
                credit.answered(now);
            }
            while (turn < 100 || resumed) && (credit.takes(now) || credit.wants_probe(now)) {
                if credit.takes(now) {
                    credit.sent(32 << 10, now);
                    put(&mut places, false);
                }
                if credit.wants_probe(now) {
                    credit.probed(now);
                    put(&mut places, true);
                }
            }
        }
        assert_eq!(dropped, 0);
    }
}
