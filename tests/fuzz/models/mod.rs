//! The parts of a session, beside models of them. The agent's crate compiles the models as a part of `session`, in fuzzing
//! builds only: these parts are closed to others.

#![allow(clippy::expect_used)]

pub mod files;
pub mod forward;
pub mod kept;
pub mod shells;

use std::sync::{Arc, LazyLock};
use std::time::Instant;

use nix::poll::PollFlags;

use super::device::Device;
use super::peer::Peer;
use super::stats::Info;
use crate::config::Config;
use crate::config::model::of_texts;
use crate::outbox::{Outbox, Queue, Sendable, Work};
use crate::proto::{Frame, SessionId};
use crate::sys::poll_one;
use crate::sys::users::{User, lookup};
use crate::sys::wake::Wake;

static ME: LazyLock<User> = LazyLock::new(|| {
    let me = nix::unistd::User::from_uid(nix::unistd::getuid()).expect("a user database").expect("a user");
    lookup(&me.name).expect("a user")
});

/// With shells of this process's own user.
fn config(text: &str) -> Config {
    let base = format!(r#"{{ "ShellCommand": "/bin/sh", "User": {:?} }}"#, ME.name);
    of_texts(text.as_bytes(), base.as_bytes(), &ME).expect("a configuration")
}

fn wake() -> Arc<Wake> {
    Arc::new(Wake::new().expect("an eventfd"))
}

/// Whether the session has been woken since it last looked.
fn is_woken(wake: &Wake) -> bool {
    !poll_one(wake, PollFlags::POLLIN, Some(Instant::now())).expect("poll").is_empty()
}

/// A session that is run by hand, and what the writer gets of it.
fn session(device: &Arc<Device>, id: &SessionId, user: &str) -> (Peer, Queue) {
    let (outbox, queue) = Outbox::new();
    let info = Info::of(id.clone(), user.into(), Instant::now());
    let thread = device.threads.acquire().expect("a thread");
    (Peer::new(device, info, &outbox, thread).expect("a session"), queue)
}

/// The next message that the writer sends, of the sessions' data only where it is told to.
fn next(queue: &mut Queue, bulk: bool) -> Option<Frame> {
    match queue.try_next(Sendable { bulk, interactive: true })? {
        Work::Message(message, ..) => Some(Frame::decode(&message).expect("a frame")),
        other => panic!("{other:?}"),
    }
}
