//! After 2038, when seconds need more than 31 bits: the clock, the dates of files and those of certificates.

use std::fs::{File, FileTimes};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use nix::sys::signal::Signal;
use rmpv::Value;

use crate::files::{get, put};
use crate::harness::daemon;
use crate::harness::device::{Device, Generation};
use crate::harness::rest::{Form, Rest};
use crate::harness::rig::{Rig, Setup};
use crate::harness::server::Server;
use crate::harness::tls::{Authority, TlsFront};
use crate::harness::wait::SOON;
use crate::remote::shell_works;
use crate::signals::ends_quickly;

/// 2040-05-01T00:00:00Z.
const MAY: u64 = 2_219_443_200;

/// Sets the clock of the agent (or of its emulator) alone, and leaves its timers and files alone.
const IN_JUNE: &str = "export LD_PRELOAD='/usr/$LIB/faketime/libfaketimeMT.so.1'
    export FAKETIME='@2040-06-01 12:00:00' DONT_FAKE_MONOTONIC=1 NO_FAKE_STAT=1
    exec \"$@\"";

/// Asserts that the file's date is told as it is.
fn is_of_may(device: &Device, path: &Path) {
    let info = Rest::open(device).stat(path.to_str().unwrap()).unwrap();
    // A timestamp whose seconds fit into 32 bits without a sign, as they do until 2106.
    let seconds = u32::try_from(MAY).unwrap().to_be_bytes().to_vec();
    assert_eq!(info.field("modtime"), Some(Value::Ext(-1, seconds)));
}

fn file_of_may(dir: &Path) -> PathBuf {
    let path = dir.join("may");
    std::fs::write(&path, "from the future").unwrap();
    let times = FileTimes::new().set_modified(UNIX_EPOCH + Duration::from_secs(MAY));
    File::options().write(true).open(&path).unwrap().set_times(times).unwrap();
    path
}

#[test]
fn files_keep_their_dates() {
    let (rig, device) = Rig::connected();
    let path = file_of_may(rig.dir.path());
    is_of_may(&device, &path);
    assert_eq!(get(&device, &path).unwrap().bytes, b"from the future");
}

#[test]
fn everything_works_in_june_2040() {
    if !daemon::has_clock() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let ca = authority.write(dir.path());
    let server = Server::start(Generation::New);
    let names = ["127.0.0.1"];
    let [past, present] = [(2030, 2040), (2040, 2041)]
        .map(|(from, until)| TlsFront::start(&authority.valid(&names, from, until), server.address()));
    let url = format!("https://127.0.0.1:{}", past.port());
    let setup = Setup::new().set("ReconnectIntervalSeconds", 1).wrapper(IN_JUNE);
    let mut rig = setup.url(&url).env("SSL_CERT_FILE", ca.to_str().unwrap()).start();
    rig.daemon.wait_for_log("invalid peer certificate: certificate expired", SOON);
    let url = format!("https://127.0.0.1:{}", present.port());
    rig.manager.change("token", &url);
    let device = server.device();
    let line = rig.daemon.wait_for_log("Connection established", SOON);
    assert!(line.starts_with("time=\"2040-06-01T12:0"), "{line}");
    shell_works(&device);
    is_of_may(&device, &file_of_may(dir.path()));
    let path = dir.path().join("up");
    put(&device, &Form::to(&path), b"content").unwrap();
    assert_eq!(get(&device, &path).unwrap().bytes, b"content");
    ends_quickly(&mut rig, Signal::SIGTERM);
}
