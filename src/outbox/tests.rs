//! Order, bounds and what comes back.

use super::*;
use crate::sys::thread;
use std::time::Duration;

const ALL: Sendable = Sendable { bulk: true, interactive: true };

fn sink() -> (Outbox, Queue, Sink) {
    let (outbox, queue) = Outbox::new();
    let sink = Sink::new(&outbox, Arc::new(Wake::new().unwrap()));
    (outbox, queue, sink)
}

fn frame(typ: &str) -> Frame {
    Frame::new(1, typ, None)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

impl Sink {
    fn output(&self, typ: &str) {
        self.send(frame(typ).encode().into(), Class::Interactive, None, None);
    }

    fn chunk(&self, typ: &str) {
        self.send(frame(typ).encode().into(), Class::Bulk, None, None);
    }
}

fn typ(work: Work) -> String {
    match work {
        Work::Message(message, ..) => Frame::decode(&message).unwrap().typ,
        other => panic!("{other:?}"),
    }
}

fn rest(queue: &mut Queue) -> Vec<String> {
    std::iter::from_fn(|| queue.try_next(ALL)).map(typ).collect()
}

#[test]
fn messages_leave_in_order_and_signals_first() {
    let (outbox, mut queue, sink) = sink();
    sink.output("a");
    sink.reply(&frame("b"));
    outbox.signal(Work::Ping(true));
    outbox.signal(Work::Pong(Bytes::from_static(b"1")));
    outbox.close(1009, Instant::now());
    assert!(matches!(queue.try_next(ALL), Some(Work::Ping(true))));
    assert!(matches!(queue.try_next(ALL), Some(Work::Pong(p)) if p == "1"));
    assert!(matches!(queue.try_next(ALL), Some(Work::Close(1009))));
    assert_eq!(rest(&mut queue), ["a", "b"]);
    assert!(queue.next(ALL, Instant::now()).is_none());
}

/// Each of 250 downloads read a message as large as the link carries in 8 ms, or waited for a place with one: 115 MiB.
#[test]
fn data_beside_much_other_is_small() {
    fn read_beside(others: usize, sink: &Sink) {
        let most = if others < MAX_BULK { 384 << 10 } else { CROWDED };
        assert_eq!(sink.piece(2048, 384 << 10), most, "beside {others}");
        if others < 2 * MAX_BULK {
            sink.compose(&frame("chunk"), most, |_| (0, read_beside(others + 1, sink)));
        }
    }
    let (_outbox, mut queue, sink) = sink();
    queue.set_piece(1 << 20);
    read_beside(0, &sink);
    for _ in 0..MAX_BULK {
        assert_eq!(sink.piece(2048, 384 << 10), 384 << 10);
        let (chunk, ()) = sink.compose(&frame("chunk"), 1, |_| (1, ()));
        sink.send(chunk, Class::Bulk, None, None);
    }
    assert_eq!(sink.piece(2048, 384 << 10), CROWDED);
    assert_eq!(sink.piece(64 << 10, 384 << 10), 64 << 10);
    assert!(queue.try_next(ALL).is_some());
    assert_eq!(sink.piece(2048, 384 << 10), 384 << 10);
}

/// A datagram of 100 bytes that waited held 64 KiB, in each of 250 sessions.
#[test]
fn small_datagrams_beside_much_other_hold_no_large_buffers() {
    let (_outbox, _queue, sink) = sink();
    let compose = |_| sink.compose(&frame("data"), 65_535, |_| (100, ())).0;
    let waiting: Vec<_> = (0..250).map(compose).collect();
    assert_eq!(sink.outbox.shared.pool.lent(), MAX_BULK);
    assert!(waiting.iter().all(|message| *message == waiting[0]));
}

#[test]
fn places_come_back_with_each_message_that_leaves() {
    let (_outbox, mut queue, sink) = sink();
    for _ in 0..MAX_DATA {
        assert!(sink.takes_data(Class::Interactive));
        sink.output("output");
        sink.chunk("chunk");
    }
    // Only the channel bounds answers.
    sink.reply_behind_bulk(&frame("stop"));
    assert!(!sink.takes_data(Class::Interactive) && !sink.takes_data(Class::Bulk));
    assert!(queue.try_next(ALL).is_some());
    assert!(sink.takes_data(Class::Interactive) && !sink.takes_data(Class::Bulk));
    assert_eq!(rest(&mut queue), ["output", "chunk", "chunk", "stop"]);
    assert!(sink.takes_data(Class::Bulk));
}

#[test]
fn what_is_discarded_gives_its_places_back_and_the_rest_stays() {
    let (_outbox, mut queue, sink) = sink();
    let discard = Discard::default();
    sink.send(frame("old").encode().into(), Class::Interactive, Some(&discard), None);
    sink.send(frame("chunk").encode().into(), Class::Bulk, Some(&discard), None);
    sink.reply(&frame("reply"));
    sink.reply_behind_bulk(&frame("stop"));
    discard.store(true, Ordering::SeqCst);
    sink.output("new");
    assert_eq!(rest(&mut queue), ["reply", "new", "stop"]);
    assert!(sink.takes_data(Class::Interactive) && sink.takes_data(Class::Bulk));
}

#[test]
fn bulk_waits_for_interactive_messages_but_not_for_ever() {
    let (_outbox, mut queue, sink) = sink();
    sink.chunk("bulk");
    sink.output("echo");
    assert_eq!(rest(&mut queue), ["echo", "bulk"]);
    sink.chunk("bulk");
    for _ in 0..MAX_INTERACTIVE {
        sink.reply(&frame("flood"));
    }
    let order: Vec<String> = (0..=MAX_FAVOURED).filter_map(|_| queue.try_next(ALL)).map(typ).collect();
    assert!(order.contains(&"bulk".to_owned()), "{order:?}");
}

#[test]
fn what_the_window_has_no_credit_for_stays() {
    let (outbox, mut queue, sink) = sink();
    sink.chunk("bulk");
    sink.output("echo");
    let none = Sendable { bulk: false, interactive: false };
    assert!(queue.next(none, Instant::now()).is_none());
    let bulk = Sendable { bulk: true, interactive: false };
    assert!(matches!(queue.try_next(bulk), Some(Work::Message(_, Class::Bulk, _))));
    outbox.signal(Work::Answered([0; 8], Instant::now()));
    assert!(matches!(queue.next(none, soon()), Some(Work::Answered(..))));
    assert_eq!(rest(&mut queue), ["echo"]);
}

#[test]
fn the_writer_is_woken_by_whatever_is_queued() {
    let (outbox, mut queue, sink) = sink();
    let (works, done) = crossbeam_channel::unbounded();
    let writer = thread::spawn("writer", thread::SMALL_STACK, move || {
        while let Some(work @ Work::Message(..)) = queue.next(ALL, soon()) {
            works.send(typ(work)).unwrap();
        }
    });
    let written = || done.recv_deadline(soon()).unwrap();
    // Once it has taken one, it has nothing to do but to wait for the next.
    sink.reply(&frame("answer"));
    assert_eq!(written(), "answer");
    sink.output("output");
    assert_eq!(written(), "output");
    sink.chunk("bulk");
    assert_eq!(written(), "bulk");
    outbox.signal(Work::Pong(Bytes::new()));
    writer.unwrap().join().unwrap();
}

/// Sessions that filled the channel, such as sixteen terminals that print, left no room: refusals were lost.
#[test]
fn sessions_leave_room_for_answers_that_do_not_wait() {
    let (outbox, mut queue, sink) = sink();
    for _ in 0..2 {
        for _ in 0..MAX_INTERACTIVE {
            sink.reply(&frame("reply"));
        }
        for _ in 0..MAX_OUTPUT {
            sink.output("output");
        }
        for _ in 0..MAX_ANSWERS {
            assert!(outbox.try_reply(&frame("answer")));
        }
        assert!(!outbox.try_reply(&frame("answer")));
        assert_eq!(rest(&mut queue).len(), MAX_INTERACTIVE + MAX_OUTPUT + MAX_ANSWERS);
    }
}

/// Each of 250 sessions waited with an answer, and an echo behind all of them: 9 s at 1 Mbit/s.
#[test]
fn output_waits_behind_no_session_that_waits() {
    let (_outbox, mut queue, sink) = sink();
    for _ in 0..MAX_INTERACTIVE {
        sink.reply(&frame("reply"));
    }
    let waiting: Vec<_> = (0..8)
        .map(|_| {
            let other = sink.clone();
            thread::spawn("other", thread::SMALL_STACK, move || other.reply(&frame("waits"))).unwrap()
        })
        .collect();
    sink.output("echo");
    assert_eq!(rest(&mut queue).iter().position(|typ| typ == "echo"), Some(MAX_INTERACTIVE));
    drop(queue);
    waiting.into_iter().for_each(|session| session.join().unwrap());
}

/// The channels are full and nobody empties them: the reader goes on, and sessions when the writer has ended.
#[test]
fn full_channels_hold_up_sessions_and_never_the_reader() {
    let (outbox, queue, sink) = sink();
    while outbox.try_reply(&frame("answer")) {}
    for _ in 0..2 * MAX_SIGNALS {
        outbox.signal(Work::Ping(true));
    }
    outbox.close(1000, Instant::now());
    let (started, waits) = crossbeam_channel::bounded(0);
    let session = thread::spawn("session", thread::SMALL_STACK, move || {
        started.send(()).unwrap();
        sink.reply(&frame("answer"));
        for _ in 0..2 * MAX_BULK {
            sink.chunk("chunk");
        }
        sink.takes_data(Class::Bulk)
    })
    .unwrap();
    waits.recv().unwrap();
    assert!(!session.is_finished());
    drop(queue);
    assert!(!session.join().unwrap(), "data would be lost");
}
