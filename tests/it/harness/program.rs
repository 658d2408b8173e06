//! Programs that tests make and have run.
//!
//! A child process writes them. While this process has a file open for writing, whatever another
//! test forks inherits it until its exec, and until then the kernel refuses to run the file (ETXTBSY).

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Copies a program, with its mode.
pub fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").args(["--preserve=mode", "--"]).args([from, to]).status();
    assert!(status.expect("run cp").success(), "copy {} to {}", from.display(), to.display());
}

/// Writes a script that everybody may run.
pub fn write(path: &Path, text: &[u8]) {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", r#"cat >"$1" && chmod 755 "$1""#, "sh"]).arg(path).stdin(Stdio::piped());
    let mut child = command.spawn().expect("run sh");
    child.stdin.take().expect("a pipe").write_all(text).expect("write");
    assert!(child.wait().expect("wait").success(), "write {}", path.display());
}
