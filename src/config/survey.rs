//! All that can be said of the configuration files: what is wrong, ignored or replaced, and what counts in the end.

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

/// Where a value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Neither file, or what it says can't be used.
    Default,
    /// The fallback configuration file.
    Fallback,
    /// The configuration file.
    Main,
}

/// What became of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// There is none.
    Absent,
    /// It was read, whatever is wrong with single values.
    Read,
    /// Nothing in it can be read.
    Broken,
}

/// Something worth saying.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    /// Error: the daemon doesn't start. Warn: hardly what was meant. Info: good to know.
    pub(crate) level: Level,
    /// Whose.
    pub(crate) file: PathBuf,
    /// Its path in the file; empty when it is about the whole file.
    pub(crate) key: String,
    /// What.
    pub(crate) text: String,
}

/// The configuration as it is and as it counts.
#[derive(Debug)]
pub(crate) struct Survey {
    /// The configuration file.
    pub(crate) main: State,
    /// The fallback configuration file.
    pub(crate) fallback: State,
    /// The most important first.
    pub(crate) findings: Vec<Finding>,
    /// Every key, the value that counts, and where that comes from.
    pub(crate) values: Vec<(String, Value, Origin)>,
}

/// Looks at both files as [`super::load`] does, but to the end. The daemon wouldn't start if there is an error
/// among the findings.
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
        // What may only follow from another error, or may be said in a file that can't be read, isn't told.
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

    // Whatever else the daemon may object to.
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

/// One file.
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

    /// Whether somebody could make the daemon do what they want.
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
            // It isn't even an object.
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
            // Somebody else's spelling may be anything.
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

/// What was found, and where values come from.
struct Findings<'a> {
    fallback: &'a Source<'a>,
    main: &'a Source<'a>,
    list: Vec<Finding>,
}

impl Findings<'_> {
    /// The last file that says something of `key`.
    fn origin(&self, key: &str) -> Origin {
        match (self.main.gives(key), self.fallback.gives(key)) {
            (true, _) => Origin::Main,
            (_, true) => Origin::Fallback,
            _ => Origin::Default,
        }
    }

    /// Of a key of ours, and the file that says it or, if none does, that should.
    fn push(&mut self, level: Level, key: &str, text: &str) {
        let file = if self.origin(key) == Origin::Fallback { self.fallback.path } else { self.main.path };
        let text = text.strip_prefix(key).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(text);
        let (file, key, text) = (file.to_owned(), key.to_owned(), text.to_owned());
        self.list.push(Finding { level, file, key, text });
    }
}

#[cfg(test)]
mod tests;
