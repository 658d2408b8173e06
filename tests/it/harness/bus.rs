//! A private message bus for one test.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::wait::{SOON, spawn};

/// The policy of Mender's own packages: only root may own the name, send to it or receive from it.
pub const MENDERS_POLICY: &str = r#"
  <policy context="default">
    <deny own="io.mender.AuthenticationManager"/>
    <deny send_destination="io.mender.AuthenticationManager"/>
    <deny receive_sender="io.mender.AuthenticationManager"/>
  </policy>
  <policy user="root">
    <allow own="io.mender.AuthenticationManager"/>
    <allow send_destination="io.mender.AuthenticationManager"/>
    <allow receive_sender="io.mender.AuthenticationManager"/>
  </policy>"#;

/// A `dbus-daemon` of our own on a socket of our own, killed on drop.
#[derive(Debug)]
pub struct Bus {
    child: Option<Child>,
    socket: PathBuf,
    config: PathBuf,
}

impl Bus {
    /// Starts a bus whose socket lies in `dir`.
    pub fn start(dir: &Path) -> Bus {
        let mut bus = Bus::absent(dir);
        bus.restart();
        bus
    }

    /// A bus that isn't running yet.
    pub fn absent(dir: &Path) -> Bus {
        Bus::with_policy(dir, "")
    }

    /// A bus that isn't running yet, and doesn't allow everybody everything when it does.
    pub fn with_policy(dir: &Path, policy: &str) -> Bus {
        let socket = dir.join("bus");
        let config = dir.join("bus.conf");
        let text = format!(
            r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*" eavesdrop="true"/>
    <allow receive_sender="*" eavesdrop="true"/>
  </policy>
{policy}
</busconfig>
"#,
            socket.display()
        );
        std::fs::write(&config, text).expect("write the bus's configuration");
        Bus { child: None, socket, config }
    }

    /// The value for DBUS_SYSTEM_BUS_ADDRESS.
    pub fn address(&self) -> String {
        format!("unix:path={}", self.socket.display())
    }

    #[allow(dead_code, reason = "for the playground")]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Kills the bus as a crash would: everybody's connection breaks.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_file(&self.socket);
    }

    /// Starts a new bus at the same address, killing the old one if there is one.
    pub fn restart(&mut self) {
        self.try_restart().unwrap_or_else(|why| panic!("{why}"));
    }

    pub fn try_restart(&mut self) -> Result<(), String> {
        self.kill();
        let mut child = Command::new("dbus-daemon")
            // A Ctrl-C at the test run's terminal is not for the bus.
            .process_group(0)
            .arg("--nofork")
            .arg("--nopidfile")
            .arg("--print-address")
            .arg(format!("--config-file={}", self.config.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| {
                format!("cannot start dbus-daemon ({e}): install the package 'dbus' (apt-get install dbus)")
            })?;
        let out = child.stdout.take().expect("piped");
        // The address appears when the socket listens.
        let (ready, wait) = std::sync::mpsc::channel();
        spawn("bus-ready", move || {
            let mut line = String::new();
            let _ = BufReader::new(out).read_line(&mut line);
            let _ = ready.send(line);
        });
        self.child = Some(child);
        match wait.recv_timeout(SOON) {
            Ok(line) if line.starts_with("unix:") => Ok(()),
            other => Err(format!("dbus-daemon did not start; it printed {other:?}")),
        }
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.kill();
    }
}
