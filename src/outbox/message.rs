//! A message on its way out. It is built once, in the buffer that it is written from: the body first, where its
//! source puts it, then the head before it, whose length only then is known, and last what the link puts in front.

use std::ops::Range;
use std::sync::Arc;

use super::spares::Spares;
use crate::proto::Frame;

/// What a websocket puts in front of a message at most.
pub const FRONT: usize = 14;

/// Smaller buffers aren't worth to be used again.
const MIN_SPARE: usize = 8 * 1024;

/// A message, or what there is of it.
#[derive(Debug)]
pub struct Message {
    /// All of it has been written to once, so that it can be read into.
    bytes: Vec<u8>,
    content: Range<usize>,
    home: Option<Arc<Spares>>,
}

impl Message {
    /// The message for `frame` with another body of up to `most` bytes: as many as `read` says it has put into
    /// what it is given. Besides, what `read` has to say.
    pub fn compose<T>(
        spares: &Arc<Spares>,
        frame: &Frame,
        most: usize,
        read: impl FnOnce(&mut [u8]) -> (usize, T),
    ) -> (Message, T) {
        let mut head = Vec::with_capacity(frame.head_room());
        frame.encode_head(most, &mut head);
        let start = FRONT + head.len();
        let mut bytes = spares.take(start + most);
        let (length, said) = read(&mut bytes[start..start + most]);
        if length < most {
            head.clear();
            frame.encode_head(length, &mut head);
        }
        let mut message = Message { bytes, content: start..start + length, home: Some(Arc::clone(spares)) };
        message.put_before(&head);
        (message, said)
    }

    fn put_before(&mut self, bytes: &[u8]) {
        let start = self.content.start - bytes.len();
        self.bytes[start..self.content.start].copy_from_slice(bytes);
        self.content.start = start;
    }

    /// The message itself.
    pub fn content(&mut self) -> &mut [u8] {
        &mut self.bytes[self.content.clone()]
    }

    /// The message behind `front`, once, of at most [`FRONT`] bytes.
    pub fn behind(&mut self, front: &[u8]) -> &[u8] {
        self.put_before(front);
        &self.bytes[self.content.clone()]
    }
}

impl From<&Frame> for Message {
    fn from(frame: &Frame) -> Self {
        let mut bytes = Vec::new();
        frame.encode_behind(FRONT, &mut bytes);
        Message { content: FRONT..bytes.len(), bytes, home: None }
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        if let Some(home) = self.home.take()
            && self.bytes.len() >= MIN_SPARE
        {
            home.give(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(spares: &Arc<Spares>, most: usize, body: &[u8]) -> Message {
        let read = |place: &mut [u8]| {
            assert_eq!(place.len(), most);
            place[..body.len()].copy_from_slice(body);
            (body.len(), ())
        };
        Message::compose(spares, &Frame::new(2, "typ", None), most, read).0
    }

    #[test]
    fn it_is_the_frame_with_the_body_that_was_read() {
        let spares = Arc::new(Spares::new(4));
        for (most, body) in [(3, &b"abc"[..]), (70_000, b"abc"), (70_000, &[7; 70_000]), (300, b"")] {
            let mut message = of(&spares, most, body);
            let expected = Frame::new(2, "typ", None).with_body(body.to_vec()).encode();
            assert_eq!(message.content(), expected);
            assert_eq!(message.behind(b"12"), [b"12", &expected[..]].concat());
        }
        let mut whole = Message::from(&Frame::new(2, "typ", None).with_body("abc"));
        assert_eq!(whole.content(), of(&spares, 9, b"abc").content());
        assert_eq!(whole.behind(&[7; FRONT])[..FRONT], [7; FRONT]);
    }

    #[test]
    fn large_buffers_are_used_again_and_given_back_when_asked() {
        let spares = Arc::new(Spares::new(4));
        let first = of(&spares, MIN_SPARE, b"x");
        let place = first.bytes.as_ptr();
        drop(first);
        let again = of(&spares, 10, b"x");
        assert_eq!(again.bytes.as_ptr(), place);
        let larger = of(&spares, 2 * MIN_SPARE, b"x");
        assert!(larger.bytes.as_ptr() != place);
        let small = of(&spares, 10, b"x");
        drop((again, larger, small));
        assert_eq!(spares.count(), 2);
        spares.clear();
        assert_eq!(spares.count(), 0);
    }
}
