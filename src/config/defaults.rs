//! Defaults for values that are missing or can't be used. Pure.

use log::Level;

use super::Notes;
use super::file::{Sessions, Settings};

pub(super) const SHELL: &str = "/bin/sh";
pub(super) const AUTH_SOURCE: &str = "dbus";
const WIDTH: u16 = 80;
const HEIGHT: u16 = 40;
const IDLE_SECONDS: u32 = 600;
const RECONNECT_SECONDS: i64 = 5;
/// Replaces a umask that can't be read: only the owner gets access.
pub(super) const STRICT_UMASK: u32 = 0o077;

/// Fills in defaults. Idempotent.
pub(super) fn fill(settings: &mut Settings, notes: &mut Notes) {
    if settings.shell_command.is_empty() {
        notes.push((Level::Warn, format!("ShellCommand is empty, defaulting to {SHELL}")));
        settings.shell_command = SHELL.to_owned();
    }
    if settings.shell_arguments.is_none() {
        notes.push((Level::Warn, "ShellArguments is empty, defaulting to [--login]".to_owned()));
        settings.shell_arguments = Some(vec!["--login".to_owned()]);
    }
    let or = |value, default| if value == 0 { default } else { value };
    settings.terminal.width = or(settings.terminal.width, WIDTH);
    settings.terminal.height = or(settings.terminal.height, HEIGHT);
    settings.sessions.max_per_user = settings.sessions.max_per_user.max(1);
    fill_expiry(&mut settings.sessions, notes);
    settings.reconnect_interval_seconds = reconnect_interval(settings.reconnect_interval_seconds, notes);
    if settings.limits.enabled {
        fill_umask(&mut settings.limits.file_transfer.umask, notes);
    }
    if settings.auth.source.is_empty() {
        settings.auth.source = AUTH_SOURCE.to_owned();
    }
}

/// Leaves at most one of the two limits above zero.
fn fill_expiry(sessions: &mut Sessions, notes: &mut Notes) {
    if !sessions.stop_expired {
        (sessions.expire_after, sessions.expire_after_idle) = (0, 0);
        return;
    }
    match (sessions.expire_after_idle, sessions.expire_after) {
        (0, 0) => {
            notes.push((Level::Info, "Defaulting ExpireAfterIdle to 10m0s".to_owned()));
            sessions.expire_after_idle = IDLE_SECONDS;
        }
        (0, _) | (_, 0) => {}
        (_, _) => {
            let text = "ExpireAfter and ExpireAfterIdle are mutually exclusive, ignoring ExpireAfter";
            notes.push((Level::Warn, text.to_owned()));
            sessions.expire_after = 0;
        }
    }
}

fn reconnect_interval(seconds: i64, notes: &mut Notes) -> i64 {
    if seconds < 0 {
        let text = format!("ReconnectIntervalSeconds is negative, defaulting to {RECONNECT_SECONDS}s");
        notes.push((Level::Warn, text));
    }
    // Longer than anybody waits, and small enough that sums with it can't overflow.
    if seconds <= 0 { RECONNECT_SECONDS } else { seconds.min(u32::MAX.into()) }
}

/// A umask that can't be read isn't fatal: otherwise nobody could correct it over the remote terminal.
fn fill_umask(text: &mut String, notes: &mut Notes) {
    if text.is_empty() {
        return;
    }
    let bits = umask(text);
    if bits.is_none() {
        let text = format!(
            "Limits.FileTransfer.Umask {text:?} is not an octal number, using {STRICT_UMASK:03o} instead"
        );
        notes.push((Level::Error, text));
    }
    let counting = bits.unwrap_or(STRICT_UMASK) & 0o777;
    if bits != Some(counting) {
        *text = format!("{counting:03o}");
    }
}

/// Parses an octal umask.
pub(super) fn umask(text: &str) -> Option<u32> {
    u32::from_str_radix(text, 8).ok()
}
