//! On which core something runs. Left to itself the kernel finds one of several places for threads that take turns,
//! one twice as quick as another, and stays there.

use std::sync::OnceLock;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

#[derive(Debug, Clone, Copy)]
pub enum Core {
    /// The first one, for server and relays.
    Server,
    /// The last one, for the agent and what it starts.
    Agent,
}

/// This thread, and what it starts meanwhile, runs on one core.
pub struct Pinned {
    before: CpuSet,
}

impl Pinned {
    pub fn to(core: Core) -> Result<Pinned, String> {
        static ALL: OnceLock<Vec<usize>> = OnceLock::new();
        let this = Pid::from_raw(0);
        let before = sched_getaffinity(this).map_err(|e| format!("ask for the cores: {e}"))?;
        let all =
            ALL.get_or_init(|| (0..CpuSet::count()).filter(|at| before.is_set(*at) == Ok(true)).collect());
        let wanted = match core {
            Core::Server => all.first(),
            Core::Agent => all.last(),
        };
        let mut one = CpuSet::new();
        one.set(*wanted.ok_or("no core")?).map_err(|e| e.to_string())?;
        sched_setaffinity(this, &one).map_err(|e| format!("pin to a core: {e}"))?;
        Ok(Pinned { before })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = sched_setaffinity(Pid::from_raw(0), &self.before);
    }
}
