//! What the kernel counts of a process.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;

/// CPU time of all its threads, those that have ended included.
pub fn cpu(pid: u32) -> Result<Duration, String> {
    let clock =
        clock_getcpuclockid(Pid::from_raw(pid as i32)).map_err(|e| format!("CPU clock of {pid}: {e}"))?;
    clock.now().map(Duration::from).map_err(|e| format!("CPU time of {pid}: {e}"))
}

/// Elapsed and CPU time from one moment on.
pub struct Meter {
    pid: u32,
    started: Instant,
    cpu: Duration,
}

impl Meter {
    pub fn start(pid: u32) -> Result<Meter, String> {
        Ok(Meter { pid, cpu: cpu(pid)?, started: Instant::now() })
    }

    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Elapsed seconds and CPU seconds.
    pub fn read(&self) -> Result<(f64, f64), String> {
        let elapsed = self.elapsed();
        Ok((elapsed.as_secs_f64(), cpu(self.pid)?.saturating_sub(self.cpu).as_secs_f64()))
    }
}

/// Memory in KiB.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    pub resident: f64,
    /// Nobody else's: what would be free without the process.
    pub private: f64,
    /// Not a file's.
    pub anonymous: f64,
}

pub fn memory(pid: u32) -> Result<Memory, String> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
        number.ok_or_else(|| format!("no {name} in {path}"))
    };
    Ok(Memory {
        resident: field("Rss")?,
        private: field("Private_Clean")? + field("Private_Dirty")?,
        anonymous: field("Anonymous")?,
    })
}

/// Sizes of an executable and of the libraries it is linked with, in bytes.
pub struct Sizes {
    pub executable: u64,
    pub libraries: usize,
    pub libraries_size: u64,
}

pub fn sizes(executable: &Path) -> Result<Sizes, String> {
    let size = |path: &Path| {
        std::fs::metadata(path).map(|m| m.len()).map_err(|e| format!("{}: {e}", path.display()))
    };
    let listing = Command::new("ldd").arg(executable).output().map_err(|e| format!("ldd: {e}"))?.stdout;
    let listing = String::from_utf8_lossy(&listing);
    let mut libraries: Vec<&str> = listing.split_whitespace().filter(|word| word.starts_with('/')).collect();
    libraries.dedup();
    let mut libraries_size = 0;
    for library in &libraries {
        libraries_size += size(Path::new(library))?;
    }
    Ok(Sizes { executable: size(executable)?, libraries: libraries.len(), libraries_size })
}
