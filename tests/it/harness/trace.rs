//! What a process and its children set out to change in the file system, as strace(1) saw it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::daemon::emulated;
use super::device::Device;
use super::rig::{Rig, Setup};
use super::wait::{SOON, eventually, skip};

/// System calls with a path that change nothing. Whatever isn't among them counts as a change.
const READING: &[&str] = &[
    "access",
    "chdir",
    "execve",
    "faccessat",
    "faccessat2",
    "getcwd",
    "lstat",
    "newfstatat",
    "readlink",
    "readlinkat",
    "stat",
    "statfs",
    "statx",
];

/// Whether there is a strace.
pub fn is_possible() -> bool {
    Command::new("strace").arg("-V").output().is_ok_and(|output| output.status.success())
}

/// Whether strace sees the agent's system calls; says so if not.
pub fn sees_the_agent() -> bool {
    let there = is_possible();
    if !there {
        skip("strace is missing");
    }
    there && !emulated("strace sees the emulator's system calls")
}

/// A connected agent whose first system call `call` with these words in strace's line fails. Says so where that isn't
/// possible.
pub fn refusing(call: &str, words: &str, error: &str) -> Option<(Rig, Device)> {
    if !sees_the_agent() {
        return None;
    }
    let traced = |inject: &str| {
        let strace = format!("exec strace -D -f -qq -o trace -e trace={call} {inject} \"$@\"");
        Setup::new().wrapper(&strace).connected()
    };
    let (rig, _device) = traced("");
    let calls = fs::read_to_string(rig.dir.path().join("trace")).expect("a trace");
    let line = calls.lines().find(|line| line.contains(words)).expect("such a call");
    // Each thread's are counted apart.
    let thread = line.split(' ').next().expect("a number");
    let before =
        calls.lines().filter(|line| line.starts_with(thread)).take_while(|other| *other != line).count();
    Some(traced(&format!("-e inject={call}:error={error}:when={}", before + 1)))
}

/// The paths that were to be written, created, renamed, removed or given other attributes, successfully or
/// not. To be asked after the end of the traced processes; `dir` is where `strace -ff -y` has put one file
/// for each of their threads.
pub fn changes(dir: &Path) -> BTreeSet<PathBuf> {
    // The tracer outlives those it traces by a moment.
    let lines = eventually(SOON, "the traces to be complete", || {
        let traces: Vec<String> = fs::read_dir(dir)
            .ok()?
            .map(|e| fs::read_to_string(e.ok()?.path()).ok())
            .collect::<Option<_>>()?;
        let complete = |trace: &String| trace.lines().last().is_some_and(|line| line.starts_with("+++ "));
        (!traces.is_empty() && traces.iter().all(complete)).then(|| traces.concat())
    });
    lines.lines().filter_map(changed).flatten().collect()
}

/// What a line says is to be changed.
pub fn changed(line: &str) -> Option<Vec<PathBuf>> {
    let (call, rest) = line.split_once('(')?;
    if line.starts_with("+++") || line.starts_with("---") || READING.contains(&call) {
        return None;
    }
    let (arguments, result) = rest.rsplit_once(") = ").unwrap_or((rest, ""));
    let writing = ["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_TMPFILE"];
    match call {
        "open" | "openat" | "openat2" if !writing.iter().any(|flag| arguments.contains(flag)) => None,
        // Links may have led elsewhere: where they did counts.
        "open" | "openat" | "openat2" if result.contains('<') => Some(paths(result)),
        // A file without a name in this directory.
        "openat" if arguments.contains("O_TMPFILE") => {
            Some(paths(arguments).iter().map(|p| p.join("#")).collect())
        }
        // The file that gets one more name; and its directory's own name, which is asked for to be refused.
        "linkat" => {
            let target = arguments.split_once("\", ").map_or("", |(_, target)| target);
            Some(paths(target)).filter(|_| !target.contains("\".\","))
        }
        // A socket's own permissions, before it has a name.
        "fchmod" if arguments.contains("<socket:") => None,
        "bind" if !arguments.contains("sa_family=AF_UNIX") => None,
        _ => Some(paths(arguments)),
    }
}

/// Names, from the directory descriptor in front of each; without names, what the descriptors are.
fn paths(text: &str) -> Vec<PathBuf> {
    let (mut descriptors, mut named) = (vec![PathBuf::from("/")], Vec::new());
    let mut rest = text;
    while let Some(at) = rest.find(['<', '"']) {
        let (opening, tail) = rest[at..].split_at(1);
        let end = tail.find(if opening == "<" { '>' } else { '"' }).unwrap_or(tail.len());
        let place = descriptors[descriptors.len() - 1].join(&tail[..end]);
        if opening == "<" {
            descriptors.push(place)
        } else {
            named.push(place)
        }
        rest = tail.get(end + 1..).unwrap_or_default();
    }
    if named.is_empty() { descriptors.split_off(1) } else { named }
}
