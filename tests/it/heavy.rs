//! Transfers of sizes at which a leak, a copy or a missing bound would show.

use std::fs::File;
use std::time::{Duration, Instant};

use crate::files::pattern;
use crate::harness::client::{Style, Terminal};
use crate::harness::device::Generation;
use crate::harness::msg::FILES;
use crate::harness::proc;
use crate::harness::rest::{Form, Rest, path_body};
use crate::harness::rig::Rig;
use crate::harness::wait::{SOON, eventually};

const SIZE: u64 = 4 << 30;
/// How much more than idle the agent may hold.
const ALLOWED_KIB: u64 = 4 * 1024;

/// A directory in memory where there is one: the tests are about the agent, not about the disk.
fn roomy_dir() -> tempfile::TempDir {
    let memory = std::path::Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

fn speed(size: u64, since: Instant) -> f64 {
    size as f64 / since.elapsed().as_secs_f64() / f64::from(1 << 20)
}

#[test]
fn four_gibibytes_go_down_in_little_memory() {
    let (rig, device) = Rig::connected();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    let idle = proc::rss_kib(rig.daemon.pid());
    let rest = Rest::open(&device, Generation::New);
    rest.stat(path.to_str().unwrap()).unwrap();
    rest.ask("get_file", &path_body(path.to_str().unwrap()));
    let (mut most, mut chunks, start) = (0, 0, Instant::now());
    let total = rest
        .receive(|bytes| {
            chunks += 1;
            if chunks % 64 == 0 {
                assert!(bytes.iter().all(|b| *b == 0));
                most = proc::rss_kib(rig.daemon.pid()).max(most);
            }
        })
        .unwrap();
    assert_eq!(total, SIZE);
    println!("4 GiB down: {} KiB more than idle ({idle} KiB), {:.0} MiB/s", most - idle, speed(SIZE, start));
    assert!(most - idle < ALLOWED_KIB, "{idle} KiB idle, {most} KiB at most");
}

#[test]
fn four_gibibytes_go_up_in_little_memory() {
    let (rig, device) = Rig::connected();
    let dir = roomy_dir();
    let path = dir.path().join("large");
    let idle = proc::rss_kib(rig.daemon.pid());
    let chunk = pattern(64 * 1024);
    let rest = Rest::open(&device, Generation::New);
    let (mut most, start) = (0, Instant::now());
    let chunks = (0..SIZE / chunk.len() as u64).map(|n| {
        if n % 256 == 0 {
            most = proc::rss_kib(rig.daemon.pid()).max(most);
        }
        chunk.as_slice()
    });
    rest.upload_here(&Form::to(&path), chunks).unwrap();
    println!("4 GiB up: {} KiB more than idle ({idle} KiB), {:.0} MiB/s", most - idle, speed(SIZE, start));
    assert_eq!(path.metadata().unwrap().len(), SIZE);
    assert!(most - idle < ALLOWED_KIB, "{idle} KiB idle, {most} KiB at most");
}
