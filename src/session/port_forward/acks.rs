//! How many messages may be on the way to a client at a time. Pure.
//!
//! The released server drops what exceeds 25 messages in one session, and mender-cli's reader stalls on a connection
//! with more than 20. Data is counted by its acknowledgements. Our own acknowledgements have none; one is taken
//! for received when its connection says something, or after a while.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::proto::forward::ConnectionId;

/// Unacknowledged data of a connection, and of all of a session's.
pub const DATA_LIMIT: usize = 16;
/// Data and acknowledgements together.
const TOTAL_LIMIT: usize = 20;
/// After so long an acknowledgement has arrived or never will.
const PRESUMED: Duration = Duration::from_millis(100);

/// The session's messages that are on the way to the client.
#[derive(Debug, Default)]
pub struct OnTheWay {
    /// Unacknowledged data.
    data: usize,
    acks: VecDeque<(Instant, ConnectionId)>,
}

impl OnTheWay {
    /// Whether one more message of data may go.
    pub fn takes_data(&self) -> bool {
        self.data < DATA_LIMIT
    }

    /// Data was sent.
    pub fn data_sent(&mut self) {
        self.data += 1;
    }

    /// `count` messages of data were acknowledged, or nobody waits for that any more.
    pub fn data_gone(&mut self, count: usize) {
        self.data = self.data.saturating_sub(count);
    }

    /// Whether one more acknowledgement may go.
    pub fn takes_ack(&mut self, now: Instant) -> bool {
        while self.acks.front().is_some_and(|(sent, _)| now >= *sent + PRESUMED) {
            self.acks.pop_front();
        }
        self.data + self.acks.len() < TOTAL_LIMIT
    }

    /// When an acknowledgement may go that may not now.
    pub fn next_ack(&self) -> Option<Instant> {
        self.acks.front().map(|(sent, _)| *sent + PRESUMED)
    }

    /// An acknowledgement was sent.
    pub fn ack_sent(&mut self, connection: &ConnectionId, now: Instant) {
        self.acks.push_back((now, connection.clone()));
    }

    /// The client has said something about a connection: what was acknowledged there before has arrived.
    pub fn heard(&mut self, connection: &ConnectionId) {
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
            way.data_sent();
        }
        assert!(!way.takes_data());
        for name in ["a", "a", "b", "c"] {
            assert!(way.takes_ack(now));
            way.ack_sent(&id(name), now);
        }
        assert!(!way.takes_ack(now));
        assert_eq!(way.next_ack(), Some(now + PRESUMED));
        way.heard(&id("a"));
        assert!(way.takes_ack(now));
        way.data_gone(100);
        assert!(way.takes_data() && way.takes_ack(now));
    }

    #[test]
    fn an_ack_is_presumed_to_have_arrived() {
        let now = Instant::now();
        let mut way = OnTheWay::default();
        for _ in 0..TOTAL_LIMIT {
            way.ack_sent(&id("a"), now);
        }
        assert!(!way.takes_ack(now) && way.takes_ack(now + PRESUMED));
    }
}
