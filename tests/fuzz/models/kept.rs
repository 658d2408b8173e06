//! The service manager's store hands back descriptors after a restart, and a description of any bytes. A model says
//! whose shell they are, and what its client has not seen.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::Uid;

use super::{ME, config, next, session};
use crate::proto::{Frame, Map, SHELL, SessionId, UserId};
use crate::session::device::Device;
use crate::session::inbox::HangUp;
use crate::session::peer::Peer;
use crate::session::shells::Admission;
use crate::session::store;
use crate::session::terminal::Terminal;
use crate::sys::Events;
use crate::sys::process::SessionLeader;
use crate::sys::pty::{Pty, WindowSize};

/// Bytes of output that are kept of a shell.
const HISTORY: usize = 64 * 1024;

/// A terminal with a process, and one without.
static TERMINALS: LazyLock<[(Pty, OwnedFd, Option<SessionLeader>); 2]> = LazyLock::new(|| {
    [true, false].map(|of_process| {
        let (pty, tty) = Pty::open(WindowSize { width: 80, height: 24 }, None).expect("a terminal");
        let (sleep, day) = (Path::new("/bin/sleep"), ["86400".to_owned()]);
        let spawn = |tty| SessionLeader::spawn(sleep, &day, &ME, false, Vec::new(), false, tty);
        let process = of_process.then(|| spawn(tty.try_clone().expect("the other side")).expect("a process"));
        (pty, tty, process)
    })
});

/// A shell, as its description has it.
#[derive(Debug, PartialEq)]
struct Shell {
    id: SessionId,
    user: UserId,
    output: Vec<u8>,
    end: u64,
    sent: u64,
    input: Vec<u8>,
}

/// The session that goes on with it.
struct Adopted {
    device: Arc<Device>,
    peer: Peer,
    terminal: Terminal,
}

/// The first byte says which descriptors there are, the second how the client comes back, the rest is the description.
/// The environment has to have a store.
pub fn run(data: &[u8]) {
    let [which, back, description @ ..] = data else { return };
    let mut file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("a file"));
    file.write_all(description).expect("write the description");
    let (terminal, file_again) = (clone(&TERMINALS[usize::from(which % 16 == 1)].0), clone(&file));
    let (descriptors, good) = match which % 16 {
        1 => (vec![terminal, file_again], false),
        2 => (vec![terminal], false),
        3 => (vec![file_again], false),
        4 => (vec![], false),
        5 => (vec![file_again, terminal], true),
        _ => (vec![terminal, file_again], true),
    };
    let mut config = config("{}");
    config.keep_detached = Duration::from_secs(3600);
    let ours = which % 16 != 6;
    if !ours {
        config.user.uid = Uid::from_raw(config.user.uid.as_raw() + 1);
    }

    let device = Device::new(config);
    let mut adopted = None;
    let result = store::adopt(&device, "shell", descriptors, |peer, terminal| {
        adopted = Some((peer, terminal));
        Ok(())
    });
    let expected = Shell::expect(description).filter(|_| good && ours);
    assert_eq!(result.is_ok(), expected.is_some(), "{result:?}");
    let (Some((peer, terminal)), Some(mut shell)) = (adopted, expected) else {
        return assert_eq!((device.counts(), device.threads.taken(), device.memory.taken()), ((0, 0), 0, 0));
    };
    let mut adopted = Adopted { device, peer, terminal };
    if back % 4 > 0 {
        adopted.come_back(&mut shell, back % 4 > 1);
    }
    adopted.leave();
    let mut left = vec![0; file.metadata().expect("its length").len() as usize];
    file.read_exact_at(&mut left, 0).expect("read the description");
    shell.output.drain(..shell.output.len().saturating_sub(HISTORY));
    assert_eq!(Shell::expect(&left), Some(shell));
}

fn clone(descriptor: &impl AsFd) -> OwnedFd {
    descriptor.as_fd().try_clone_to_owned().expect("a descriptor")
}

impl Shell {
    fn expect(description: &[u8]) -> Option<Self> {
        let frame = Frame::decode(&description.to_vec().into()).ok()?;
        let number = |key| u64::try_from(frame.props.int(key)?).ok();
        let (end, sent) = (number("end")?, number("sent")?);
        let typed = usize::try_from(number("typed")?).ok()?;
        let (output, input) = frame.body.split_at(frame.body.len().checked_sub(typed)?);
        let possible = output.len() as u64 <= end && sent <= end && frame.typ == "kept-1";
        let (output, input) = (output.to_vec(), input.to_vec());
        let shell = Shell { id: frame.sid.clone()?, user: frame.user(), output, end, sent, input };
        Some(shell).filter(|shell| possible && !shell.user.as_str().is_empty())
    }
}

impl Adopted {
    /// The shell's user comes back: the same client, or with another terminal.
    fn come_back(&mut self, shell: &mut Shell, resumes: bool) {
        let now = Instant::now();
        let shells = &self.device.shells;
        assert_eq!(self.peer.id, shell.id);
        let stranger = format!("not {}", shell.user.as_str()).as_str().into();
        assert!(shells.running() == 1 && shells.resume(&shell.id, &stranger).is_none());
        if !resumes {
            shell.id = SessionId::new("another").expect("a name");
        }
        let (mut peer, mut queue) = session(&self.device, &shell.id, shell.user.as_str());
        let admission = match resumes {
            true => shells.resume(&shell.id, &shell.user).expect("its shell").1,
            false => shells.acquire(&shell.user, 1, (&peer.info, &peer.wake), true).expect("its shell"),
        };
        let Admission::Return(handover) = admission else { panic!("{admission:?}") };
        self.terminal.detach(&mut self.peer, HangUp::LinkLost.name(), now);
        let user = Map::new().with_str("user_id", shell.user.as_str());
        let request = Frame::new(SHELL, "new", Some(&shell.id)).with_props(user);
        let mut terminal = Terminal::default();
        // They wait for each other.
        thread::scope(|scope| {
            let followed = scope.spawn(|| self.terminal.follow_call(&mut self.peer, now));
            assert!(terminal.attach(&mut peer, &handover, (!resumes).then_some(&request), now));
            let followed = followed.join().expect("no panic");
            assert_eq!(followed, Some(if resumes { None } else { Some("reattached") }));
        });
        let mut shown = Vec::new();
        while {
            terminal.proceed(&mut peer, &Events::default(), now);
            peer.credit.prove_all();
            let before = shown.len();
            let frames = std::iter::from_fn(|| next(&mut queue, true)).filter(|frame| frame.typ == "shell");
            shown.extend(frames.flat_map(|frame| frame.body));
            shown.len() > before
        } {}

        let output = &shell.output[shell.output.len().saturating_sub(HISTORY)..];
        let start = shell.end - output.len() as u64;
        let line = output.iter().position(|byte| *byte == b'\n').filter(|_| start > 0);
        let from_line = &output[line.map_or(0, |at| at + 1)..];
        // Nothing confirms that the client has what it is sent: it would be sent again.
        if resumes && start <= shell.sent {
            assert_eq!(shown, output[(shell.sent - start) as usize..]);
        } else if resumes {
            assert!(shown.starts_with(b"\r\n[mender-connect] ") && shown.ends_with(from_line));
            shell.sent = shell.end - from_line.len() as u64;
        } else {
            assert!(shown.starts_with(b"[mender-connect] Reattached "));
            let notice = shown.iter().position(|byte| *byte == b'\n').expect("a line");
            let again = shown.split_off(notice + 1);
            // Without questions to the terminal.
            let mut before = from_line.iter();
            assert!(again.iter().all(|byte| before.any(|other| other == byte)));
            shell.sent = shell.end - again.len() as u64;
            shell.output = again;
        }
        (self.peer, self.terminal) = (peer, terminal);
    }

    /// The agent ends again.
    fn leave(mut self) {
        self.device.store.as_ref().expect("a store").end();
        // As the router does with the shells of its link.
        let (Peer { info, wake, .. }, now) = (&self.peer, Instant::now());
        assert!(self.terminal.is_kept() || self.device.detach(info, wake));
        self.terminal.detach(&mut self.peer, HangUp::LinkLost.name(), now);
        self.device.shells.close();
        assert!(self.terminal.follow_call(&mut self.peer, now).is_none());
        assert!(!self.terminal.is_kept());
        assert_eq!(self.device.counts(), (0, 0));
    }
}
