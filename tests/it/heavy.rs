//! Transfers of sizes at which a leak, a copy or a missing bound would show.

use std::fs::File;
use std::time::Instant;

use crate::files::pattern;
use crate::harness::daemon;
use crate::harness::device::Reading;
use crate::harness::proc;
use crate::harness::rest::{Form, Rest, path_body};
use crate::harness::rig::{Rig, Setup, script_config};
use crate::harness::server::Server;
use crate::harness::wait::{millis, spawn};
use crate::resources::{ROLES, echo_times, echoing};

/// At this size a leak of a byte in a hundred would show. One of 4 GiB and more, `MENDER_CONNECT_MEBIBYTES=4160`, also
/// tells whether an offset needs more than 32 bits.
fn size() -> u64 {
    let mebibytes = std::env::var("MENDER_CONNECT_MEBIBYTES");
    mebibytes.map_or(512, |mebibytes| mebibytes.parse().expect("a number")) << 20
}

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
fn a_large_file_goes_down_in_little_memory() {
    if daemon::emulated("its memory is the emulator's, too") {
        return;
    }
    let (rig, device) = Rig::connected();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse");
    File::create(&path).unwrap().set_len(size()).unwrap();
    let idle = proc::rss_kib(rig.daemon.pid());
    let rest = Rest::open(&device);
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
    assert_eq!(total, size());
    println!(
        "{total} bytes down: {} KiB more than idle ({idle} KiB), {:.0} MiB/s",
        most.saturating_sub(idle),
        speed(size(), start)
    );
    assert!(most < idle + ALLOWED_KIB, "{idle} KiB idle, {most} KiB at most");
}

#[test]
fn a_large_file_goes_up_in_little_memory() {
    if daemon::emulated("its memory is the emulator's, too") {
        return;
    }
    let (rig, device) = Rig::connected();
    let dir = roomy_dir();
    let path = dir.path().join("large");
    let idle = proc::rss_kib(rig.daemon.pid());
    let chunk = pattern(64 * 1024);
    let rest = Rest::open(&device);
    let (mut most, start) = (0, Instant::now());
    let chunks = (0..size() / chunk.len() as u64).map(|n| {
        if n % 256 == 0 {
            most = proc::rss_kib(rig.daemon.pid()).max(most);
        }
        chunk.as_slice()
    });
    rest.upload_here(&Form::to(&path), chunks).unwrap();
    println!(
        "{} bytes up: {} KiB more than idle ({idle} KiB), {:.0} MiB/s",
        size(),
        most.saturating_sub(idle),
        speed(size(), start)
    );
    assert_eq!(path.metadata().unwrap().len(), size());
    assert!(most < idle + ALLOWED_KIB, "{idle} KiB idle, {most} KiB at most");
}

/// On a link of 2 MiB/s a chunk takes up to an eighth of a second. A keystroke's echo waits for the one that is
/// being written and for what the kernels hold, not for the transfer.
#[test]
fn a_download_delays_a_keystroke_by_little() {
    let rig =
        Setup::new().config(script_config(ROLES)).start_with(|s: &Server| s.small_receive_buffer(64 << 10));
    let device = rig.device();
    let mut terminal = echoing(&device);
    let alone = echo_times(&mut terminal, 20);
    let path = rig.dir.path().join("large");
    File::create(&path).unwrap().set_len(64 << 20).unwrap();
    let rest = Rest::open(&device);
    rest.ask("get_file", &path_body(path.to_str().unwrap()));
    device.set_reading(Reading::Rate(2 << 20));
    let (start, started) = std::sync::mpsc::channel();
    let download = spawn("download", move || {
        let mut count = 0;
        rest.receive(|_| {
            count += 1;
            if count == 30 {
                start.send(()).unwrap();
            }
        })
    });
    started.recv_timeout(crate::harness::wait::SOON).unwrap();
    let times = echo_times(&mut terminal, 20);
    let median = times[times.len() / 2];
    println!("echo alone {:?}, during a download at 2 MiB/s {median:?}", alone[alone.len() / 2]);
    assert!(!download.is_finished(), "the download goes on meanwhile");
    device.set_reading(Reading::Full);
    assert_eq!(download.join().unwrap(), Ok(64 << 20));
    assert!(median < millis(400), "the median echo took {median:?}");
}
