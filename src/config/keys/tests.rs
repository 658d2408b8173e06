use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::*;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

#[test]
fn names_are_found_below_their_section_in_any_case() {
    for key in Key::all() {
        let (section, member) = key.name().rsplit_once('.').unwrap_or(("", key.name()));
        assert_eq!(Key::find(section, &member.to_ascii_uppercase()), Some((key.name(), Some(key))));
    }
    assert_eq!(Key::find("", "limits"), Some(("Limits", None)));
    assert_eq!(Key::find("Limits", "filetransfer"), Some(("Limits.FileTransfer", None)));
    for (section, member) in [("", "Terminal.Width"), ("", "Term"), ("Terminal", ""), ("", ""), ("", "Width")]
    {
        assert_eq!(Key::find(section, member), None);
    }
}

/// Each value of an object with its dotted key.
fn leaves(prefix: &str, value: &Value, found: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(members) if !members.is_empty() => {
            members.iter().for_each(|(key, value)| leaves(&join(prefix, key), value, found))
        }
        value => {
            found.insert(prefix.to_owned(), value.clone());
        }
    }
}

/// Packages set a user that has no rights.
fn default(key: Key) -> Value {
    if key == Key::User { "nobody".into() } else { key.kind().default() }
}

#[test]
fn the_example_has_every_key_at_its_default() {
    let text = read("yocto/files/mender-connect.conf.example");
    let lines: Vec<_> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let mut found = BTreeMap::new();
    leaves("", &serde_json::from_str(&lines.join("\n")).unwrap(), &mut found);
    let expected = Key::current().map(|key| (key.name().to_owned(), default(key))).collect();
    assert_eq!(found, expected);
}

#[test]
fn the_manual_has_an_item_for_every_key_with_its_default() {
    let manual = read("docs/man/mender-connect.conf.5");
    let mut items = BTreeMap::new();
    for item in manual.split("\n.It Va ").skip(1) {
        let (key, rest) = item.split_once('\n').unwrap_or((item, ""));
        if let Some(about) = rest.lines().next().and_then(|line| line.strip_prefix(".Pq ")) {
            let default = about.split("; default ").nth(1).unwrap_or_else(|| panic!("{key} has no default"));
            items.insert(key.to_owned(), default.replace("\\(dq", "\"").replace(", required", ""));
        }
    }
    let shown = |key: Key| match key.kind().default() {
        Value::Null => "none".to_owned(),
        value if value == "" => "none".to_owned(),
        value => value.to_string(),
    };
    let expected = Key::current().map(|key| (key.name().to_owned(), shown(key))).collect();
    assert_eq!(items, expected);
}

#[test]
fn every_part_of_a_key_is_described() {
    let words = |page: &str| {
        let text = read(page);
        text.split(|c: char| !c.is_ascii_alphanumeric()).map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let manual = words("docs/man/mender-connect.conf.5");
    let page = words("docs/configuration.md");
    for key in Key::all() {
        for part in key.name().split('.') {
            assert!(manual.contains(part), "{part} of {key:?}");
            assert!(page.contains(part) || key.deprecated().is_some(), "{part} of {key:?}");
        }
    }
}
