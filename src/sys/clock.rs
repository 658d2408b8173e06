//! The wall clock and its jumps.

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

/// The same for all processes until the next boot. Nobody sets it.
pub(crate) fn monotonic() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

/// Notices jumps of the wall clock: suspensions, which timers and time-outs don't count, and a clock that was wrong and
/// is set, so that certificates that weren't valid are.
pub(crate) struct Jumps {
    pub(crate) timer: TimerFd,
    /// By how much the wall clock is ahead of the monotonic one, which stands still while the system is suspended.
    ahead: Duration,
}

impl Jumps {
    /// Less may be the time between two readings of a clock, or a correction by NTP.
    const SHORTEST: Duration = Duration::from_secs(2);

    pub(crate) fn watch() -> nix::Result<Self> {
        let timer =
            TimerFd::new(TimerClock::CLOCK_REALTIME, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        // Readable when the wall clock jumps, as it does after a suspension (timerfd_create(2)), and otherwise at most once,
        // in 2038. Processors of 32 bits can't be told a later time, with musl on kernels before 5.1.
        let latest = Duration::from_secs(i32::MAX.unsigned_abs().into());
        let never = Expiration::OneShot(TimeSpec::from_duration(latest));
        timer
            .set(never, TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET)?;
        Ok(Jumps { timer, ahead: ahead() })
    }

    /// True if there was one since the last call.
    pub(crate) fn occurred(&mut self) -> bool {
        // Make it unreadable again.
        let _ = self.timer.wait();
        self.moved_to(ahead())
    }

    fn moved_to(&mut self, ahead: Duration) -> bool {
        std::mem::replace(&mut self.ahead, ahead).abs_diff(ahead) >= Jumps::SHORTEST
    }
}

fn ahead() -> Duration {
    now().saturating_sub(monotonic())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With readings of the clocks that are made up: nobody suspends the machine that runs the tests, or sets its clock.
    #[test]
    fn a_jump_is_noticed_once() {
        let mut jumps = Jumps::watch().unwrap();
        assert!(!jumps.occurred() && !jumps.occurred());
        let (start, second) = (jumps.ahead, Duration::from_secs(1));
        let moved = [0, 1, 60, 60, 59, 60, 3600, 1].map(|later| jumps.moved_to(start + later * second));
        assert_eq!(moved, [false, false, true, false, false, false, true, true]);
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
