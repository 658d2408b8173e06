//! What an agent takes: sizes, time to connect, wake-ups, memory.

use std::time::{Duration, Instant};

use crate::churn::Echo;
use crate::envelope::Kind;
use crate::files::{CHUNK, Download, Upload, open};
use crate::forwards::{connect, of_connection};
use crate::harness::proc::voluntary_switches;
use crate::mixed::endless;
use crate::process::{Memory, memory, sizes};
use crate::row::{Figure, KIB, MIB, Measure, Row, SOON, Scale, figure, median, row};
use crate::stage::{Agent, Stage, Way, config};
use crate::terminal::{ECHO, Keys, start_shell};

/// Nothing has come for so long: nothing will.
const QUIET: Duration = Duration::from_millis(300);
/// After so many chunks a download has found its pace.
const WARM: usize = 300;

pub fn rows() -> Vec<Row> {
    vec![
        row("size", "the executable and the libraries it is linked with", prepare_size),
        row("start", "from the start to the handshake's request", prepare_start),
        row("wake-ups", "wake-ups with an idle shell, for 20 s", prepare_wake_ups),
        row("memory-shells", "memory: idle, with 1 and 16 shells", |agent, scale| {
            prepare_memory(agent, scale, "shell", &[1, 16], add_shell)
        }),
        row("memory-forwards", "memory with 1, 64 and 256 forwards that were used", |agent, scale| {
            let target = Echo::start()?;
            prepare_memory(agent, scale, "forward", &[1, 64, 256], move |stage, count| {
                let target = &target;
                add_forward(stage, count, target.port)
            })
        }),
        row("memory-downloads", "memory with 1 and 16 downloads that wait for acks", |agent, scale| {
            prepare_memory(agent, scale, "download", &[1, 16], add_download)
        }),
        row("memory-uploads", "memory with 1 and 16 uploads under way", |agent, scale| {
            prepare_memory(agent, scale, "upload", &[1, 16], add_upload)
        }),
    ]
}

fn prepare_size(agent: &Agent, _: Scale) -> Result<Measure, String> {
    let path = agent.path.clone();
    Ok(Box::new(move || {
        let sizes = sizes(&path)?;
        Ok(vec![
            figure("executable", "MiB", sizes.executable as f64 / MIB),
            figure("shared libraries", "", sizes.libraries as f64),
            figure("their size", "MiB", sizes.libraries_size as f64 / MIB),
        ])
    }))
}

fn prepare_start(agent: &Agent, scale: Scale) -> Result<Measure, String> {
    let agent = agent.clone();
    Ok(Box::new(move || {
        let mut times = Vec::new();
        // Once will do when it takes long.
        while times.len() < scale.pick(5, 2) && times.iter().all(|time| *time < 1000.0) {
            let stage = Stage::start(&agent, &config(ECHO), Way::Direct)?;
            times.push(stage.connected_after.as_secs_f64() * 1e3);
        }
        Ok(vec![figure("connected after", "ms", median(times))])
    }))
}

fn prepare_wake_ups(agent: &Agent, scale: Scale) -> Result<Measure, String> {
    let mut stage = Stage::start(agent, &config(ECHO), Way::Direct)?;
    let session = stage.session();
    start_shell(&mut stage.link, session)?;
    let span = Duration::from_secs(scale.pick(20, 5));
    stage.measured(move |stage| {
        stage.link.rest(Instant::now() + Duration::from_secs(3))?;
        let (before, started) = (voluntary_switches(stage.pid()), Instant::now());
        stage.link.rest(started + span)?;
        let count = voluntary_switches(stage.pid()) - before;
        Ok(vec![figure("wake-ups", "per s", count as f64 / started.elapsed().as_secs_f64())])
    })
}

/// `add` begins one more of what takes memory, told how many there are.
fn prepare_memory(
    agent: &Agent,
    _: Scale,
    name: &'static str,
    counts: &'static [usize],
    add: impl Fn(&mut Stage, usize) -> Result<(), String> + 'static,
) -> Result<Measure, String> {
    let agent = agent.clone();
    Ok(Box::new(move || {
        // Each time a new process, since memory isn't given back.
        let mut stage = Stage::start(&agent, &config(ECHO), Way::Direct)?;
        let mut figures = Vec::new();
        stage.link.rest(Instant::now() + Duration::from_secs(1))?;
        if name == "shell" {
            let idle = memory(stage.pid())?;
            say(&mut figures, "idle", &idle);
            figures.push(figure("idle: anonymous", "KiB", idle.anonymous));
        }
        let mut steps: Vec<(usize, Memory)> = Vec::new();
        let mut now = 0;
        for &count in counts {
            while now < count {
                stage.explained(|stage| add(stage, now))?;
                now += 1;
            }
            stage.link.settle(QUIET, SOON)?;
            let memory = memory(stage.pid())?;
            let several = if count == 1 { "" } else { "s" };
            say(&mut figures, &format!("{count} {name}{several}"), &memory);
            steps.push((count, memory));
        }
        if let [(few, first), .., (many, last)] = steps[..] {
            let more = (many - few) as f64;
            let resident = (last.resident - first.resident) / more;
            figures.push(figure(format!("each further {name}: resident"), "KiB", resident));
            let private = (last.private - first.private) / more;
            figures.push(figure(format!("each further {name}: private"), "KiB", private));
        }
        Ok(figures)
    }))
}

fn say(figures: &mut Vec<Figure>, what: &str, memory: &Memory) {
    figures.push(figure(format!("{what}: resident"), "MiB", memory.resident / KIB));
    figures.push(figure(format!("{what}: private"), "MiB", memory.private / KIB));
}

fn add_shell(stage: &mut Stage, _: usize) -> Result<(), String> {
    let session = stage.session();
    start_shell(&mut stage.link, session)?;
    let mut keys = Keys::new(session);
    for _ in 0..20 {
        keys.press(&mut stage.link)?;
    }
    Ok(())
}

/// All in one session.
fn add_forward(stage: &mut Stage, count: usize, port: u16) -> Result<(), String> {
    if count == 0 {
        let session = stage.session();
        open(&mut stage.link, session)?;
    }
    let (session, connection) = (1, count as u32 + 1);
    connect(&mut stage.link, session, connection, port)?;
    for _ in 0..4 {
        stage.link.put(&of_connection("forward", session, connection, &[b'x'; CHUNK]))?;
        let (mut echoed, mut acked) = (0, false);
        while echoed < CHUNK || !acked {
            let header = stage.link.next_of(session, SOON)?;
            match header.kind {
                Kind::Ack => acked = true,
                Kind::Forward => {
                    echoed += header.body;
                    stage.link.put(&of_connection("ack", session, connection, &[]))?;
                }
                _ => return Err(stage.link.unexpected(&header)),
            }
        }
    }
    Ok(())
}

fn add_download(stage: &mut Stage, _: usize) -> Result<(), String> {
    let file = endless(stage.dir())?;
    let session = stage.session();
    let mut download = Download::start(&mut stage.link, session, &file)?;
    for _ in 0..WARM {
        let header = stage.link.next_of(session, SOON)?;
        download.take(&mut stage.link, &header)?;
    }
    stage.link.settle(QUIET, SOON)
}

fn add_upload(stage: &mut Stage, count: usize) -> Result<(), String> {
    let session = stage.session();
    let target = stage.dir().join(format!("upload-{count}"));
    let mut upload = Upload::start(&mut stage.link, session, &target)?;
    while !upload.is_held() {
        upload.send(&mut stage.link, &[b'x'; CHUNK])?;
    }
    stage.link.settle(QUIET, SOON)
}
