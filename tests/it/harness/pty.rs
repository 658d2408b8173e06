//! A terminal of a test's own, as a person sits at one.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::Arc;

use nix::fcntl::{OFlag, open};
use nix::pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::stat::Mode;

use super::daemon;
use super::wait::{Watched, spawn};

/// Both ends, the first with these flags. They are closed on exec from the start: other tests start processes meanwhile.
pub fn open_pair(flags: OFlag) -> (PtyMaster, OwnedFd) {
    let usual = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = posix_openpt(usual | flags).expect("a PTY");
    grantpt(&master).and_then(|()| unlockpt(&master)).expect("a usable PTY");
    let name = ptsname_r(&master).expect("a name");
    (master, open(name.as_str(), usual, Mode::empty()).expect("its terminal"))
}

/// setsid(1), which makes the terminal the controlling one of the program that is added: Ctrl-C and resizes go by that.
pub fn session_on(slave: &OwnedFd) -> Command {
    let copy = || Stdio::from(slave.try_clone().expect("clone"));
    let mut command = Command::new("setsid");
    daemon::bare(&mut command);
    command.arg("--ctty").stdin(copy()).stdout(copy()).stderr(copy());
    command
}

/// Everything that is shown on the terminal, as it comes.
pub fn screen(master: &File) -> Arc<Watched<String>> {
    let screen = Arc::new(Watched::new(String::new()));
    let (shown, mut reader) = (Arc::clone(&screen), master.try_clone().expect("clone"));
    spawn("screen", move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
            shown.update(|s| s.push_str(&text));
        }
    });
    screen
}
