//! The command `check`: reports what the daemon would make of its configuration.

use std::fs;
use std::path::Path;

use log::Level;
use nix::unistd::{Group, User};
use serde_json::Value;
use strsim::osa_distance;

use crate::config::{self, ConfigError, Key, Misfit, Origin, Values, Walk};
use crate::link::{Endpoint, IN_CLEAR};
use crate::sys::{print, reason, visible, writers};

/// Returns whether the daemon would start with these files.
pub(crate) fn run(main: &Path, fallback: &Path) -> bool {
    let survey = Survey::new(main, fallback, Path::new(config::SHELLS));
    print(&survey.report());
    survey.is_good()
}

/// Suffix of a file's line in the report; empty if the file was read, even if some of its values are wrong.
type State = &'static str;
const ABSENT: State = " (absent)";
const BROKEN: State = " (can't be read: not counted in)";

/// Error: the daemon won't start. Warn: probably a mistake. The text begins with the path in the file, if it has one.
type Finding<'a> = (Level, &'a Path, String);
type Advice = (Level, Key, String);

#[derive(Debug)]
struct Survey<'a> {
    main: (&'a Path, State),
    fallback: (&'a Path, State),
    findings: Vec<Finding<'a>>,
    /// Effective values.
    values: Values,
}

impl<'a> Survey<'a> {
    /// Reads both files as the daemon does, but continues after errors.
    fn new(main: &'a Path, fallback: &'a Path, shells: &Path) -> Self {
        let (mut raw, mut findings) = (Values::default(), Vec::new());
        let (fallback_state, mut misfits) = read(fallback, Origin::Fallback, &mut raw, &mut findings);
        let (main_state, more_misfits) = read(main, Origin::Main, &mut raw, &mut findings);
        misfits.extend(more_misfits);
        let broken = [main_state, fallback_state].contains(&BROKEN);
        // Its log lines go nowhere: only the daemon has a logger.
        let values = raw.filled();

        let errors = config::validate(&values, config::user_of_shell(&values, shells)).err();
        let advice = errors.into_iter().flatten().map(|error| match error {
            ConfigError::Unusable(key, text) => (Level::Error, key, text),
            // The list of shells is at fault, or the shell isn't on it.
            other => (Level::Error, Key::ShellCommand, other.to_string()),
        });
        let mut advice: Vec<Advice> = advice.collect();
        advice.sort_by_key(|(_, key, _)| *key == Key::User);
        // Leave out findings that may only follow from another error, or that an unreadable file may settle.
        let settled = |key| !broken || raw.origin(key) != Origin::Default;
        advice.retain(|(_, key, _)| settled(*key) && !misfits.iter().any(|misfit| misfit.key == Some(*key)));
        if !broken {
            if values.text(Key::AuthSource) == "dbus" && !cfg!(feature = "dbus") {
                let text = "built without D-Bus, a token can only come from a file: it must be \"file\"";
                advice.push((Level::Error, Key::AuthSource, text.to_owned()));
            }
            let given = Key::current().filter(|key| raw.origin(*key) != Origin::Default);
            advice.extend(given.filter_map(|key| ineffective(key, &raw, &values)));
            advice.extend(unusable(&values));
        }
        findings.extend(advice.into_iter().map(|(level, key, text)| {
            // A key that neither file sets belongs in the main one.
            let file = if raw.origin(key) == Origin::Fallback { fallback } else { main };
            // Errors in the elements of a key begin with its name.
            let name = format!("{}: ", key.name());
            (level, file, if text.starts_with(&name) { text } else { name + &text })
        }));
        findings.sort_by_key(|(level, ..)| *level);
        Survey { main: (main, main_state), fallback: (fallback, fallback_state), findings, values }
    }

    fn is_good(&self) -> bool {
        !self.findings.iter().any(|(level, ..)| *level == Level::Error)
    }

    fn report(&self) -> String {
        let word = |level: Level| ["error", "warning", "note"][level as usize - 1];
        let findings = self.findings.iter();
        let lines =
            findings.map(|(level, file, text)| format!("{}: {}: {text}", word(*level), file.display()));
        let mut lines: Vec<_> = lines.collect();
        if !lines.is_empty() {
            lines.push(String::new());
        }
        for (name, (file, state)) in [("main", self.main), ("fallback", self.fallback)] {
            lines.push(format!("{name:8}  {}{state}", file.display()));
        }
        lines.push(String::new());
        let shown = |key| match key {
            Key::AuthServerUrl => config::without_password(self.values.text(key)).into(),
            key => self.values.get(key).clone(),
        };
        let rows: Vec<_> = Key::current().map(|key| (key, shown(key).to_string())).collect();
        let name_width = rows.iter().map(|(key, _)| key.name().len()).max().unwrap_or_default();
        // Longer values may stick out of their column.
        let widths = rows.iter().map(|(_, value)| value.chars().count()).filter(|width| *width <= 24);
        let width = widths.max().unwrap_or_default();
        for (key, value) in rows {
            let origin = ["default", "fallback", "main"][self.values.origin(key) as usize];
            lines.push(format!("{:name_width$}  {value:width$}  {origin}", key.name()));
        }
        lines.iter().map(|line| visible(line) + "\n").collect()
    }
}

fn read<'a>(
    file: &'a Path,
    origin: Origin,
    raw: &mut Values,
    findings: &mut Vec<Finding<'a>>,
) -> (State, Vec<Misfit>) {
    let mut push = |level, text| findings.push((level, file, text));
    let place = |path: &str| if path.is_empty() { String::new() } else { format!("{path}: ") };
    let (mut state, walk) = match raw.read(file, origin) {
        Ok(walk) => (if walk.is_some() { "" } else { ABSENT }, walk.unwrap_or_default()),
        Err(error) => {
            let text = match error {
                ConfigError::Open { error, .. } => reason(&error),
                ConfigError::Syntax(error) => error.to_string(),
                other => other.to_string(),
            };
            push(Level::Error, text);
            (BROKEN, Walk::default())
        }
    };
    // A user who can write the file controls the daemon.
    if file.is_file() || !file.exists() {
        writers(file).into_iter().for_each(|text| push(Level::Warn, text));
    }
    for Misfit { path, text, .. } in &walk.misfits {
        if path.is_empty() {
            state = BROKEN;
        }
        push(Level::Error, place(path) + text);
    }
    for path in &walk.unknown {
        let meant = suggest(path).map(|other| match other.eq_ignore_ascii_case(path) {
            true => "; a dot stands for nesting: {\"Terminal\": {\"Width\": 80}}".to_owned(),
            false => format!("; is {other} meant?"),
        });
        let meant = meant.unwrap_or_default();
        push(Level::Warn, format!("{}unknown and ignored{meant}", place(path)));
    }
    for (index, (key, _)) in walk.given.iter().enumerate() {
        let (before, after) = (&walk.given[..index], &walk.given[index + 1..]);
        let given = |part: &[(Key, Value)]| part.iter().any(|(other, _)| other == key);
        if !given(before) && given(after) {
            push(Level::Warn, format!("{}: given more than once, the last counts", key.name()));
        }
        if !given(before) && key.deprecated().is_some() {
            push(Level::Warn, format!("{}: deprecated and ignored", key.name()));
        }
    }
    (state, walk.misfits)
}

fn ineffective(key: Key, raw: &Values, values: &Values) -> Option<Advice> {
    let (given, used) = (raw.get(key), values.get(key));
    Some(match idle(key, values) {
        Some((level, why)) if !key.is_unset(given) => (level, key, format!("without effect, because {why}")),
        _ if given == used => return None,
        _ if key.is_unset(given) => (Level::Info, key, format!("{given} stands for the default, {used}")),
        _ => (Level::Warn, key, format!("{given} can't be used, {used} is used instead")),
    })
}

/// Why `key` has no effect. A warning suggests a misunderstanding.
fn idle(key: Key, values: &Values) -> Option<(Level, &'static str)> {
    let below = |section: &str| key.name().starts_with(section);
    let (on, given) = (|key| values.flag(key), |key: Key| !key.is_unset(values.get(key)));
    let (no_terminal, dbus) = (on(Key::DisableTerminal), values.text(Key::AuthSource) == "dbus");
    let why = match key {
        Key::ShellCommand if no_terminal => "Terminal.Disable is true; it is checked nevertheless",
        Key::DisableTerminal => return None,
        Key::ShellArguments if no_terminal => "Terminal.Disable is true",
        _ if no_terminal && (below("Terminal.") || below("Sessions.")) => "Terminal.Disable is true",
        Key::ExpireAfter | Key::ExpireAfterIdle | Key::IdleIncludesOutput if !on(Key::StopExpired) => {
            "Sessions.StopExpired is false"
        }
        Key::ExpireAfter if given(Key::ExpireAfterIdle) => {
            return Some((Level::Warn, "Sessions.ExpireAfterIdle is set"));
        }
        Key::IdleIncludesOutput if !given(Key::ExpireAfterIdle) => "sessions expire by Sessions.ExpireAfter",
        Key::KeepWhenUserLeaves if on(key) && *values.get(Key::KeepDetached) == 0 => {
            "Sessions.KeepDetached is 0"
        }
        Key::Allow | Key::ForwardIdle if on(Key::DisablePortForward) => "PortForward.Disable is true",
        _ if on(Key::DisableFileTransfer) && below("Limits.") => "FileTransfer.Disable is true",
        _ if !on(Key::Limits) && below("Limits.FileTransfer.") => {
            return Some((Level::Warn, "Limits.Enabled is false"));
        }
        // Set-uid is then the only bit of the mode left to preserve.
        Key::PreserveMode if given(Key::Umask) && !on(Key::AllowSuid) => "Limits.FileTransfer.Umask is set",
        Key::PreserveOwner if given(Key::OwnerPut) && given(Key::GroupPut) => {
            "Limits.FileTransfer.OwnerPut and GroupPut are set"
        }
        Key::TokenFile | Key::AuthServerUrl if dbus => "Auth.Source is \"dbus\"",
        _ => return None,
    };
    Some((Level::Info, why))
}

/// Reports settings that this device cannot honour, or that put it at risk.
fn unusable(values: &Values) -> Vec<Advice> {
    let mut advice = Vec::new();
    let mut warn = |key, text| advice.push((Level::Warn, key, text));
    let command = values.text(Key::ShellCommand);
    let arguments = values.list(Key::ShellArguments).unwrap_or_default();
    if !values.flag(Key::DisableTerminal) && config::knows_no_login(Path::new(command), &arguments) {
        let text =
            "is dash, which ends at once with --login: set ShellArguments to [\"-l\"], or name another shell";
        warn(Key::ShellCommand, format!("{command} {text}"));
    }
    if values.text(Key::AuthSource) == "file" {
        if Endpoint::parse(values.text(Key::AuthServerUrl)).is_ok_and(|server| server.sends_in_clear()) {
            warn(Key::AuthServerUrl, IN_CLEAR.to_owned());
        }
        let found = writers(Path::new(values.text(Key::TokenFile)));
        found.into_iter().for_each(|text| warn(Key::TokenFile, format!("the file {text}")));
    }
    if !values.flag(Key::Limits) || values.flag(Key::DisableFileTransfer) {
        return advice;
    }
    let chroot = values.text(Key::Chroot);
    let why = match fs::metadata(chroot) {
        _ if chroot.is_empty() => None,
        _ if !Path::new(chroot).is_absolute() => Some("is not an absolute path".to_owned()),
        Ok(metadata) if metadata.is_dir() => None,
        Ok(_) => Some("is not a directory".to_owned()),
        Err(error) => Some(format!("can't be used: {}", reason(&error))),
    };
    if let Some(why) = why {
        warn(Key::Chroot, format!("{chroot} {why}"));
    }
    for key in [Key::OwnerPut, Key::OwnerGet, Key::GroupPut, Key::GroupGet] {
        let names = values.list(key).unwrap_or_else(|| vec![values.text(key).to_owned()]);
        for name in names.iter().filter(|name| !name.is_empty()) {
            // Ignore errors: the user database may be unavailable only for now.
            let unknown = match key {
                Key::OwnerPut | Key::OwnerGet => matches!(User::from_name(name), Ok(None)).then_some("user"),
                _ => matches!(Group::from_name(name), Ok(None)).then_some("group"),
            };
            unknown.into_iter().for_each(|what| warn(key, format!("unknown {what} {name:?}")));
        }
    }
    advice
}

/// The key of the same name elsewhere if it is unique; otherwise the most similar one.
fn suggest(unknown: &str) -> Option<&'static str> {
    let last = unknown.rsplit('.').next()?;
    let keys = || Key::current().map(Key::name);
    let sections = keys().flat_map(|name| name.match_indices('.').map(|(at, _)| &name[..at]));
    let names: Vec<&str> = keys().chain(sections).collect();
    let is_same = |name: &&&str| name.rsplit('.').next().is_some_and(|part| part.eq_ignore_ascii_case(last));
    let mut same = names.iter().filter(is_same);
    if let (Some(name), None) = (same.next(), same.next()) {
        return Some(name);
    }
    let most = if last.len() < 6 { 1 } else { 2 };
    // Two letters have at most 8 bytes. Bounds the work for a very long key.
    let near = names.into_iter().filter(|name| unknown.len() <= name.len() + 8);
    let slips = |name: &str| osa_distance(&unknown.to_ascii_lowercase(), &name.to_ascii_lowercase());
    let near = near.map(|name| (slips(name), name)).filter(|(slips, _)| *slips <= most);
    near.min_by_key(|(slips, _)| *slips).map(|(_, name)| name)
}

#[cfg(test)]
mod tests;
