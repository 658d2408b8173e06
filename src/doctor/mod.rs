//! The command `doctor`: walks the way that a connection takes and says where it ends. Each step is made by the
//! daemon's own code, so that it can't find anything else than the daemon does.
//!
//! `device` has the steps up to the token, `server` those from there on; here they are written down.

mod device;
mod server;
mod token;

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::sys::privilege;

/// Tries step after step and prints what became of each, as JSON if `json` says so or, where it says nothing, if
/// standard output is no terminal. Whether all of them worked.
pub(crate) fn run(main: &Path, fallback: &Path, json: Option<bool>) -> bool {
    // The token isn't for core files.
    let _ = privilege::keep_to_oneself();
    let json = json.unwrap_or_else(|| !std::io::stdout().is_terminal());
    let mut report = Report { json, steps: Vec::new(), warnings: Vec::new(), since: Instant::now() };
    let ok = walk(&mut report, main, fallback).is_ok();
    if json {
        print(&format!("{:#}\n", json!({ "ok": ok, "steps": report.steps })));
    }
    ok
}

fn walk(report: &mut Report, main: &Path, fallback: &Path) -> Result<(), Break> {
    let occupied = device::daemon(report);
    let config = device::configuration(report, main, fallback)?;
    device::terminal(report, &config)?;
    let credentials = device::credentials(report, &config)?;
    server::reach(report, &credentials, !occupied)
}

/// The way has ended, which was told.
struct Break;

/// What was found, step by step. Text is printed at once, JSON at the end.
struct Report {
    json: bool,
    steps: Vec<Value>,
    /// Of the current step.
    warnings: Vec<String>,
    /// When the last step was made.
    since: Instant,
}

impl Report {
    /// Something that is no break, about the step that is told next.
    fn warn(&mut self, text: impl Into<String>) {
        self.warnings.push(clean(&text.into()));
    }

    /// A step was made.
    fn good(&mut self, step: &str, found: &str) {
        self.add(step, found, None);
    }

    /// A step can't be made.
    fn bad(&mut self, step: &str, found: &str, advice: &str) -> Break {
        self.add(step, found, Some(advice));
        Break
    }

    fn add(&mut self, step: &str, found: &str, advice: Option<&str>) {
        let seconds = self.since.elapsed().as_secs_f64();
        let (found, warnings) = (clean(found), std::mem::take(&mut self.warnings));
        let advice = advice.map(clean);
        if self.json {
            self.steps.push(json!({
                "step": step,
                "ok": advice.is_none(),
                "found": found,
                "advice": advice,
                "warnings": warnings,
                "seconds": (seconds * 1e4).round() / 1e4,
            }));
        } else {
            let mark = if advice.is_none() { '✓' } else { '✗' };
            let mut text = format!("{mark} {step}: {found}");
            // What takes time is worth knowing.
            if seconds >= 0.001 {
                text.push_str(&format!(" ({:.0} ms)", seconds * 1e3));
            }
            text.push('\n');
            for warning in warnings {
                text.push_str(&format!("  ! {warning}\n"));
            }
            for line in advice.iter().flat_map(|advice| advice.lines()) {
                text.push_str(&format!("  {line}\n"));
            }
            print(&text);
        }
        self.since = Instant::now();
    }
}

/// Whoever reads it may have gone away, which is no reason to fail.
fn print(text: &str) {
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

/// Without what could move a terminal's cursor or turn its text round: some words come from outside.
fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '\n' | '"' | '\'' | '\\') {
            clean.push(c);
        } else {
            clean.extend(c.escape_debug());
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_from_outside_moves_the_cursor() {
        assert_eq!(clean("a \"quoted\" é → ✓\n"), "a \"quoted\" é → ✓\n");
        assert_eq!(clean("\x1b[2J\r\u{9b}1m\u{202e}txt"), "\\u{1b}[2J\\r\\u{9b}1m\\u{202e}txt");
    }
}
