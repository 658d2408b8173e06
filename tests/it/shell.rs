//! The process behind a terminal: its environment, its user, its signals, its window.

use std::process::Command;

use nix::unistd::User;
use rmpv::Value;
use serde_json::json;

use crate::harness::client::{Style, Terminal};
use crate::harness::device::Device;
use crate::harness::proc;
use crate::harness::rig::{Rig, Setup, is_root, script_config, user_name};
use crate::harness::trace;
use crate::harness::wait::{SOON, eventually, millis, secs, skip};

/// Opens a terminal whose shell prints something and ends; returns the output.
fn printed(device: &Device) -> String {
    let mut terminal = Terminal::new(device, Style::Cli);
    terminal.open();
    printed_by(&mut terminal)
}

fn printed_by(terminal: &mut Terminal) -> String {
    let mut output = String::new();
    loop {
        let msg = terminal.next(SOON);
        if msg.typ == "stop" {
            return output.replace("\r\n", "\n");
        }
        output.push_str(&msg.text());
    }
}

fn me() -> User {
    User::from_name(&user_name()).expect("read the password database").expect("the current user")
}

/// The variables of a script, sorted, of a terminal of alice's with this session id.
fn variables(device: &Device, sid: &str) -> Vec<String> {
    let mut terminal = Terminal { sid: sid.to_owned(), ..Terminal::of_user(device, "alice") };
    terminal.open();
    let mut lines: Vec<_> = printed_by(&mut terminal).lines().map(str::to_owned).collect();
    lines.sort_unstable();
    lines
}

const PRINT: &str = "tr '\\000' '\\n' </proc/$$/environ";

/// What the system says of its locale, if it does.
fn lang() -> Option<String> {
    let script = "for f in /etc/default/locale /etc/locale.conf; do [ -e $f ] && . $f && [ \"$LANG\" ] && break; done; \
        echo $LANG";
    let output = Command::new("sh").args(["-c", script]).env_remove("LANG").output().expect("sh");
    Some(String::from_utf8(output.stdout).expect("text").trim().to_owned()).filter(|lang| !lang.is_empty())
}

#[test]
fn the_environment_is_a_logins_and_nothing_else() {
    let setup = Setup::new().config(script_config(PRINT)).env("SECRET", "of the agent").env("LANG", "C");
    let (_rig, device) = setup.connected();
    let (home, name) = (me().dir, user_name());
    let mut expected = vec![
        format!("HOME={}", home.display()),
        format!("LOGNAME={name}"),
        "MENDER_SESSION_ID=of-this-test".to_owned(),
        "MENDER_USER_ID=alice".to_owned(),
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        "SHELL=/bin/sh".to_owned(),
        "TERM=xterm-256color".to_owned(),
        format!("USER={name}"),
    ];
    expected.extend(lang().map(|lang| format!("LANG={lang}")));
    expected.sort_unstable();
    assert_eq!(variables(&device, "of-this-test"), expected);
}

#[test]
fn an_id_that_no_variable_can_hold_is_left_out() {
    let (_rig, device) = Setup::new().config(script_config(PRINT)).connected();
    let variables = variables(&device, "a\0b");
    assert!(!variables.iter().any(|line| line.starts_with("MENDER_SESSION_ID")), "{variables:?}");
    assert!(variables.iter().any(|line| line == "MENDER_USER_ID=alice"), "{variables:?}");
}

#[test]
fn the_configuration_adds_variables_and_replaces_them() {
    let environment =
        json!({"TERM": "vt100", "EDITOR": "vi -u 'x y'", "MENDER_USER_ID": "", "LANG": "de_DE.UTF-8"});
    let setup =
        Setup::new().config(script_config(PRINT)).set("Terminal", json!({"Environment": environment}));
    let (rig, device) = setup.connected();
    let found = variables(&device, "one");
    for line in ["TERM=vt100", "EDITOR=vi -u 'x y'", "MENDER_USER_ID=", "LANG=de_DE.UTF-8", "SHELL=/bin/sh"] {
        assert!(found.iter().any(|found| found == line), "{line} is missing: {found:?}");
    }
    assert_eq!(found.iter().filter(|line| line.starts_with("TERM=")).count(), 1);
    // The next login has what a reload brings.
    let mut config = script_config(PRINT);
    config["Terminal"] = json!({"Environment": {"TERM": "linux"}});
    let mark = rig.reload(&config);
    rig.daemon.wait_for_log_after(mark, "the new configuration is in use", SOON);
    assert!(variables(&device, "two").contains(&"TERM=linux".to_owned()));
}

#[test]
fn a_login_shell_has_its_path_from_the_profile() {
    for arguments in [json!(["-lc", PRINT]), json!(["--login", "-c", PRINT])] {
        let mut config = script_config("");
        config["ShellArguments"] = arguments;
        config["ShellCommand"] = "/bin/bash".into();
        let (_rig, device) = Setup::new().config(config).connected();
        let found = variables(&device, "login");
        assert!(!found.iter().any(|line| line.starts_with("PATH=")), "{found:?}");
    }
}

#[test]
fn the_arguments_are_command_and_shell_arguments() {
    let (_rig, _device, mut terminal) = Setup::new().terminal();
    let arguments = terminal.run("tr '\\000' '|' </proc/$$/cmdline");
    assert_eq!(arguments, "/bin/bash|--noprofile|--norc|--noediting|-i|");
}

#[test]
fn it_starts_in_the_home_directory() {
    let (_rig, _device, mut terminal) = Setup::new().terminal();
    let home = me().dir;
    let expected = if home.is_dir() { home.canonicalize().expect("a home") } else { "/".into() };
    assert_eq!(terminal.run("pwd -P"), expected.display().to_string());
}

#[test]
fn the_terminal_is_the_controlling_one() {
    let (_rig, _device, mut terminal) = Setup::new().terminal();
    assert!(terminal.run("tty").starts_with("/dev/pts/"));
    // Session leader, and able to open its own terminal.
    assert_eq!(terminal.run("test $(cut -d' ' -f6 /proc/$$/stat) = $$ && echo leader"), "leader");
    assert_eq!(terminal.run("echo through >/dev/tty"), "through");
}

#[test]
fn control_characters_reach_the_foreground_program() {
    let (_rig, _device, mut terminal) = Setup::new().terminal();
    terminal.input("cat; echo st''atus=$?\n");
    terminal.input("hello\n");
    terminal.read_until("hello\r\nhello\r\n", SOON);
    terminal.input("\x03");
    prompt_after_signal(&mut terminal);
    assert_eq!(terminal.run("echo fine"), "fine");
    terminal.input("(trap 'exit' QUIT; echo re''ady; while :; do read x; done)\n");
    terminal.read_until("ready", SOON);
    terminal.input("\x1c");
    prompt_after_signal(&mut terminal);
    assert_eq!(terminal.run("echo fine"), "fine");
    terminal.input("cat\n\x04");
    terminal.prompt();
    assert_eq!(terminal.run("echo fine"), "fine");
}

/// With the signal the kernel throws away what lies in the PTY, at times the new prompt, too.
fn prompt_after_signal(terminal: &mut Terminal) {
    eventually(SOON, "a prompt after the signal", || {
        terminal.input("\n");
        let msg = terminal.device.try_take(secs(1), |m| m.sid.as_ref() == Some(&terminal.sid))?;
        terminal.pending.push_str(&msg.expect("output").text());
        terminal.pending.ends_with("# ").then_some(()).or(terminal.pending.ends_with("$ ").then_some(()))
    });
    // Every empty line brings another prompt.
    let settled = "echo sett''led\n";
    terminal.input(settled);
    terminal.read_until("settled\r\n", SOON);
    terminal.prompt();
}

#[test]
fn signals_are_as_after_login_whatever_started_the_agent() {
    let (_rig, device) = Setup::new()
        .config(script_config("grep -E '^Sig(Blk|Ign)' /proc/self/status"))
        .wrapper("trap '' INT QUIT PIPE HUP USR1 TSTP; exec \"$@\"")
        .connected();
    let none = "0000000000000000";
    // The C library's own, 32 and 33: a program can't set them, and qemu leaves the first one ignored.
    let ignored = printed(&device).replace("SigIgn:\t0000000080000000", &format!("SigIgn:\t{none}"));
    assert_eq!(ignored, format!("SigBlk:\t{none}\nSigIgn:\t{none}\n"));
}

#[test]
fn no_descriptor_is_inherited() {
    // A descriptor the agent got from its starter, and those of another session, stay out too.
    let (_rig, device) = Setup::new()
        .config(script_config("ls -1 /proc/$$/fd; echo end; exec cat"))
        .wrapper("exec 7</dev/null; exec \"$@\"")
        .connected();
    let mut terminals: Vec<Terminal> = (0..3).map(|_| Terminal::new(&device, Style::Cli)).collect();
    for terminal in &mut terminals {
        terminal.open();
        assert_eq!(terminal.read_until("end\r\n", SOON), "0\r\n1\r\n2\r\nend\r\n");
    }
}

/// The directory by which descriptors were found is of Linux 3.17.
#[test]
fn no_descriptor_is_inherited_on_an_old_kernel() {
    if !trace::sees_the_agent() {
        return;
    }
    let (_rig, device) = Setup::new()
        .config(script_config("ls -1 /proc/$$/fd; echo end; exec cat"))
        .wrapper(
            "exec 7</dev/null strace -D -f -qq -o trace -P /proc/thread-self/fd -e trace=openat \
             -e inject=openat:error=ENOENT \"$@\"",
        )
        .connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    assert_eq!(terminal.read_until("end\r\n", SOON), "0\r\n1\r\n2\r\nend\r\n");
}

#[test]
fn sizes_come_from_the_request_or_the_configuration() {
    let script = script_config("stty size");
    let (_rig, device) = Setup::new().config(script.clone()).connected();
    let size_of = |device: &Device, props: &[(&str, Value)]| {
        let mut terminal = Terminal::new(device, Style::Cli);
        terminal.send("new", props, b"");
        terminal.expect("new", 1, Some("Shell started"));
        printed_by(&mut terminal).trim().to_owned()
    };
    let dims = |width: Value, height: Value| vec![("terminal_width", width), ("terminal_height", height)];
    assert_eq!(size_of(&device, &dims(132.into(), 50.into())), "50 132");
    assert_eq!(size_of(&device, &[]), "40 80", "the default");
    assert_eq!(size_of(&device, &dims(132.into(), 0.into())), "40 80", "both or none");
    assert_eq!(size_of(&device, &[("terminal_width", 132.into())]), "40 80", "both or none");
    assert_eq!(size_of(&device, &dims((-5).into(), 50.into())), "40 80", "not positive");
    assert_eq!(size_of(&device, &dims(65_626.into(), 50.into())), "50 90", "cut to 16 bits");
    assert_eq!(size_of(&device, &dims(132.0.into(), 50.0.into())), "50 132", "whole floats count");
    assert_eq!(size_of(&device, &dims("132".into(), "50".into())), "40 80", "strings don't");

    let mut config = script;
    config["Terminal"] = json!({ "Width": 100, "Height": 30 });
    let (_rig, device) = Setup::new().config(config).connected();
    assert_eq!(size_of(&device, &[]), "30 100", "the configured one");
    assert_eq!(size_of(&device, &dims(132.into(), 50.into())), "50 132");
}

#[test]
fn a_resize_reaches_the_foreground_program() {
    let script = "trap 'stty size' WINCH; stty -echo; stty size; echo ready; while :; do read x; done";
    let (_rig, device) = Setup::new().config(script_config(script)).connected();
    let mut terminal = Terminal::new(&device, Style::Gui);
    terminal.send("new", &[], b"");
    terminal.expect("new", 1, Some("Shell started"));
    terminal.read_until("40 80\r\nready\r\n", SOON);
    for (width, height) in [(100, 30), (81, 25), (300, 100)] {
        terminal.resize(width, height);
        resized(&mut terminal, width, height);
    }
    // Half a size, or none, changes nothing.
    terminal.send("resize", &[("terminal_width", 10.into())], b"");
    terminal.send("resize", &[("terminal_width", 0.into()), ("terminal_height", 0.into())], b"");
    terminal.resize(90, 33);
    resized(&mut terminal, 90, 33);
}

/// Waits for the trap to tell the size. A line of input wakes a shell that noted the signal just
/// before it went back to reading.
fn resized(terminal: &mut Terminal, width: u16, height: u16) {
    let expected = format!("{height} {width}\r\n");
    eventually(SOON, &format!("the shell to say {expected:?}"), || {
        terminal.input("\n");
        let msg = terminal.device.try_take(secs(1), |m| m.sid.as_ref() == Some(&terminal.sid))?;
        terminal.pending.push_str(&msg.expect("output").text());
        let said = terminal.pending.contains(&expected);
        said.then(|| terminal.pending.clear())
    });
}

#[test]
fn another_user_with_all_groups() {
    if !is_root() {
        return skip("only root can switch to another user");
    }
    let groups = std::fs::read_to_string("/etc/group").expect("read /etc/group");
    let member = groups
        .lines()
        .filter_map(|line| line.rsplit(':').next()?.split(',').next())
        .find(|name| !name.is_empty() && *name != "root" && User::from_name(name).is_ok_and(|u| u.is_some()));
    for name in ["nobody", member.unwrap_or("daemon")] {
        let (_rig, _device, mut terminal) = Setup::new().set("User", name).terminal();
        let expect = |flags: &str| {
            let output = Command::new("id").arg(flags).arg(name).output().expect("run id");
            String::from_utf8(output.stdout).expect("digits").trim().to_owned()
        };
        let sorted = |list: String| {
            let mut ids: Vec<u32> = list.split_whitespace().map(|id| id.parse().expect("an id")).collect();
            ids.sort_unstable();
            ids
        };
        assert_eq!(terminal.run("id -u"), expect("-u"), "{name}");
        assert_eq!(terminal.run("id -g"), expect("-g"), "{name}");
        assert_eq!(sorted(terminal.run("id -G")), sorted(expect("-G")), "{name}");
        // Real, effective and saved ids alike: there is no way back.
        let ids = terminal.run("grep ^Uid /proc/$$/status | cut -f2- | tr '\\t' '\\n' | sort -u | wc -l");
        assert_eq!(ids, "1", "{name}");
        let user = User::from_name(name).expect("read").expect("exists");
        assert_eq!(terminal.run("echo $HOME"), user.dir.display().to_string());
        if !user.dir.exists() {
            assert_eq!(terminal.run("pwd"), "/", "without a home it starts in /");
        }
        assert_eq!(terminal.run("cat /etc/shadow >/dev/null 2>&1 || echo denied"), "denied");
    }
}

#[test]
fn a_login_shell_that_knows_no_login_is_explained() {
    let dash = std::fs::canonicalize("/bin/sh").is_ok_and(|p| p.ends_with("dash"));
    if !dash {
        return skip("this machine's sh isn't dash and knows the option");
    }
    let (rig, device) = Setup::new().config(json!({ "User": user_name() })).connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    let output = printed_by(&mut terminal);
    assert!(output.contains("llegal option"), "dash complains: {output}");
    let line = rig.daemon.wait_for_log("--login", SOON);
    let warned = |line: &str| line.contains("level=warning") && line.contains("/bin/sh");
    eventually(SOON, &format!("a warning (first line: {line})"), || {
        rig.daemon.log().iter().any(|l| warned(l) && l.contains("--login")).then_some(())
    });
}

#[test]
fn losing_the_link_ends_every_shell_and_frees_the_quota() {
    let setup = Setup::new().set("ReconnectIntervalSeconds", 1);
    let (rig, device) = setup.set("Sessions", json!({ "KeepDetached": 0 })).connected();
    let mut before = Terminal::of_user(&device, "alice");
    before.open_with_prompt();
    let mut stubborn = Terminal::of_user(&device, "bob");
    stubborn.open_with_prompt();
    stubborn.input("trap '' HUP TERM INT; echo re''ady\n");
    stubborn.read_until("ready", SOON);
    let shells = proc::children(rig.daemon.pid());
    assert_eq!(shells.len(), 2);
    device.reset();
    let device = rig.device();
    shells.iter().for_each(|&pid| proc::wait_gone(pid, SOON));
    let mut after = Terminal::of_user(&device, "alice");
    after.open_with_prompt();
    // The session of the old link is unknown on the new one.
    let old = Terminal { device: device.clone(), ..before };
    old.input("x");
    old.expect("shell", 2, Some("session not found"));
}

#[test]
fn many_shells_side_by_side_keep_their_output_apart() {
    let (_rig, device) = Rig::connected();
    let mut terminals: Vec<Terminal> = (0..8).map(|_| Terminal::new(&device, Style::Cli)).collect();
    terminals.iter_mut().for_each(Terminal::open_with_prompt);
    for (n, terminal) in terminals.iter().enumerate() {
        terminal.input(format!("for i in $(seq 1 500); do echo shell{n}-$i; done; echo do''ne\n"));
    }
    for (n, terminal) in terminals.iter_mut().enumerate() {
        let output = terminal.read_until("done\r\n", SOON);
        let mine = output.lines().filter(|l| l.starts_with(&format!("shell{n}-"))).count();
        let others =
            output.lines().filter(|l| l.starts_with("shell") && !l.starts_with(&format!("shell{n}-")));
        assert_eq!((mine, others.count()), (500, 0));
    }
    device.nothing(millis(50), "prompts only", |m| m.typ != "shell");
}
