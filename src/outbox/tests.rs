//! Order, bounds and room.

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

/// A connection that takes so many messages whole, the next one in part, and has no room for those after.
#[derive(Debug, Default)]
struct Narrow {
    takes: usize,
    taken: Mutex<Vec<String>>,
}

impl Line for Narrow {
    fn write_now(&self, messages: &mut dyn Iterator<Item = Message>) -> Written {
        let mut taken = self.taken.lock().unwrap();
        while taken.len() <= self.takes {
            let Some(mut message) = messages.next() else { return Written::All };
            taken.push(Frame::decode(&message.content().to_vec().into()).unwrap().typ);
            if taken.len() > self.takes {
                return Written::Part;
            }
        }
        Written::All
    }
}

#[test]
fn small_messages_are_written_by_who_made_them_while_the_writer_waits() {
    let (outbox, sink, _wake) = sink();
    let line = Arc::new(Narrow { takes: 4, ..Narrow::default() });
    outbox.set_line(Arc::clone(&line) as Arc<dyn Line>);
    // The writer doesn't wait yet.
    sink.reply(&frame("early"));
    let limit = Instant::now() + std::time::Duration::from_secs(10);
    let (works, done) = crossbeam_channel::unbounded();
    let theirs = Arc::clone(&outbox);
    let writer = crate::sys::thread::spawn("writer", crate::sys::thread::SMALL_STACK, move || {
        while let work @ (Work::Message(..) | Work::Rest) = theirs.next(ALL, limit) {
            works.send(work).unwrap();
        }
    });
    let written = || match done.recv_deadline(limit).unwrap() {
        Work::Message(mut m, _) => Frame::decode(&m.content().to_vec().into()).unwrap().typ,
        other => format!("{other:?}"),
    };
    let waits = || {
        while outbox.lock().busy {
            assert!(Instant::now() < limit)
        }
    };
    assert_eq!(written(), "early");
    waits();
    sink.reply(&frame("first"));
    sink.replies(["second", "third"].map(frame).into_iter());
    sink.output(message("fourth"));
    assert_eq!(*line.taken.lock().unwrap(), ["first", "second", "third", "fourth"]);
    sink.bulk(message("bulk"));
    assert_eq!(written(), "bulk");
    waits();
    // A rest comes before everything else, and what there is no room for waits for the writer.
    sink.replies(["fifth", "sixth"].map(frame).into_iter());
    assert_eq!((written(), written()), ("Rest".to_owned(), "sixth".to_owned()));
    assert_eq!(line.taken.lock().unwrap().last().unwrap(), "fifth");
    outbox.close(1000, "");
    writer.unwrap().join().unwrap();
    assert!(sink.takes_data() && sink.takes_bulk() && sink.takes_replies());
}
