//! What a server sends after the upgrade, read as the link's reader does. The first byte says how large messages may
//! be, the second into which pieces the rest is cut.

#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

use libfuzzer_sys::fuzz_target;
use mender_connect::internals::{Frame, LinkError, Outbox, Sendable, Work, read};

/// As in the agent.
const LARGEST: usize = (1 << 20) + (1 << 10);
/// Signals that the writer can have before it; the reader drops those beyond.
const SIGNALS: usize = 64;
/// Frames that are still in use while others come.
const KEPT: usize = 32;
/// What may be allocated besides messages: the read buffer and the reader's spare ones.
const OVERHEAD: usize = 256 * 1024;

fuzz_target!(|data: &[u8]| {
    let [size, cut, stream @ ..] = data else { return };
    let most = if *size == 0 { LARGEST } else { 16 << (size % 11) };
    let expected = expect(stream, most);
    let (outbox, mut queue) = Outbox::new();
    let mut inbound = Sessions { expected: &expected.frames, ..Sessions::default() };
    let server = Server { rest: stream, cut: (*cut).into() };

    let before = ALLOCATED.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let lost = read(server, most, &outbox, |frame| inbound.frame(frame));
    let used = PEAK.load(Ordering::Relaxed) - before;
    assert!(used <= OVERHEAD + 2 * most + 8 * stream.len(), "{used} bytes for {} of {most}", stream.len());

    assert_eq!(inbound.came, expected.frames.len(), "{lost}");
    for (number, frame) in &inbound.kept {
        assert_eq!(*frame, expected.frames[*number], "it has changed while it was in use");
    }
    match (&lost, &expected.end) {
        (LinkError::Closed { .. }, End::Closed)
        | (LinkError::Broken(_), End::Broken)
        | (LinkError::TooLarge, End::TooLarge) => {}
        (lost, end) => panic!("{lost:?}, expected {end:?}"),
    }
    let all = Sendable { bulk: true, interactive: true };
    for expected in expected.controls.iter().take(SIGNALS) {
        match (queue.try_next(all), expected) {
            (Some(Work::Pong(payload)), Control::Ping(expected)) => {
                assert_eq!(payload, expected)
            }
            (Some(Work::Answered(probe, _)), Control::Pong(expected)) => {
                assert_eq!(probe, *expected);
            }
            (work, expected) => panic!("{work:?}, expected {expected:?}"),
        }
    }
    assert!(queue.try_next(all).is_none());
});

/// Hands out its bytes in pieces.
struct Server<'a> {
    rest: &'a [u8],
    cut: usize,
}

impl Read for Server<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let piece = if self.cut < 2 { self.rest.len() } else { 1 + self.rest.len() % self.cut };
        let n = (&self.rest[..piece.min(self.rest.len())]).read(buffer)?;
        self.rest = &self.rest[n..];
        Ok(n)
    }
}

/// As the read half: what tungstenite answers is the writer's to say.
impl Write for Server<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Default)]
struct Sessions<'a> {
    expected: &'a [Frame],
    came: usize,
    kept: Vec<(usize, Frame)>,
}

impl Sessions<'_> {
    fn frame(&mut self, frame: Frame) {
        assert_eq!(Some(&frame), self.expected.get(self.came));
        if self.kept.len() == KEPT {
            self.kept.swap_remove(self.came % KEPT);
        }
        self.kept.push((self.came, frame));
        self.came += 1;
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Closed,
    TooLarge,
    Broken,
}

/// What a stream comes to.
struct Expected {
    frames: Vec<Frame>,
    /// The tasks that the writer has to get.
    controls: Vec<Control>,
    end: End,
}

#[derive(Debug)]
enum Control {
    Ping(Vec<u8>),
    /// With a probe's length.
    Pong([u8; 8]),
}

/// Reads a stream as RFC 6455 describes it.
fn expect(mut stream: &[u8], most: usize) -> Expected {
    let mut expected = Expected { frames: Vec::new(), controls: Vec::new(), end: End::Broken };
    // The message so far, and whether it is text.
    let mut begun: Option<(Vec<u8>, bool)> = None;
    expected.end = loop {
        let (first, masked, payload) = match take_frame(&mut stream, most) {
            Ok(frame) => frame,
            Err(end) => break end,
        };
        let (last, opcode) = (first & 0x80 != 0, first & 0x0f);
        if first & 0x70 != 0 || masked || (opcode >= 8 && (!last || payload.len() > 125)) {
            break End::Broken;
        }
        match (opcode, &mut begun) {
            (8, _) => break if is_goodbye(payload) { End::Closed } else { End::Broken },
            (9, _) => expected.controls.push(Control::Ping(payload.to_vec())),
            (10, _) => expected.controls.extend(payload.try_into().ok().map(Control::Pong)),
            (1 | 2, None) => begun = Some((payload.to_vec(), opcode == 1)),
            (0, Some((message, _))) if message.len() + payload.len() > most => break End::TooLarge,
            (0, Some((message, _))) => message.extend(payload),
            _ => break End::Broken,
        }
        if opcode >= 8 {
            continue;
        }
        if let Some((message, true)) = &begun
            && let Err(e) = std::str::from_utf8(message)
            && (last || e.error_len().is_some())
        {
            break End::Broken;
        }
        if last && let Some((message, _)) = begun.take() {
            expected.frames.extend(Frame::decode(&message.into()));
        }
    };
    expected
}

/// The first byte of the frame that comes next, whether it is masked, and its payload.
fn take_frame<'a>(stream: &mut &'a [u8], most: usize) -> Result<(u8, bool, &'a [u8]), End> {
    let mut take = |n: usize| {
        let (taken, rest) = stream.split_at_checked(n).ok_or(End::Broken)?;
        *stream = rest;
        Ok(taken)
    };
    let head = take(2)?;
    let wide = match head[1] & 0x7f {
        126 => take(2)?,
        127 => take(8)?,
        _ => &[],
    };
    let masked = head[1] & 0x80 != 0;
    if masked {
        take(4)?;
    }
    let length = match wide {
        [] => u64::from(head[1] & 0x7f),
        wide => wide.iter().fold(0, |n, byte| n << 8 | u64::from(*byte)),
    };
    if matches!(head[0] & 0x0f, 3..8 | 11..) {
        return Err(End::Broken);
    }
    if length > most as u64 {
        return Err(End::TooLarge);
    }
    Ok((head[0], masked, take(length as usize)?))
}

fn is_goodbye(payload: &[u8]) -> bool {
    payload.is_empty() || payload.get(2..).is_some_and(|reason| std::str::from_utf8(reason).is_ok())
}

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, with a count of the bytes that are in use.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(place, layout) }
    }
}
