//! The steps that each message takes within the agent, one by one, with the bytes they concern.

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mender_connect::internals::{Class, Frame, Outbox, Sendable, SessionId, Sink, Wake, Work, file, shell};

/// What a server sends in one message of an upload.
const SMALL: usize = 4 * 1024;
/// The largest chunk of a download.
const LARGE: usize = 256 * 1024;

fn session() -> SessionId {
    SessionId::new("00000000-0000-4000-8000-000000000001").unwrap()
}

fn reading(c: &mut Criterion) {
    let sid = session();
    let mut group = c.benchmark_group("decode");
    for (name, frame) in [
        ("key", shell::output(&sid).with_body(&b"a"[..])),
        ("upload's chunk", file::chunk(&sid, 1 << 30).with_body(vec![7; SMALL])),
        ("ack", file::ack(&sid, 1 << 30, Some("a user"))),
    ] {
        let message = Bytes::from(frame.encode());
        group.throughput(Throughput::Elements(1));
        group.bench_function(name, |b| b.iter(|| Frame::decode(black_box(&message))));
    }
    group.finish();
}

fn writing(c: &mut Criterion) {
    let (outbox, mut queue) = Outbox::new();
    let sink = Sink::new(&outbox, Arc::new(Wake::new().unwrap()));
    let all = Sendable { bulk: true, interactive: true };
    let mut next = || match queue.next(all, Instant::now() + Duration::from_secs(1)) {
        Some(Work::Message(message, ..)) => message,
        other => unreachable!("{other:?}"),
    };
    let sid = session();
    let mut group = c.benchmark_group("compose and queue");
    for (name, size) in [("echo", 1), ("upload-sized chunk", SMALL), ("largest chunk", LARGE)] {
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                let frame = file::chunk(&sid, 1 << 30);
                // What a read of that size would cost isn't part of it.
                let (message, ()) = sink.compose(&frame, size, |place| (place.len(), ()));
                sink.send(message, Class::Bulk, None, None);
                drop(next());
            });
        });
    }
    group.bench_function("ack", |b| {
        b.iter(|| {
            sink.reply(&file::ack(&sid, 1 << 30, None));
            drop(next());
        });
    });
    group.finish();
}

criterion_group!(benches, reading, writing);
criterion_main!(benches);
