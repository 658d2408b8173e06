use std::cell::RefCell;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use log::Level::{self, Error, Info, Warn};
use log::{LevelFilter, Log, Metadata, Record};
use tempfile::TempDir;

use super::*;

/// Log lines.
pub(crate) type Notes = Vec<(Level, String)>;

thread_local!(static NOTES: RefCell<Notes> = const { RefCell::new(Vec::new()) });

/// Keeps each thread's lines for the test in it.
struct Collector;

impl Log for Collector {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let _ = NOTES.try_with(|notes| notes.borrow_mut().push((record.level(), record.args().to_string())));
    }

    fn flush(&self) {}
}

/// Loads, and returns what was logged.
pub(crate) fn load_from(main: &Path, fallback: &Path, shells: &Path) -> (Result<Config, ConfigError>, Notes) {
    // Fails if another test has done so.
    let _ = log::set_logger(&Collector);
    log::set_max_level(LevelFilter::Info);
    NOTES.take();
    (load_with(main, fallback, shells), NOTES.take())
}

/// A device's file system, as far as the configuration sees it.
pub(crate) struct Device {
    pub(crate) dir: TempDir,
}

impl Device {
    pub(crate) fn new() -> Self {
        let device = Self { dir: tempfile::tempdir().unwrap() };
        device.shell("sh", 0o755);
        device.write("shells", &format!("# valid login shells\n{}\n", device.path("sh")));
        device
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).into_os_string().into_string().unwrap()
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn shell(&self, name: &str, mode: u32) {
        self.write(name, "#!/bin/sh\n");
        self.chmod(name, mode);
    }

    fn chmod(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), Permissions::from_mode(mode)).unwrap();
    }

    pub(crate) fn load(&self) -> (Result<Config, ConfigError>, Notes) {
        let [main, fallback, shells] = ["main", "fallback", "shells"].map(|name| self.dir.path().join(name));
        let (config, mut notes) = load_from(&main, &fallback, &shells);
        notes.retain(|(_, text)| !text.starts_with("Loaded configuration file: "));
        (config, notes)
    }

    /// Loads `members`, to which a shell and a user that work are added.
    pub(crate) fn load_with(&self, members: &str) -> (Config, Notes) {
        self.write("main", &self.working(members));
        let (config, notes) = self.load();
        (config.unwrap(), notes)
    }

    pub(crate) fn working(&self, members: &str) -> String {
        let comma = if members.is_empty() { "" } else { "," };
        format!(
            r#"{{"ShellCommand": "{}", "ShellArguments": [], "User": "root"{comma}{members}}}"#,
            self.path("sh")
        )
    }
}

pub(crate) fn load(members: &str) -> (Config, Notes) {
    Device::new().load_with(members)
}

/// Loads what must fail, and returns the error's text.
pub(crate) fn fail(main: &str) -> String {
    let device = Device::new();
    device.write("main", main);
    device.load().0.unwrap_err().to_string()
}

pub(crate) fn note(level: Level, text: &str) -> (Level, String) {
    (level, text.to_owned())
}

/// Keeps the default expiry, and its log line, out of the way.
pub(crate) const EXPIRES: &str = r#""Sessions": {"ExpireAfterIdle": 600}"#;

#[test]
fn a_minimal_file_gets_every_default() {
    let (config, notes) = load("");
    assert_eq!((config.terminal, config.width, config.height), (true, 80, 40));
    assert_eq!(config.expiry, Expiry::Idle(Duration::from_secs(600)));
    assert_eq!((config.sessions_per_user, config.keep_detached), (1, Duration::from_secs(300)));
    assert!(!config.idle_includes_output && !config.keep_when_user_leaves);
    assert!(config.file_transfer && config.port_forward && config.mender_client);
    assert_eq!(config.limits, None);
    assert_eq!(config.reconnect_interval, Duration::from_secs(5));
    assert_eq!(config.user.name, "root");
    assert_eq!(notes, [note(Info, "Defaulting ExpireAfterIdle to 10m0s")]);
}

#[test]
fn every_key_reaches_its_field() {
    let (config, notes) = load(
        r#""Terminal": {"Width": 132, "Height": 43, "Disable": true, "NoNewPrivileges": true},
        "Sessions": {"StopExpired": true, "ExpireAfter": 60, "MaxPerUser": 4},
        "Limits": {"Enabled": true, "FileTransfer": {"Chroot": "/data", "FollowSymLinks": true,
            "AllowOverwrite": true, "OwnerPut": "a", "GroupPut": "b", "OwnerGet": ["c", "d"], "GroupGet": ["e"],
            "Umask": "027", "MaxFileSize": 4096,
            "Counters": {"MaxBytesTxPerMinute": 18446744073709551615, "MaxBytesRxPerMinute": 2},
            "AllowSuid": true, "RegularFilesOnly": true, "PreserveMode": false, "PreserveOwner": false}},
        "ReconnectIntervalSeconds": 30,
        "FileTransfer": {"Disable": true}, "PortForward": {"Disable": true}, "MenderClient": {"Disable": true}"#,
    );
    assert_eq!(notes, []);
    assert_eq!((config.terminal, config.width, config.height), (false, 132, 43));
    assert!(config.no_new_privileges);
    assert_eq!(config.expiry, Expiry::Age(Duration::from_secs(60)));
    assert_eq!(config.sessions_per_user, 4);
    assert!(!config.file_transfer && !config.port_forward && !config.mender_client);
    assert_eq!(config.reconnect_interval, Duration::from_secs(30));
    let limits = FileLimits {
        chroot: Some("/data".into()),
        follow_symlinks: true,
        allow_overwrite: true,
        owner_put: Some("a".into()),
        group_put: Some("b".into()),
        owner_get: vec!["c".into(), "d".into()],
        group_get: vec!["e".into()],
        umask: Some(0o027),
        max_file_size: NonZeroU64::new(4096),
        max_tx_bytes_per_minute: NonZeroU64::new(u64::MAX),
        max_rx_bytes_per_minute: NonZeroU64::new(2),
        allow_suid: true,
        regular_files_only: true,
        preserve_mode: false,
        preserve_owner: false,
    };
    assert_eq!(config.limits, Some(limits));
}

#[test]
fn limits_count_only_when_enabled() {
    assert_eq!(load(r#""Limits": {"FileTransfer": {"Umask": "9", "Chroot": "/data"}}"#).0.limits, None);
    let limits = load(r#""Limits": {"Enabled": true}"#).0.limits.unwrap();
    assert_eq!((limits.chroot, limits.umask, limits.max_file_size), (None, None, None));
    assert_eq!((limits.owner_put, limits.group_put), (None, None));
    assert!(limits.preserve_mode && limits.preserve_owner);
    assert!(!limits.follow_symlinks && !limits.allow_overwrite && !limits.allow_suid);
}

#[test]
fn a_bad_umask_becomes_a_strict_one() {
    for (text, bits) in [("0022", 0o022), ("7", 0o007), ("1777", 0o777), ("0", 0)] {
        let limits =
            format!(r#"{EXPIRES}, "Limits": {{"Enabled": true, "FileTransfer": {{"Umask": "{text}"}}}}"#);
        let (config, notes) = load(&limits);
        assert_eq!(config.limits.unwrap().umask, Some(bits));
        assert_eq!(notes, []);
    }
    for text in ["088", "rwx", "-22", "0o22", " 22", "77777777777777"] {
        let limits =
            format!(r#"{EXPIRES}, "Limits": {{"Enabled": true, "FileTransfer": {{"Umask": "{text}"}}}}"#);
        let (config, notes) = load(&limits);
        assert_eq!(config.limits.unwrap().umask, Some(0o077));
        let text = format!("Limits.FileTransfer.Umask \"{text}\" is not an octal number, using 077 instead");
        assert_eq!(notes, [note(Error, &text)]);
    }
}

#[test]
fn shell_arguments_default_only_when_absent() {
    let device = Device::new();
    let arguments = |text: &str| {
        device.write(
            "main",
            &format!(r#"{{"ShellCommand": "{}", "User": "root", {EXPIRES} {text}}}"#, device.path("sh")),
        );
        let (config, notes) = device.load();
        (config.unwrap().arguments, notes)
    };
    let warning = note(Warn, "ShellArguments is empty, defaulting to [--login]");
    for absent in ["", r#", "ShellArguments": null"#] {
        assert_eq!(arguments(absent), (vec!["--login".to_owned()], vec![warning.clone()]));
    }
    assert_eq!(arguments(r#", "ShellArguments": []"#), (vec![], vec![]));
    assert_eq!(arguments(r#", "ShellArguments": [""]"#), (vec![String::new()], vec![]));
    assert_eq!(arguments(r#", "ShellArguments": ["-i"]"#), (vec!["-i".to_owned()], vec![]));
}

#[test]
fn an_empty_shell_command_defaults_to_bin_sh() {
    let device = Device::new();
    device.write("shells", "/bin/sh\n");
    for command in ["", r#", "ShellCommand": """#, r#", "ShellCommand": null"#] {
        device.write("main", &format!(r#"{{"User": "root", "ShellArguments": [], {EXPIRES} {command}}}"#));
        let (config, notes) = device.load();
        assert_eq!(config.unwrap().shell, Path::new("/bin/sh"));
        assert_eq!(notes, [note(Warn, "ShellCommand is empty, defaulting to /bin/sh")]);
    }
}

#[test]
fn expiry_follows_its_table() {
    let info = || vec![note(Info, "Defaulting ExpireAfterIdle to 10m0s")];
    let exclusive =
        || vec![note(Warn, "ExpireAfter and ExpireAfterIdle are mutually exclusive, ignoring ExpireAfter")];
    let idle = |seconds| Expiry::Idle(Duration::from_secs(seconds));
    for (members, expiry, notes) in [
        ("", idle(600), info()),
        (r#""StopExpired": true"#, idle(600), info()),
        (r#""ExpireAfter": 0, "ExpireAfterIdle": 0"#, idle(600), info()),
        (r#""ExpireAfterIdle": 7"#, idle(7), vec![]),
        (r#""ExpireAfter": 8"#, Expiry::Age(Duration::from_secs(8)), vec![]),
        (r#""ExpireAfter": 8, "ExpireAfterIdle": 7"#, idle(7), exclusive()),
        (r#""StopExpired": false"#, Expiry::Never, vec![]),
        (r#""StopExpired": false, "ExpireAfter": 8, "ExpireAfterIdle": 7"#, Expiry::Never, vec![]),
    ] {
        let (config, logged) = load(&format!(r#""Sessions": {{{members}}}"#));
        assert_eq!((config.expiry, logged), (expiry, notes), "{members}");
    }
}

#[test]
fn the_reconnect_interval_is_never_zero_or_negative() {
    for (text, seconds) in [("0", 5), ("null", 5), ("1", 1), ("9223372036854775807", u32::MAX.into())] {
        let (config, notes) = load(&format!(r#"{EXPIRES}, "ReconnectIntervalSeconds": {text}"#));
        assert_eq!(config.reconnect_interval, Duration::from_secs(seconds));
        assert_eq!(notes, []);
    }
    let (config, notes) = load(&format!(r#"{EXPIRES}, "ReconnectIntervalSeconds": -1"#));
    assert_eq!(config.reconnect_interval, Duration::from_secs(5));
    assert_eq!(notes, [note(Warn, "ReconnectIntervalSeconds is negative, defaulting to 5s")]);
}

#[test]
fn validation_stops_at_the_first_of_its_texts() {
    // Each file is wrong in everything that comes later, too.
    for (text, expected) in [
        (r#"{"ShellCommand": "sh"}"#, "given shell (sh) is not an absolute path"),
        (r#"{"ShellCommand": "/no/such/shell"}"#, "given shell (/no/such/shell) is not executable"),
        (r#"{"ShellCommand": "/bin/ls"}"#, "please provide a user to run the shell as"),
        (
            r#"{"ShellCommand": "/bin/ls", "User": "no-such-user-here"}"#,
            "user: unknown user no-such-user-here",
        ),
        (
            r#"{"ShellCommand": "/bin/ls", "User": "root"}"#,
            "ShellCommand /bin/ls is not present in /etc/shells",
        ),
        (
            r#"{"ShellCommand": "sh", "Terminal": {"Disable": true}}"#,
            "given shell (sh) is not an absolute path",
        ),
    ] {
        assert_eq!(fail(text), expected);
    }
}

#[test]
fn a_shell_needs_an_execute_bit_of_anybody() {
    let device = Device::new();
    device.write("main", &device.working(""));
    for (mode, executable) in [(0o644, false), (0o100, true), (0o010, true), (0o001, true)] {
        device.chmod("sh", mode);
        let (config, _) = device.load();
        assert_eq!(config.is_ok(), executable, "{mode:o}");
        if let Err(error) = config {
            let expected = format!("given shell ({}) is not executable", device.path("sh"));
            assert_eq!(error.to_string(), expected);
        }
    }
}

#[test]
fn a_shell_must_be_a_whole_line_of_the_list() {
    let device = Device::new();
    device.write("main", &device.working(EXPIRES));
    let shell = device.path("sh");
    for listed in [format!("/bin/x\n{shell}\n"), shell.clone(), format!("{shell}\r\n")] {
        device.write("shells", &listed);
        assert!(device.load().0.is_ok(), "{listed:?}");
    }
    for not in [
        String::new(),
        format!("{shell} \n"),
        format!(" {shell}\n"),
        format!("{shell}x\n"),
        format!("#{shell}\n"),
    ] {
        device.write("shells", &not);
        let (config, notes) = device.load();
        let text = format!("ShellCommand {shell} is not present in /etc/shells");
        assert_eq!(config.unwrap_err().to_string(), text, "{not:?}");
        assert_eq!(notes, [note(Error, &text)]);
    }
}

#[test]
fn without_a_list_only_bin_sh_will_do() {
    let device = Device::new();
    fs::remove_file(device.path("shells")).unwrap();
    device.write("main", r#"{"ShellCommand": "/bin/sh", "User": "root"}"#);
    assert!(device.load().0.is_ok());
    device.write("main", &device.working(""));
    let error = device.load().0.unwrap_err().to_string();
    assert!(error.starts_with(&format!("open {}: ", device.path("shells"))), "{error}");
}

#[test]
fn an_entry_that_cannot_be_read_is_named() {
    let error = fail(r#"{"User": "root", "PortForward": {"Allow": ["tcp/*:1", "tcp/host:0"]}}"#);
    assert_eq!(error, r#"PortForward.Allow: "tcp/host:0": "0" is no port, expected 1 to 65535"#);
}

#[test]
fn the_token_comes_from_the_bus_or_a_file() {
    for members in
        ["", r#""Auth": {}"#, r#""Auth": {"Source": "dbus"}"#, r#""auth": {"Source": "", "TokenFile": "/t"}"#]
    {
        assert_eq!(load(members).0.auth, Auth::Dbus, "{members}");
    }
    let file = r#""Auth": {"Source": "file", "TokenFile": "/run/token", "ServerURL": "https://x"}"#;
    let expected = Auth::File { token: "/run/token".into(), server_url: "https://x".to_owned() };
    assert_eq!(load(file).0.auth, expected);
    for (auth, error) in [
        (r#"{"Source": "File"}"#, r#"Auth.Source "File" is not known, only "dbus" and "file" are"#),
        (
            r#"{"Source": "file", "ServerURL": "x"}"#,
            r#"Auth.TokenFile is needed where Auth.Source is "file""#,
        ),
        (
            r#"{"Source": "file", "TokenFile": "/x"}"#,
            r#"Auth.ServerURL is needed where Auth.Source is "file""#,
        ),
        (
            r#"{"Source": "file", "TokenFile": "x", "ServerURL": "x"}"#,
            "Auth.TokenFile (x) is not an absolute path",
        ),
        (r#"{"Source": 1}"#, "Error parsing config file: Auth.Source: expected a string, found 1"),
    ] {
        assert_eq!(fail(&format!(r#"{{"User": "root", "Auth": {auth}}}"#)), error);
    }
}

#[test]
fn user_and_password_of_a_url_are_not_shown() {
    for (url, shown) in [
        ("https://a:b@host:1/p@th", "https://host:1/p@th"),
        ("a:b@host", "host"),
        ("https://a:b@c@host", "https://host"),
        ("http://localhost:5000", "http://localhost:5000"),
        ("", ""),
    ] {
        assert_eq!(without_password(url), shown);
    }
}
