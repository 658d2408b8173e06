//! Sessions: the [`Router`], in the link's reader, brings each frame to the thread of its session, which runs one poll
//! loop. A session ends when nothing is left to do, or with its link unless it keeps a shell.

mod credit;
mod device;
mod file_transfer;
mod inbox;
#[cfg(fuzzing)]
#[path = "../../tests/fuzz/models/mod.rs"]
pub mod models;
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
#[cfg(fuzzing)]
pub use self::peer::Peer;
pub use self::router::Router;
pub(crate) use self::shells::MAX_SHELLS;
pub(crate) use self::store::adopt_all;
