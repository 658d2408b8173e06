//! How many messages may be on the way to a client at a time. Pure.
//!
//! The released server drops what exceeds 25 messages in one session, and mender-cli's reader stalls on a connection
//! with more than 20. Data is counted by its acknowledgements. Our own acknowledgements have none; one is taken
//! for received when its connection says something, or after a while.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::proto::forward::ConnectionId;

/// Unacknowledged data frames of all of a session's forwards.
pub(crate) const DATA_LIMIT: usize = 16;
/// Data frames and acks together.
const TOTAL_LIMIT: usize = 20;
/// After this time an ack has arrived or never will.
const ACK_PRESUMED: Duration = Duration::from_millis(100);
/// After this time data has arrived, and waits in the queue of a client that doesn't read.
const DATA_PRESUMED: Duration = Duration::from_secs(10);

type Sent = VecDeque<(Instant, ConnectionId)>;

/// The session's frames in flight to the client.
#[derive(Debug, Default)]
pub(crate) struct OnTheWay {
    data: Sent,
    acks: Sent,
}

impl OnTheWay {
    /// True if another data frame may be sent.
    pub(crate) fn takes_data(&self) -> bool {
        self.data.len() < DATA_LIMIT
    }

    /// True if a forward with `unacked` data frames may send another: none may take more than what is left for the
    /// others. So one that the client doesn't read gets half of the window, two get a third each, and there is always
    /// some left.
    pub(crate) fn takes_data_of(&self, unacked: usize) -> bool {
        unacked + self.data.len() < DATA_LIMIT
    }

    /// When the window for data opens again by time alone.
    pub(crate) fn next_data(&self) -> Option<Instant> {
        self.data.front().map(|(sent, _)| *sent + DATA_PRESUMED)
    }

    pub(crate) fn data_sent(&mut self, connection: &ConnectionId, now: Instant) {
        self.data.push_back((now, connection.clone()));
    }

    /// One data frame was acknowledged.
    pub(crate) fn data_arrived(&mut self, connection: &ConnectionId) {
        if let Some(at) = self.data.iter().position(|(_, id)| id == connection) {
            self.data.remove(at);
        }
    }

    /// Forgets the data of a forward that has ended.
    pub(crate) fn data_gone(&mut self, connection: &ConnectionId) {
        self.data.retain(|(_, id)| id != connection);
    }

    /// Forgets what must have arrived by now.
    pub(crate) fn forget_old(&mut self, now: Instant) {
        let forget = |sent: &mut Sent, after| {
            while sent.front().is_some_and(|(at, _)| now >= *at + after) {
                sent.pop_front();
            }
        };
        forget(&mut self.data, DATA_PRESUMED);
        forget(&mut self.acks, ACK_PRESUMED);
    }

    /// True if another ack may be sent.
    pub(crate) fn takes_ack(&mut self, now: Instant) -> bool {
        self.forget_old(now);
        self.data.len() + self.acks.len() < TOTAL_LIMIT
    }

    /// When the window for acks opens again by time alone.
    pub(crate) fn next_ack(&self) -> Option<Instant> {
        self.acks.front().map(|(sent, _)| *sent + ACK_PRESUMED)
    }

    pub(crate) fn ack_sent(&mut self, connection: &ConnectionId, now: Instant) {
        self.acks.push_back((now, connection.clone()));
    }

    /// The client has sent something on a forward: earlier acks there have arrived.
    pub(crate) fn heard(&mut self, connection: &ConnectionId) {
        self.acks.retain(|(_, id)| id != connection);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{Frame, Props};

    fn id(name: &str) -> ConnectionId {
        ConnectionId::of(&Frame::new(3, "", None).with_props(Props::new().with_str("connection_id", name)))
            .unwrap()
    }

    #[test]
    fn data_and_acks_share_the_room() {
        let now = Instant::now();
        let mut way = OnTheWay::default();
        for _ in 0..DATA_LIMIT {
            assert!(way.takes_data());
            way.data_sent(&id("a"), now);
        }
        assert!(!way.takes_data());
        for name in ["a", "a", "b", "c"] {
            assert!(way.takes_ack(now));
            way.ack_sent(&id(name), now);
        }
        assert!(!way.takes_ack(now));
        assert_eq!(way.next_ack(), Some(now + ACK_PRESUMED));
        way.heard(&id("a"));
        assert!(way.takes_ack(now));
        way.data_arrived(&id("b"));
        assert!(!way.takes_data());
        way.data_arrived(&id("a"));
        assert!(way.takes_data());
        way.data_gone(&id("a"));
        assert!(way.data.is_empty() && way.takes_ack(now));
    }

    #[test]
    fn what_is_not_read_takes_no_room_for_ever() {
        let now = Instant::now();
        let mut way = OnTheWay::default();
        for _ in 0..DATA_LIMIT {
            way.data_sent(&id("deaf"), now);
        }
        assert!(!way.takes_data());
        way.forget_old(now + DATA_PRESUMED);
        assert!(way.takes_data());
        way.data_arrived(&id("deaf"));
    }

    #[test]
    fn an_ack_is_presumed_to_have_arrived() {
        let now = Instant::now();
        let mut way = OnTheWay::default();
        for _ in 0..TOTAL_LIMIT {
            way.ack_sent(&id("a"), now);
        }
        assert!(!way.takes_ack(now) && way.takes_ack(now + ACK_PRESUMED));
    }
}
