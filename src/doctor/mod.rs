//! The command `doctor`: takes the steps of a connection with the daemon's own code, and reports which one fails.
//! `device` has the steps up to the token, `server` the rest; this file writes the report.

#[cfg(feature = "dbus")]
mod bus;
mod device;
mod server;

use std::io::IsTerminal;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::config::Auth;
use crate::encoding::from_base64url;
use crate::sys::{print, privilege, visible};

/// JSON is the default where standard output is no terminal. Returns whether all steps succeeded.
pub(crate) fn run(main: &Path, fallback: &Path, json: Option<bool>) -> bool {
    // Keep the token out of core files.
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
    server::reach(report, &credentials, config.auth == Auth::Dbus, !occupied)
}

/// A step failed, which the report says; later steps would fail, too.
struct Break;

/// Prints text step by step, JSON at the end.
struct Report {
    json: bool,
    steps: Vec<Value>,
    /// For the step that is reported next.
    warnings: Vec<String>,
    /// When the last step ended.
    since: Instant,
}

impl Report {
    fn warn(&mut self, text: impl Into<String>) {
        self.warnings.push(visible(&text.into()));
    }

    fn good(&mut self, step: &str, found: &str) {
        self.add(step, found, None);
    }

    fn bad(&mut self, step: &str, found: &str, advice: &str) -> Break {
        self.add(step, found, Some(advice));
        Break
    }

    fn add(&mut self, step: &str, found: &str, advice: Option<&str>) {
        let seconds = self.since.elapsed().as_secs_f64();
        let (found, warnings) = (visible(found), std::mem::take(&mut self.warnings));
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
            let took = if seconds < 0.001 { String::new() } else { format!(" ({:.0} ms)", seconds * 1e3) };
            let mut text = format!("{mark} {step}: {found}{took}\n");
            text.extend(warnings.iter().map(|warning| format!("  ! {warning}\n")));
            text.extend(advice.iter().flat_map(|advice| advice.lines()).map(|line| format!("  {line}\n")));
            print(&text);
        }
        self.since = Instant::now();
    }
}

/// `exp` in seconds since 1970; `None` if there is none, or the token is no JSON web token.
pub(crate) fn expiry(token: &str) -> Option<u64> {
    let mut parts = token.split('.');
    let (payload, 3) = (parts.clone().nth(1)?, parts.by_ref().count()) else { return None };
    let payload = from_base64url(payload)?;
    let exp = serde_json::from_slice::<Value>(&payload).ok()?.get("exp")?.as_f64()?;
    // The cast saturates; the number may have a fraction (RFC 7519, NumericDate).
    Some(exp as u64)
}

pub(crate) fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use data_encoding::BASE64URL_NOPAD;

    #[test]
    fn the_expiry_is_read_where_there_is_one() {
        let token = |payload: &str| format!("h.{}.s", BASE64URL_NOPAD.encode(payload.as_bytes()));
        assert_eq!(expiry(&token(r#"{"exp":1700000000,"sub":"x"}"#)), Some(1_700_000_000));
        assert_eq!(expiry(&token(r#"{"exp":1.7e9}"#)), Some(1_700_000_000));
        assert_eq!(expiry(&token(r#"{"exp":1e300}"#)), Some(u64::MAX));
        for none in
            ["", "header.payload.signature", "a.b", &token("{}"), &token(r#"{"exp":"soon"}"#), &token("7")]
        {
            assert_eq!(expiry(none), None, "{none}");
        }
        assert_eq!(expiry(&format!("{}.more", token(r#"{"exp":1}"#))), None);
    }

    #[test]
    fn spans_have_one_unit() {
        let spans = [119, 120, 7199, 7200, 172_800].map(span);
        assert_eq!(spans, ["119 s", "2 min", "119 min", "2 h", "2 days"]);
    }
}
