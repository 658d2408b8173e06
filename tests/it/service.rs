//! What systemd is told (sd_notify), and the watchdog.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::harness::client::new_sid;
use crate::harness::daemon;
use crate::harness::rig::{Setup, bash_config, is_root};
use crate::harness::server::Reply;
use crate::harness::wait::{SOON, eventually, millis, secs, skip};
use crate::signals::ends_quickly;

/// The manager's end.
struct Manager {
    socket: UnixDatagram,
    name: String,
    _dir: TempDir,
}

impl Manager {
    fn new(abstracted: bool) -> Manager {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let (socket, name) = if abstracted {
            let name = format!("mender-connect-{}", new_sid());
            let address = SocketAddr::from_abstract_name(&name).unwrap();
            (UnixDatagram::bind_addr(&address).unwrap(), format!("@{name}"))
        } else {
            (UnixDatagram::bind(&path).unwrap(), path.to_str().unwrap().to_owned())
        };
        Manager { socket, name, _dir: dir }
    }

    fn setup(&self) -> Setup {
        Setup::new().env("NOTIFY_SOCKET", &self.name)
    }

    /// What is said next, if anything within `limit`.
    fn next(&self, limit: Duration) -> Option<String> {
        let mut bytes = [0; 4096];
        self.socket.set_read_timeout(Some(limit)).unwrap();
        let n = self.socket.recv(&mut bytes).ok()?;
        Some(String::from_utf8(bytes[..n].to_vec()).unwrap())
    }

    /// Everything up to what begins like this, which included.
    fn until(&self, start: &str) -> Vec<String> {
        let deadline = Instant::now() + SOON;
        let mut said = Vec::new();
        loop {
            assert!(Instant::now() < deadline, "waited in vain for {start:?}: {said:?}");
            said.extend(self.next(SOON));
            if said.last().is_some_and(|text| text.starts_with(start)) {
                return said;
            }
        }
    }
}

#[test]
fn readiness_state_and_end_are_told() {
    for abstracted in [false, true] {
        let manager = Manager::new(abstracted);
        let (mut rig, device) = manager.setup().connected();
        let url = rig.server.url();
        let said = manager.until(&format!("STATUS=connected to {url}"));
        assert!(said.contains(&"READY=1".to_owned()), "{said:?}");
        assert_eq!(said.iter().filter(|text| *text == "READY=1").count(), 1, "{said:?}");
        device.reset();
        manager.until(&format!("STATUS=next attempt to connect to {url}, 0 failed"));
        manager.until(&format!("STATUS=connected to {url}"));
        rig.manager.change("", "");
        manager.until("STATUS=waiting for a token");
        ends_quickly(&mut rig, Signal::SIGTERM);
        assert_eq!(manager.until("STOPPING=1").last().unwrap(), "STOPPING=1");
        assert_eq!(manager.next(millis(100)), None);
    }
}

#[test]
fn an_agent_is_ready_without_a_token_or_a_server() {
    let manager = Manager::new(false);
    let _unauthorized = manager.setup().token("").start();
    manager.until("READY=1");
    let manager = Manager::new(false);
    let _alone = manager.setup().without_manager().start();
    manager.until("READY=1");
    let manager = Manager::new(false);
    let _refused = manager.setup().start_with(|server| server.always(Reply::status(500)));
    manager.until("READY=1");
}

#[test]
fn an_agent_that_cannot_start_is_never_ready() {
    let manager = Manager::new(false);
    let mut command = daemon::command();
    let output = command
        .args(["--config", "/nonexistent", "--fallback-config", "/nonexistent", "daemon"])
        .env("NOTIFY_SOCKET", &manager.name)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(manager.next(millis(100)), None);
    let mut rig = manager.setup().env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent").start();
    assert_eq!(rig.daemon.wait_exit(SOON).code(), Some(1));
    while let Some(said) = manager.next(millis(100)) {
        assert!(said.starts_with("STATUS="), "{said}");
    }
}

#[test]
fn a_reload_is_told() {
    let manager = Manager::new(false);
    let (rig, _device) = manager.setup().connected();
    manager.until("STATUS=connected");
    rig.daemon.signal(Signal::SIGHUP);
    let said = manager.until("READY=1");
    let [reloading, ready] = &said[..] else { panic!("{said:?}") };
    let now = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect("when it began");
    assert!(now.parse::<u64>().is_ok(), "{reloading}");
    assert_eq!(ready, "READY=1");
    // What went wrong is to be seen there, too.
    std::fs::write(rig.dir.path().join("mender-connect.conf"), "{").unwrap();
    rig.daemon.signal(Signal::SIGHUP);
    manager.until("READY=1");
    let said = manager.until("STATUS=connected").pop().unwrap();
    assert!(said.ends_with("; the configuration was not reloaded, see the log"), "{said}");
    rig.reload(&bash_config());
    let said = manager.until("STATUS=connected").pop().unwrap();
    assert!(!said.contains("configuration"), "{said}");
}

#[test]
fn a_manager_that_does_not_read_or_is_gone_is_no_trouble() {
    let manager = Manager::new(false);
    let setup = manager.setup().env("WATCHDOG_USEC", "2000");
    let (mut rig, device) = setup.connected();
    // A signal of life each millisecond has filled the queue long before.
    assert!(device.answers(b"full", SOON));
    eventually(SOON, "the queue to be full", || {
        let probe = UnixDatagram::unbound().unwrap();
        probe.set_nonblocking(true).unwrap();
        probe.send_to(b"probe", &manager.name).is_err().then_some(())
    });
    assert!(device.answers(b"still", SOON));
    drop(manager);
    assert!(device.answers(b"gone", SOON));
    ends_quickly(&mut rig, Signal::SIGTERM);
}

/// It was never ready for a manager whose queue was full at that moment, which would have ended it.
#[test]
fn a_manager_that_was_busy_hears_of_it_later() {
    let manager = Manager::new(false);
    let fill = || {
        let other = UnixDatagram::unbound()?;
        other.set_nonblocking(true)?;
        other.send_to(b"other", &manager.name)
    };
    while fill().is_ok() {}
    let (_rig, device) = manager.setup().connected();
    assert!(device.answers(b"up", SOON));
    manager.until("READY=1");
}

/// A thread of the agent, made to stand still.
struct Frozen(Pid);

impl Frozen {
    fn new(agent: u32, thread: &str) -> Frozen {
        let tasks = std::fs::read_dir(format!("/proc/{agent}/task")).unwrap();
        let task = tasks.flatten().find(|task| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == thread)
        });
        let pid: i32 = task.expect(thread).file_name().to_str().unwrap().parse().unwrap();
        let pid = Pid::from_raw(pid);
        ptrace::seize(pid, ptrace::Options::empty()).expect("trace a thread");
        ptrace::interrupt(pid).expect("stop a thread");
        waitpid(pid, Some(WaitPidFlag::__WALL)).expect("wait for the stop");
        Frozen(pid)
    }

    fn thaw(self) {
        ptrace::detach(self.0, None).expect("let the thread go on");
    }
}

fn feeds_within(manager: &Manager, span: Duration) -> usize {
    let deadline = Instant::now() + span;
    let mut feeds = 0;
    while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        feeds += usize::from(manager.next(left).as_deref() == Some("WATCHDOG=1"));
    }
    feeds
}

#[test]
fn the_watchdog_is_fed_only_while_the_link_goes_on() {
    if !is_root() {
        return skip("tracing the agent takes root");
    }
    if daemon::emulated("an emulator's threads are its own") {
        return;
    }
    let manager = Manager::new(false);
    let (rig, device) = manager.setup().env("WATCHDOG_USEC", "1000000").connected();
    manager.until("STATUS=connected");
    for _ in 0..3 {
        manager.until("WATCHDOG=1");
    }
    // With nothing to read a reader that stands still is like any other.
    let frozen = Frozen::new(rig.daemon.pid(), "link");
    for _ in 0..3 {
        manager.until("WATCHDOG=1");
    }
    device.ping(b"are you there");
    eventually(SOON, "the watchdog to go hungry", || {
        (feeds_within(&manager, millis(1400)) == 0).then_some(())
    });
    frozen.thaw();
    manager.until("WATCHDOG=1");
    assert!(device.answers(b"again", SOON));
    // As it is at the other end of the daemon.
    let frozen = Frozen::new(rig.daemon.pid(), "mender-connect");
    feeds_within(&manager, millis(600));
    assert_eq!(feeds_within(&manager, millis(1400)), 0);
    frozen.thaw();
    manager.until("WATCHDOG=1");
    // A server that is silent, an attempt that hangs and a wait are no fault of the agent's.
    rig.server.always(Reply::Silence);
    device.reset();
    for _ in 0..6 {
        manager.until("WATCHDOG=1");
    }
}

#[test]
fn the_watchdog_of_another_process_is_not_fed() {
    for (micros, pid) in [("200000", "1"), ("0", ""), ("soon", "")] {
        let manager = Manager::new(false);
        let mut setup = manager.setup().env("WATCHDOG_USEC", micros);
        if !pid.is_empty() {
            setup = setup.env("WATCHDOG_PID", pid);
        }
        let (_rig, _device) = setup.connected();
        assert_eq!(feeds_within(&manager, secs(1)), 0, "{micros} {pid}");
    }
}
