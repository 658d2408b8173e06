use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;
use crate::config::tests::{Device, EXPIRES};

fn survey(device: &Device) -> Survey<'static> {
    let [main, fallback, shells] =
        ["main", "fallback", "shells"].map(|name| &*device.dir.path().join(name).leak());
    let survey = Survey::new(main, fallback, shells);
    let refused = device.load().0.is_err();
    assert!(
        !cfg!(feature = "dbus") || survey.is_good() != refused,
        "the daemon is of another opinion: {survey:?}"
    );
    survey
}

/// Writes the files (`None`: absent) and looks at them. `SHELL` in them is one that is listed.
fn look(main: Option<&str>, fallback: Option<&str>) -> Survey<'static> {
    let device = Device::new();
    for (name, text) in [("main", main), ("fallback", fallback)] {
        if let Some(text) = text {
            device.write(name, &text.replace("SHELL", &device.path("sh")));
        }
    }
    survey(&device)
}

/// The findings, with the file's name alone: `Warn main User: text`. Texts of every build without D-Bus aren't
/// among them.
fn lines(survey: &Survey<'_>) -> Vec<String> {
    let line =
        |(level, file, text): &Finding| format!("{level:?} {} {text}", file.file_name().unwrap().display());
    survey.findings.iter().map(line).filter(|line| !line.contains("built without D-Bus")).collect()
}

const WORKING: &str = r#""ShellCommand": "SHELL", "ShellArguments": [], "User": "root""#;

/// The findings in the main file where these members are added to what works.
fn found(members: &str) -> Vec<String> {
    lines(&look(Some(&format!("{{{WORKING}, {members}}}")), None))
}

fn value(survey: &Survey<'_>, key: &str) -> (String, Origin) {
    let key = Key::current().find(|known| known.name() == key).unwrap();
    (survey.values.get(key).to_string(), survey.values.origin(key))
}

#[test]
fn a_good_file_has_no_findings() {
    assert_eq!(found(EXPIRES), [""; 0]);
    assert_eq!(found(r#""Terminal": null, "PortForward": {"Allow": []}"#), [""; 0]);
}

#[test]
fn all_that_is_wrong_is_told() {
    let main = r#"{"User": 5, "Terminal": {"Width": 70000, "height": "x"}, "ShellArguments": ["a", 1, 2],
        "Auth": {"Source": "file", "TokenFile": "token"}, "PortForward": {"Allow": ["x", "tcp/*:1", "y"]}}"#;
    let expected = [
        "Error fallback SkipVerify: expected a boolean, found a string",
        "Error main User: expected a string, found 5",
        "Error main Terminal.Width: expected an integer from 0 to 65535, found 70000",
        "Error main Terminal.height: expected an integer from 0 to 65535, found a string",
        "Error main ShellArguments[1]: expected a string, found 1",
        "Error main ShellArguments[2]: expected a string, found 2",
        r#"Error main PortForward.Allow: "x": expected tcp/HOST:PORTS or udp/HOST:PORTS"#,
        r#"Error main PortForward.Allow: "y": expected tcp/HOST:PORTS or udp/HOST:PORTS"#,
        r#"Error main Auth.ServerURL: Auth.ServerURL is needed where Auth.Source is "file""#,
        "Error main Auth.TokenFile: Auth.TokenFile (token) is not an absolute path",
        "Error fallback ShellCommand: given shell (sh) is not an absolute path",
    ];
    let survey = look(Some(main), Some(r#"{"ShellCommand": "sh", "SkipVerify": "x"}"#));
    assert_eq!(lines(&survey), expected);
    assert_eq!(value(&survey, "ShellArguments"), (r#"["--login"]"#.to_owned(), Origin::Default));

    let wrong = |text| lines(&look(Some(text), None));
    let refused = |why: &str| vec![format!("Error main {why}")];
    let no_user = "User: please provide a user to run the shell as";
    assert_eq!(wrong(r#"{"ShellCommand": "SHELL", "ShellArguments": []}"#), refused(no_user));
    assert_eq!(
        wrong(r#"{"ShellCommand": "/bin/ls", "ShellArguments": [], "User": "no-such-user-here"}"#),
        [
            "Error main ShellCommand: ShellCommand /bin/ls is not present in /etc/shells",
            "Error main User: user: unknown user no-such-user-here",
        ]
    );
    assert_eq!(
        wrong(r#"{"ShellCommand": "/no/such", "User": "root"}"#),
        refused("ShellCommand: given shell (/no/such) is not executable")
    );
    assert_eq!(
        found(r#""Auth": {"Source": "x"}"#),
        refused(r#"Auth.Source: Auth.Source "x" is not known, only "dbus" and "file" are"#)
    );
}

#[test]
fn of_a_broken_file_the_other_is_looked_at() {
    let survey =
        look(Some("{\n  \"User\": \"root\",\n}"), Some(r#"{"Usr": "x", "ShellCommand": "/no/such"}"#));
    assert_eq!((survey.main.1, survey.fallback.1), (BROKEN, ""));
    assert_eq!(
        lines(&survey),
        [
            "Error main trailing comma at line 3 column 1",
            // But nothing of a User that the main file may have.
            "Error fallback ShellCommand: given shell (/no/such) is not executable",
            "Warn fallback Usr: unknown and ignored; is User meant?",
        ]
    );
    let survey = look(Some(&format!("{{{WORKING}}}")), Some("[]"));
    assert_eq!((survey.main.1, survey.fallback.1), ("", BROKEN));
    assert_eq!(lines(&survey), ["Error fallback expected an object, found an array"]);
    assert_eq!(value(&survey, "User"), (r#""root""#.to_owned(), Origin::Main));
    let survey = look(None, None);
    assert_eq!((survey.main.1, survey.fallback.1), (ABSENT, ABSENT));
    let no_user = "Error main User: please provide a user to run the shell as";
    assert!(lines(&survey).iter().any(|line| line == no_user), "{survey:?}");
}

#[test]
fn what_is_ignored_is_told_with_its_file() {
    let main = format!(
        r#"{{{WORKING}, "user": "root", "Chroot": "/", "Terminal": {{"Wdith": 1, "x\u001b": 1}},
        "Servers": [{{"ServerURL": "a", "b": 1}}]}}"#
    );
    let survey = look(Some(&main), Some(r#"{"HttpsClient": {"Key": ""}, "ServerURL": null}"#));
    assert_eq!(
        lines(&survey),
        [
            "Warn fallback HttpsClient.Key: deprecated and ignored",
            "Warn main Chroot: unknown and ignored; is Limits.FileTransfer.Chroot meant?",
            "Warn main Terminal.Wdith: unknown and ignored; is Terminal.Width meant?",
            "Warn main Terminal.x\u{1b}: unknown and ignored",
            "Warn main Servers[0].b: unknown and ignored",
            "Warn main User: given more than once, the last counts",
            "Warn main Servers: deprecated and ignored",
        ]
    );
}

#[test]
fn values_have_their_origin() {
    let fallback = r#"{"User": "nobody", "Terminal": {"width": 100, "Height": 0}, "Sessions": {"ExpireAfter": 9},
        "Limits": {"Enabled": true, "FileTransfer": {"OwnerGet": ["root"], "Umask": "1027"}}}"#;
    let main = format!(
        r#"{{{WORKING}, "Limits": {{"FileTransfer": {{"OwnerGet": null}}}}, "ReconnectIntervalSeconds": -1}}"#
    );
    let survey = look(Some(&main), Some(fallback));
    for (key, expected, origin) in [
        ("User", r#""root""#, Origin::Main),
        ("ShellArguments", "[]", Origin::Main),
        ("Terminal.Width", "100", Origin::Fallback),
        ("Terminal.Height", "40", Origin::Default),
        ("Terminal.Disable", "false", Origin::Default),
        ("Sessions.ExpireAfter", "9", Origin::Fallback),
        ("Sessions.ExpireAfterIdle", "0", Origin::Default),
        ("Sessions.MaxPerUser", "1", Origin::Default),
        ("Limits.FileTransfer.OwnerGet", "[]", Origin::Main),
        ("Limits.FileTransfer.Umask", r#""027""#, Origin::Default),
        ("ReconnectIntervalSeconds", "5", Origin::Default),
        ("PortForward.Allow", "null", Origin::Default),
        ("Auth.Source", r#""dbus""#, Origin::Default),
    ] {
        assert_eq!(value(&survey, key), (expected.to_owned(), origin), "{key}");
    }
    assert_eq!(
        lines(&survey),
        [
            r#"Warn fallback Limits.FileTransfer.Umask: "1027" can't be used, "027" is used instead"#,
            "Warn main ReconnectIntervalSeconds: -1 can't be used, 5 is used instead",
            "Info fallback Terminal.Height: 0 stands for the default, 40",
        ]
    );
}

/// The listed values, written down as a file, are the same configuration.
#[test]
fn the_values_listed_are_those_that_count() {
    let device = Device::new();
    let members = r#""Terminal": {"Width": 0, "NoNewPrivileges": true}, "ReconnectIntervalSeconds": 99999999999,
        "Sessions": {"ExpireAfter": 5, "ExpireAfterIdle": 6, "IdleIncludesOutput": true, "MaxPerUser": 0},
        "Limits": {"Enabled": true, "FileTransfer": {"Umask": "x", "Chroot": "/tmp", "MaxFileSize": 7,
            "OwnerGet": ["a"], "Counters": {"MaxBytesTxPerMinute": 8}, "PreserveMode": false}},
        "PortForward": {"Allow": ["tcp/*:22"]}, "MenderClient": {"Disable": true}"#;
    let (config, _) = device.load_with(members);
    let mut document = serde_json::json!({});
    let values = survey(&device).values;
    for key in Key::current() {
        *key.name().split('.').fold(&mut document, |place, name| &mut place[name]) = values.get(key).clone();
    }
    device.write("main", &document.to_string());
    assert_eq!(device.load().0.unwrap(), config);
}

#[test]
fn every_key_without_effect_is_told() {
    let idle = |members: &str, keys: &[&str], why: &str| {
        let lines = found(members);
        let lines: Vec<_> = lines.iter().map(|line| line.split_once(' ').unwrap().1).collect();
        let line = |key: &&str| format!("main {key}: without effect, because {why}");
        assert_eq!(lines, keys.iter().map(line).collect::<Vec<_>>(), "{members}");
    };
    let terminal = r#""Terminal": {"Disable": true, "Width": 1, "Height": 2, "NoNewPrivileges": true},
        "Sessions": {"MaxPerUser": 3, "IdleIncludesOutput": true}"#;
    let lines = found(terminal);
    assert_eq!(lines.len(), 7, "{lines:?}");
    assert!(lines.iter().all(|line| line.contains("because Terminal.Disable is true")), "{lines:?}");
    idle(
        r#""Sessions": {"StopExpired": false, "ExpireAfter": 1, "ExpireAfterIdle": 2, "IdleIncludesOutput": true}"#,
        &["Sessions.ExpireAfter", "Sessions.ExpireAfterIdle", "Sessions.IdleIncludesOutput"],
        "Sessions.StopExpired is false",
    );
    idle(r#""Sessions": {"StopExpired": false, "ExpireAfter": 0, "ExpireAfterIdle": 0}"#, &[], "");
    idle(
        r#""Sessions": {"ExpireAfter": 1, "ExpireAfterIdle": 2, "IdleIncludesOutput": true}"#,
        &["Sessions.ExpireAfter"],
        "Sessions.ExpireAfterIdle is set",
    );
    idle(
        r#""Sessions": {"ExpireAfter": 1, "ExpireAfterIdle": 0, "IdleIncludesOutput": true}"#,
        &["Sessions.IdleIncludesOutput"],
        "sessions expire by Sessions.ExpireAfter",
    );
    idle(
        r#""PortForward": {"Disable": true, "Allow": []}"#,
        &["PortForward.Allow"],
        "PortForward.Disable is true",
    );
    let limits = r#""Limits": {"Enabled": false, "FileTransfer": {"Umask": "x", "FollowSymLinks": false}}"#;
    let both = ["Limits.FileTransfer.FollowSymLinks", "Limits.FileTransfer.Umask"];
    idle(limits, &both, "Limits.Enabled is false");
    assert!(found(limits).iter().all(|line| line.starts_with("Warn ")));
    idle(
        &format!(r#"{limits}, "FileTransfer": {{"Disable": true}}"#),
        &["Limits.Enabled", both[0], both[1]],
        "FileTransfer.Disable is true",
    );
    let put = r#""Umask": "022", "PreserveMode": true, "OwnerPut": "root", "PreserveOwner": false"#;
    let put = |more| format!(r#""Limits": {{"Enabled": true, "FileTransfer": {{{put}{more}}}}}"#);
    idle(&put(""), &["Limits.FileTransfer.PreserveMode"], "Limits.FileTransfer.Umask is set");
    idle(
        &put(r#", "AllowSuid": true, "GroupPut": "root""#),
        &["Limits.FileTransfer.PreserveOwner"],
        "Limits.FileTransfer.OwnerPut and GroupPut are set",
    );
    idle(
        r#""Auth": {"TokenFile": "x", "ServerURL": "y"}"#,
        &["Auth.TokenFile", "Auth.ServerURL"],
        "Auth.Source is \"dbus\"",
    );
    idle(r#""Auth": {"Source": "file", "TokenFile": "/x", "ServerURL": "https://y"}"#, &[], "");
}

#[test]
fn zero_and_the_like_stand_for_defaults() {
    let members = r#""Terminal": {"Width": 0}, "Sessions": {"MaxPerUser": 0, "ExpireAfterIdle": 0}"#;
    let survey = look(Some(r#"{"ShellCommand": "SHELL", "User": "root", "ShellArguments": null}"#), None);
    let mut lines = lines(&survey);
    lines.extend(found(members));
    assert_eq!(
        lines,
        [
            r#"Info main ShellArguments: null stands for the default, ["--login"]"#,
            "Info main Terminal.Width: 0 stands for the default, 80",
            "Info main Sessions.ExpireAfterIdle: 0 stands for the default, 600",
            "Info main Sessions.MaxPerUser: 0 stands for the default, 1",
        ]
    );
}

#[test]
fn what_will_not_work_on_this_device_is_told() {
    let limits =
        |members: &str| found(&format!(r#""Limits": {{"Enabled": true, "FileTransfer": {{{members}}}}}"#));
    assert_eq!(
        limits(
            r#""Chroot": "/no/such", "OwnerPut": "no-such-user", "GroupPut": "root", "OwnerGet": ["root", "nor-this"],
            "GroupGet": ["no-such-group"]"#
        ),
        [
            "Warn main Limits.FileTransfer.Chroot: /no/such can't be used: no such file or directory",
            r#"Warn main Limits.FileTransfer.OwnerPut: unknown user "no-such-user""#,
            r#"Warn main Limits.FileTransfer.OwnerGet: unknown user "nor-this""#,
            r#"Warn main Limits.FileTransfer.GroupGet: unknown group "no-such-group""#,
        ]
    );
    for (chroot, why) in [("/etc/passwd", "is not a directory"), ("tmp", "is not an absolute path")] {
        let expected = format!("Warn main Limits.FileTransfer.Chroot: {chroot} {why}");
        assert_eq!(limits(&format!(r#""Chroot": "{chroot}""#)), [expected]);
    }
    assert_eq!(limits(r#""Chroot": "/tmp", "OwnerGet": [""]"#), [""; 0]);
}

#[test]
fn dash_and_login_do_not_go_together() {
    let device = Device::new();
    symlink("dash", device.path("ash")).unwrap();
    for shell in ["dash", "bash"] {
        device.write(shell, "");
        fs::set_permissions(device.path(shell), Permissions::from_mode(0o755)).unwrap();
    }
    device.write("shells", &["ash", "bash"].map(|name| device.path(name)).join("\n"));
    let dash = |shell: &str, more: &str| {
        device
            .write("main", &format!(r#"{{"User": "root", "ShellCommand": "{}"{more}}}"#, device.path(shell)));
        let lines = lines(&survey(&device));
        lines.iter().any(|line| line.starts_with("Warn main ShellCommand: ") && line.contains("sh is dash"))
    };
    assert!(dash("ash", ""));
    assert!(!dash("ash", r#", "ShellArguments": []"#));
    assert!(!dash("ash", r#", "ShellArguments": ["-l"]"#));
    assert!(!dash("ash", r#", "Terminal": {"Disable": true}"#));
    assert!(!dash("bash", ""));
}

#[test]
fn a_file_that_others_may_write_is_told() {
    let device = Device::new();
    device.write("main", &device.working(""));
    let main = device.path("main");
    let with_mode = |mode| {
        fs::set_permissions(&main, Permissions::from_mode(mode)).unwrap();
        lines(&survey(&device))
    };
    assert_eq!(with_mode(0o644), [""; 0]);
    assert_eq!(with_mode(0o646), ["Warn main may be written by everybody"]);
    if nix::unistd::geteuid().is_root() {
        assert_eq!(with_mode(0o664), [""; 0]);
        nix::unistd::chown(Path::new(&main), Some(54_321.into()), Some(54_320.into())).unwrap();
        assert_eq!(
            with_mode(0o664),
            [
                "Warn main may be written by its owner, user 54321",
                "Warn main may be written by its group, 54320",
            ]
        );
    }
}

#[test]
fn what_is_near_or_elsewhere_is_suggested() {
    for (unknown, meant) in [
        ("Chroot", Some("Limits.FileTransfer.Chroot")),
        ("FileTransfer.chroot", Some("Limits.FileTransfer.Chroot")),
        ("Terminal.User", Some("User")),
        ("Terminal.Wdith", Some("Terminal.Width")),
        ("Usr", Some("User")),
        ("Uesr", Some("User")),
        ("Terminl", Some("Terminal")),
        ("Limits.FileTransfr", Some("Limits.FileTransfer")),
        ("Sesions", Some("Sessions")),
        ("Sessions.ExpiresAftr", Some("Sessions.ExpireAfter")),
        ("Disable", None),
        ("Path", None),
        ("Usage", None),
        ("Frobnicate", None),
        ("\u{1f600}User", Some("User")),
        ("", None),
    ] {
        assert_eq!(suggest(unknown), meant, "{unknown}");
    }
    assert_eq!(suggest(&"x".repeat(100_000)), None);
}

/// It was asked whether the very same key was meant, as the pages spell it.
#[test]
fn a_key_that_is_spelt_with_a_dot_is_told() {
    for key in ["Terminal.Disable", "portforward.allow"] {
        let findings = found(&format!(r#""{key}": null"#));
        let start = format!("Warn main {key}: unknown and ignored; a dot stands for nesting");
        assert!(findings.len() == 1 && findings[0].starts_with(&start), "{findings:?}");
    }
}

#[test]
fn a_token_sent_in_clear_is_told() {
    let auth = |url: &str| {
        found(&format!(r#""Auth": {{"Source": "file", "TokenFile": "/token", "ServerURL": "{url}"}}"#))
    };
    let told = format!("Warn main Auth.ServerURL: {IN_CLEAR}");
    assert_eq!(auth("http://device.example"), [told]);
    for url in ["https://device.example", "http://127.0.0.1:1", "http://[::1]:1", "http://localhost"] {
        assert_eq!(auth(url), [""; 0], "{url}");
    }
}
