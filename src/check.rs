//! The command `check`: what the daemon would make of its configuration, without running it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use log::Level;
use serde_json::Value;

use crate::config::{self, Origin, State};

/// Prints what the daemon would make of the files. True if it would start with them.
pub(crate) fn run(main: &Path, fallback: &Path) -> bool {
    let (report, good) = report(main, fallback);
    // A reader that closed its end of the pipe is no reason to fail.
    let _ = std::io::stdout().write_all(report.as_bytes());
    good
}

fn report(main: &Path, fallback: &Path) -> (String, bool) {
    let survey = config::survey(main, fallback);
    let mut text = String::new();
    let mut good = true;
    for finding in &survey.findings {
        let level = match finding.level {
            Level::Error => "error",
            Level::Warn => "warning",
            _ => "note",
        };
        good &= finding.level != Level::Error;
        let colon = if finding.key.is_empty() { "" } else { ": " };
        let _ = writeln!(text, "{level}: {}: {}{colon}{}", finding.file.display(), finding.key, finding.text);
    }
    if !survey.findings.is_empty() {
        text.push('\n');
    }
    for (name, file, state) in [("main", main, survey.main), ("fallback", fallback, survey.fallback)] {
        let state = match state {
            State::Absent => " (absent)",
            State::Read => "",
            State::Broken => " (can't be read: not counted in)",
        };
        let _ = writeln!(text, "{name:8}  {}{state}", file.display());
    }
    text.push('\n');
    let values: Vec<_> =
        survey.values.into_iter().map(|(key, value, origin)| (shown(&key, value), key, origin)).collect();
    let width = |lengths: &mut dyn Iterator<Item = usize>| lengths.max().unwrap_or_default();
    let keys = width(&mut values.iter().map(|(_, key, _)| key.len()));
    // Values longer than this may stick out of their column.
    let wide = width(&mut values.iter().map(|(value, ..)| value.chars().count()).filter(|n| *n <= 24));
    for (value, key, origin) in values {
        let origin = match origin {
            Origin::Default => "default",
            Origin::Fallback => "fallback",
            Origin::Main => "main",
        };
        let _ = writeln!(text, "{key:keys$}  {value:wide$}  {origin}");
    }
    (text, good)
}

/// A value as JSON, the server's URL without user and password.
fn shown(key: &str, value: Value) -> String {
    match value {
        Value::String(url) if key == "Auth.ServerURL" => {
            Value::from(config::without_password(&url)).to_string()
        }
        value => value.to_string(),
    }
}
