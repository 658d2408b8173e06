//! The service manager's part: it keeps the descriptors of shells while the agent is away.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::harness::client::new_sid;
use crate::harness::wait::{Watched, spawn};

type Kept = BTreeMap<String, Vec<OwnedFd>>;

pub struct Store {
    /// `NOTIFY_SOCKET`.
    pub name: String,
    kept: Arc<Watched<Kept>>,
}

impl Store {
    pub fn new() -> Store {
        let name = format!("mender-connect-{}", new_sid());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let socket = UnixDatagram::bind_addr(&address).expect("a socket");
        let kept = Arc::new(Watched::new(Kept::new()));
        let store = Store { name: format!("@{name}"), kept: Arc::clone(&kept) };
        // The test's end is its end.
        spawn("store", move || {
            loop {
                listen(&socket, &kept);
            }
        });
        store
    }

    pub fn clear(&self) {
        self.kept.update(Kept::clear);
    }

    /// The shell of a user whose name contains `user`, with its name in the store. All others lose their terminals.
    pub fn take(&self, user: &str) -> Option<(String, Vec<OwnedFd>)> {
        let kept = self.kept.update(std::mem::take);
        kept.into_iter().find(|(_, descriptors)| {
            descriptors.iter().any(|descriptor| {
                let mut description = vec![0; 4096];
                let copy = descriptor.try_clone().map(File::from);
                let length = copy.and_then(|file| file.read_at(&mut description, 0)).unwrap_or(0);
                description[..length].windows(user.len()).any(|window| window == user.as_bytes())
            })
        })
    }
}

/// One message of the agent.
fn listen(socket: &UnixDatagram, kept: &Watched<Kept>) {
    let mut text = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let slices = &mut [IoSliceMut::new(&mut text)];
    let received = recvmsg(socket, slices, &mut control, RecvFlags::CMSG_CLOEXEC).expect("a message");
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let text = String::from_utf8_lossy(&text[..received.bytes]);
    let Some(name) = text.lines().find_map(|line| line.strip_prefix("FDNAME=")) else { return };
    kept.update(|kept| {
        if text.starts_with("FDSTOREREMOVE=1") {
            kept.remove(name);
        } else {
            kept.insert(name.to_owned(), descriptors);
        }
    });
}
