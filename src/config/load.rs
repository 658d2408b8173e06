//! Reads JSON into values as Go's encoding/json fills a struct: the files in the field were written for that.
//!
//! - Keys match in any case. Unknown ones are ignored, and reported to the caller.
//! - `null` leaves a value as it is, but empties an array or a map.
//! - Of duplicate keys the last wins; objects merge field by field, arrays are replaced.
//! - A number for an integer must be written without fraction and exponent, and fit.
//! - Invalid UTF-8 becomes U+FFFD, one for each byte.
//!
//! Two oddities aren't followed: a lone surrogate escape and a number beyond f64 are syntax errors here.

use std::fmt;
use std::fs;
use std::io;
use std::iter;
use std::path::Path;
use std::str::Utf8Chunk;

use log::Level;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Error, Number, Value};

use super::error::{ConfigError, Misfit};
use super::keys::{Key, Kind, join};

/// Log lines, kept apart from the logger so that tests can look at them.
pub(crate) type Notes = Vec<(Level, String)>;

/// Replaces a umask that can't be read: an error would disable the terminal that is needed to correct it.
const STRICT_UMASK: u32 = 0o077;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Neither file has the key, or its value can't be used.
    Default,
    Fallback,
    Main,
}

/// The value of each key, with its origin. Types are those of [`Kind`].
#[derive(Debug, Clone)]
pub(crate) struct Values(Vec<(Value, Origin)>);

impl Default for Values {
    fn default() -> Self {
        Values(Key::all().map(|key| (key.kind().default(), Origin::Default)).collect())
    }
}

impl Values {
    pub(crate) fn get(&self, key: Key) -> &Value {
        &self.0[key as usize].0
    }

    pub(crate) fn origin(&self, key: Key) -> Origin {
        self.0[key as usize].1
    }

    pub(crate) fn flag(&self, key: Key) -> bool {
        *self.get(key) == true
    }

    /// 0 for a number that doesn't fit, which the kind of `key` must rule out.
    pub(crate) fn number<T: TryFrom<u64> + Default>(&self, key: Key) -> T {
        self.get(key).as_u64().and_then(|number| T::try_from(number).ok()).unwrap_or_default()
    }

    pub(crate) fn text(&self, key: Key) -> &str {
        self.get(key).as_str().unwrap_or_default()
    }

    pub(crate) fn map(&self, key: Key) -> Vec<(String, String)> {
        let texts = self.get(key).as_object().into_iter().flatten();
        texts.filter_map(|(name, text)| Some((name.clone(), text.as_str()?.to_owned()))).collect()
    }

    /// `None` for `null`.
    pub(crate) fn list(&self, key: Key) -> Option<Vec<String>> {
        let texts = self.get(key).as_array()?.iter().filter_map(Value::as_str);
        Some(texts.map(str::to_owned).collect())
    }

    /// With defaults for values that are missing or can't be used.
    pub(crate) fn filled(&self, notes: &mut Notes) -> Values {
        let mut filled = self.clone();
        let mut set = |key: Key, value: Value| {
            let origin = if value == *self.get(key) { self.origin(key) } else { Origin::Default };
            filled.0[key as usize] = (value, origin);
        };
        let given = |key: Key| self.origin(key) != Origin::Default && !key.is_unset(self.get(key));
        for key in Key::all().filter(|key| !given(*key)) {
            let default = key.kind().default();
            if matches!(key, Key::ShellCommand | Key::ShellArguments) {
                let shown = default.to_string().replace('"', "");
                notes.push((Level::Warn, format!("{} is empty, defaulting to {shown}", key.name())));
            }
            set(key, default);
        }
        let stop = self.flag(Key::StopExpired);
        let [idle, age] = [Key::ExpireAfterIdle, Key::ExpireAfter].map(given);
        if stop && !idle && !age {
            notes.push((Level::Info, "Defaulting ExpireAfterIdle to 10m0s".to_owned()));
        }
        if stop && idle && age {
            let text = "ExpireAfter and ExpireAfterIdle are mutually exclusive, ignoring ExpireAfter";
            notes.push((Level::Warn, text.to_owned()));
        }
        // At most one of the two limits stays above zero.
        if !stop || (age && !idle) {
            set(Key::ExpireAfterIdle, 0.into());
        }
        if !stop || idle {
            set(Key::ExpireAfter, 0.into());
        }
        let seconds = self.get(Key::ReconnectInterval).as_i64().unwrap_or_default();
        if seconds < 0 {
            let default = Key::ReconnectInterval.kind().default();
            let text = format!("ReconnectIntervalSeconds is negative, defaulting to {default}s");
            notes.push((Level::Warn, text));
            set(Key::ReconnectInterval, default);
        } else if seconds > u32::MAX.into() {
            // Longer than anybody waits, and small enough that sums with it can't overflow.
            set(Key::ReconnectInterval, u32::MAX.into());
        }
        let (umask, used) = (self.text(Key::Umask), self.umask().unwrap_or(STRICT_UMASK) & 0o777);
        if self.flag(Key::Limits) && !umask.is_empty() && self.umask() != Some(used) {
            if self.umask().is_none() {
                let text = format!("{umask:?} is not an octal number, using {used:03o} instead");
                notes.push((Level::Error, format!("{} {text}", Key::Umask.name())));
            }
            set(Key::Umask, format!("{used:03o}").into());
        }
        filled
    }

    pub(super) fn umask(&self) -> Option<u32> {
        u32::from_str_radix(self.text(Key::Umask), 8).ok()
    }

    /// Applies what fits in `file`; `None` if there is no such file.
    pub(crate) fn read(&mut self, file: &Path, origin: Origin) -> Result<Option<Walk>, ConfigError> {
        match fs::read(file) {
            Ok(text) => self.lay(&text, origin).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ConfigError::Open { file: file.to_owned(), error }),
        }
    }

    /// Applies what fits in the JSON `text`; [`Walk::misfits`] has the rest. Fails if it isn't JSON.
    pub(super) fn lay(&mut self, text: &[u8], origin: Origin) -> Result<Walk, ConfigError> {
        let clean =
            |chunk: Utf8Chunk<'_>| chunk.valid().to_owned() + &"\u{fffd}".repeat(chunk.invalid().len());
        let clean: String = text.utf8_chunks().map(clean).collect();
        let mut walk = Walk::default();
        // The whole text first: what is wrong later in it has precedence, and its place is right.
        serde_json::from_str::<Value>(&clean)
            .and_then(|_| walk.object("", "", serde_json::from_str(&clean)?))
            .map_err(ConfigError::Syntax)?;
        for (key, value) in &walk.given {
            let (mut value, old) = (value.clone(), &mut self.0[*key as usize]);
            if let (Some(old), Some(new)) = (old.0.as_object_mut(), value.as_object_mut()) {
                old.append(new);
                std::mem::swap(old, new);
            }
            *old = (value, origin);
        }
        Ok(walk)
    }
}

/// Reads both files, if they exist. Values in `main` win over `fallback`.
pub(super) fn read_both(main: &Path, fallback: &Path, notes: &mut Notes) -> Result<Values, ConfigError> {
    let mut values = Values::default();
    let mut note = |level, text: String| notes.push((level, text));
    let mut any = false;
    for (file, origin) in [(fallback, Origin::Fallback), (main, Origin::Main)] {
        let name = file.display();
        let walk = values.read(file, origin).and_then(|walk| walk.map(Walk::fit).transpose());
        let walk = walk.inspect_err(|error| {
            note(Level::Error, format!("Error loading configuration from file: {name} ({error})"));
        })?;
        let Some(walk) = walk else { continue };
        for path in &walk.unknown {
            note(Level::Warn, format!("{name}: ignoring unknown key {path}"));
        }
        for name in walk.deprecated() {
            note(Level::Warn, format!("{name} field is deprecated, ignoring."));
        }
        note(Level::Info, format!("Loaded configuration file: {name}"));
        any = true;
    }
    if !any {
        note(Level::Info, "No configuration files present. Using defaults".to_owned());
    }
    Ok(values)
}

/// The content of one file, sorted by whether the table knows it.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    /// Paths in the file's own spelling, each once.
    pub(crate) unknown: Vec<String>,
    /// In the file's order: the last value of a repeated key counts.
    pub(crate) given: Vec<(Key, Value)>,
    pub(crate) misfits: Vec<Misfit>,
}

impl Walk {
    /// The first misfit as an error.
    pub(super) fn fit(self) -> Result<Self, ConfigError> {
        match self.misfits.first() {
            Some(misfit) => Err(misfit.clone().into()),
            None => Ok(self),
        }
    }

    /// Deprecated keys that have a value, as upstream's warnings name them.
    fn deprecated(&self) -> Vec<&'static str> {
        let last = |key: &Key| self.given.iter().rfind(|(given, _)| given == key);
        let used = |key: &Key| last(key).is_some_and(|(_, value)| *value != key.kind().default());
        let mut names: Vec<_> = Key::all().filter(used).filter_map(Key::deprecated).collect();
        names.dedup();
        names
    }

    fn misfit(&mut self, key: Option<Key>, path: &str, expected: &str, found: &Value) {
        let found = match found {
            // Debug keeps the ".0" that shows why it isn't an integer.
            Value::Number(number) if number.is_f64() => format!("{:?}", number.as_f64().unwrap_or_default()),
            Value::Number(_) | Value::Null => found.to_string(),
            Value::Bool(_) => "a boolean".to_owned(),
            Value::String(_) => "a string".to_owned(),
            Value::Array(_) => "an array".to_owned(),
            Value::Object(_) => "an object".to_owned(),
        };
        let text = format!("expected {expected}, found {found}");
        self.misfits.push(Misfit { key, path: path.to_owned(), text });
    }

    /// `section` in our spelling, `path` in the file's.
    fn object(&mut self, section: &str, path: &str, text: &RawValue) -> Result<(), Error> {
        let members = match serde_json::from_str(text.get())? {
            Value::Object(_) => serde_json::Deserializer::from_str(text.get()).deserialize_map(Members)?,
            Value::Null => Vec::new(),
            other => {
                self.misfit(None, path, "an object", &other);
                Vec::new()
            }
        };
        for (member, text) in members {
            let path = join(path, &member);
            // Go folds two letters beyond ASCII into the keys'.
            match Key::find(section, &member.replace('\u{17f}', "s").replace('\u{212a}', "k")) {
                Some((_, Some(key))) => {
                    let misfits = self.misfits.len();
                    let value = self.value(key, &path, text)?;
                    if self.misfits.len() == misfits {
                        self.given.extend(value.map(|value| (key, value)));
                    }
                }
                Some((section, None)) => self.object(section, &path, text)?,
                None if self.unknown.contains(&path) => {}
                None => self.unknown.push(path),
            }
        }
        Ok(())
    }

    /// `None` if the value doesn't fit, or is a `null` that leaves it as it is.
    fn value(&mut self, key: Key, path: &str, text: &RawValue) -> Result<Option<Value>, Error> {
        let value: Value = serde_json::from_str(text.get())?;
        let element = |index| format!("{path}[{index}]");
        let (fits, expected) = match (key.kind(), &value) {
            (Kind::List(Some([_, ..])) | Kind::Map, Value::Null) => return Ok(Some(value)),
            (kind @ (Kind::List(_) | Kind::Objects), Value::Null) => return Ok(Some(kind.default())),
            (_, Value::Null) => return Ok(None),
            (Kind::List(_), Value::Array(elements)) => {
                let wrong =
                    elements.iter().enumerate().filter(|(_, text)| !text.is_string() && !text.is_null());
                wrong.for_each(|(index, other)| self.misfit(Some(key), &element(index), "a string", other));
                let texts = elements.iter().map(|text| text.as_str().unwrap_or_default());
                return Ok(Some(texts.collect()));
            }
            (Kind::Map, Value::Object(members)) => {
                let wrong = members.iter().filter(|(_, text)| !text.is_string());
                wrong.for_each(|(name, other)| self.misfit(Some(key), &join(path, name), "a string", other));
                return Ok(Some(value));
            }
            (Kind::Objects, Value::Array(_)) => {
                // The elements are checked, but have no effect.
                let given = self.given.len();
                let texts: Vec<&RawValue> = serde_json::from_str(text.get())?;
                for (index, text) in texts.into_iter().enumerate() {
                    self.object(key.name(), &element(index), text)?;
                }
                self.given.truncate(given);
                return Ok(Some(value));
            }
            (Kind::Flag(_), value) => (value.is_boolean(), "a boolean"),
            (Kind::Number(range, _), value) => (
                value.as_number().and_then(Number::as_i128).is_some_and(|number| range.contains(&number)),
                &*format!("an integer from {} to {}", range.start(), range.end()),
            ),
            (Kind::Text(_), value) => (value.is_string(), "a string"),
            (Kind::List(_) | Kind::Objects, _) => (false, "an array"),
            (Kind::Map, _) => (false, "an object"),
        };
        if !fits {
            self.misfit(Some(key), path, expected, &value);
        }
        Ok(fits.then_some(value))
    }
}

/// Reads an object's members in their order, with duplicates.
struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Vec<(String, &'de RawValue)>;

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        iter::from_fn(|| map.next_entry().transpose()).collect()
    }

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }
}

#[cfg(test)]
mod tests;
