//! The real executable as a child process.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::proc;
use super::wait::{SOON, Watched, eventually, millis, skip, spawn, tell};

/// Where the executable lies. MENDER_CONNECT names another one than was built with the tests; else cargo tells
/// integration tests, and an example looks beside itself.
pub fn executable() -> PathBuf {
    if let Some(path) = std::env::var_os("MENDER_CONNECT") {
        return path.into();
    }
    if let Some(path) = option_env!("CARGO_BIN_EXE_mender-connect") {
        return path.into();
    }
    let me = std::env::current_exe().expect("this program's path");
    // target/<profile>/examples/playground -> target/<profile>/mender-connect
    let profile = me.ancestors().nth(2).expect("target/<profile>");
    profile.join("mender-connect")
}

/// The executable with a bare environment, so that nothing of the caller's leaks into a test. When it is for
/// another kind of processor, MENDER_CONNECT_RUNNER names the emulator.
pub fn command() -> Command {
    let mut command = match std::env::var_os("MENDER_CONNECT_RUNNER") {
        None => Command::new(executable()),
        Some(runner) => {
            let mut command = Command::new(runner);
            command.arg(executable());
            command
        }
    };
    bare(&mut command);
    command
}

/// Whether the program that is started, executable or emulator, is linked with nothing.
pub fn is_static() -> bool {
    let listing = Command::new("ldd").arg(command().get_program()).output().expect("run ldd").stdout;
    !String::from_utf8_lossy(&listing).contains("libc.so")
}

/// Whether the executable runs in an emulator, where this test isn't possible: says so, and `why`.
pub fn emulated(why: &str) -> bool {
    let emulated = std::env::var_os("MENDER_CONNECT_RUNNER").is_some();
    if emulated {
        tell(&format!("not possible in an emulator: {why}"));
    }
    emulated
}

/// Whether libfaketime can set the executable's clock, and no other's; says so if not.
pub fn has_clock() -> bool {
    if is_static() {
        tell("the clock of a static executable can't be set for it alone");
        return false;
    }
    let library = Path::new("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1").exists();
    if !library {
        skip("the Debian package 'libfaketime' is missing");
    }
    library
}

/// Takes everything out of the environment but what programs need to be found.
pub fn bare(command: &mut Command) {
    command.env_clear().env("RUST_BACKTRACE", "1");
    // Not the machine's own: daemons at a time are many.
    command.env("RUNTIME_DIRECTORY", "/nonexistent/mender-connect");
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
}

/// Runs the executable to its end.
pub fn run(args: &[&str]) -> Output {
    command().args(args).stdin(Stdio::null()).output().expect("run mender-connect")
}

/// A running agent; killed on drop, or told to end where MENDER_CONNECT_TERM is set: what runs it may have a word to
/// say at a regular end. When the test panics its log is printed.
pub struct Daemon {
    child: Child,
    log: Arc<Watched<Log>>,
    status: Option<ExitStatus>,
    /// When it was started.
    pub started: Instant,
}

#[derive(Debug, Default)]
struct Log {
    lines: Vec<String>,
    complete: bool,
}

impl Daemon {
    /// Starts a prepared command with this standard input and output, reading its standard error. When that shall look
    /// like the journal's, JOURNAL_STREAM names it as systemd does: device and inode.
    pub fn start([input, output]: [Stdio; 2], mut command: Command, journal: bool) -> Daemon {
        let (stderr, write_end) = std::io::pipe().expect("a pipe");
        if journal {
            let pipe = nix::sys::stat::fstat(&write_end).expect("fstat");
            command.env("JOURNAL_STREAM", format!("{}:{}", pipe.st_dev, pipe.st_ino));
        }
        command.stdin(input).stdout(output).stderr(write_end);
        let started = Instant::now();
        let child = command.spawn().unwrap_or_else(|e| panic!("start {:?}: {e}", command.get_program()));
        // The command holds the write end too, and without its end the log has none.
        drop(command);
        let log = Arc::new(Watched::new(Log::default()));
        let filled = Arc::clone(&log);
        spawn("daemon-log", move || {
            let mut reader = BufReader::new(stderr);
            let mut line = Vec::new();
            while let Ok(1..) = reader.read_until(b'\n', &mut line) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                filled.update(|log| log.lines.push(text));
                line.clear();
            }
            filled.update(|log| log.complete = true);
        });
        Daemon { child, log, status: None, started }
    }

    /// Starts a prepared command whose log goes to a file.
    #[allow(dead_code, reason = "for the playground")]
    pub fn start_logging_to(mut command: Command, file: std::fs::File) -> Daemon {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        let started = Instant::now();
        let child = command.spawn().unwrap_or_else(|e| panic!("start {:?}: {e}", command.get_program()));
        let log = Arc::new(Watched::new(Log { lines: Vec::new(), complete: true }));
        Daemon { child, log, status: None, started }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs prlimit(1) for it, as its user.
    fn prlimit(&self, arguments: &[&str]) -> String {
        let user = std::fs::metadata(format!("/proc/{}", self.pid())).expect("the agent").uid();
        let mut command = if user == nix::unistd::getuid().as_raw() {
            Command::new("prlimit")
        } else {
            let mut command = Command::new("setpriv");
            command.args([
                &format!("--reuid={user}"),
                &format!("--regid={user}"),
                "--clear-groups",
                "prlimit",
            ]);
            command
        };
        let output = command.args(["--pid", &self.pid().to_string()]).args(arguments).output();
        let output = output.expect("run prlimit");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
    }

    /// Sets a limit of the running agent.
    pub fn limit(&self, name: &str, value: u64) {
        self.prlimit(&[&format!("--{name}={value}:")]);
    }

    /// Takes it away.
    pub fn lift(&self, name: &str) {
        let most = self.prlimit(&[&format!("--{name}"), "--output=HARD", "--noheadings", "--raw"]);
        self.prlimit(&[&format!("--{name}={most}:")]);
    }

    /// Everything logged so far.
    pub fn log(&self) -> Vec<String> {
        self.log.peek(|log| log.lines.clone())
    }

    /// Takes what was logged so far away, so that it doesn't pile up for hours.
    pub fn take_log(&self) -> Vec<String> {
        self.log.update(|log| std::mem::take(&mut log.lines))
    }

    /// How many lines have been logged: a mark for [`Daemon::wait_for_log_after`].
    pub fn mark(&self) -> usize {
        self.log.peek(|log| log.lines.len())
    }

    /// Waits for a line that contains `text`, from the start of the log.
    pub fn wait_for_log(&self, text: &str, limit: Duration) -> String {
        self.wait_for_log_after(0, text, limit)
    }

    /// Waits for a line at or behind `mark` that contains `text`.
    pub fn wait_for_log_after(&self, mark: usize, text: &str, limit: Duration) -> String {
        let found = self.log.wait(limit, |log| {
            let line = log.lines.iter().skip(mark).find(|line| line.contains(text)).cloned();
            line.map(Some).or_else(|| log.complete.then_some(None))
        });
        match found {
            Some(Some(line)) => line,
            Some(None) => panic!("the daemon ended without logging {text:?}"),
            None => panic!("waited {limit:?} in vain for the log to say {text:?}"),
        }
    }

    /// How many lines contain `text`.
    pub fn count_log(&self, text: &str) -> usize {
        self.log.peek(|log| log.lines.iter().filter(|line| line.contains(text)).count())
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid() as i32), signal).expect("signal the daemon");
    }

    /// Stops the process with all its threads for a while, as a debugger or a suspended machine does.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
        let deadline = Instant::now() + SOON;
        loop {
            let going_on = proc::not_stopped(self.pid());
            if going_on.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "the daemon does not stand still: {going_on:#?}");
            std::thread::park_timeout(millis(20));
        }
    }

    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    pub fn is_running(&mut self) -> bool {
        self.try_wait().is_none()
    }

    fn try_wait(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("wait for the daemon");
        }
        self.status
    }

    /// Waits for the daemon's end and for the last line of its log.
    pub fn wait_exit(&mut self, limit: Duration) -> ExitStatus {
        let status = eventually(limit, "the daemon to exit", || self.try_wait());
        self.log.wait(SOON, |log| log.complete.then_some(()));
        status
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.status.is_none() {
            if std::env::var_os("MENDER_CONNECT_TERM").is_some() {
                self.signal(Signal::SIGTERM);
                let deadline = Instant::now() + SOON;
                while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
                    std::thread::park_timeout(millis(20));
                }
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let tail = log.len().saturating_sub(60);
            eprintln!("--- the daemon's log (last {} of {} lines):", log.len() - tail, log.len());
            for line in &log[tail..] {
                eprintln!("{line}");
            }
        }
    }
}
