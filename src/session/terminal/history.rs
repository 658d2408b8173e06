//! The end of a shell's output, kept for a client that comes back or for its user's next one.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use crate::outbox::Mark;
use crate::permits::Permit;

const MAX_BYTES: usize = 64 * 1024;
/// Bytes without a permit for the device's memory: a prompt.
const RESERVED: usize = 4096;
/// Messages that are remembered: what a client that answers no ping gets until the dead link is noticed.
const MAX_UNDER_WAY: usize = 1024;

const ESCAPE: u8 = 0x1b;
const BELL: u8 = 0x07;

/// Bytes are numbered from the shell's start.
pub(super) struct History {
    pub(super) bytes: VecDeque<u8>,
    /// One past the last byte.
    pub(super) end: u64,
    /// The first byte that was not sent.
    pub(super) sent: u64,
    /// First bytes of the last messages, and whether the link has written them.
    under_way: VecDeque<(u64, Mark)>,
    memory: Permit,
}

impl History {
    pub(super) fn new(memory: Permit) -> Self {
        History { bytes: VecDeque::new(), end: 0, sent: 0, under_way: VecDeque::new(), memory }
    }

    /// The history of an earlier agent; `None` if its numbers are impossible.
    pub(super) fn adopt(bytes: &[u8], (end, sent): (u64, u64), memory: Permit) -> Option<Self> {
        let possible = bytes.len() as u64 <= end && sent <= end;
        let mut history = History::new(memory);
        history.push(bytes);
        (history.end, history.sent) = (end, sent);
        possible.then_some(history)
    }

    fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// Appends output and drops the oldest.
    pub(super) fn push(&mut self, output: &[u8]) {
        self.end += output.len() as u64;
        let wanted = (self.bytes.len() + output.len()).min(MAX_BYTES);
        let more = self.memory.resize(wanted.saturating_sub(RESERVED));
        let room = if more { wanted } else { self.bytes.len().max(RESERVED) };
        let output = &output[output.len().saturating_sub(room)..];
        let kept = room - output.len();
        self.bytes.drain(..self.bytes.len().saturating_sub(kept));
        self.bytes.extend(output);
    }

    pub(super) fn is_sent(&self) -> bool {
        self.sent == self.end
    }

    /// Copies unsent output. Returns how many bytes.
    pub(super) fn unsent(&self, place: &mut [u8]) -> usize {
        let from = self.bytes.len() - usize::try_from(self.end - self.sent).unwrap_or(self.bytes.len());
        let bytes = self.bytes.iter().skip(from).zip(place);
        bytes.map(|(byte, place)| *place = *byte).count()
    }

    /// Counts a message with the next `bytes` bytes as sent. The writer sets the returned mark.
    pub(super) fn mark(&mut self, bytes: usize) -> Mark {
        let mark = Mark::default();
        if self.under_way.len() == MAX_UNDER_WAY {
            self.under_way.pop_front();
        }
        self.under_way.push_back((self.sent, Mark::clone(&mark)));
        self.sent += bytes as u64;
        mark
    }

    /// Goes back to the first byte that the client has not got. `delivered`: bytes that the lost link has delivered.
    pub(super) fn rewind(&mut self, delivered: u64) {
        let has_left = |mark: &Mark| (1..=delivered).contains(&mark.load(Ordering::SeqCst));
        if let Some((first, _)) = self.under_way.iter().find(|(_, mark)| !has_left(mark)) {
            self.sent = *first;
        }
        self.under_way.clear();
    }

    /// Bytes that fit before unsent ones are lost.
    pub(super) fn room(&self) -> usize {
        MAX_BYTES.saturating_sub(usize::try_from(self.end - self.sent).unwrap_or(usize::MAX))
    }

    /// Continues for the same client. Returns how many bytes are lost.
    pub(super) fn resume(&mut self) -> u64 {
        let lost = self.start().saturating_sub(self.sent);
        if lost > 0 {
            self.skip_to_line();
        }
        lost
    }

    /// Sends everything once more, to another terminal.
    pub(super) fn replay(&mut self) {
        self.under_way.clear();
        self.skip_to_line();
        let from = usize::try_from(self.sent - self.start()).unwrap_or_default();
        self.bytes = without_queries(&self.bytes.make_contiguous()[from..]).into();
        self.sent = self.start();
    }

    /// Starts at the first whole line, if there is one.
    fn skip_to_line(&mut self) {
        let whole = self.start() == 0;
        let line = self.bytes.iter().position(|byte| *byte == b'\n').filter(|_| !whole);
        self.sent = self.start() + line.map_or(0, |at| at as u64 + 1);
    }
}

/// Removes queries. The first terminal has answered them; a second answer would be taken for input.
fn without_queries(mut bytes: &[u8]) -> Vec<u8> {
    let mut kept = Vec::with_capacity(bytes.len());
    while let Some(at) = bytes.iter().position(|byte| *byte == ESCAPE) {
        kept.extend(&bytes[..at]);
        let (sequence, rest) = bytes[at..].split_at(length(&bytes[at..]));
        if !is_query(sequence) {
            kept.extend(sequence);
        }
        bytes = rest;
    }
    kept.extend(bytes);
    kept
}

/// Length of the control sequence at the start of `bytes` (ECMA-48, 5.4 and 5.6).
fn length(bytes: &[u8]) -> usize {
    let end = match bytes.get(1) {
        Some(b'[') => bytes.iter().skip(2).position(|byte| (0x40..=0x7e).contains(byte)).map(|at| at + 3),
        Some(b']' | b'P') => {
            let is_end = |at: usize| bytes[at] == BELL || bytes[..at].ends_with(&[ESCAPE, b'\\']);
            (2..bytes.len()).find(|at| is_end(*at)).map(|at| if bytes[at] == BELL { at + 1 } else { at })
        }
        _ => Some(2),
    };
    end.unwrap_or(bytes.len()).min(bytes.len())
}

/// Queries for device attributes, reports, modes, window size, version, colours, settings and capabilities.
fn is_query(sequence: &[u8]) -> bool {
    match sequence {
        [_, b'Z'] | [_, b'[', .., b'c' | b'n' | b't'] => true,
        [_, b'[', b'>', .., b'q'] | [_, b'[', b'?', .., b'u'] | [_, b'[', .., b'$', b'p'] => true,
        // Titles, folders and links, whose text may have a question mark.
        [_, b']', b'0'..=b'2' | b'7' | b'8', b';', ..] => false,
        [_, b']', text @ ..] => text.contains(&b'?'),
        [_, b'P', b'$' | b'+', b'q', ..] => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::permits::Permits;

    fn history() -> History {
        History::new(Permits::new(1 << 20).none())
    }

    fn unsent(history: &mut History) -> Vec<u8> {
        let mut place = vec![0; 2 * MAX_BYTES];
        let length = history.unsent(&mut place);
        history.mark(length);
        assert!(history.is_sent());
        place.truncate(length);
        place
    }

    /// Shows and sends `output` as one message, which leaves when the link has written so many bytes; never with 0.
    fn show(history: &mut History, output: &[u8], written: u64) {
        history.push(output);
        history.mark(output.len()).store(written, Ordering::SeqCst);
    }

    #[test]
    fn what_the_client_has_not_got_is_sent_again() {
        let mut history = history();
        show(&mut history, b"one\r\n", 10);
        show(&mut history, b"two\r\n", 20);
        show(&mut history, b"three\r\n", 0);
        history.push(b"four\r\n");
        history.rewind(u64::MAX);
        assert_eq!(history.resume(), 0);
        assert_eq!(unsent(&mut history), b"three\r\nfour\r\n");
        show(&mut history, b"five\r\n", 40);
        show(&mut history, b"six\r\n", 50);
        history.rewind(49);
        assert_eq!(history.resume(), 0);
        // The message before it was never written.
        assert_eq!(unsent(&mut history), b"three\r\nfour\r\nfive\r\nsix\r\n");
    }

    #[test]
    fn what_is_lost_is_counted_up_to_a_whole_line() {
        let mut history = history();
        show(&mut history, b"lost\r\n", 0);
        let lines = b"0123456789\r\n".repeat(MAX_BYTES / 12 + 1);
        history.rewind(u64::MAX);
        assert_eq!(history.room(), MAX_BYTES - 6);
        history.push(&lines);
        assert_eq!(history.room(), 0);
        assert_eq!(history.resume(), 6 + lines.len() as u64 - MAX_BYTES as u64);
        assert_eq!(unsent(&mut history), lines[lines.len() - MAX_BYTES / 12 * 12..]);
    }

    #[test]
    fn without_memory_the_last_page_stays() {
        let permits = Permits::new(0);
        let mut history = History::new(permits.none());
        history.push(&[b'a'; 3 * RESERVED]);
        history.push(b"b");
        assert_eq!((history.bytes.len(), history.bytes.back()), (RESERVED, Some(&b'b')));
        history.push(&[b'c'; 2 * MAX_BYTES]);
        assert_eq!(history.bytes.len(), RESERVED);
        assert_eq!(permits.taken(), 0);
    }

    #[test]
    fn a_replay_has_everything_but_questions() {
        let mut history = history();
        let shown = b"$ vi\r\n\x1b[?1049h\x1b[>c\x1b[6n\x1b[1;24r\x1b]10;?\x07\x1b]0;title\x07\x1b[?12$p\x1bP+q436f\x1b\\\
            \x1b[31mred\x1b[m\x1b[18t\x1b[>q\x1b[?u\x1bZ\x1b=~\x1b]2;what?\x07\x1b]8;;http://h/?q\x1b\\\x1b[12";
        show(&mut history, shown, 1);
        history.replay();
        let expected = "$ vi\r\n\x1b[?1049h\x1b[1;24r\x1b]0;title\x07\x1b[31mred\x1b[m\x1b=~\
            \x1b]2;what?\x07\x1b]8;;http://h/?q\x1b\\\x1b[12";
        assert_eq!(String::from_utf8(unsent(&mut history)).unwrap(), expected);
    }

    #[test]
    fn any_bytes_can_be_replayed() {
        for length in 0..4 {
            for number in 0..6_usize.pow(length) {
                let pick =
                    |place: u32| [ESCAPE, b'[', b']', b'P', b'\\', b'c'][number / 6_usize.pow(place) % 6];
                let bytes: Vec<u8> = (0..length).map(pick).collect();
                assert!(without_queries(&bytes).len() <= bytes.len());
            }
        }
    }
}
