use std::path::PathBuf;

use log::Level::{Error, Info, Warn};
use serde_json::json;

use super::*;
use crate::config::tests::{Device, EXPIRES, fail, load, load_from, note};

fn over(values: &Values, text: &str) -> Values {
    let mut values = values.clone();
    let walk = values.lay(text.as_bytes(), Origin::Main).unwrap();
    assert!(walk.misfits.is_empty(), "{walk:?}");
    values
}

fn read(text: &str) -> Values {
    over(&Values::default(), text)
}

fn walk(text: &str) -> Walk {
    Values::default().lay(text.as_bytes(), Origin::Main).unwrap()
}

/// The first.
fn error(text: &str) -> String {
    match Values::default().lay(text.as_bytes(), Origin::Main) {
        Ok(walk) => walk.misfits[0].to_string(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn keys_match_in_any_case() {
    assert_eq!(read(r#"{"USER": "a"}"#).text(Key::User), "a");
    assert_eq!(read(r#"{"user": "a"}"#).text(Key::User), "a");
    let deep = read(r#"{"liMITS": {"fILEtransfer": {"counters": {"MAXbytesTXperMINUTE": 1}}}}"#);
    assert_eq!(deep.number::<u64>(Key::MaxBytesTxPerMinute), 1);
    assert_eq!(read("{\"U\u{17f}er\": \"a\"}").text(Key::User), "a", "Go folds the long s");
    assert_eq!(read("{\"\u{17f}\u{212a}ipVerify\": true}").get(Key::SkipVerify), true, "and the Kelvin sign");
    assert_eq!(walk("{\"Us\u{e9}r\": 1}").unknown, ["Us\u{e9}r"]);
    let path = r#"{"Terminal.Width": 1, "Terminal": {"": 1, "Wid": 2}, "": 3}"#;
    assert_eq!(walk(path).unknown, ["Terminal.Width", "Terminal.", "Terminal.Wid", ""]);
}

#[test]
fn of_duplicate_keys_the_last_wins_whatever_its_case() {
    assert_eq!(read(r#"{"User": "a", "user": "b", "USER": "c"}"#).text(Key::User), "c");
    assert_eq!(read(r#"{"user": "c", "User": "a"}"#).text(Key::User), "a");
    assert_eq!(read(r#"{"User": "c", "User": "a"}"#).text(Key::User), "a");
    assert_eq!(read(r#"{"user": "a", "user": null}"#).text(Key::User), "a");
    let merged = read(r#"{"terminal": {"width": 1, "height": 2}, "terminal": {"width": 3}}"#);
    assert_eq!((merged.number(Key::Width), merged.number(Key::Height)), (3, 2));
    assert_eq!(walk(r#"{"user": 1, "user": "a", "user": false}"#).misfits.len(), 2);
}

#[test]
fn objects_merge_and_arrays_are_replaced() {
    let first = read(r#"{"ShellArguments": ["a", "b"], "Terminal": {"Width": 1, "Disable": true}}"#);
    let second = over(&first, r#"{"ShellArguments": ["c"], "Terminal": {"Height": 2}}"#);
    assert_eq!(*second.get(Key::ShellArguments), json!(["c"]));
    assert_eq!((second.number(Key::Width), second.number(Key::Height)), (1, 2));
    assert!(second.flag(Key::DisableTerminal));
    assert_eq!(*over(&second, r#"{"ShellArguments": []}"#).get(Key::ShellArguments), json!([]));
}

#[test]
fn null_leaves_values_and_empties_arrays() {
    let limits = r#""Limits": {"FileTransfer": {"OwnerGet": ["x"], "Chroot": "/x"}}"#;
    let before = read(&format!(r#"{{"User": "a", "SkipVerify": true, "ShellArguments": ["y"], {limits}}}"#));
    let limits = r#""Limits": {"FileTransfer": {"OwnerGet": null, "Chroot": null}}"#;
    let text =
        format!(r#"{{"User": null, "SkipVerify": null, "ShellArguments": null, "Auth": null, {limits}}}"#);
    let after = over(&before, &text);
    assert_eq!(*after.get(Key::ShellArguments), Value::Null);
    assert_eq!(*after.get(Key::OwnerGet), json!([]));
    for key in Key::all().filter(|key| ![Key::ShellArguments, Key::OwnerGet].contains(key)) {
        assert_eq!(after.get(key), before.get(key), "{key:?}");
    }
    assert_eq!(over(&before, "null").0, before.0);
    assert_eq!(over(&before, r#"{"Limits": {"FileTransfer": null}}"#).0, before.0);
    assert_eq!(*read(r#"{"ShellArguments": ["a", null]}"#).get(Key::ShellArguments), json!(["a", ""]));
}

#[test]
fn maps_merge_by_name_and_null_empties_them() {
    let map = |values: &Values| values.map(Key::Environment);
    let pairs = |pairs: &[(&str, &str)]| -> Vec<_> {
        pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    };
    let first = read(r#"{"terminal": {"environment": {"A": "1", "a": "2", "B": ""}}}"#);
    assert_eq!(map(&first), pairs(&[("A", "1"), ("B", ""), ("a", "2")]));
    let second = over(&first, r#"{"Terminal": {"Environment": {"A": "3", "C": "4"}}}"#);
    assert_eq!(map(&second), pairs(&[("A", "3"), ("B", ""), ("C", "4"), ("a", "2")]));
    assert_eq!(map(&over(&second, r#"{"Terminal": {"Environment": {}}}"#)), map(&second));
    assert_eq!(map(&over(&second, r#"{"Terminal": {"Environment": null}}"#)), []);
    let wrong = r#"{"Terminal": {"Environment": {"A": "1", "B": 2}}}"#;
    assert_eq!(error(wrong), "Error parsing config file: Terminal.Environment.B: expected a string, found 2");
    let wrong = error(r#"{"Terminal": {"Environment": ["A=1"]}}"#);
    assert_eq!(wrong, "Error parsing config file: Terminal.Environment: expected an object, found an array");
}

#[test]
fn what_cannot_be_a_variable_is_refused() {
    for (text, shown) in [
        (r#"{"": "x"}"#, r#"""="x""#),
        (r#"{"A=B": "x"}"#, r#""A=B"="x""#),
        (r#"{"A": "\u0000"}"#, r#""A"="\0""#),
    ] {
        let device = Device::new();
        device
            .write("main", &device.working(&format!(r#"{EXPIRES}, "Terminal": {{"Environment": {text}}}"#)));
        let error = device.load().0.unwrap_err().to_string();
        assert_eq!(error, format!("Terminal.Environment: no variable can be {shown}"));
    }
}

#[test]
fn a_list_that_may_be_absent_tells_that_from_empty() {
    let allow = |text: &str| read(text).list(Key::Allow);
    assert_eq!(allow("{}"), None);
    assert_eq!(allow(r#"{"portForward": {"allow": []}}"#), Some(vec![]));
    assert_eq!(allow(r#"{"portForward": {"allow": [""]}}"#), Some(vec![String::new()]));
}

#[test]
fn unknown_keys_are_named_once_with_their_path() {
    let text = r#"{"A": 1, "auth": {"B": {"C": 1}}, "A": 2, "servers": [{"D": [1e3]}, {"D": 0}]}"#;
    assert_eq!(walk(text).unknown, ["A", "auth.B", "servers[0].D", "servers[1].D"]);
    assert!(walk("{}").unknown.is_empty());
}

/// A file with one number, of 16, 32 and 64 bits and with a sign, and the path of it.
fn number(bits: &str, number: &str) -> (String, &'static str) {
    let (text, path) = match bits {
        "16" => (r#"{"Terminal": {"width": N}}"#, "Terminal.width"),
        "32" => (r#"{"Sessions": {"maxPerUser": N}}"#, "Sessions.maxPerUser"),
        "64" => (r#"{"Limits": {"FileTransfer": {"MaxFileSize": N}}}"#, "Limits.FileTransfer.MaxFileSize"),
        _ => (r#"{"ReconnectIntervalSeconds": N}"#, "ReconnectIntervalSeconds"),
    };
    (text.replace('N', number), path)
}

#[test]
fn integers_at_the_edges_fit() {
    for (bits, key, edge) in [
        ("16", Key::Width, json!(u16::MAX)),
        ("32", Key::MaxPerUser, json!(u32::MAX)),
        ("64", Key::MaxFileSize, json!(u64::MAX)),
        ("signed", Key::ReconnectInterval, json!(i64::MIN)),
        ("signed", Key::ReconnectInterval, json!(i64::MAX)),
    ] {
        assert_eq!(*read(&number(bits, &edge.to_string()).0).get(key), edge);
    }
}

#[test]
fn integers_beyond_the_edges_are_type_errors() {
    for (bits, text, range) in [
        ("16", "65536", "0 to 65535"),
        ("16", "-1", "0 to 65535"),
        ("32", "4294967296", "0 to 4294967295"),
        ("64", "-1", "0 to 18446744073709551615"),
        ("signed", "9223372036854775808", "-9223372036854775808 to 9223372036854775807"),
        ("64", "18446744073709551616", "0 to 18446744073709551615"),
    ] {
        let (file, path) = number(bits, text);
        let expected = format!("Error parsing config file: {path}: expected an integer from {range}, found ");
        let found = error(&file);
        let found = found.strip_prefix(&expected).unwrap_or_else(|| panic!("{found}"));
        assert_eq!(found, text);
    }
}

#[test]
fn numbers_with_fraction_or_exponent_are_not_integers() {
    for text in ["1.5", "1.0", "1e3", "-0.0", "1e999"] {
        let error = error(&number("16", text).0);
        assert!(error.ends_with(&format!("found {text}")), "{error}");
    }
    let long = error(&number("16", &"9".repeat(10_000)).0);
    assert!(long.ends_with(&"9".repeat(40)) && long.len() < 200, "{long}");
}

#[test]
fn wrong_types_are_named_with_their_path() {
    for (text, message) in [
        (r#"{"User": 1}"#, "User: expected a string, found 1"),
        (r#"{"user": ["a"]}"#, "user: expected a string, found an array"),
        (r#"{"skipVerify": "true"}"#, "skipVerify: expected a boolean, found a string"),
        (r#"{"skipVerify": 1}"#, "skipVerify: expected a boolean, found 1"),
        (r#"{"shellArguments": "a"}"#, "shellArguments: expected an array, found a string"),
        (r#"{"shellArguments": {}}"#, "shellArguments: expected an array, found an object"),
        (r#"{"shellArguments": ["a", false]}"#, "shellArguments[1]: expected a string, found a boolean"),
        (r#"{"shellArguments": [[]]}"#, "shellArguments[0]: expected a string, found an array"),
        (r#"{"auth": []}"#, "auth: expected an object, found an array"),
        (r#"{"servers": {}}"#, "servers: expected an array, found an object"),
        (r#"{"servers": [{}, null, {"ServerURL": 1}]}"#, "servers[2].ServerURL: expected a string, found 1"),
        (r#"{"servers": ["a"]}"#, "servers[0]: expected an object, found a string"),
        (
            r#"{"terminal": {"Width": "1"}}"#,
            "terminal.Width: expected an integer from 0 to 65535, found a string",
        ),
        ("[]", "top level: expected an object, found an array"),
        ("\"a\"", "top level: expected an object, found a string"),
    ] {
        assert_eq!(error(text), format!("Error parsing config file: {message}"));
    }
}

#[test]
fn every_type_error_is_told_in_its_order_and_the_rest_is_taken() {
    let mut values = read(r#"{"ShellArguments": ["before"]}"#);
    let text = r#"{"skipVerify": 1, "shellArguments": ["a", 2, 3], "portForward": {"allow": {}},
        "terminal": {"width": 9, "HEIGHT": "x"}, "user": "a", "servers": [{"serverURL": true}], "Auth": 1}"#;
    let walk = values.lay(text.as_bytes(), Origin::Fallback).unwrap();
    let places: Vec<_> = walk.misfits.iter().map(|misfit| (misfit.key, misfit.path.as_str())).collect();
    let expected = [
        (Some(Key::SkipVerify), "skipVerify"),
        (Some(Key::ShellArguments), "shellArguments[1]"),
        (Some(Key::ShellArguments), "shellArguments[2]"),
        (Some(Key::Allow), "portForward.allow"),
        (Some(Key::Height), "terminal.HEIGHT"),
        (Some(Key::ServersServerUrl), "servers[0].serverURL"),
        (None, "Auth"),
    ];
    assert_eq!(places, expected);
    assert_eq!(walk.given, [(Key::Width, json!(9)), (Key::User, json!("a"))]);
    let kept = (values.get(Key::ShellArguments).clone(), values.origin(Key::ShellArguments));
    assert_eq!(kept, (json!(["before"]), Origin::Main));
    assert_eq!((values.number(Key::Width), values.origin(Key::Width)), (9, Origin::Fallback));
}

#[test]
fn what_was_given_is_told_in_its_order() {
    let text = r#"{"USER": "a", "skipVerify": null, "shellArguments": null, "servers": [{"serverURL": "x"}],
        "user": "b", "x": 1, "limits": {"filetransfer": {"uMASK": ""}}}"#;
    let given: Vec<_> = walk(text).given.into_iter().map(|(key, _)| key).collect();
    assert_eq!(given, [Key::User, Key::ShellArguments, Key::Servers, Key::User, Key::Umask]);
}

#[test]
fn syntax_errors_have_their_own_text_and_come_first() {
    let deep = "[".repeat(100_000);
    for text in [
        "",
        " \n",
        "{",
        "{}{}",
        "{} x",
        r#"{"User": "a",}"#,
        r#"{User: "a"}"#,
        "{'User': 'a'}",
        "{\"name\": \"a\nb\"}",
        r#"{"User": "\x"}"#,
        r#"{"Terminal": {"Width": 01}}"#,
        "// comment\n{}",
        "\u{feff}{}",
        r#"{"SkipVerify": 1"#,
        r#"{"User": NaN}"#,
        // Ahead of what doesn't fit.
        r#"{"User": 1, "Unknown": 1e}"#,
        r#"{"User": 1, "Unknown": {"A": "\ud80"}}"#,
        r#"{"User": "\ud800\é"}"#,
        &deep,
    ] {
        let error = error(text);
        assert!(error.starts_with("Error parsing mender configuration file: "), "{text:.20}: {error}");
    }
}

/// Such files stopped the start, while Mender's own agent reads them.
#[test]
fn what_go_reads_is_read() {
    let deep = format!("{}{}", "[".repeat(9000), "]".repeat(9000));
    for unknown in ["1e999", "-1E+999", "[1e999, {}]", r#""\ud800""#, &"9".repeat(400), &deep] {
        let values = read(&format!(r#"{{"Unknown": {unknown}, "User": "a"}}"#));
        assert_eq!(values.text(Key::User), "a", "{unknown:.20}");
    }
    for (text, user) in [
        (r"\ud800", "\u{fffd}"),
        (r"\udC00x", "\u{fffd}x"),
        (r"\ud800\ud83d\ude00", "\u{fffd}\u{1f600}"),
        (r"\ude00\ud83d", "\u{fffd}\u{fffd}"),
        (r"\ud83d\n\ude00", "\u{fffd}\n\u{fffd}"),
        (r"\\ud800", r"\ud800"),
    ] {
        assert_eq!(read(&format!(r#"{{"\udfff": 1, "User": "{text}"}}"#)).text(Key::User), user, "{text}");
    }
    let misfit = error(&format!(r#"{{"Terminal": {deep}}}"#));
    assert!(misfit.ends_with("Terminal: expected an object, found an array"), "{misfit}");
}

/// A FIFO blocked the start until somebody wrote it.
#[test]
fn what_is_no_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::os::unix::fs::symlink(&fifo, dir.path().join("link")).unwrap();
    for file in [fifo, dir.path().join("link"), dir.path().to_owned(), "/dev/zero".into(), "/dev/null".into()]
    {
        let error = Values::default().read(&file, Origin::Main).unwrap_err().to_string();
        assert_eq!(error, format!("open {}: it is no regular file", file.display()));
    }
}

/// Rust's words and the number stood there.
#[test]
fn why_a_file_cannot_be_read_is_in_gos_words() {
    let below_a_file = Path::new("/etc/passwd/x");
    let error = Values::default().read(below_a_file, Origin::Main).unwrap_err().to_string();
    assert_eq!(error, "open /etc/passwd/x: not a directory");
}

#[test]
fn a_syntax_error_tells_its_place_in_the_file() {
    let error = error("{\n  \"Terminal\": {\n    \"Width\": 1,\n  }\n}");
    assert!(error.ends_with("trailing comma at line 4 column 3"), "{error}");
}

#[test]
fn invalid_utf8_becomes_one_replacement_character_per_byte() {
    let mut values = Values::default();
    values.lay(b"{\"User\": \"a\xe2\x82b\xff\xc3\xa9\"}", Origin::Main).unwrap();
    assert_eq!(values.text(Key::User), "a\u{fffd}\u{fffd}b\u{fffd}\u{e9}");
    let outside = values.lay(b"{\xff}", Origin::Main).unwrap_err();
    assert!(matches!(outside, ConfigError::Syntax(_)));
}

#[test]
fn escapes_are_undone() {
    let values = read(r#"{"\u0055ser": "\u00e9\ud83d\ude00\"\\\/\t"}"#);
    assert_eq!(values.text(Key::User), "\u{e9}\u{1f600}\"\\/\t");
}

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
    assert_eq!(config.user.name, "root");
    assert_eq!((config.width, config.height), (100, 60));
    assert_eq!(config.arguments, [""; 0]);
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
    let below_a_file = device.dir.path().join("sh/main");
    let nowhere = device.dir.path().join("no/such/dir");
    let error = load_from(&below_a_file, &nowhere, Path::new("/etc/shells")).0.unwrap_err();
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
    let (config, notes) = load_from(&main, &fallback, &shells);
    assert!(config.is_ok());
    let loaded = |file: PathBuf| note(Info, &format!("Loaded configuration file: {}", file.display()));
    assert_eq!(notes, [loaded(fallback), loaded(main)]);
}
