//! The architecture, read off the `use` lines: who may know whom.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Module → what it may use of the crate, besides itself.
const ALLOWED: &[(&str, &[&str])] = &[
    ("sys", &[]),
    ("proto", &[]),
    ("backoff", &[]),
    ("encoding", &[]),
    ("permits", &["sys"]),
    ("cli", &[]),
    ("audit", &["proto"]),
    ("logging", &["audit", "sys"]),
    ("config", &["sys"]),
    ("check", &["config", "link", "sys"]),
    ("outbox", &["permits", "proto", "sys"]),
    ("auth", &["config", "sys"]),
    ("link", &["auth", "encoding", "outbox", "proto", "sys"]),
    ("commands", &["audit", "outbox", "proto", "sys"]),
    ("session", &["audit", "commands", "config", "encoding", "outbox", "permits", "proto", "sys"]),
    ("status", &["config", "proto", "session", "sys"]),
    ("doctor", &["auth", "config", "encoding", "link", "status", "sys"]),
    ("daemon", &["cli", "config", "logging", "session", "supervisor", "sys"]),
    ("supervisor", &["auth", "backoff", "config", "link", "proto", "session", "status", "sys"]),
];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("read a source folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// The modules of the crate that a source names, by `use` or in place.
fn used(source: &str) -> BTreeSet<String> {
    let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut modules = BTreeSet::new();
    for line in code {
        for rest in line.split("crate::").skip(1) {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            modules.insert(rest[..end].to_owned());
        }
        assert!(!line.contains("use crate::{"), "name the modules one by one: {line}");
    }
    modules
}

#[test]
fn arrows_point_one_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    assert!(files.len() > 30, "{} sources", files.len());
    for file in files {
        let place = file.strip_prefix(&src).expect("below src");
        let module = place.components().next().expect("a name").as_os_str().to_str().expect("UTF-8");
        let module = module.trim_end_matches(".rs");
        if ["main", "lib", "build"].contains(&module) {
            continue;
        }
        let (_, allowed) = ALLOWED
            .iter()
            .find(|(name, _)| *name == module)
            .unwrap_or_else(|| panic!("{module} is new: where is it?"));
        for other in used(&fs::read_to_string(&file).expect("read a source")) {
            assert!(
                other == module || allowed.contains(&other.as_str()),
                "{} uses {other}, which is not below {module}",
                place.display()
            );
        }
    }
}

#[test]
fn unsafe_code_is_in_sys_alone() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    for file in files {
        let inside = file.starts_with(src.join("sys"));
        let text = fs::read_to_string(&file).expect("read a source");
        assert!(inside || !text.contains("allow(unsafe_code)"), "{}", file.display());
    }
}
