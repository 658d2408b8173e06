//! Standard error that nobody reads: a stalled journal, a stopped `logger`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};

use nix::sys::signal::Signal;

use crate::files::{get, pattern};
use crate::harness::client::{Style, Terminal};
use crate::harness::daemon::emulated;
use crate::harness::device::Device;
use crate::harness::msg::SHELL;
use crate::harness::proc;
use crate::harness::rig::{Rig, Setup};
use crate::harness::wait::{SOON, secs, spawn};

/// Standard error is a FIFO whose only reader is the agent itself, which doesn't read.
const UNREAD: &str = "mkfifo log && exec \"$@\" 2<>log";

/// Has the agent log more than the FIFO and any queue hold, about half a mebibyte.
fn flood(device: &Device) {
    for _ in 0..4000 {
        device.send(SHELL, "a message without a session is worth a line", "", &[], b"");
    }
}

fn unread() -> (Rig, Device) {
    let (rig, device) = Setup::new().flag("--debug").wrapper(UNREAD).connected();
    flood(&device);
    assert!(device.answers(b"the flood is over", SOON), "the reader goes on");
    (rig, device)
}

/// Every thread wrote its own lines: the first that found the pipe full held the lock for which the others waited. No
/// session began any more, and no transfer, while the server showed the device as connected.
#[test]
fn a_log_that_nobody_reads_stops_nobody() {
    let (rig, device) = unread();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("echo works"), "works");
    let file = rig.dir.path().join("file");
    fs::write(&file, pattern(100_000)).unwrap();
    assert_eq!(get(&device, &file).unwrap().bytes, pattern(100_000));
    assert_eq!(rig.status()["connection"]["state"], "connected");
    let rss = proc::rss_kib(rig.daemon.pid());
    assert!(rss < 24 << 10 || emulated("its memory is the emulator's, too"), "{rss} KiB");

    // Once somebody reads, the log tells what is missing. What the audit log has to say didn't have to give way.
    let mut log = BufReader::new(File::open(rig.dir.path().join("log")).unwrap()).lines();
    let lines = spawn("log-reader", move || {
        let mut lines: Vec<String> = Vec::new();
        while !lines.last().is_some_and(|line| line.contains("lines lost")) {
            lines.push(log.next().unwrap().unwrap());
        }
        lines
    });
    let lines = lines.join().unwrap();
    let has = |text: &str| lines.iter().any(|line| line.contains(text));
    assert!(has("event=shell-start") && has("event=transfer"), "{:?}", &lines[lines.len() - 5..]);
    let report = lines.last().unwrap();
    assert!(report.contains("level=warning") && !report.contains("audit"), "{report}");
    assert!(lines.iter().all(|line| line.len() < 4096));
    terminal.stop();
}

/// The supervisor waited for the same lock, and SIGTERM had no effect.
#[test]
fn an_agent_whose_log_nobody_reads_ends_in_time() {
    let (mut rig, device) = unread();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    rig.daemon.signal(Signal::SIGTERM);
    assert!(rig.daemon.wait_exit(secs(3)).success());
}

/// A client's errors need no answer: one user filled the log, and the journal, as fast as the link carries them.
#[test]
fn a_clients_errors_do_not_fill_the_log() {
    use crate::harness::msg::{CONTROL, FILES};
    use crate::harness::rest::Rest;
    let (rig, device) = Rig::connected();
    let rest = Rest::open(&device);
    for _ in 0..20 {
        for _ in 0..50 {
            rest.send(FILES, "error", None, b"\x81\xa3err\xa2no");
            rest.send(CONTROL, "error", None, b"\x81\xa3err\xa2no");
        }
        rest.send(CONTROL, "ping", None, b"");
        assert_eq!(rest.next().typ, "pong");
    }
    let lines = rig.daemon.count_log("error from the client");
    assert!(lines < 20, "{lines} lines");
}
