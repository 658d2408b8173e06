//! Settings that are valid but hardly meant: without effect, replaced, or unusable on this device.

use std::fs;
use std::path::Path;

use log::Level;
use nix::unistd::{Group, User};
use serde_json::Value;

use super::{Findings, Origin};
use crate::config::defaults;
use crate::config::file::{FileTransferLimits, Settings};

/// Looks at `settings`, where `raw` has the values as written and `filled` the effective ones.
pub(super) fn give(
    settings: &Settings,
    raw: &[(String, Value)],
    filled: &[(String, Value)],
    findings: &mut Findings,
) {
    let idle = idle(settings);
    for ((key, given), (_, counting)) in raw.iter().zip(filled) {
        if findings.origin(key) == Origin::Default {
            continue;
        }
        // Upstream takes these values for "not set".
        let empty = matches!(given, Value::Null) || *given == 0 || *given == "";
        let covers = |name: &&str| key == name || (name.ends_with('.') && key.starts_with(*name));
        match idle.iter().find(|rule| rule.holds && rule.keys.iter().any(covers)) {
            Some(rule) if !empty => {
                findings.push(rule.level, key, &format!("without effect, because {}", rule.why));
            }
            _ if given == counting => {}
            _ if empty => {
                findings.push(Level::Info, key, &format!("{given} stands for the default, {counting}"));
            }
            _ => {
                findings.push(Level::Warn, key, &format!("{given} can't be used, {counting} is used instead"))
            }
        }
    }
    let arguments = settings.shell_arguments.as_deref().unwrap_or_default();
    if !settings.terminal.disable && knows_no_login(Path::new(&settings.shell_command), arguments) {
        let text = format!(
            "{} is dash, which ends at once with --login: name another shell, or set ShellArguments to []",
            settings.shell_command
        );
        findings.push(Level::Warn, "ShellCommand", &text);
    }
    if settings.limits.enabled && !settings.file_transfer.disable {
        look_up(&settings.limits.file_transfer, findings);
    }
}

/// Keys that have no effect if `holds`; a dot at the end stands for all keys below.
struct Idle {
    holds: bool,
    keys: &'static [&'static str],
    why: &'static str,
    level: Level,
}

fn idle(settings: &Settings) -> [Idle; 11] {
    let rule = |holds, keys, why| Idle { holds, keys, why, level: Level::Info };
    // These suggest a misunderstanding: warn.
    let trap = |holds, keys, why| Idle { holds, keys, why, level: Level::Warn };
    let Settings { terminal, sessions, limits, auth, .. } = settings;
    let files = &limits.file_transfer;
    [
        rule(
            terminal.disable,
            &["ShellArguments", "Terminal.Width", "Terminal.Height", "Terminal.NoNewPrivileges", "Sessions."],
            "Terminal.Disable is true",
        ),
        rule(terminal.disable, &["ShellCommand"], "Terminal.Disable is true; it is checked nevertheless"),
        rule(
            !sessions.stop_expired,
            &["Sessions.ExpireAfter", "Sessions.ExpireAfterIdle", "Sessions.IdleIncludesOutput"],
            "Sessions.StopExpired is false",
        ),
        trap(sessions.expire_after_idle > 0, &["Sessions.ExpireAfter"], "Sessions.ExpireAfterIdle is set"),
        rule(
            sessions.expire_after_idle == 0,
            &["Sessions.IdleIncludesOutput"],
            "sessions expire by Sessions.ExpireAfter",
        ),
        rule(settings.port_forward.disable, &["PortForward.Allow"], "PortForward.Disable is true"),
        rule(settings.file_transfer.disable, &["Limits."], "FileTransfer.Disable is true"),
        trap(!limits.enabled, &["Limits.FileTransfer."], "Limits.Enabled is false"),
        // Set-uid is then the only part of the mode left to preserve.
        rule(
            !files.umask.is_empty() && !files.allow_suid,
            &["Limits.FileTransfer.PreserveMode"],
            "Limits.FileTransfer.Umask is set",
        ),
        rule(
            !files.owner_put.is_empty() && !files.group_put.is_empty(),
            &["Limits.FileTransfer.PreserveOwner"],
            "Limits.FileTransfer.OwnerPut and GroupPut are set",
        ),
        rule(
            auth.source == defaults::AUTH_SOURCE,
            &["Auth.TokenFile", "Auth.ServerURL"],
            "Auth.Source is \"dbus\"",
        ),
    ]
}

/// dash ends at once if started with --login.
pub(crate) fn knows_no_login(command: &Path, arguments: &[String]) -> bool {
    arguments.iter().any(|argument| argument == "--login")
        && fs::canonicalize(command).is_ok_and(|program| program.ends_with("dash"))
}

/// Checks the users and groups that file transfer looks up each time.
fn look_up(limits: &FileTransferLimits, findings: &mut Findings) {
    if !limits.chroot.is_empty() {
        let chroot = Path::new(&limits.chroot);
        let why = match fs::metadata(chroot) {
            _ if !chroot.is_absolute() => Some("is not an absolute path".to_owned()),
            Ok(metadata) if metadata.is_dir() => None,
            Ok(_) => Some("is not a directory".to_owned()),
            Err(error) => Some(format!("can't be used: {}", crate::sys::reason(&error))),
        };
        if let Some(why) = why {
            findings.push(Level::Warn, "Limits.FileTransfer.Chroot", &format!("{} {why}", limits.chroot));
        }
    }
    let given = |name: &&String| !name.is_empty();
    let users = [("OwnerPut", std::slice::from_ref(&limits.owner_put)), ("OwnerGet", &limits.owner_get)];
    for (key, names) in users {
        for name in names.iter().filter(given) {
            unknown(key, "user", name, User::from_name(name).map(|user| user.is_some()), findings);
        }
    }
    let groups = [("GroupPut", std::slice::from_ref(&limits.group_put)), ("GroupGet", &limits.group_get)];
    for (key, names) in groups {
        for name in names.iter().filter(given) {
            unknown(key, "group", name, Group::from_name(name).map(|group| group.is_some()), findings);
        }
    }
}

fn unknown(key: &str, what: &str, name: &str, found: nix::Result<bool>, findings: &mut Findings) {
    // The user database may only be unavailable for now.
    if found == Ok(false) {
        findings.push(
            Level::Warn,
            &format!("Limits.FileTransfer.{key}"),
            &format!("unknown {what} {name:?}"),
        );
    }
}
