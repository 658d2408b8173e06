use std::path::PathBuf;

use log::Level::{Error, Info, Warn};

use super::*;
use crate::config::load_with;
use crate::config::tests::{Device, EXPIRES, fail, load, note};

#[test]
fn the_main_file_wins_field_by_field() {
    let device = Device::new();
    device.write(
        "fallback",
        r#"{"User": "nobody-at-all", "Terminal": {"Width": 100, "Height": 50}, "FileTransfer": {"Disable": true},
            "ShellArguments": ["-a", "-b"], "Limits": {"Enabled": true, "FileTransfer": {"OwnerGet": ["x", "y"],
            "GroupGet": ["g"], "PreserveMode": false}}}"#,
    );
    let (config, _) = device.load_with(
        r#""terminal": {"height": 60}, "Limits": {"FileTransfer": {"OwnerGet": ["z"], "Chroot": "/c"}}"#,
    );
    assert_eq!(config.shell.user.name, "root");
    assert_eq!((config.terminal.width, config.terminal.height), (100, 60));
    assert_eq!(config.shell.arguments, [""; 0]);
    assert!(!config.file_transfer && config.port_forward);
    let limits = config.limits.unwrap();
    assert_eq!(limits.owner_get, ["z"]);
    assert_eq!(limits.group_get, ["g"]);
    assert_eq!(limits.chroot.as_deref(), Some(Path::new("/c")));
    assert!(!limits.preserve_mode);
}

#[test]
fn one_file_is_enough_whichever() {
    let device = Device::new();
    device.write("fallback", &device.working(EXPIRES));
    let (config, notes) = device.load();
    assert_eq!((config.is_ok(), notes), (true, vec![]));
}

#[test]
fn without_files_the_user_is_missing() {
    let (config, notes) = Device::new().load();
    assert_eq!(config.unwrap_err().to_string(), "please provide a user to run the shell as");
    assert_eq!(notes[0], note(Info, "No configuration files present. Using defaults"));
}

#[test]
fn a_file_that_exists_but_cannot_be_read_is_fatal() {
    let device = Device::new();
    fs::create_dir(device.path("fallback")).unwrap();
    device.write("main", &device.working(""));
    let (config, notes) = device.load();
    let file = device.path("fallback");
    let error = config.unwrap_err().to_string();
    assert!(error.starts_with(&format!("open {file}: ")), "{error}");
    assert_eq!(notes, [note(Error, &format!("Error loading configuration from file: {file} ({error})"))]);
}

#[test]
fn only_enoent_makes_a_file_missing() {
    let device = Device::new();
    let mut notes = Notes::new();
    let below_a_file = device.dir.path().join("sh/main");
    let nowhere = device.dir.path().join("no/such/dir");
    let error = load_with(&below_a_file, &nowhere, Path::new("/etc/shells"), &mut notes).unwrap_err();
    assert!(matches!(error, ConfigError::Open { file, .. } if file == below_a_file));
}

#[test]
fn json_errors_are_logged_with_their_file() {
    for (text, start) in [
        ("", "Error parsing mender configuration file: EOF"),
        ("{} {}", "Error parsing mender configuration file: trailing characters"),
        (
            r#"{"Terminal": {"Width": 65536}}"#,
            "Error parsing config file: Terminal.Width: expected an integer from 0 to 65535, found 65536",
        ),
        (r#"{"User": 1}"#, "Error parsing config file: User: expected a string, found 1"),
    ] {
        let device = Device::new();
        device.write("fallback", text);
        let (config, notes) = device.load();
        let error = config.unwrap_err().to_string();
        assert!(error.starts_with(start), "{error}");
        let file = device.path("fallback");
        assert_eq!(notes, [note(Error, &format!("Error loading configuration from file: {file} ({error})"))]);
    }
}

#[test]
fn unknown_keys_are_warned_about_with_their_file() {
    let device = Device::new();
    let (_, notes) = device.load_with(&format!(
        r#"{EXPIRES}, "Nonsense": 1, "Limits": {{"FileTransfer": {{"Foo": 1, "Foo": 2, "PreserveGroup": true}}}}"#
    ));
    let file = device.path("main");
    let warning = |key| note(Warn, &format!("{file}: ignoring unknown key {key}"));
    assert_eq!(
        notes,
        [
            warning("Nonsense"),
            warning("Limits.FileTransfer.Foo"),
            warning("Limits.FileTransfer.PreserveGroup")
        ]
    );
}

#[test]
fn deprecated_keys_are_warned_about() {
    let (_, notes) = load(&format!(
        r#"{EXPIRES}, "ServerURL": "https://x", "Servers": [{{"ServerURL": "https://x"}}],
        "ClientProtocol": "https", "HttpsClient": {{"SSLEngine": "pkcs11"}}, "SkipVerify": true,
        "ServerCertificate": "/x""#
    ));
    let names = ["ServerURL", "Servers", "ClientProtocol", "HTTPSClient", "SkipVerify", "ServerCertificate"];
    assert_eq!(notes, names.map(|name| note(Warn, &format!("{name} field is deprecated, ignoring."))));
}

#[test]
fn deprecated_keys_without_content_are_not_warned_about() {
    let (_, notes) = load(&format!(
        r#"{EXPIRES}, "ServerURL": "", "Servers": [], "ClientProtocol": null, "HttpsClient": {{"Key": ""}},
        "SkipVerify": false, "ServerCertificate": """#
    ));
    assert_eq!(notes, []);
}

#[test]
fn deprecated_keys_of_the_wrong_type_are_fatal() {
    for (text, key) in [
        (r#"{"ServerURL": 1}"#, "ServerURL"),
        (r#"{"Servers": {}}"#, "Servers"),
        (r#"{"Servers": ["https://x"]}"#, "Servers[0]"),
        (r#"{"HttpsClient": {"Key": 1}}"#, "HttpsClient.Key"),
        (r#"{"SkipVerify": "true"}"#, "SkipVerify"),
        (r#"{"ServerCertificate": []}"#, "ServerCertificate"),
    ] {
        let error = fail(text);
        assert!(error.starts_with(&format!("Error parsing config file: {key}: expected ")), "{error}");
    }
}

#[test]
fn loaded_files_are_named_in_their_order() {
    let device = Device::new();
    device.write("main", &device.working(EXPIRES));
    device.write("fallback", "null");
    let [main, fallback, shells] = ["main", "fallback", "shells"].map(|name| device.dir.path().join(name));
    let mut notes = Notes::new();
    load_with(&main, &fallback, &shells, &mut notes).unwrap();
    let loaded = |file: PathBuf| note(Info, &format!("Loaded configuration file: {}", file.display()));
    assert_eq!(notes, [loaded(fallback), loaded(main)]);
}
