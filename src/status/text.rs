//! The daemon's state for people. Texts from clients are escaped.

use std::fmt::Write;

use serde_json::Value;

/// Forwards shown per session.
const MAX_FORWARDS: usize = 16;
/// Characters shown of a path or a target: its end.
const MAX_NAME: usize = 40;

/// Lines that each end with a line feed.
pub(crate) fn of(state: &Value) -> String {
    let mut text = format!(
        "mender-connect {}, pid {}, up {}\n",
        shown(&state["version"]),
        count(&state["pid"]),
        time(&state["uptime"])
    );
    // Writing to a String doesn't fail.
    let _ = connection(&mut text, &state["connection"], &state["token"]);
    let (shells, transferred) = (&state["shells"], &state["transferred"]);
    let _ = writeln!(
        text,
        "shells {} of {}, files {}",
        count(&shells["running"]),
        count(&shells["max"]),
        bytes(transferred)
    );
    for session in list(&state["sessions"]) {
        let _ = self::session(&mut text, session);
    }
    text
}

fn connection(text: &mut String, connection: &Value, token: &Value) -> std::fmt::Result {
    let word = |key: &str| shown(&connection[key]);
    write!(text, "{}", word("state"))?;
    if !connection["server"].is_null() {
        write!(text, " ({})", word("server"))?;
    }
    write!(text, " for {}", time(&connection["for"]))?;
    if !connection["next_attempt_in"].is_null() {
        write!(text, ", next attempt in {}", time(&connection["next_attempt_in"]))?;
    }
    let failed = count(&connection["failed_attempts"]);
    if failed > 0 {
        write!(text, ", {failed} failed")?;
    }
    if token["length"].is_null() {
        writeln!(text, "\nno token from {}", shown(&token["source"]))?;
    } else {
        writeln!(text, "\ntoken of {} bytes from {}", count(&token["length"]), shown(&token["source"]))?;
    }
    if !connection["last_error"].is_null() {
        writeln!(text, "last error {} ago: {}", time(&connection["last_error_age"]), word("last_error"))?;
    }
    Ok(())
}

fn session(text: &mut String, session: &Value) -> std::fmt::Result {
    writeln!(text, "\n{}  user {}", shown(&session["id"]), shown(&session["user"]))?;
    let kinds: Vec<_> = list(&session["kinds"]).iter().map(shown).collect();
    writeln!(text, "  {}{}{}", kinds.join(", "), if kinds.is_empty() { "" } else { ", " }, traffic(session))?;
    let shell = &session["shell"];
    if shell.is_object() {
        writeln!(text, "  shell {}, {}", count(&shell["pid"]), traffic(shell))?;
    }
    for transfer in list(&session["transfers"]) {
        write!(text, "  {} {}, ", shown(&transfer["direction"]), name(&transfer["path"]))?;
        let done = count(&transfer["bytes"]);
        match transfer["size"].as_u64() {
            Some(size @ 1..) => {
                let percent = (done as f64 * 100.0 / size as f64) as u64;
                write!(text, "{percent} % of {}", amount(size))?;
            }
            _ => write!(text, "{}", amount(done))?,
        }
        writeln!(text, ", {}", time(&transfer["age"]))?;
    }
    let forwards = list(&session["forwards"]);
    for forward in forwards.iter().take(MAX_FORWARDS) {
        write!(text, "  {} {}", shown(&forward["protocol"]), name(&forward["target"]))?;
        if forward["address"] != forward["target"] {
            let address = &forward["address"];
            let address = if address.is_null() { "connecting".to_owned() } else { shown(address) };
            write!(text, " ({address})")?;
        }
        writeln!(text, ", {}", traffic(forward))?;
    }
    let open = count(&session["forwards_open"]);
    let more = open.saturating_sub(forwards.len().min(MAX_FORWARDS) as u64);
    if more > 0 {
        writeln!(text, "  and {more} connections more")?;
    }
    Ok(())
}

fn traffic(thing: &Value) -> String {
    format!("{}, idle {}, {}", time(&thing["age"]), time(&thing["idle"]), bytes(thing))
}

fn bytes(thing: &Value) -> String {
    let of = |key: &str| amount(count(&thing[key]));
    format!("{} in, {} out", of("bytes_in"), of("bytes_out"))
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Escapes what a terminal would obey.
fn shown(text: &Value) -> String {
    text.as_str().unwrap_or_default().escape_debug().to_string()
}

/// As `shown`, shortened.
fn name(text: &Value) -> String {
    let text = shown(text);
    match text.char_indices().rev().nth(MAX_NAME) {
        Some((at, c)) => format!("…{}", &text[at + c.len_utf8()..]),
        None => text,
    }
}

fn amount(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut rest, mut unit) = (bytes, 0);
    while rest >= 1 << 20 {
        (rest, unit) = (rest >> 10, unit + 1);
    }
    let tenths = rest * 10 / 1024;
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// The two largest units of a time span in seconds.
fn time(seconds: &Value) -> String {
    let s = seconds.as_f64().unwrap_or(0.0) as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn amounts_and_times_are_short() {
        let amounts: Vec<_> = [0, 1023, 1024, 1536, 1 << 20, u64::MAX].map(amount).into();
        assert_eq!(amounts, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "15.9 EiB"]);
        let times = [0.9, 59.9, 61.0, 7260.0, 90_000.0].map(|s| time(&json!(s)));
        assert_eq!(times, ["0 s", "59 s", "1 min 1 s", "2 h 1 min", "1 d 1 h"]);
    }

    #[test]
    fn a_name_is_escaped_and_shortened_to_its_end() {
        assert_eq!(name(&json!("/a\u{1b}[2J\u{9b}\u{202e}")), "/a\\u{1b}[2J\\u{9b}\\u{202e}");
        let long = "ä".repeat(60) + "end";
        assert_eq!(name(&json!(long)), format!("…{}end", "ä".repeat(37)));
        assert_eq!(name(&json!("x".repeat(40))), "x".repeat(40));
    }

    #[test]
    fn whatever_comes_is_survived() {
        for odd in [json!(null), json!([1]), json!({ "sessions": [7, { "transfers": [{}] }] })] {
            assert!(of(&odd).ends_with('\n'));
        }
    }
}
