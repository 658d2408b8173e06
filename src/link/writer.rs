//! The only thread that writes to an open websocket.

use std::io::ErrorKind;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tungstenite::protocol::CloseFrame;
use tungstenite::{Error, Message, WebSocket};

use super::dial::websocket;
use super::error::{LinkError, MAX_MESSAGE};
use super::halves::Half;
use super::pace::Pace;
use super::socket::{Question, Socket};
use crate::outbox::{Class, Queue, Work};
use crate::sys::give_memory_back;

/// As Mender's agent sends it.
const PING_PAYLOAD: Bytes = Bytes::from_static(b"60");

pub(super) fn run(half: Half, mut queue: Queue, heartbeat: Duration) -> Result<(), LinkError> {
    let pace = Pace::new(half.socket().took());
    let websocket = websocket(half, 0, MAX_MESSAGE);
    let mut writer = Writer { websocket, pace };
    match writer.write(&mut queue, heartbeat) {
        // The connection was over already, and the reader has the reason.
        Err(Error::Io(e)) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

struct Writer {
    websocket: WebSocket<Half>,
    pace: Pace,
}

impl Writer {
    fn write(&mut self, queue: &mut Queue, heartbeat: Duration) -> Result<(), Error> {
        let (mut next_ping, mut hurry) = (Instant::now() + heartbeat, false);
        let mut asked = None::<Question>;
        loop {
            let now = Instant::now();
            if let Some(late) = asked.take_if(|asked| now >= asked.limit) {
                asked = self.socket().judge(late);
            }
            if now >= next_ping {
                // mender-auth's forwarder buffers more than a slow link carries: the ping waits behind that.
                let silence = if self.pace.is_waiting() && !hurry { heartbeat } else { Duration::ZERO };
                let patience = self.socket().patience() / (1 + u32::from(hurry));
                // First, since the answer may come before this thread goes on.
                let at = Instant::now();
                let question = Question { limit: at + patience, asked: at, patience, silence };
                self.websocket.send(Message::Ping(PING_PAYLOAD))?;
                asked.take_if(|asked| self.socket().is_answered(asked));
                asked = Some(asked.map_or(question, |asked| asked.min(question)));
                (next_ping, hurry) = (now + heartbeat, false);
                queue.free_buffers();
                // Drop tungstenite's buffer, which grows to the largest message and never shrinks.
                self.websocket = websocket(self.websocket.get_ref().writing(), 0, MAX_MESSAGE);
                give_memory_back();
            }
            queue.set_piece(self.pace.piece(now));
            let sendable = self.pace.sendable(now);
            let mut work = queue.try_next(sendable);
            if work.is_none() {
                // The window may have shrunk below what was written since the last probe: without another probe no
                // answer would ever open it.
                self.probe(false)?;
                // Flush before waiting.
                self.websocket.flush()?;
                let opening = self.pace.deadline().filter(|deadline| *deadline > now);
                let deadlines = opening.into_iter().chain(asked.map(|asked| asked.limit));
                work = queue.next(sendable, deadlines.fold(next_ping, Instant::min));
            }
            match work {
                None => {}
                Some(Work::Message(message, class, mark)) => {
                    if class == Class::Bulk {
                        self.probe(true)?;
                    }
                    self.pace.wrote(message.len());
                    self.websocket.write(Message::Binary(message))?;
                    if let Some(mark) = mark {
                        // Not with the next one: that may be held up while the server has got this one.
                        self.websocket.flush()?;
                        mark.store(self.socket().written(), Ordering::SeqCst);
                    }
                    self.probe(false)?;
                }
                Some(Work::Answered(probe, when)) => self.pace.answered(probe, when),
                Some(Work::Pong(payload)) => self.websocket.write(Message::Pong(payload))?,
                Some(Work::Ping(hurries)) => (next_ping, hurry) = (now, hurries),
                Some(Work::Close(code)) => {
                    return self.websocket.close(Some(CloseFrame { code: code.into(), reason: "".into() }));
                }
            }
        }
    }

    fn socket(&self) -> &Socket {
        self.websocket.get_ref().socket()
    }

    /// `bulk`: a bulk message follows.
    fn probe(&mut self, bulk: bool) -> Result<(), Error> {
        match self.pace.probe(bulk, Instant::now()) {
            Some(probe) => self.websocket.write(Message::Ping(Bytes::copy_from_slice(&probe))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::{Mark, Outbox, Sink};
    use crate::proto::Frame;
    use crate::sys::wake::Wake;
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;
    use std::thread::JoinHandle;
    use tungstenite::protocol::Role;

    fn start(pace: Pace, mut queue: Queue) -> (WebSocket<TcpStream>, JoinHandle<Result<(), Error>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let websocket = websocket(Half::new(Socket::of(ours), None), 0, MAX_MESSAGE);
        let mut writer = Writer { websocket, pace };
        let writer = crate::sys::thread::spawn("writer", crate::sys::thread::LARGE_STACK, move || {
            writer.write(&mut queue, Duration::from_secs(25))
        });
        (WebSocket::from_raw_socket(server, Role::Server, None), writer.unwrap())
    }

    /// The message was marked with the end of the ping in front of it, as if it had been written already.
    #[test]
    fn a_message_behind_a_ping_is_marked_when_it_is_written() {
        let (outbox, queue) = Outbox::new();
        let sink = Sink::new(&outbox, Arc::new(Wake::new().unwrap()));
        let (message, mark) = (Bytes::from(Frame::new(1, "shell", None).encode()), Mark::default());
        outbox.signal(Work::Ping(false));
        sink.send(message.clone(), Class::Interactive, None, Some(Arc::clone(&mark)));
        let (mut server, writer) = start(Pace::new(Duration::ZERO), queue);
        assert!(server.read().unwrap().is_ping());
        assert_eq!(server.read().unwrap(), Message::Binary(message.clone()));
        outbox.close(1000, Instant::now() + Duration::from_secs(10));
        writer.join().unwrap().unwrap();
        // Each of the two frames has a head of two bytes and a mask of four.
        let ends_at = (6 + PING_PAYLOAD.len() + 6 + message.len()) as u64;
        assert_eq!(mark.load(Ordering::SeqCst), ends_at);
    }

    /// It counted as written only with the message behind it: where the link ended then, the client got it once more by
    /// the next one.
    #[test]
    fn a_message_before_one_that_is_held_up_is_marked() {
        let (outbox, queue) = Outbox::new();
        let sink = Sink::new(&outbox, Arc::new(Wake::new().unwrap()));
        let (message, mark) = (Bytes::from(Frame::new(1, "shell", None).encode()), Mark::default());
        sink.send(message.clone(), Class::Interactive, None, Some(Arc::clone(&mark)));
        // More than the kernel takes.
        sink.send(vec![0; 64 << 20].into(), Class::Bulk, None, None);
        let (mut server, writer) = start(Pace::new(Duration::ZERO), queue);
        assert_eq!(server.read().unwrap(), Message::Binary(message));
        let deadline = Instant::now() + Duration::from_secs(10);
        while mark.load(Ordering::SeqCst) == 0 {
            assert!(Instant::now() < deadline, "it isn't marked");
            std::thread::yield_now();
        }
        drop(server);
        writer.join().unwrap().unwrap_err();
    }

    /// Without the probe the writer would wait for an answer to nothing, for ever.
    #[test]
    fn credit_that_is_lacking_is_asked_for() {
        let (outbox, queue) = Outbox::new();
        let pace = super::super::pace::tests::without_credit_or_probe(Instant::now());
        let (mut server, writer) = start(pace, queue);
        let sink = Sink::new(&outbox, Arc::new(Wake::new().unwrap()));
        let message = Bytes::from(Frame::new(2, "file_chunk", None).encode());
        sink.send(message.clone(), Class::Bulk, None, None);
        let Message::Ping(probe) = server.read().unwrap() else { panic!("no probe") };
        outbox.signal(Work::Answered(probe.as_ref().try_into().unwrap(), Instant::now()));
        // A probe goes in front of a transfer's first message.
        assert!(server.read().unwrap().is_ping());
        assert_eq!(server.read().unwrap(), Message::Binary(message));
        outbox.close(1000, Instant::now() + Duration::from_secs(10));
        assert!(server.read().unwrap().is_close());
        writer.join().unwrap().unwrap();
    }
}
