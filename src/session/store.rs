//! Shells that outlive the agent. The service manager's store has their terminals and descriptions; the next process of
//! the service gets both, and takes the shells over as detached ones.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use log::warn;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::device::Device;
use super::peer::Peer;
use super::session;
use super::shells::Kept;
use super::stats::Info;
use super::terminal::Terminal;
use crate::outbox::Outbox;
use crate::proto::{Frame, SHELL};
use crate::sys::manager::{self, Manager};
use crate::sys::pty::Pty;
use crate::sys::{clock, reason};

/// Type of the frame that describes a shell. Other versions may have another.
const KEPT: &str = "kept-1";
/// Bytes: the most output and input, and the frame around them.
const MAX_DESCRIPTION: usize = 2 << 20;

pub(crate) struct Store {
    manager: Manager,
    ends: AtomicBool,
}

/// A shell's place in the store. Dropping it frees the place unless the agent ends.
pub(crate) struct Place {
    store: Arc<Store>,
    name: String,
    description: File,
}

impl Store {
    /// FDSTORE is set by systemd 254 and later; the unit sets it for older ones.
    pub(crate) fn open() -> Option<Arc<Self>> {
        let places = manager::variable::<u32>("FDSTORE").filter(|places| *places > 0);
        places.map(|_| Arc::new(Store { manager: Manager::from_environment(), ends: AtomicBool::new(false) }))
    }

    pub(crate) fn end(&self) {
        self.ends.store(true, Ordering::SeqCst);
    }

    /// `None` if the store is full, or the manager too busy.
    pub(crate) fn keep(self: &Arc<Self>, pty: &Pty) -> Option<Place> {
        // Differs from those of an earlier agent.
        let name = format!("shell-{:x}", getrandom::u64().ok()?);
        let description: File = memfd_create(c"mender-connect", MFdFlags::MFD_CLOEXEC).ok()?.into();
        // FDPOLL=0: without it the manager drops a terminal that a program closes, even if it opens it again.
        let told = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0");
        let kept = self.manager.send(&told, &[pty.as_fd().as_raw_fd(), description.as_raw_fd()]);
        kept.is_ok().then(|| Place { store: Arc::clone(self), name, description })
    }
}

impl Place {
    pub(crate) fn describe(&self, shell: Frame) {
        let text = Frame { proto: SHELL, typ: KEPT.to_owned(), ..shell }.encode();
        let written = self.description.set_len(0).and_then(|()| self.description.write_all_at(&text, 0));
        if let Err(e) = written {
            warn!("a shell won't outlive the agent: {}", reason(&e));
        }
    }

    pub(crate) fn is_left(&self) -> bool {
        self.store.ends.load(Ordering::SeqCst)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.is_left() {
            let _ = self.store.manager.send(&format!("FDSTOREREMOVE=1\nFDNAME={}", self.name), &[]);
        }
    }
}

/// Takes over the shells of an earlier process of the service. A shell that can't be verified loses its terminal, which
/// hangs it up.
pub(crate) fn adopt_all(device: &Arc<Device>) {
    let mut shells = BTreeMap::<String, Vec<OwnedFd>>::new();
    for (name, descriptor) in manager::kept_descriptors() {
        shells.entry(name).or_default().push(descriptor);
    }
    for (name, descriptors) in shells {
        if let Err(e) = adopt(device, &name, descriptors, session::start) {
            warn!("{name:?} is not kept any longer: {}", reason(&e));
        }
    }
}

/// Goes on with one of them, in a session that `start` starts.
pub(super) fn adopt(
    device: &Arc<Device>,
    name: &str,
    descriptors: Vec<OwnedFd>,
    start: impl FnOnce(Peer, Terminal) -> io::Result<()>,
) -> io::Result<()> {
    let store = device.store.as_ref().ok_or(io::ErrorKind::Unsupported)?;
    let (mut terminals, mut others) = (Vec::new(), Vec::new());
    for descriptor in descriptors {
        match Pty::adopt(descriptor.try_clone()?) {
            Ok(terminal) => terminals.push(terminal),
            Err(_) => others.push(descriptor),
        }
    }
    let description = others.pop().ok_or(io::ErrorKind::NotFound)?.into();
    let place = Place { store: Arc::clone(store), name: name.to_owned(), description };
    let (pty, size) = terminals.pop().ok_or(io::ErrorKind::NotFound)?;
    let length = place.description.metadata()?.len().min(MAX_DESCRIPTION as u64);
    let mut text = vec![0; length as usize];
    place.description.read_exact_at(&mut text, 0)?;
    let shell = Frame::decode(&text.into()).map_err(io::Error::other)?;
    let (user, now) = (shell.user(), Instant::now());
    let id = shell.sid.clone().filter(|_| shell.typ == KEPT && !user.as_str().is_empty());
    let id = id.ok_or(io::ErrorKind::InvalidData)?;
    let age = clock::monotonic()
        .saturating_sub(Duration::from_secs(shell.props.int("started").unwrap_or(0) as u64));
    let since = now.checked_sub(age).unwrap_or(now);
    let info = Info::of(id, user, since);
    let thread = device.threads.acquire().ok_or(io::ErrorKind::OutOfMemory)?;
    let peer = Peer::new(device, Arc::clone(&info), &Outbox::new().0, thread)?;
    device.shells.open();
    let kept = Kept { info, since: now };
    let permit = device.shells.adopt(kept, &peer.wake).ok_or(io::ErrorKind::QuotaExceeded)?;
    peer.inbox.close();
    let terminal = Terminal::adopt(&peer, &shell, (pty, size), permit, place, now)?;
    start(peer, terminal)
}
