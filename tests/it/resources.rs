//! Figures the agent must hold: time, memory, descriptors. They are printed; the bounds asserted
//! leave room for a debug build among other tests on two cores.

use std::time::{Duration, Instant};

use crate::harness::client::{Style, Terminal};
use crate::harness::daemon;
use crate::harness::device::{Device, Reading};
use crate::harness::proc;
use crate::harness::rig::{Rig, Setup, script_config};
use crate::harness::server::Server;
use crate::harness::wait::{SOON, eventually, millis, secs, throughout};

#[test]
fn start_to_connected() {
    let mut times: Vec<Duration> = (0..5)
        .map(|_| {
            let (rig, device) = Rig::connected();
            device.request().at - rig.daemon.started
        })
        .collect();
    times.sort_unstable();
    println!("start to handshake: {times:?}");
    assert!(times[0] < millis(300), "the best of five took {:?}", times[0]);
}

#[test]
fn hundreds_of_shells_leave_nothing_behind() {
    let (rig, device) = Setup::new().config(script_config("read x; exit 0")).connected();
    let pid = rig.daemon.pid();
    let terminal = Terminal::new(&device, Style::Cli);
    let mut warm = None;
    for n in 0..300 {
        terminal.open();
        if n % 2 == 0 {
            terminal.ask_stop();
            let reply = terminal.expect_after_output("stop", SOON);
            assert_eq!((reply.status(), reply.body), (Some(1), None), "shell {n}");
        } else {
            terminal.input("\n");
            assert_eq!(terminal.expect_after_output("stop", SOON).status(), Some(2), "shell {n}");
        }
        if n == 100 {
            warm = Some((proc::threads(pid), proc::descriptors(pid), proc::rss_kib(pid)));
        }
    }
    eventually(SOON, "no process to be left", || proc::children(pid).is_empty().then_some(()));
    let (threads, descriptors, rss) = warm.expect("measured");
    let rig_of = || (proc::threads(pid), proc::descriptors(pid));
    eventually(SOON, &format!("{threads} threads, {descriptors} descriptors again"), || {
        let (t, d) = rig_of();
        (t <= threads && d <= descriptors).then_some(())
    });
    let grown = proc::assert_not_grown(pid, rss);
    println!("300 shells: {:?}; resident {rss} KiB after 100, {grown} KiB after all", rig_of());
    let ptys = || proc::descriptor_targets(pid).into_iter().filter(|t| t.contains("ptmx")).count();
    eventually(SOON, &format!("no PTY to be left open: {:?}", proc::descriptor_targets(pid)), || {
        (ptys() == 0).then_some(())
    });
}

/// How long keystrokes take to come back as echo, sorted.
pub fn echo_times(terminal: &mut Terminal, samples: usize) -> Vec<Duration> {
    let mut times: Vec<Duration> = (0..samples)
        .map(|_| {
            let start = Instant::now();
            terminal.input("k");
            terminal.read_until("k", SOON);
            terminal.forget_output();
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times
}

/// Whatever another shell does, half of the keystrokes must be back within 50 ms.
fn assert_quick(what: &str, times: &[Duration]) {
    let median = times[times.len() / 2];
    println!("{what}: echo median {median:?}, worst {:?}", times[times.len() - 1]);
    assert!(median < millis(50), "{what}: the median echo took {median:?}");
}

/// A terminal whose keystrokes are echoed by the PTY while a program reads them away.
pub fn echoing(device: &Device) -> Terminal {
    let mut terminal = Terminal::new(device, Style::Cli);
    terminal.open();
    terminal.read_until("ready", SOON);
    terminal.forget_output();
    terminal
}

/// One script for all shells: it does what its first line of input says.
pub const ROLES: &str = "echo ready; read role; case $role in \
    stubborn) trap '' HUP INT TERM QUIT; echo armed; while :; do read x || sleep 1; done;; \
    deaf) stty raw -echo; echo armed; exec sleep 60;; \
    flood) echo armed; exec yes;; \
    esac";

fn role(device: &Device, name: &str) -> Terminal {
    let mut terminal = echoing(device);
    terminal.input(format!("{name}\n"));
    terminal.read_until("armed", SOON);
    terminal
}

#[test]
fn a_stubborn_shell_slows_nobody_down() {
    let (_rig, device) = Setup::new().config(script_config(ROLES)).connected();
    let mut other = echoing(&device);
    assert_quick("alone", &echo_times(&mut other, 30));
    let stubborn = role(&device, "stubborn");
    stubborn.ask_stop();
    let times = echo_times(&mut other, 60);
    assert_quick("while a shell ignores SIGTERM", &times);
    assert!(
        times[times.len() - 1] < secs(1),
        "no single echo waits for the kill: {:?}",
        times[times.len() - 1]
    );
    assert_eq!(stubborn.expect_after_output("stop", SOON).status(), Some(1));
}

#[test]
fn a_deaf_shell_slows_nobody_down() {
    let (_rig, device) = Setup::new().config(script_config(ROLES)).connected();
    let mut other = echoing(&device);
    let deaf = role(&device, "deaf");
    for _ in 0..30 {
        deaf.input(vec![b'x'; 60_000]);
    }
    assert_quick("while a shell doesn't read its input", &echo_times(&mut other, 60));
}

#[test]
fn a_flooding_shell_slows_nobody_down() {
    let (_rig, device) = Setup::new().config(script_config(ROLES)).connected();
    let mut other = echoing(&device);
    let flood = role(&device, "flood");
    device.discard(&flood.sid);
    assert_quick("while a shell floods", &echo_times(&mut other, 60));
}

#[test]
fn a_flooding_shell_and_a_slow_peer() {
    let rig =
        Setup::new().config(script_config(ROLES)).start_with(|s: &Server| s.small_receive_buffer(128 << 10));
    let device = rig.device();
    let mut other = echoing(&device);
    let flood = role(&device, "flood");
    device.discard(&flood.sid);
    device.set_reading(Reading::Rate(8 << 20));
    echo_times(&mut other, 5);
    let times = echo_times(&mut other, 20);
    let median = times[times.len() / 2];
    println!("while a shell floods a peer that reads 8 MiB/s: echo median {median:?}");
    // What lies in the peer's receive buffer comes first, whoever sends it.
    assert!(median < millis(250), "the median echo took {median:?}");
}

#[test]
fn endless_output_to_a_slow_peer_is_bounded_and_whole() {
    let rig = Setup::new()
        .config(script_config("exec seq 1 1000000000"))
        .start_with(|s: &Server| s.small_receive_buffer(256 << 10));
    let device = rig.device();
    let pid = rig.daemon.pid();
    let before = proc::rss_kib(pid);
    let terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    let mut check = Sequence::default();
    let mut most = 0;
    let mut read = |device: &Device, bytes: usize, check: &mut Sequence| {
        let end = check.bytes + bytes;
        while check.bytes < end {
            let msg = terminal.next(secs(30));
            assert_eq!((msg.typ.as_str(), msg.status()), ("shell", Some(1)), "{}", msg.summary());
            check.feed(&msg.body.expect("output"));
            most = most.max(proc::rss_kib(pid));
        }
        assert!(!device.is_over());
    };
    read(&device, 1 << 20, &mut check);
    device.set_reading(Reading::Rate(2 << 20));
    read(&device, 6 << 20, &mut check);
    // A pause shorter than the time after which a stuck link is given up.
    device.set_reading(Reading::Paused);
    throughout(secs(4), "the agent waits for its peer", || !device.is_over());
    device.set_reading(Reading::Rate(1 << 20));
    read(&device, 2 << 20, &mut check);
    device.set_reading(Reading::Full);
    read(&device, 16 << 20, &mut check);
    println!(
        "endless output: {} MiB checked; resident {before} KiB before, {most} KiB at most",
        check.bytes >> 20
    );
    assert!(most < before + (8 << 10), "memory grew from {before} to {most} KiB");
    terminal.ask_stop();
    let sid = terminal.sid.clone();
    loop {
        let msg = terminal.next(secs(30));
        if msg.typ == "stop" {
            assert_eq!((msg.status(), msg.body), (Some(1), None));
            break;
        }
        check.feed(&msg.body.expect("output"));
    }
    device.nothing(millis(300), "the stop reply is the last word", |m| m.sid.as_ref() == Some(&sid));
}

/// Checks seq's output as it comes.
#[derive(Default)]
struct Sequence {
    bytes: usize,
    last: u64,
    /// Digits of a line that isn't complete.
    partial: Vec<u8>,
}

impl Sequence {
    fn feed(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len();
        for &byte in bytes {
            self.partial.push(byte);
            if byte == b'\n' {
                let expected = format!("{}\r\n", self.last + 1);
                assert_eq!(String::from_utf8_lossy(&self.partial), expected, "lost or reordered output");
                self.last += 1;
                self.partial.clear();
            }
        }
    }
}

/// The static executable's promise is for plain websockets, as through mender-auth's forwarder.
#[test]
fn an_idle_agent_is_small() {
    let (rig, _device) = Rig::connected();
    let pid = rig.daemon.pid();
    let (resident, own) = (proc::rss_kib(pid), proc::anonymous_kib(pid));
    println!("idle and connected: {resident} KiB resident, {own} KiB of them its own");
    let limit = if daemon::is_static() { 2_000_000 / 1024 } else { 8 * 1024 };
    assert!(resident <= limit || daemon::emulated("its memory is the emulator's, too"), "{resident} KiB");
}
