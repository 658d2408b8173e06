//! Everything there is to report about the configuration files: errors, ignored keys, defaults, effective values.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use log::Level;
use serde_json::Value;

use super::file::{self, Settings};
use super::json::{Merge, Walk};
use super::{ConfigError, JsonError, Notes, SHELLS, complete, defaults, validate};

mod advice;
mod suggest;

pub(crate) use advice::knows_no_login;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Neither file has the key, or its value can't be used.
    Default,
    Fallback,
    Main,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Absent,
    /// Read, though single values may be wrong.
    Read,
    /// Unreadable as a whole.
    Broken,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    /// Error: the daemon doesn't start. Warn: probably not what was meant. Info: good to know.
    pub(crate) level: Level,
    /// The file it is about.
    pub(crate) file: PathBuf,
    /// Path in the file; empty if it is about the whole file.
    pub(crate) key: String,
    pub(crate) text: String,
}

/// The configuration as written and as it takes effect.
#[derive(Debug)]
pub(crate) struct Survey {
    pub(crate) main: State,
    pub(crate) fallback: State,
    /// The most important first.
    pub(crate) findings: Vec<Finding>,
    /// Every key, its effective value, and the origin of that.
    pub(crate) values: Vec<(String, Value, Origin)>,
}

/// Reads both files as [`super::load`] does, but doesn't stop at errors. The daemon wouldn't start if any finding is
/// an error.
pub(crate) fn survey(main: &Path, fallback: &Path) -> Survey {
    survey_with(main, fallback, Path::new(SHELLS))
}

fn survey_with(main: &Path, fallback: &Path, shells: &Path) -> Survey {
    let mut settings = Settings::default();
    let known = values(&settings);
    let fallback = Source::read(fallback, &mut settings, &known);
    let main = Source::read(main, &mut settings, &known);
    let raw = values(&settings);
    defaults::fill(&mut settings, &mut Notes::new());
    let filled = values(&settings);

    let mut findings = Findings { fallback: &fallback, main: &main, list: Vec::new() };
    for source in [&fallback, &main] {
        findings.list.extend_from_slice(&source.findings);
    }
    let broken = fallback.state == State::Broken || main.state == State::Broken;
    for error in validate::all(&settings, shells) {
        let key = error.key();
        // Findings that may only follow from another error, or that an unreadable file may settle, are left out.
        let known = !fallback.misfits(&key) && !main.misfits(&key);
        if known && (!broken || findings.origin(&key) != Origin::Default) {
            findings.push(Level::Error, &key, &error.to_string());
        }
    }
    if !broken {
        if settings.auth.source == defaults::AUTH_SOURCE && !cfg!(feature = "dbus") {
            let text = "built without D-Bus, a token can only come from a file: it must be \"file\"";
            findings.push(Level::Error, "Auth.Source", text);
        }
        advice::give(&settings, &raw, &filled, &mut findings);
    }
    let values = filled.into_iter().zip(&raw).map(|((key, value), (_, raw))| {
        let origin = if value == *raw { findings.origin(&key) } else { Origin::Default };
        (key, value, origin)
    });
    let values = values.collect();

    // Errors that only the daemon's own checks find.
    if !findings.list.iter().any(|finding| finding.level == Level::Error) {
        let device =
            |command: &str, user: &str, notes: &mut Notes| validate::device(command, user, shells, notes);
        if let Err(error) = complete(settings, &mut Notes::new(), device) {
            findings.push(Level::Error, &error.key(), &error.to_string());
        }
    }
    // Sorting would take more code.
    let mut sorted = Vec::new();
    for level in [Level::Error, Level::Warn, Level::Info] {
        sorted.extend(findings.list.iter().filter(|finding| finding.level == level).cloned());
    }
    Survey { main: main.state, fallback: fallback.state, findings: sorted, values }
}

fn values(settings: &Settings) -> Vec<(String, Value)> {
    let mut values = Vec::new();
    settings.list("", &mut values);
    values
}

struct Source<'a> {
    path: &'a Path,
    state: State,
    walk: Walk,
    findings: Vec<Finding>,
}

impl<'a> Source<'a> {
    fn read(path: &'a Path, settings: &mut Settings, known: &[(String, Value)]) -> Self {
        let mut source = Source { path, state: State::Read, walk: Walk::default(), findings: Vec::new() };
        match file::read(path, settings) {
            Ok(Some(laid)) => source.walk = laid.walk,
            Ok(None) => source.state = State::Absent,
            Err(error) => {
                source.state = State::Broken;
                let text = match error {
                    ConfigError::Open { error, .. } => crate::sys::reason(&error),
                    ConfigError::Json(JsonError::Syntax(error)) => error.to_string(),
                    other => other.to_string(),
                };
                source.push(Level::Error, "", text);
            }
        }
        source.note_access();
        let walk = std::mem::take(&mut source.walk);
        source.note_walk(&walk, known);
        source.walk = walk;
        source
    }

    fn push(&mut self, level: Level, key: &str, text: String) {
        self.findings.push(Finding { level, file: self.path.to_owned(), key: key.to_owned(), text });
    }

    /// Warns if others can write the configuration file, and so control the daemon.
    fn note_access(&mut self) {
        let Ok(metadata) = fs::metadata(self.path) else { return };
        if !metadata.is_file() {
            return;
        }
        if ![0, nix::unistd::geteuid().as_raw()].contains(&metadata.uid()) {
            self.push(Level::Warn, "", format!("may be written by its owner, user {}", metadata.uid()));
        }
        if metadata.mode() & 0o020 != 0 && metadata.gid() != 0 {
            self.push(Level::Warn, "", format!("may be written by its group, {}", metadata.gid()));
        }
        if metadata.mode() & 0o002 != 0 {
            self.push(Level::Warn, "", "may be written by everybody".to_owned());
        }
    }

    fn note_walk(&mut self, walk: &Walk, known: &[(String, Value)]) {
        for (known, error) in &walk.errors {
            let JsonError::Type { key, expected, found } = error else { continue };
            // The document is no object.
            let whole = known.is_empty();
            if whole {
                self.state = State::Broken;
            }
            self.push(
                Level::Error,
                if whole { "" } else { key },
                format!("expected {expected}, found {found}"),
            );
        }
        for key in &walk.unknown {
            let text = match suggest::suggest(key, known.iter().map(|(key, _)| key.as_str())) {
                Some(other) => format!("unknown and ignored; is {other} meant?"),
                None => "unknown and ignored".to_owned(),
            };
            // Unknown keys are untrusted text: escape them.
            self.push(Level::Warn, &key.escape_debug().to_string(), text);
        }
        for (index, key) in walk.given.iter().enumerate() {
            if walk.given[..index].contains(key) {
                continue;
            }
            if walk.given[index + 1..].contains(key) {
                self.push(Level::Warn, key, "given more than once, the last counts".to_owned());
            }
            if !known.iter().any(|(known, _)| known == key) {
                self.push(Level::Warn, key, "deprecated and ignored".to_owned());
            }
        }
    }

    fn gives(&self, key: &str) -> bool {
        self.walk.given.iter().any(|given| given == key)
    }

    fn misfits(&self, key: &str) -> bool {
        self.walk.errors.iter().any(|(known, _)| known == key)
    }
}

struct Findings<'a> {
    fallback: &'a Source<'a>,
    main: &'a Source<'a>,
    list: Vec<Finding>,
}

impl Findings<'_> {
    /// The last file that sets `key`.
    fn origin(&self, key: &str) -> Origin {
        match (self.main.gives(key), self.fallback.gives(key)) {
            (true, _) => Origin::Main,
            (_, true) => Origin::Fallback,
            _ => Origin::Default,
        }
    }

    /// Adds a finding about `key`, in the file that sets it or, if none does, the one that should.
    fn push(&mut self, level: Level, key: &str, text: &str) {
        let file = if self.origin(key) == Origin::Fallback { self.fallback.path } else { self.main.path };
        let text = text.strip_prefix(key).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(text);
        let (file, key, text) = (file.to_owned(), key.to_owned(), text.to_owned());
        self.list.push(Finding { level, file, key, text });
    }
}

#[cfg(test)]
mod tests;
