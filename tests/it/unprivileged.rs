//! An agent without root, on a bus that lets only root and, by our policy, this agent's user talk to mender-auth.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use crate::harness::bus::MENDERS_POLICY;
use crate::harness::client::{Style, Terminal};
use crate::harness::proc;
use crate::harness::rest::{Form, Rest};
use crate::harness::rig::{Setup, is_root};
use crate::harness::wait::{SOON, millis, skip};

const POLICY: &str = include_str!("../../yocto/files/io.mender.connect.conf");

/// The user nobody, who stands for mender-connect.
const UID: u32 = 65534;

/// Our policy's elements, for that user.
fn ours() -> String {
    let (_, rest) = POLICY.split_once("<busconfig>").expect("a configuration");
    let (elements, _) = rest.split_once("</busconfig>").expect("its end");
    assert_eq!(elements.matches("user=").count(), 1);
    elements.replace("user=\"mender-connect\"", "user=\"nobody\"")
}

/// An agent of that user, whose group may read the configuration.
fn setup(policy: &str) -> Option<Setup> {
    if !is_root() {
        skip("only root can start an agent as somebody else");
        return None;
    }
    let script = "chmod 755 . && chgrp 65534 *.conf && chmod 640 *.conf &&
        mkdir -m 700 run && chown 65534 run &&
        exec setpriv --reuid=65534 --regid=65534 --clear-groups \"$@\"";
    let policy = format!("{MENDERS_POLICY}{policy}");
    Some(Setup::new().set("User", "nobody").policy(&policy).wrapper(script))
}

#[test]
fn without_the_policy_there_is_no_token_and_the_log_says_why() {
    let Some(setup) = setup("") else { return };
    let mut rig = setup.start();
    let line = rig.daemon.wait_for_log("call to GetJWTToken on the Mender D-Bus API failed: ", SOON);
    assert!(line.contains("level=warning") && line.contains("Rejected send message"), "{line}");
    rig.manager.signal("stolen", &rig.server.url());
    rig.server.no_device(millis(500), "nobody else's token is told");
    assert!(rig.manager.all_calls().is_empty());
    assert!(rig.daemon.is_running());
}

#[test]
fn with_the_policy_it_connects_and_follows_the_token() {
    let Some(setup) = setup(&ours()) else { return };
    let rig = setup.token("").start();
    // Each call that it makes, and the signal.
    rig.manager.wait_calls("FetchJwtToken", 1, SOON);
    rig.manager.change("token", &rig.server.url());
    let device = rig.device();
    assert_eq!(device.request().header("Authorization"), Some("Bearer token"));
    rig.daemon.wait_for_log("Connection established", SOON);
    let agent = rig.daemon.pid();
    assert_eq!(fs::metadata(format!("/proc/{agent}/task")).expect("the agent").uid(), UID);
    let log = rig.daemon.log();
    assert!(!log.iter().any(|line| line.contains("level=warning")), "{log:#?}");
}

#[test]
fn it_does_what_its_user_may_do() {
    let Some(setup) = setup(&ours()) else { return };
    let files = tempfile::tempdir().expect("a temporary directory");
    fs::set_permissions(files.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    let (own, other) = (files.path().join("own"), files.path().join("other"));
    for (folder, owner) in [(&own, UID), (&other, 0)] {
        fs::create_dir(folder).expect("a folder");
        fs::write(folder.join("secret"), "secret").expect("write");
        fs::set_permissions(folder.join("secret"), fs::Permissions::from_mode(0o600)).expect("chmod");
        chown(folder, Some(owner), Some(owner)).expect("chown");
        chown(folder.join("secret"), Some(owner), Some(owner)).expect("chown");
    }
    let (rig, device) = setup.connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("echo $(id -u) $(id -g)"), "65534 65534");
    terminal.run("trap '' HUP TERM");
    let shells = proc::children(rig.daemon.pid());
    terminal.stop();
    shells.iter().for_each(|&pid| proc::wait_gone(pid, SOON));

    let get = |folder: &Path| Rest::download(&device, folder.join("secret").to_str().expect("UTF-8"));
    assert_eq!(get(&own).expect("a download").bytes, b"secret");
    let refusal = get(&other).expect_err("somebody else's");
    assert!(refusal.text.contains("permission denied"), "{refusal:?}");

    let form = Form { uid: Some(UID), gid: Some(UID), mode: Some(0o640), ..Form::to(own.join("new")) };
    Rest::upload(&device, &form, b"new").expect("an upload");
    let stat = fs::metadata(own.join("new")).expect("the file");
    assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o7777), (UID, UID, 0o640));
    let refusal = Rest::upload(&device, &Form::to(other.join("new")), b"new").expect_err("somebody else's");
    assert!(refusal.text.contains("permission denied"), "{refusal:?}");
    assert!(!other.join("new").exists());
    let form = Form { uid: Some(0), gid: Some(0), ..Form::to(own.join("roots")) };
    let refusal = Rest::upload(&device, &form, b"new").expect_err("it can't be given away");
    assert!(refusal.text.contains("operation not permitted"), "{refusal:?}");
    assert!(!own.join("roots").exists());
}
