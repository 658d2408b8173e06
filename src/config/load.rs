//! Reads JSON as Go's encoding/json fills a struct: the files in the field were written for that.
//!
//! - Keys match in any case. Unknown keys are ignored, and reported to the caller; they may have numbers of any size
//!   and any depth.
//! - `null` leaves a value as it is, but empties an array or a map.
//! - The last of duplicate keys wins; objects merge field by field, arrays are replaced.
//! - An integer must be written without fraction and exponent, and fit.
//! - Each byte of invalid UTF-8 and each lone surrogate escape becomes U+FFFD.

use std::fmt;
use std::fs;
use std::io;
use std::iter;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::str::Utf8Chunk;

use log::{error, info, warn};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Error, Number, Value};

use super::keys::{Key, Kind, join};
use super::{ConfigError, Misfit};

/// Digits of a number shown in an error.
const MAX_NUMBER: usize = 40;

/// Replaces a malformed umask: an error would disable the terminal that is needed to correct it.
const STRICT_UMASK: u32 = 0o077;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Unset, or unusable.
    Default,
    Fallback,
    Main,
}

/// Indexed by key; types are those of [`Kind`].
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

    /// 0 if the number does not fit, which the kind of `key` must rule out.
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

    pub(crate) fn list(&self, key: Key) -> Option<Vec<String>> {
        let texts = self.get(key).as_array()?.iter().filter_map(Value::as_str);
        Some(texts.map(str::to_owned).collect())
    }

    pub(crate) fn filled(&self) -> Values {
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
                warn!("{} is empty, defaulting to {shown}", key.name());
            }
            set(key, default);
        }
        let stop = self.flag(Key::StopExpired);
        let [idle, age] = [Key::ExpireAfterIdle, Key::ExpireAfter].map(given);
        if stop && !idle && !age {
            info!("Defaulting ExpireAfterIdle to 10m0s");
        }
        if stop && idle && age {
            warn!("ExpireAfter and ExpireAfterIdle are mutually exclusive, ignoring ExpireAfter");
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
            warn!("ReconnectIntervalSeconds is negative, defaulting to {default}s");
            set(Key::ReconnectInterval, default);
        } else if seconds > u32::MAX.into() {
            // Small enough that sums with it cannot overflow.
            set(Key::ReconnectInterval, u32::MAX.into());
        }
        let (umask, used) = (self.text(Key::Umask), self.umask().unwrap_or(STRICT_UMASK) & 0o777);
        if self.flag(Key::Limits) && !umask.is_empty() && self.umask() != Some(used) {
            if self.umask().is_none() {
                error!("{} {umask:?} is not an octal number, using {used:03o} instead", Key::Umask.name());
            }
            set(Key::Umask, format!("{used:03o}").into());
        }
        filled
    }

    pub(super) fn umask(&self) -> Option<u32> {
        u32::from_str_radix(self.text(Key::Umask), 8).ok()
    }

    /// Applies the values that fit; `None` if there is no such file.
    pub(crate) fn read(&mut self, file: &Path, origin: Origin) -> Result<Option<Walk>, ConfigError> {
        match read_file(file) {
            Ok(text) => self.lay(&text, origin).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ConfigError::Open { file: file.to_owned(), error }),
        }
    }

    /// Applies the values that fit; [`Walk::misfits`] has the rest. Fails if `text` is not JSON.
    pub(super) fn lay(&mut self, text: &[u8], origin: Origin) -> Result<Walk, ConfigError> {
        let clean =
            |chunk: Utf8Chunk<'_>| chunk.valid().to_owned() + &"\u{fffd}".repeat(chunk.invalid().len());
        let mut clean: String = text.utf8_chunks().map(clean).collect();
        mend_surrogates(&mut clean);
        let mut walk = Walk::default();
        // Parse the whole text first: a later syntax error takes precedence, and its position is right.
        serde_json::from_str(&clean).and_then(|text| walk.object("", "", text)).map_err(|error| {
            // A `Value` names more faults, such as a trailing comma, but accepts less than Go does.
            let place = |error: &Error| (error.line(), error.column());
            let better = serde_json::from_str::<Value>(&clean).err();
            ConfigError::Syntax(better.filter(|other| place(other) == place(&error)).unwrap_or(error))
        })?;
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

/// Opening a FIFO would wait for a writer. The pipe of a shell's `<(…)` has a writer, and no name.
fn read_file(file: &Path) -> io::Result<Vec<u8>> {
    let kind = fs::metadata(file)?.file_type();
    if kind.is_file() || kind.is_fifo() && fs::canonicalize(file).is_err() {
        return fs::read(file);
    }
    Err(io::Error::other("it is no regular file"))
}

/// Replaces escapes of lone surrogates by that of U+FFFD.
fn mend_surrogates(text: &mut String) {
    let mut at = 0;
    while let Some(next) = text.get(at..).and_then(|rest| rest.find('\\')) {
        at += next;
        let escape = |at| {
            let digits = text.get(at..at + 6)?.strip_prefix("\\u")?;
            u16::from_str_radix(digits, 16).ok()
        };
        at += match (escape(at), escape(at + 6)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => 12,
            (Some(0xd800..=0xdfff), _) => {
                text.replace_range(at + 2..at + 6, "fffd");
                6
            }
            _ => 2,
        };
    }
}

/// Values in `main` win over `fallback`; either file may be missing.
pub(super) fn read_both(main: &Path, fallback: &Path) -> Result<Values, ConfigError> {
    let mut values = Values::default();
    let mut any = false;
    for (file, origin) in [(fallback, Origin::Fallback), (main, Origin::Main)] {
        let name = file.display();
        let walk = values.read(file, origin).and_then(|walk| walk.map(Walk::fit).transpose());
        let walk = walk.inspect_err(|e| error!("Error loading configuration from file: {name} ({e})"))?;
        let Some(walk) = walk else { continue };
        for path in &walk.unknown {
            warn!("{name}: ignoring unknown key {path}");
        }
        // As upstream's warnings name them; keys with their default value are left out.
        let used = |key: &Key| values.origin(*key) == origin && *values.get(*key) != key.kind().default();
        let mut names: Vec<_> = Key::all().filter(used).filter_map(Key::deprecated).collect();
        names.dedup();
        for name in names {
            warn!("{name} field is deprecated, ignoring.");
        }
        info!("Loaded configuration file: {name}");
        any = true;
    }
    if !any {
        info!("No configuration files present. Using defaults");
    }
    Ok(values)
}

/// The keys of one file, by whether the table knows them.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    /// As the file spells them, each once.
    pub(crate) unknown: Vec<String>,
    /// In the order of the file: the last value of a key counts.
    pub(crate) given: Vec<(Key, Value)>,
    pub(crate) misfits: Vec<Misfit>,
}

impl Walk {
    pub(super) fn fit(self) -> Result<Self, ConfigError> {
        match self.misfits.first() {
            Some(misfit) => Err(misfit.clone().into()),
            None => Ok(self),
        }
    }

    fn misfit(&mut self, key: Option<Key>, path: &str, expected: &str, found: &RawValue) {
        let found = match first(found) {
            b'{' => "an object",
            b'[' => "an array",
            b'"' => "a string",
            b't' | b'f' => "a boolean",
            _ => found.get(),
        };
        let text = format!("expected {expected}, found {found:.MAX_NUMBER$}");
        self.misfits.push(Misfit { key, path: path.to_owned(), text });
    }

    /// `section` as the table spells it, `path` as the file does.
    fn object(&mut self, section: &str, path: &str, text: &RawValue) -> Result<(), Error> {
        let members = match first(text) {
            b'{' => serde_json::Deserializer::from_str(text.get()).deserialize_map(Members)?,
            b'n' => Vec::new(),
            _ => {
                self.misfit(None, path, "an object", text);
                Vec::new()
            }
        };
        for (member, text) in members {
            let path = join(path, &member);
            // Go folds U+017F and U+212A into the letters s and k.
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

    /// `None` if the value does not fit, or is a `null` without effect.
    fn value(&mut self, key: Key, path: &str, text: &RawValue) -> Result<Option<Value>, Error> {
        // A number beyond f64 has no value, and fits nowhere.
        let parsed = || serde_json::from_str::<Value>(text.get()).unwrap_or_default();
        let element = |index| format!("{path}[{index}]");
        let (fits, expected) = match (key.kind(), first(text)) {
            (Kind::List(Some([_, ..])) | Kind::Map, b'n') => return Ok(Some(Value::Null)),
            (kind @ (Kind::List(_) | Kind::Objects), b'n') => return Ok(Some(kind.default())),
            (_, b'n') => return Ok(None),
            (Kind::List(_), b'[') => {
                let elements: Vec<&RawValue> = serde_json::from_str(text.get())?;
                let wrong =
                    elements.iter().enumerate().filter(|(_, text)| !matches!(first(text), b'"' | b'n'));
                wrong.for_each(|(index, other)| self.misfit(Some(key), &element(index), "a string", other));
                let texts = elements.iter().map(|text| serde_json::from_str::<String>(text.get()));
                return Ok(Some(texts.map(Result::unwrap_or_default).collect()));
            }
            (Kind::Map, b'{') => {
                let members = serde_json::Deserializer::from_str(text.get()).deserialize_map(Members)?;
                let wrong = members.iter().filter(|(_, text)| first(text) != b'"');
                wrong.for_each(|(name, other)| self.misfit(Some(key), &join(path, name), "a string", other));
                return Ok(Some(parsed()));
            }
            (Kind::Objects, b'[') => {
                // Check the elements; they have no effect.
                let given = self.given.len();
                let texts: Vec<&RawValue> = serde_json::from_str(text.get())?;
                let elements = Value::Array(vec![Value::Null; texts.len()]);
                for (index, text) in texts.into_iter().enumerate() {
                    self.object(key.name(), &element(index), text)?;
                }
                self.given.truncate(given);
                return Ok(Some(elements));
            }
            (Kind::Flag(_), byte) => (matches!(byte, b't' | b'f'), "a boolean"),
            (Kind::Number(range, _), _) => (
                parsed().as_number().and_then(Number::as_i128).is_some_and(|number| range.contains(&number)),
                &*format!("an integer from {} to {}", range.start(), range.end()),
            ),
            (Kind::Text(_), byte) => (byte == b'"', "a string"),
            (Kind::List(_) | Kind::Objects, _) => (false, "an array"),
            (Kind::Map, _) => (false, "an object"),
        };
        if !fits {
            self.misfit(Some(key), path, expected, text);
        }
        Ok(fits.then(parsed))
    }
}

/// Tells the type of a JSON value.
fn first(text: &RawValue) -> u8 {
    text.get().bytes().next().unwrap_or_default()
}

/// Members of an object in their order, with duplicates.
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
