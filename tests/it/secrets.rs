//! Where the token must never be found: in the log (see `logs`), the command line, the environment, a core file, the
//! memory once it was replaced.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::time::Instant;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::Signal;

use crate::harness::client::{Style, Terminal};
use crate::harness::daemon::emulated;
use crate::harness::rig::{Rig, Setup, is_root};
use crate::harness::server::Server;
use crate::harness::wait::{SOON, skip};

/// Where a token's signature begins.
const SIGNATURE: usize = 560;

/// As long as a real one, and each part of it occurs nowhere else.
fn token(seed: u64) -> String {
    let mut state = seed;
    let random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        char::from(
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"[(state >> 58) as usize],
        )
    };
    let text: String = std::iter::repeat_with(random).take(900).collect();
    format!("{}.{}.{}", &text[..40], &text[40..SIGNATURE - 2], &text[SIGNATURE - 2..])
}

/// How many pieces of `secret` are in the process's memory, and where.
fn pieces_in_memory(pid: u32, secret: &str) -> Vec<String> {
    const PIECE: usize = 20;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("read the memory's map");
    let mut memory = fs::File::open(format!("/proc/{pid}/mem")).expect("open the memory");
    let pieces: Vec<&[u8]> = secret.as_bytes().chunks_exact(PIECE).collect();
    let mut found = Vec::new();
    for line in maps.lines().filter(|line| line.contains(" rw")) {
        let (from, until) =
            line.split_once(' ').and_then(|(range, _)| range.split_once('-')).expect("a range");
        let number = |text| u64::from_str_radix(text, 16).expect("a number");
        let mut bytes = vec![0; usize::try_from(number(until) - number(from)).expect("a size")];
        memory.seek(SeekFrom::Start(number(from))).expect("seek");
        // What was never used can't be read, and what is the kernel's.
        if memory.read_exact(&mut bytes).is_err() {
            continue;
        }
        for (n, piece) in pieces.iter().enumerate() {
            // A first byte is rare, which makes this quick enough for a debug build.
            let at = bytes.windows(PIECE).position(|window| window[0] == piece[0] && window == *piece);
            found.extend(at.map(|at| format!("piece {n} at {:x} of {line}", number(from) + at as u64)));
        }
    }
    found
}

/// Replaces the first token by others and looks what is left of it.
fn a_replaced_token_is_gone(rig: &Rig, server: &Server, old: &str, replace: impl Fn(&str)) {
    if !is_root() {
        return skip("only root can read the agent's memory");
    }
    if emulated("its memory is the emulator's, too") {
        return;
    }
    let pid = rig.daemon.pid();
    Terminal::new(&server.device(), Style::Cli).open();
    // The end of its signature may stay in libdbus's receive buffer until a longer message comes.
    let old = &old[..SIGNATURE];
    assert!(!pieces_in_memory(pid, old).is_empty(), "the search finds what is there");
    // Of the same length and shorter: buffers that are used again have more of what was in them before.
    for new in [token(2), token(3)[..600].to_owned()] {
        replace(&new);
        Terminal::new(&server.device(), Style::Cli).open();
        // The old link's threads may still be about to end.
        let deadline = Instant::now() + SOON;
        loop {
            let left = pieces_in_memory(pid, old);
            if left.is_empty() {
                break;
            }
            assert!(Instant::now() < deadline, "of the old token there is left: {left:#?}");
        }
    }
}

#[test]
fn a_replaced_token_is_wiped_from_memory() {
    let old = token(1);
    let rig = Setup::new().token(&old).start();
    a_replaced_token_is_gone(&rig, &rig.server, &old, |new| rig.manager.change(new, &rig.server.url()));
}

#[test]
fn a_replaced_token_of_a_file_is_wiped_from_memory() {
    let old = token(1);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("token");
    fs::write(&file, &old).expect("write");
    let rig = Setup::new().token_file(&file).start();
    a_replaced_token_is_gone(&rig, &rig.server, &old, |new| fs::write(&file, new).expect("write"));
}

#[cfg(feature = "tls")]
#[test]
fn a_replaced_token_is_wiped_from_memory_with_tls() {
    use crate::harness::device::Generation;
    use crate::harness::tls::{Authority, TlsFront};
    let dir = tempfile::tempdir().expect("a temporary directory");
    let authority = Authority::new();
    let ca = authority.write(dir.path());
    let server = Server::start(Generation::New);
    let front = TlsFront::start(&authority.identity(&["127.0.0.1"]), server.address());
    let old = token(1);
    let url = format!("https://127.0.0.1:{}", front.port());
    let rig = Setup::new().token(&old).url(&url).env("SSL_CERT_FILE", ca.to_str().expect("UTF-8")).start();
    a_replaced_token_is_gone(&rig, &server, &old, |new| rig.manager.change(new, &url));
}

#[test]
fn the_token_is_neither_argument_nor_variable() {
    let token = token(4);
    let (rig, device) = Setup::new().token(&token).connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    let shell = terminal.run("echo $$");
    for file in ["cmdline", "environ"] {
        for pid in [rig.daemon.pid().to_string(), shell.clone()] {
            let bytes = fs::read(format!("/proc/{pid}/{file}")).expect("read");
            assert!(!String::from_utf8_lossy(&bytes).contains(&token[..20]), "{file} of {pid}");
        }
    }
}

/// By the limit, and by the flag for those who pipe core files to a program.
#[test]
fn no_core_file_is_written() {
    let (mut rig, device) = Rig::connected();
    let pid = rig.daemon.pid();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("read the limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("a limit");
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    // The shell has the limit that the agent was started with.
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    let (soft, _) = getrlimit(Resource::RLIMIT_CORE).expect("a limit");
    let expected = match soft {
        u64::MAX => "unlimited".to_owned(),
        bytes => (bytes / 1024).to_string(),
    };
    assert_eq!(terminal.run("ulimit -Sc"), expected);
    rig.daemon.signal(Signal::SIGABRT);
    let status = rig.daemon.wait_exit(SOON);
    let dumped = std::os::unix::process::ExitStatusExt::core_dumped(&status);
    assert!(!dumped || emulated("the emulator is what ends"), "{status}");
}
