//! Order, bounds and room.

use super::sink::FRAMES_IN_FLIGHT;
use super::*;
use crate::proto::Frame;
use crate::sys::wake::Wake;

const ALL: Room = Room { bulk: true, interactive: true };

fn sink() -> (Arc<Outbox>, FrameSink, Arc<Wake>) {
    let outbox = Arc::new(Outbox::default());
    let wake = Arc::new(Wake::new().unwrap());
    let sink = FrameSink::new(&outbox, Arc::clone(&wake));
    (outbox, sink, wake)
}

fn frame(typ: &str) -> Frame {
    Frame::new(1, typ, None)
}

fn message(typ: &str) -> Message {
    (&frame(typ)).into()
}

fn next(outbox: &Outbox) -> Option<String> {
    match outbox.next(ALL, Instant::now()) {
        Work::Message(mut m, _) => Some(Frame::decode(&m.content().to_vec().into()).unwrap().typ),
        Work::Nothing => None,
        other => panic!("{other:?}"),
    }
}

#[test]
fn frames_leave_in_order_and_urgent_matters_first() {
    let (outbox, sink, _wake) = sink();
    sink.output(message("a"));
    sink.reply(&frame("b"));
    outbox.flush();
    outbox.pong(Bytes::from_static(b"1"));
    outbox.pong(Bytes::from_static(b"2"));
    let now = Instant::now();
    assert!(matches!(outbox.next(ALL, now), Work::Pong(p) if p == "2"));
    assert!(matches!(outbox.next(ALL, now), Work::Flush));
    assert_eq!(next(&outbox).as_deref(), Some("a"));
    outbox.close(1000, "");
    assert!(matches!(outbox.next(ALL, now), Work::Close(1000, "")));
    assert_eq!(next(&outbox).as_deref(), Some("b"));
    assert!(next(&outbox).is_none() && outbox.try_next(ALL).is_none());
}

#[test]
fn room_comes_back_with_each_frame_that_leaves() {
    let (outbox, sink, _wake) = sink();
    for _ in 0..FRAMES_IN_FLIGHT {
        assert!(sink.takes_data());
        sink.output(message("d"));
    }
    assert!(!sink.takes_data() && sink.takes_replies());
    assert!(next(&outbox).is_some());
    assert!(sink.takes_data());
    for _ in 0..REPLIES_IN_FLIGHT {
        sink.reply(&frame("r"));
    }
    assert!(!sink.takes_replies());
}

#[test]
fn what_is_thrown_away_makes_room_and_the_rest_stays() {
    let (outbox, sink, _wake) = sink();
    let fill = || {
        sink.output(message("output"));
        sink.reply(&frame("reply"));
        sink.chunk(message("chunk"));
        sink.bulk(message("bulk"));
    };
    let rest = || std::iter::from_fn(|| next(&outbox)).collect::<Vec<_>>();
    fill();
    sink.discard_output();
    sink.output(message("new"));
    assert_eq!(rest(), ["reply", "new", "chunk", "bulk"]);
    fill();
    sink.discard_chunks();
    sink.chunk(message("new"));
    assert_eq!(rest(), ["output", "reply", "bulk", "new"]);
    assert!(sink.takes_data() && sink.takes_bulk());
}

#[test]
fn a_queue_that_goes_away_gives_all_room_back() {
    let (outbox, sink, _wake) = sink();
    sink.output(message("d"));
    sink.output(message("d"));
    assert!(!sink.takes_data());
    outbox.lock().interactive.clear();
    assert!(sink.takes_data());
}

#[test]
fn bulk_waits_for_interactive_frames_but_not_for_ever() {
    let (outbox, sink, _wake) = sink();
    sink.bulk(message("bulk"));
    sink.output(message("echo"));
    assert_eq!(next(&outbox).as_deref(), Some("echo"));
    assert_eq!(next(&outbox).as_deref(), Some("bulk"));
    sink.bulk(message("bulk"));
    for _ in 0..100 {
        sink.output(message("flood"));
    }
    let order: Vec<String> = (0..=MAX_FAVOURED).filter_map(|_| next(&outbox)).collect();
    assert!(order.contains(&"bulk".to_owned()), "{order:?}");
}

#[test]
fn what_there_is_no_room_for_stays() {
    let (outbox, sink, _wake) = sink();
    sink.bulk(message("bulk"));
    sink.output(message("echo"));
    let none = Room { bulk: false, interactive: false };
    assert!(outbox.try_next(none).is_none());
    let bulk = Room { bulk: true, interactive: false };
    assert!(matches!(outbox.try_next(bulk), Some(Work::Message(_, true))));
    outbox.answered([0; 8], Instant::now());
    assert!(matches!(outbox.try_next(none), Some(Work::Answered(..))));
    assert_eq!(next(&outbox).as_deref(), Some("echo"));
}

#[test]
fn the_writer_is_woken_by_what_is_queued() {
    let (outbox, sink, _wake) = sink();
    let limit = Instant::now() + std::time::Duration::from_secs(10);
    let (works, done) = crossbeam_channel::unbounded();
    let theirs = Arc::clone(&outbox);
    let writer = crate::sys::thread::spawn("writer", crate::sys::thread::SMALL_STACK, move || {
        while let Work::Message(mut m, _) = theirs.next(ALL, limit) {
            works.send(Frame::decode(&m.content().to_vec().into()).unwrap().typ).unwrap();
        }
    });
    let written = || done.recv_deadline(limit).unwrap();
    // Once it has taken the one before, it has nothing to do but to wait for the next.
    sink.reply(&frame("answer"));
    assert_eq!(written(), "answer");
    sink.replies(["first", "second", "third"].map(frame).into_iter());
    assert_eq!([written(), written(), written()], ["first", "second", "third"]);
    sink.output(message("output"));
    assert_eq!(written(), "output");
    sink.bulk(message("bulk"));
    assert_eq!(written(), "bulk");
    outbox.close(1000, "");
    writer.unwrap().join().unwrap();
    assert!(sink.takes_data() && sink.takes_bulk() && sink.takes_replies());
}
