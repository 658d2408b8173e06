//! Files through the agent, as users of the server send and fetch them.

use std::fs::{self, OpenOptions};
use std::io::{IsTerminal, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::harness::device::Device;
use crate::harness::msg::{FILES, Msg};
use crate::harness::rest::{Form, Refused, Rest, path_body};
use crate::harness::wait::{Watched, millis, secs, spawn};
use crate::keyboard::{Signals, unless_signalled};
use crate::session::Session;

/// The server's size of an upload's chunks.
const CHUNK: usize = 4096;

#[derive(Debug, Clone, Copy)]
pub enum Direction {
    Put,
    Get,
}

/// One file to be transferred.
#[derive(Debug, Clone)]
pub struct Job {
    pub direction: Direction,
    /// The user's file.
    pub local: PathBuf,
    /// The device's.
    pub remote: String,
}

/// Transfers a few files and shows what came of it.
pub fn demonstrate(dir: &Path, device: &Device, signals: &Signals) -> Result<(), String> {
    let (sent, there) = (dir.join("sent.txt"), dir.join("device"));
    fs::create_dir(&there).map_err(|e| format!("create {}: {e}", there.display()))?;
    let text: String = (1..=500).map(|n| format!("line {n} of a text for the device\n")).collect();
    fs::write(&sent, text).map_err(|e| format!("write {}: {e}", sent.display()))?;
    let remote = there.join("received.txt").display().to_string();
    // Minimal systems have no host name there.
    let system = if Path::new("/etc/hostname").is_file() { "/etc/hostname" } else { "/proc/version" };
    let jobs = [
        Job { direction: Direction::Put, local: sent, remote: remote.clone() },
        Job { direction: Direction::Get, local: dir.join("back.txt"), remote },
        Job { direction: Direction::Get, local: dir.join("system.txt"), remote: system.to_owned() },
    ];
    for job in jobs {
        let line = run(&job, device, signals)?;
        // The device's files can be looked at directly: it is this machine.
        let same = match (fs::read(&job.local), fs::read(&job.remote)) {
            (Ok(local), Ok(remote)) => local == remote,
            _ => false,
        };
        // An ordinary window has 80 columns.
        let line = line.replace(&format!("{}/", dir.display()), "");
        eprintln!("  {line}, {}", if same { "the same bytes" } else { "NOT the same bytes" });
    }
    Ok(())
}

/// Carries out a job unless a signal comes; returns the line that tells its result.
pub fn run(job: &Job, device: &Device, signals: &Signals) -> Result<String, String> {
    let (job, device) = (job.clone(), device.clone());
    unless_signalled(signals, move || job.carry_out(&device))?
}

impl Job {
    fn carry_out(&self, device: &Device) -> Result<String, String> {
        let start = Instant::now();
        let rest = Rest::open(device);
        let (name, (size, mode)) = match self.direction {
            Direction::Put => ("put", self.put(&rest)?),
            Direction::Get => ("get", self.get(&rest)?),
        };
        rest.close();
        let time = start.elapsed().as_secs_f64() * 1000.0;
        Ok(format!("{name:<8}{}: {size} bytes, mode {mode:o}, {time:.1} ms", self.remote))
    }

    /// Returns size and mode.
    fn put(&self, rest: &Rest) -> Result<(usize, u32), String> {
        let explain = |e| format!("read {}: {e}", self.local.display());
        let bytes = fs::read(&self.local).map_err(explain)?;
        let mode = fs::metadata(&self.local).map_err(explain)?.mode() & 0o777;
        let src_path = self.local.file_name().map(|name| name.to_string_lossy().into_owned());
        let form = Form { src_path, mode: Some(mode), ..Form::to(&self.remote) };
        let mut progress = Progress::new(bytes.len());
        rest.upload_here(&form, bytes.chunks(CHUNK).inspect(|chunk| progress.add(chunk.len())))
            .map_err(text)?;
        if bytes.is_empty() {
            // The server wouldn't wait for the file to be in place, but the agent's end comes soon.
            let last = rest.next();
            if last.typ != "ack" {
                return Err(text(Rest::refused(&last, 400)));
            }
        }
        Ok((bytes.len(), mode))
    }

    /// Returns size and mode.
    fn get(&self, rest: &Rest) -> Result<(usize, u32), String> {
        let info = rest.stat(&self.remote).map_err(text)?;
        let number = |name: &str| info.field(name).and_then(|v| v.as_u64()).unwrap_or_default();
        let mode = number("mode") as u32 & 0o777;
        let mut bytes = Vec::new();
        let mut progress = Progress::new(number("size") as usize);
        rest.ask("get_file", &path_body(&self.remote));
        rest.receive(|chunk| {
            bytes.extend_from_slice(chunk);
            progress.add(chunk.len());
        })
        .map_err(text)?;
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&self.local);
        file.and_then(|mut file| file.write_all(&bytes))
            .map_err(|e| format!("write {}: {e}", self.local.display()))?;
        Ok((bytes.len(), mode))
    }
}

fn text(refused: Refused) -> String {
    refused.text
}

/// How far a transfer is, for those who watch; gone when it is over.
struct Progress {
    total: usize,
    done: usize,
    shown: Option<Instant>,
}

const EVERY: Duration = millis(100);

impl Progress {
    fn new(total: usize) -> Progress {
        Progress { total, done: 0, shown: std::io::stderr().is_terminal().then(Instant::now) }
    }

    fn add(&mut self, count: usize) {
        self.done += count;
        if self.shown.is_some_and(|shown| shown.elapsed() >= EVERY) {
            eprint!("\r\x1b[K{} of {} bytes", self.done, self.total);
            self.shown = Some(Instant::now());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown.is_some() {
            eprint!("\r\x1b[K");
        }
    }
}

/// A download beside the shell, whose bytes are counted and thrown away. Dropping it stops it.
#[derive(Debug)]
pub struct Load(Arc<Watched<Loading>>);

#[derive(Debug, Default)]
struct Loading {
    bytes: u64,
    stopped: bool,
    /// The line that tells the result.
    end: Option<String>,
}

impl Load {
    pub fn start(device: &Device, path: &Path) -> Load {
        let state = Arc::new(Watched::new(Loading::default()));
        let (loading, session) = (Arc::clone(&state), Session::open(device));
        session.post(FILES, "get_file", &[], &path_body(&path.to_string_lossy()));
        spawn("load", move || {
            let start = Instant::now();
            let result = loading.receive(&session);
            session.close();
            let mib = loading.peek(|l| l.bytes) >> 20;
            let end = result.map(|()| format!("{mib} MiB in {:.1} s", start.elapsed().as_secs_f64()));
            loading.update(|l| l.end = Some(end.unwrap_or_else(|why| why)));
        });
        Load(state)
    }

    pub fn bytes(&self) -> u64 {
        self.0.peek(|l| l.bytes)
    }

    pub fn end(&self) -> Option<String> {
        self.0.peek(|l| l.end.clone())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.update(|l| l.stopped = true);
    }
}

impl Watched<Loading> {
    /// Takes chunks until the end, acknowledging every tenth and the end, as the server does.
    fn receive(&self, session: &Session) -> Result<(), String> {
        let mut count = 0;
        while !self.peek(|l| l.stopped) {
            let Some(msg) = session.take(secs(1)).transpose()? else { continue };
            match (msg.proto, msg.typ.as_str()) {
                (FILES, "file_chunk") => {
                    let size = msg.body.as_ref().map_or(0, Vec::len) as u64;
                    let total = self.update(|l| {
                        l.bytes += size;
                        l.bytes
                    });
                    count += 1;
                    if size == 0 || count % 10 == 0 {
                        session.post(FILES, "ack", &[("offset", (total as i64).into())], b"");
                    }
                    if size == 0 {
                        return Ok(());
                    }
                }
                (FILES, "error") => return Err(reason(&msg)),
                _ => {}
            }
        }
        Ok(())
    }
}

fn reason(msg: &Msg) -> String {
    msg.field("err").and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}
