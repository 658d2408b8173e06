//! The wall clock, and suspensions of the system.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId as TimerClock, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::{ClockId, clock_gettime};

/// Time since 1970, UTC. `SystemTime::now` panics from 2038 on 32-bit musl.
#[cfg(not(all(target_env = "musl", target_pointer_width = "32")))]
#[allow(clippy::disallowed_methods, reason = "the standard library knows the way everywhere else")]
pub(crate) fn now() -> Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default()
}

/// The standard library's `time_t` has 32 bits here, ours has 64 (see .cargo/config.toml).
#[cfg(all(target_env = "musl", target_pointer_width = "32"))]
pub(crate) fn now() -> Duration {
    let Ok(now) = clock_gettime(ClockId::CLOCK_REALTIME) else { return Duration::ZERO };
    // The clock may be before 1970.
    u64::try_from(now.tv_sec()).map_or(Duration::ZERO, |_| now.into())
}

/// Notices suspensions, which timers and time-outs don't count.
pub(crate) struct Suspension {
    timer: TimerFd,
    /// Sum of all suspensions.
    slept: Duration,
}

impl Suspension {
    /// Less may be the time between two readings of a clock.
    const SHORTEST: Duration = Duration::from_secs(2);

    pub(crate) fn watch() -> nix::Result<Self> {
        let timer =
            TimerFd::new(TimerClock::CLOCK_REALTIME, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        // Readable when the wall clock jumps, as it does after a suspension (timerfd_create(2)), and never otherwise.
        let never = Expiration::OneShot(TimeSpec::from_duration(Duration::from_secs(u32::MAX.into())));
        timer
            .set(never, TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET)?;
        Ok(Suspension { timer, slept: asleep() })
    }

    /// True if there was one since the last call.
    pub(crate) fn is_over(&mut self) -> bool {
        // Make it unreadable again.
        let _ = self.timer.wait();
        self.grew_to(asleep())
    }

    fn grew_to(&mut self, slept: Duration) -> bool {
        let before = std::mem::replace(&mut self.slept, slept);
        slept.saturating_sub(before) >= Suspension::SHORTEST
    }
}

impl AsFd for Suspension {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

/// Time suspended since boot.
fn asleep() -> Duration {
    let [awake, all] = [ClockId::CLOCK_MONOTONIC, ClockId::CLOCK_BOOTTIME]
        .map(|clock| clock_gettime(clock).map_or(Duration::ZERO, Duration::from));
    all.saturating_sub(awake)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With readings of the clocks that are made up: nobody suspends the machine that runs the tests.
    #[test]
    fn a_suspension_is_noticed_once() {
        let mut suspension = Suspension::watch().unwrap();
        assert!(!suspension.is_over() && !suspension.is_over());
        let (start, second) = (suspension.slept, Duration::from_secs(1));
        let grew = [0, 1, 60, 60, 59, 60, 3600].map(|later| suspension.grew_to(start + later * second));
        assert_eq!(grew, [false, false, true, false, false, false, true]);
    }

    #[test]
    #[allow(clippy::disallowed_methods, reason = "the comparison")]
    fn it_is_the_system_time() {
        let system = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        assert!(now().abs_diff(system) < Duration::from_secs(10));
    }

    #[test]
    #[cfg(all(target_env = "musl", target_pointer_width = "32"))]
    fn seconds_have_64_bits() {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).unwrap();
        assert_eq!(size_of_val(&now.tv_sec()), 8);
    }
}
