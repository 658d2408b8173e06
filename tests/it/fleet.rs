//! A small fleet of the benchmark's that loses its server.

use std::time::Duration;

use crate::harness::{daemon, wire};

#[allow(dead_code, reason = "the benchmark prints more of it")]
#[path = "../bench/fleet/real.rs"]
mod real;

/// The server refuses every third, with a time to come back after that is longer than the back-off's. The agents have
/// their tokens from files.
#[test]
fn comes_back_and_none_before_its_time() {
    if daemon::emulated("the benchmark starts the executable itself") {
        return;
    }
    let scene = real::Scene {
        executable: daemon::executable(),
        agents: 20,
        outage: Duration::from_secs(1),
        base: 1,
        refuse_every: 3,
        retry_after: 2,
    };
    let measured = real::measure(&scene);
    assert_eq!((measured.returns.len(), measured.broken), (20, 0));
    assert_eq!(measured.connects.len(), 20 + measured.waits.len());
    assert!(measured.waits.len() >= 6, "{:?}", measured.waits);
}
