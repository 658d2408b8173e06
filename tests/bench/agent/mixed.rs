//! Somebody types while a file goes down.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::files::{Download, close};
use crate::harness::relay::Shape;
use crate::process::Meter;
use crate::row::{Figure, MIB, Measure, Row, SOON, Scale, figure, percentile, row};
use crate::stage::{Agent, Stage, Way, config};
use crate::terminal::{ECHO, Keys, start_shell, stop_shell};

/// A key at most so often.
const PAUSE: Duration = Duration::from_millis(10);
/// Bytes per second of the slow link: 1 Mbit/s.
const SLOW: u64 = 125_000;

pub fn rows() -> Vec<Row> {
    let mut rows: Vec<Row> = [
        ("keys-beside-download", "keys while a file goes down", false),
        ("keys-one-thread", "the same with a client that copies every byte in its only thread", true),
    ]
    .map(|(name, about, reads_all)| {
        row(name, about, move |agent, scale| beside_download(agent, scale, reads_all))
    })
    .into();
    for each_way in [25, 50] {
        let about = format!("the same with 1 Mbit/s towards the server and {each_way} ms each way");
        rows.push(row(format!("keys-1mbit-{}ms", 2 * each_way), about, move |agent, scale| {
            let delay = Duration::from_millis(each_way);
            let shape = Shape { delay, up: Some(SLOW), ..Shape::default() };
            prepare_slow(agent, scale, shape)
        }));
    }
    rows
}

fn beside_download(agent: &Agent, scale: Scale, reads_all: bool) -> Result<Measure, String> {
    let (stage, file) = prepare(agent, Way::Direct)?;
    stage.measured(move |stage| {
        stage.link.verify(reads_all);
        let meter = Meter::start(stage.pid())?;
        let (_, mixed) = run(stage, &file, Duration::ZERO, scale.span)?;
        let cpu = meter.read()?.1;
        Ok(vec![
            figure("echo, median", "µs", percentile(&mixed.times, 50) * 1e6),
            figure("echo, 99th percentile", "µs", percentile(&mixed.times, 99) * 1e6),
            figure("download", "MiB/s", mixed.bytes as f64 / MIB / mixed.span),
            figure("agent's CPU", "s/s", cpu / mixed.span),
        ])
    })
}

fn prepare_slow(agent: &Agent, scale: Scale, shape: Shape) -> Result<Measure, String> {
    let (stage, file) = prepare(agent, Way::Link(shape))?;
    let span = Duration::from_secs(scale.pick(15, 5));
    stage.measured(move |stage| {
        let (early, mixed) = run(stage, &file, Duration::from_secs(5), span)?;
        let share = |bytes: u64| bytes as f64 / (SLOW as f64 * mixed.span) * 100.0;
        let figures: Vec<Figure> = vec![
            figure("echo, median", "ms", percentile(&mixed.times, 50) * 1e3),
            figure("echo, 99th percentile", "ms", percentile(&mixed.times, 99) * 1e3),
            figure("echo, slowest of the first 5 s", "ms", percentile(&early.times, 100) * 1e3),
            figure("of the link used by the file", "%", share(mixed.bytes)),
            figure("of the link used by everything", "%", share(mixed.link_bytes)),
        ];
        Ok(figures)
    })
}

/// An agent, and a file that has no end.
fn prepare(agent: &Agent, way: Way) -> Result<(Stage, std::path::PathBuf), String> {
    let stage = Stage::start(agent, &config(ECHO), way)?;
    let file = endless(stage.dir())?;
    Ok((stage, file))
}

/// A file that takes longer than anybody waits, and no room.
pub fn endless(dir: &Path) -> Result<std::path::PathBuf, String> {
    let path = dir.join("endless");
    let file = File::create(&path).and_then(|file| file.set_len(1 << 40));
    file.map(|()| path).map_err(|e| format!("a file with a hole: {e}"))
}

/// What happened in a time.
struct Phase {
    /// Seconds until the echo, for each key.
    times: Vec<f64>,
    span: f64,
    /// Of the file, and of everything that passed the link.
    bytes: u64,
    link_bytes: u64,
}

/// Types for this long after the download's start, and this long again.
fn run(stage: &mut Stage, file: &Path, first: Duration, then: Duration) -> Result<(Phase, Phase), String> {
    let (shell, session) = (stage.session(), stage.session());
    start_shell(&mut stage.link, shell)?;
    let mut keys = Keys::new(shell);
    let mut download = Download::start(&mut stage.link, session, file)?;
    let mut phase = |span| type_for(stage, span, &mut keys, &mut download);
    let phases = (phase(first)?, phase(then)?);
    close(&mut stage.link, session)?;
    stop_shell(&mut stage.link, shell)?;
    Ok(phases)
}

fn type_for(
    stage: &mut Stage,
    span: Duration,
    keys: &mut Keys,
    download: &mut Download,
) -> Result<Phase, String> {
    let passed =
        |stage: &Stage| stage.relay.as_ref().map_or(0, |relay| relay.sent_up.load(Ordering::Relaxed));
    let started = Instant::now();
    let (bytes, link_bytes) = (download.bytes, passed(stage));
    let end = started + span;
    let mut phase = Phase { times: Vec::new(), span: 0.0, bytes: 0, link_bytes: 0 };
    let (mut due, mut waiting) = (started, false);
    // The last key's echo is waited for.
    while Instant::now() < end || waiting {
        let now = Instant::now();
        if now < end {
            phase.span = (now - started).as_secs_f64();
            (phase.bytes, phase.link_bytes) = (download.bytes - bytes, passed(stage) - link_bytes);
        } else if now > end + SOON {
            return Err(format!("no echo within {SOON:?}"));
        }
        if !waiting && now >= due {
            keys.send(&mut stage.link)?;
            (waiting, due) = (true, now + PAUSE);
        }
        let until = if waiting { end + SOON } else { due.min(end) };
        let Some(header) = stage.link.next(until)? else { continue };
        if header.session == download.session {
            if download.take(&mut stage.link, &header)? {
                return Err("the file has an end".to_owned());
            }
        } else if header.session == keys.session {
            phase.times.push(keys.take(&stage.link, &header)?.as_secs_f64());
            waiting = false;
        }
    }
    Ok(phase)
}
