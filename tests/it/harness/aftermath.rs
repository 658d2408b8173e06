//! What must hold after any fault: the agent is as good as new, and nothing is left of what happened.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Instant;

use nix::sys::signal::Signal;

use super::client::{Style, Terminal};
use super::device::Device;
use super::proc;
use super::rest::{Form, Rest};
use super::rig::{Rig, Setup};
use super::wait::{SOON, eventually, secs};

/// What a connected agent without sessions consists of.
#[derive(Debug, PartialEq, Eq)]
struct Idle {
    threads: Vec<String>,
    /// What they are, without numbers.
    descriptors: Vec<String>,
    children: Vec<u32>,
}

impl Idle {
    fn of(pid: u32) -> Idle {
        let kind = |target: String| target.split(":[").next().unwrap_or_default().to_owned();
        Idle {
            threads: proc::thread_names(pid),
            // libfaketime's are none of the agent's.
            descriptors: proc::descriptor_targets(pid)
                .into_iter()
                .filter(|target| !target.contains("faketime"))
                .map(kind)
                .collect(),
            children: proc::children(pid),
        }
    }

    /// That of one that has done nothing yet.
    fn usual() -> &'static Idle {
        static USUAL: OnceLock<Idle> = OnceLock::new();
        USUAL.get_or_init(|| {
            let (rig, _device) = Rig::connected();
            rig.daemon.wait_for_log("Connection established", SOON);
            eventually(SOON, "the start to be over", || {
                let idle = Idle::of(rig.daemon.pid());
                let has = |name: &str| idle.threads.iter().any(|thread| thread == name);
                (has("link-writer") && !has("bus-connect")).then_some(idle)
            })
        })
    }
}

/// A shell, an upload and a download.
fn use_everything(rig: &Rig, device: &Device) {
    let mut terminal = Terminal::new(device, Style::Cli);
    terminal.open();
    let config = fs::read_to_string(rig.dir.path().join("mender-connect.conf")).expect("the configuration");
    if config.contains("/bin/bash") {
        terminal.prompt();
        assert_eq!(terminal.run("echo works"), "works");
    }
    terminal.ask_stop();
    assert_eq!(terminal.expect_after_output("stop", SOON).status(), Some(1));
    let dir = tempfile::tempdir_in(rig.dir.path()).expect("a directory");
    // The agent may be another user's.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("chmod");
    let path = dir.path().join("file");
    let name = path.to_str().expect("UTF-8");
    Rest::upload(device, &Form::to(&path), b"content").expect("an upload");
    assert_eq!(Rest::download(device, name).expect("a download").bytes, b"content");
}

/// Asserts that the agent, connected with `device`, works and has neither threads, descriptors, processes nor files
/// that it wouldn't have if nothing had happened. All of the test's sessions have to be over.
pub fn assert_healthy(rig: &mut Rig, device: &Device) {
    assert!(rig.daemon.is_running() && !device.is_over());
    use_everything(rig, device);
    // Valgrind and ThreadSanitizer have threads, descriptors and processes of their own.
    if std::env::var_os("MENDER_CONNECT_TERM").is_none() {
        let (pid, usual) = (rig.daemon.pid(), Idle::usual());
        let deadline = Instant::now() + SOON;
        eventually(secs(60), "nothing to be left", || {
            let idle = Idle::of(pid);
            assert!(idle == *usual || Instant::now() < deadline, "this is left: {idle:?}, not {usual:?}");
            (idle == *usual).then_some(())
        });
    }
    assert_no_temporary_files(rig.dir.path());
    assert!(device.broken().is_empty(), "{:?}", device.broken());
}

/// Asserts that no upload has left anything below `dir`.
pub fn assert_no_temporary_files(dir: &Path) {
    for entry in fs::read_dir(dir).expect("list").flatten() {
        let name = entry.file_name();
        assert!(
            !name.to_string_lossy().starts_with(".mender-connect-"),
            "{} is left",
            entry.path().display()
        );
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            assert_no_temporary_files(&entry.path());
        }
    }
}

/// Does what the service's supervisor does, without its pause: starts an agent that has ended anew. Whether it had.
pub fn supervise(rig: &mut Rig, setup: &Setup) -> bool {
    let ended = !rig.daemon.is_running();
    if ended {
        rig.restart(setup);
    }
    ended
}

/// Kills the agent without warning and asserts that its shells end with it.
pub fn kill(rig: &mut Rig) {
    let children = proc::children(rig.daemon.pid());
    rig.daemon.signal(Signal::SIGKILL);
    rig.daemon.wait_exit(SOON);
    for child in children {
        eventually(SOON, &format!("process {child} to end"), || proc::has_ended(child).then_some(()));
    }
}

/// What follows an agent's end: its supervisor starts it anew, it connects without help and is healthy.
pub fn assert_comes_back(rig: &mut Rig, setup: &Setup) {
    assert!(supervise(rig, setup), "the agent runs");
    let device = rig.device();
    assert_healthy(rig, &device);
}
