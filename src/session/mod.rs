//! Sessions: from a frame to the thread that owns what it is about.
//!
//! The [`Router`] runs in the link's reader and never blocks. Each session has a thread with one poll loop. It ends when
//! nothing is left to do for it, and when the link is gone, unless there is a shell to keep.

mod credit;
mod device;
mod file_transfer;
mod inbox;
mod peer;
mod port_forward;
mod router;
#[allow(clippy::module_inception, reason = "one session among many")]
mod session;
mod shells;
pub(crate) mod stats;
mod store;
mod terminal;

pub use self::device::Device;
pub(crate) use self::file_transfer::rate::Direction;
#[cfg(fuzzing)]
pub use self::peer::Peer;
pub use self::router::Router;
pub(crate) use self::shells::MAX_SHELLS;
pub(crate) use self::store::adopt_all;
