//! Keys, options, log lines and links of the pages against the program.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use mender_connect::internals as config;
use serde_json::Value;

use super::{PAGES, PRINTED, blocks, read, root};
use crate::harness::daemon::{executable, run};
use crate::harness::wait::skip;

const EXAMPLE: &str = "yocto/files/mender-connect.conf.example";
const CONF_5: &str = "docs/man/mender-connect.conf.5";
const MAIN_8: &str = "docs/man/mender-connect.8";

/// The example as the command that it names makes it.
fn example() -> String {
    read(EXAMPLE).lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// Each value of an object with its dotted key.
fn leaves(prefix: &str, value: &Value, found: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(members) => {
            for (key, value) in members {
                let dotted = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                leaves(&dotted, value, found);
            }
        }
        value => {
            found.insert(prefix.to_owned(), value.clone());
        }
    }
}

fn keys_of_example() -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    leaves("", &serde_json::from_str(&example()).expect("JSON"), &mut found);
    found
}

fn load(text: &str, fallback: &str) -> Result<config::Config, String> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).expect("write");
        path
    };
    config::load(&write("main", text), &write("fallback", fallback)).map_err(|e| e.to_string())
}

#[test]
fn the_example_has_every_key_at_its_default() {
    for enabled in ["false", "true"] {
        let example = example().replace(r#""Enabled": false"#, &format!(r#""Enabled": {enabled}"#));
        let minimal = format!(r#"{{ "User": "nobody", "Limits": {{ "Enabled": {enabled} }} }}"#);
        assert_eq!(load(&example, "{}").unwrap(), load(&minimal, "{}").unwrap());
    }
}

/// Whoever copies a part of a configuration gets what it says.
#[test]
fn examples_of_configurations_are_right() {
    let known = keys_of_example();
    let top = |key: &str| known.keys().any(|known| known.split('.').next() == Some(key));
    let mut loaded = 0;
    for page in PAGES {
        let blocks = blocks(page);
        for (i, block) in blocks.iter().enumerate().filter(|(_, block)| block.language == "json") {
            // What is wrong with it is said next.
            if blocks.get(i + 1).is_some_and(|next| next.language == PRINTED) {
                continue;
            }
            let text = block.lines.join("\n");
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{page}: {e}: {text}"));
            // Others are what a command prints.
            let mut members = value.as_object().into_iter().flatten();
            if members.all(|(key, _)| top(key)) {
                let config = load(&text, r#"{ "User": "root", "ShellCommand": "/bin/sh" }"#);
                config.unwrap_or_else(|e| panic!("{page}: {e}: {text}"));
                let mut dotted = BTreeMap::new();
                leaves("", &value, &mut dotted);
                assert!(dotted.keys().all(|key| known.contains_key(key)), "{page}: {text}");
                loaded += 1;
            }
        }
    }
    assert!(loaded > 4, "{loaded}");
}

#[test]
fn every_command_and_option_is_in_the_manual() {
    let manual = read(MAIN_8);
    let help = |args: &[&str]| String::from_utf8(run(args).stdout).expect("UTF-8");
    let all = help(&["help"]);
    let commands =
        all.split("COMMANDS:\n").nth(1).and_then(|rest| rest.split("\n\n").next()).expect("commands");
    let name = |line: &'_ str| line.split([' ', ',']).find(|word| !word.is_empty()).map(str::to_owned);
    let commands: Vec<String> = commands.lines().filter_map(name).collect();
    assert!(commands.len() > 5, "{commands:?}");
    for command in &commands {
        let items = [format!(".It Cm {command}"), format!(".It Cm {command} , Cm h")];
        assert!(manual.lines().any(|line| items.iter().any(|item| item == line)), "{command}");
        for option in options(&help(&["help", command])) {
            let described = manual.contains(&format!("\n.It Cm {command} Fl {option}"));
            assert!(described || ["h", "-help"].contains(&option.as_str()), "{command} -{option}");
        }
    }
    for option in options(&all) {
        let item = |line: &str| line.starts_with(".It Fl ") && flags(line).contains(&option);
        assert!(manual.lines().any(item), "-{option}");
    }
}

/// The options of a help text, without their first dash.
fn options(help: &str) -> BTreeSet<String> {
    let text = help.split("OPTIONS:\n").last().expect("options");
    let columns = text
        .lines()
        .filter(|line| line.starts_with("   -"))
        .filter_map(|line| line.trim().split("  ").next());
    let words = columns.flat_map(|column| column.split([' ', ',']).filter_map(|word| word.strip_prefix('-')));
    words.map(str::to_owned).collect()
}

/// The same of an item of the manual.
fn flags(item: &str) -> BTreeSet<String> {
    item.split("Fl ").skip(1).filter_map(|rest| rest.split([' ', ',']).next()).map(str::to_owned).collect()
}

/// How many of the text's letters, and of how many, are words that the executable has in this order. It has what is short
/// as numbers, and texts that are put together in pieces.
fn found(text: &str, program: &str) -> (usize, usize) {
    let mut words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
    let letters = |words: &[&str]| words.iter().map(|word| word.len()).sum::<usize>();
    let (mut found, all) = (0, letters(&words));
    while !words.is_empty() {
        let run = (1..=words.len()).rev().find(|&n| {
            let run = words[..n].join(" ");
            run.len() >= 8 && program.contains(&run)
        });
        let rest = words.split_off(run.unwrap_or(1));
        found += run.map_or(0, |_| letters(&words));
        words = rest;
    }
    (found, all)
}

/// The executable has each line that the pages quote of the log; an ellipsis stands for the parts that differ.
#[test]
fn quoted_log_lines_are_the_programs() {
    let program = fs::read(executable()).expect("read the executable");
    let program = String::from_utf8_lossy(&program);
    let mut quoted = 0;
    for page in PAGES {
        for line in
            blocks(page).into_iter().filter(|block| block.language == "log").flat_map(|block| block.lines)
        {
            let text = line.replace("\\\"", "\"");
            let pieces: Vec<_> = text.split('…').map(|piece| found(piece, &program)).collect();
            let sum = |part: fn(&(usize, usize)) -> usize| pieces.iter().map(part).sum::<usize>();
            assert!(sum(|(found, _)| *found) * 2 > sum(|(_, all)| *all), "{page}: {line}: {pieces:?}");
            quoted += 1;
        }
    }
    assert!(quoted > 30, "{quoted}");
}

/// All tests of behaviour, as their executable lists them.
pub fn tests() -> String {
    let mut list = Command::new(env!("CARGO"));
    list.args(["test", "--locked", "--quiet", "--test", "it", "--", "--list"]).current_dir(root());
    // Cargo's variables about this program's package would have ring's build script run again.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            list.env_remove(&name);
        }
    }
    let output = list.output().expect("run cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn tests_that_are_named_exist() {
    let tests = tests();
    let is_name = |name: &str| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    let mut named = 0;
    for page in PAGES.iter().chain(&["yocto/SECURITY.md"]) {
        let text = read(page);
        let codes = text.split('`').skip(1).step_by(2);
        for (module, test) in codes.filter_map(|code| code.split_once("::")) {
            if is_name(module) && is_name(test) {
                assert!(tests.contains(&format!("{module}::{test}: test\n")), "{page}: {module}::{test}");
                named += 1;
            }
        }
    }
    assert!(named > 20, "{named}");
}

/// As GitHub makes it of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim_start_matches('#').trim().to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).collect::<String>().replace(' ', "-")
}

#[test]
fn links_lead_somewhere() {
    let mut links = 0;
    for page in
        PAGES.iter().chain(&["CHANGELOG.md", "yocto/SECURITY.md"]).filter(|page| page.ends_with(".md"))
    {
        let text = read(page);
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if target.contains("://") {
                continue;
            }
            let (file, name) = target.split_once('#').unwrap_or((target, ""));
            let page_file = root().join(page);
            let file =
                if file.is_empty() { page_file } else { page_file.parent().expect("a folder").join(file) };
            assert!(file.exists(), "{page}: {target}");
            if !name.is_empty() {
                let text = fs::read_to_string(&file).expect("read");
                let mut headings = text.lines().filter(|line| line.starts_with('#'));
                assert!(headings.any(|heading| anchor(heading) == name), "{page}: {target}");
            }
            links += 1;
        }
    }
    assert!(links > 50, "{links}");
}

#[test]
fn manual_pages_are_clean() {
    for page in [MAIN_8, CONF_5] {
        let mut mandoc = Command::new("mandoc");
        let Ok(output) = mandoc.args(["-T", "lint", "-W", "warning"]).arg(root().join(page)).output() else {
            return skip("mandoc is missing: install the package 'mandoc'");
        };
        let found = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && found.is_empty(), "{found}");
        // The other formatter, where there is one.
        if let Ok(output) =
            Command::new("groff").args(["-mdoc", "-Tutf8", "-wall"]).arg(root().join(page)).output()
        {
            let found = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && found.is_empty(), "{found}");
        }
    }
}
