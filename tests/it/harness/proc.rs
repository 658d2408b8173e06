//! What /proc tells about a process.

use std::fs;

use super::daemon;
use super::wait::eventually;
use std::time::Duration;

/// Whether the process exists; a zombie does.
pub fn exists(pid: u32) -> bool {
    fs::metadata(format!("/proc/{pid}")).is_ok()
}

/// Whether the process has ended. Whoever adopted it may take time to reap it.
pub fn has_ended(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z'))
}

/// The processes of a session that haven't ended.
pub fn session(leader: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_member = |pid: &u32| stat_field(*pid, 3) == Some(leader) && !has_ended(*pid);
    pids.filter(is_member).collect()
}

/// The threads of the process that haven't been stopped by a signal, and what the kernel does for them.
pub fn not_stopped(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process");
    let states = tasks.flatten().map(|task| {
        let [stat, stack] =
            ["stat", "stack"].map(|name| fs::read_to_string(task.path().join(name)).unwrap_or_default());
        (stat, stack)
    });
    let is_stopped = |stat: &str| stat.rsplit_once(')').is_none_or(|(_, rest)| rest.starts_with(" T"));
    states.filter(|(stat, _)| !is_stopped(stat)).map(|(stat, stack)| stat + &stack).collect()
}

/// Whether all threads of the process wait for something. On a busy machine one may be kept from going on.
pub fn sleeps(pid: u32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process");
    let mut states = tasks.flatten().map(|task| fs::read_to_string(task.path().join("stat")));
    states.all(|stat| {
        stat.is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S')))
    })
}

/// Whether the process exists and is no zombie.
pub fn is_running(pid: u32) -> bool {
    status_line(pid, "State:").is_some_and(|state| !state.contains('Z'))
}

/// Whether any process was started with this argument.
pub fn has_argument(wanted: &str) -> bool {
    let Ok(entries) = fs::read_dir("/proc") else { return false };
    entries.flatten().any(|entry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|argument| argument == wanted.as_bytes())
    })
}

/// Waits until the process is gone, reaped included.
pub fn wait_gone(pid: u32, limit: Duration) {
    eventually(limit, &format!("process {pid} to be gone: {:?}", status_line(pid, "State:")), || {
        (!exists(pid)).then_some(())
    });
}

pub fn threads(pid: u32) -> usize {
    count(&format!("/proc/{pid}/task"))
}

/// The names of the process's threads, for failure messages.
pub fn thread_names(pid: u32) -> Vec<String> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).ok();
    let mut names: Vec<String> = tasks.flatten().filter_map(name).map(|n| n.trim().to_owned()).collect();
    names.sort();
    names
}

pub fn descriptors(pid: u32) -> usize {
    count(&format!("/proc/{pid}/fd"))
}

/// What the process's descriptors point to, for failure messages.
pub fn descriptor_targets(pid: u32) -> Vec<String> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let mut targets: Vec<String> = entries
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|target| target.display().to_string())
        .collect();
    targets.sort();
    targets
}

/// Resident memory in KiB.
pub fn rss_kib(pid: u32) -> u64 {
    status_number(&format!("/proc/{pid}/status"), "VmRSS:")
}

/// Its resident memory at the peak, in KiB.
pub fn peak_rss_kib(pid: u32) -> u64 {
    status_number(&format!("/proc/{pid}/status"), "VmHWM:")
}

/// The size of its address space in KiB.
pub fn virtual_kib(pid: u32) -> u64 {
    status_number(&format!("/proc/{pid}/status"), "VmSize:")
}

/// Of its resident memory what isn't a file's, in KiB.
pub fn anonymous_kib(pid: u32) -> u64 {
    status_number(&format!("/proc/{pid}/status"), "RssAnon:")
}

/// Asserts that the process has no more memory than it had, `before` KiB, but for what its allocator keeps; says
/// how much it has.
pub fn assert_not_grown(pid: u32, before: u64) -> u64 {
    let now = rss_kib(pid);
    assert!(
        now < before + 1024 || daemon::emulated("its memory is the emulator's, too"),
        "memory grew from {before} to {now} KiB"
    );
    now
}

/// How often the process's threads gave up the CPU by themselves, which is what a wake-up ends with.
pub fn voluntary_switches(pid: u32) -> u64 {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
    tasks
        .flatten()
        .map(|task| {
            status_number(&task.path().join("status").display().to_string(), "voluntary_ctxt_switches:")
        })
        .sum()
}

/// Processor time that it has taken, in hundredths of a second.
pub fn cpu_ticks(pid: u32) -> u64 {
    let ticks = |place| stat_field(pid, place).map_or(0, u64::from);
    ticks(11) + ticks(12)
}

/// The direct children, zombies included.
pub fn children(pid: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|&child| parent(child) == Some(pid))
        .collect()
}

fn parent(pid: u32) -> Option<u32> {
    stat_field(pid, 1)
}

/// A number of /proc/PID/stat, counted from the state.
fn stat_field(pid: u32, place: usize) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything; what follows the last one is regular.
    stat.rsplit_once(')')?.1.split_whitespace().nth(place)?.parse().ok()
}

fn count(dir: &str) -> usize {
    fs::read_dir(dir).map_or(0, |entries| entries.count())
}

fn status_line(pid: u32, field: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find(|line| line.starts_with(field)).map(str::to_owned)
}

fn status_number(file: &str, field: &str) -> u64 {
    let status = fs::read_to_string(file).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}
