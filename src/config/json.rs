//! Reads JSON the way Go's encoding/json fills a struct, because the files in the field were written for that.
//! The parser makes an ordered tree of the text, which is then merged into existing values.
//!
//! - Keys match in any case. Unknown ones are ignored, and reported to the caller.
//! - `null` leaves a value as it is, but empties an array.
//! - Of duplicate keys the last wins; objects merge field by field, arrays are replaced.
//! - A number for an integer must be written without fraction and exponent, and fit.
//! - Invalid UTF-8 becomes U+FFFD, one for each byte.
//!
//! Two oddities aren't followed: a lone surrogate escape and a number beyond f64 are syntax errors here.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    #[error("Error parsing mender configuration file: {0}")]
    Syntax(serde_json::Error),
    /// Valid JSON, but a value of the wrong type or out of range.
    #[error("Error parsing config file: {key}: expected {expected}, found {found}")]
    Type {
        /// In the file's own spelling: `Terminal.Width`, `Servers[0].ServerURL`.
        key: String,
        expected: String,
        /// A number itself; of other values the type.
        found: String,
    },
}

/// Objects keep the order of their keys, and duplicates.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    /// A number without fraction and exponent that fits 64 bits.
    Integer(i128),
    Real(f64),
    String(String),
    Array(Vec<Value>),
    Object(Vec<(String, Value)>),
}

/// A type that a JSON value can be applied to.
pub(crate) trait Merge {
    /// Applies `value` to `self`. False if it doesn't fit; fields of an object answer for themselves.
    fn merge(&mut self, value: Value, walk: &mut Walk) -> bool;

    /// Appends `key` with the current value or, for an object, the keys below `key` with theirs.
    fn list(&self, key: &str, values: &mut Vec<(String, serde_json::Value)>);
}

pub(crate) trait Object {
    /// The field for a folded key, with its name.
    fn field(&mut self, key: &str) -> Option<(&'static str, &mut dyn Merge)>;

    fn fields(&self) -> Vec<(&'static str, &dyn Merge)>;
}

/// Implements [`Object`] for a struct: declares which key goes to which field.
macro_rules! keys {
    ($object:ty { $($key:literal => $field:ident),* $(,)? }) => {
        impl $crate::config::json::Object for $object {
            fn field(&mut self, key: &str) -> Option<(&'static str, &mut dyn $crate::config::json::Merge)> {
                $(if key.eq_ignore_ascii_case($key) {
                    return Some(($key, &mut self.$field));
                })*
                None
            }

            fn fields(&self) -> Vec<(&'static str, &dyn $crate::config::json::Merge)> {
                vec![$(($key, &self.$field)),*]
            }
        }
    };
}

pub(super) use keys;

/// Applies the JSON `text` to `target` as far as it fits; [`Walk::errors`] has the rest. Fails if it isn't JSON.
pub(crate) fn merge(text: &[u8], target: &mut dyn Merge) -> Result<Walk, JsonError> {
    let value = parse(text).map_err(JsonError::Syntax)?;
    let mut walk = Walk::default();
    target.merge(value, &mut walk);
    Ok(walk)
}

fn parse(text: &[u8]) -> Result<Value, serde_json::Error> {
    let mut clean = String::with_capacity(text.len());
    for chunk in text.utf8_chunks() {
        clean.push_str(chunk.valid());
        clean.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    serde_json::from_str(&clean)
}

/// Folds a key as Go does: ASCII, and the two other letters that fold into ASCII.
fn fold(key: &str) -> String {
    let letter = |c: char| match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        other => other.to_ascii_lowercase(),
    };
    key.chars().map(letter).collect()
}

/// The position of a merge in the document, and what it met.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    /// In the document's own spelling, array elements with their index.
    path: String,
    /// In our spelling, without indices.
    key: String,
    /// Paths without a field, each once.
    pub(crate) unknown: Vec<String>,
    /// Keys whose value was taken, as often as that happened.
    pub(crate) given: Vec<String>,
    /// Keys whose value doesn't fit.
    pub(crate) errors: Vec<(String, JsonError)>,
}

fn push(path: &mut String, name: &str) {
    if !path.is_empty() {
        path.push('.');
    }
    path.push_str(name);
}

impl Walk {
    /// Notes a value of the wrong type. Returns `false`, for [`Merge::merge`] to return.
    fn mismatch(&mut self, expected: impl Into<String>, found: &Value) -> bool {
        let found = match found {
            Value::Null => "null".to_owned(),
            Value::Bool(_) => "a boolean".to_owned(),
            Value::Integer(number) => number.to_string(),
            // Debug keeps the ".0" that shows why it isn't an integer.
            Value::Real(number) => format!("{number:?}"),
            Value::String(_) => "a string".to_owned(),
            Value::Array(_) => "an array".to_owned(),
            Value::Object(_) => "an object".to_owned(),
        };
        let key = if self.path.is_empty() { "top level".to_owned() } else { self.path.clone() };
        self.errors.push((self.key.clone(), JsonError::Type { key, expected: expected.into(), found }));
        false
    }

    fn member(&mut self, key: &str, value: Value, object: &mut impl Object) {
        let parents = (self.path.len(), self.key.len());
        push(&mut self.path, key);
        match object.field(&fold(key)) {
            Some((name, field)) => {
                push(&mut self.key, name);
                if field.merge(value, self) {
                    self.given.push(self.key.clone());
                }
            }
            None if self.unknown.contains(&self.path) => {}
            None => self.unknown.push(self.path.clone()),
        }
        self.path.truncate(parents.0);
        self.key.truncate(parents.1);
    }

    fn element<T: Merge + Default>(&mut self, index: usize, value: Value) -> T {
        let before = (self.path.len(), self.given.len());
        self.path.push_str(&format!("[{index}]"));
        let mut element = T::default();
        element.merge(value, self);
        self.path.truncate(before.0);
        self.given.truncate(before.1);
        element
    }
}

impl<T: Object> Merge for T {
    fn merge(&mut self, value: Value, walk: &mut Walk) -> bool {
        match value {
            Value::Null => {}
            Value::Object(members) => {
                members.into_iter().for_each(|(key, value)| walk.member(&key, value, self));
            }
            other => return walk.mismatch("an object", &other),
        }
        false
    }

    fn list(&self, key: &str, values: &mut Vec<(String, serde_json::Value)>) {
        for (name, field) in self.fields() {
            let mut key = key.to_owned();
            push(&mut key, name);
            field.list(&key, values);
        }
    }
}

impl Merge for bool {
    fn merge(&mut self, value: Value, walk: &mut Walk) -> bool {
        match value {
            Value::Null => return false,
            Value::Bool(value) => *self = value,
            other => return walk.mismatch("a boolean", &other),
        }
        true
    }

    fn list(&self, key: &str, values: &mut Vec<(String, serde_json::Value)>) {
        values.push((key.to_owned(), (*self).into()));
    }
}

impl Merge for String {
    fn merge(&mut self, value: Value, walk: &mut Walk) -> bool {
        match value {
            Value::Null => return false,
            Value::String(value) => *self = value,
            other => return walk.mismatch("a string", &other),
        }
        true
    }

    fn list(&self, key: &str, values: &mut Vec<(String, serde_json::Value)>) {
        values.push((key.to_owned(), self.as_str().into()));
    }
}

macro_rules! merge_integer {
    ($($integer:ty),*) => {$(
        impl Merge for $integer {
            fn merge(&mut self, value: Value, walk: &mut Walk) -> bool {
                let fits = match &value {
                    Value::Null => return false,
                    Value::Integer(number) => <$integer>::try_from(*number).ok(),
                    _ => None,
                };
                let Some(number) = fits else {
                    let range = format!("an integer from {} to {}", <$integer>::MIN, <$integer>::MAX);
                    return walk.mismatch(range, &value);
                };
                *self = number;
                true
            }

            fn list(&self, key: &str, values: &mut Vec<(String, serde_json::Value)>) {
                values.push((key.to_owned(), (*self).into()));
            }
        }
    )*};
}

merge_integer!(u16, u32, u64, i64);

impl<T: Merge + Default> Merge for Vec<T> {
    fn merge(&mut self, value: Value, walk: &mut Walk) -> bool {
        let errors = walk.errors.len();
        let list = match value {
            Value::Null => Vec::new(),
            Value::Array(values) => {
                let elements = values.into_iter().enumerate();
                elements.map(|(index, value)| walk.element(index, value)).collect()
            }
            other => return walk.mismatch("an array", &other),
        };
        let fits = walk.errors.len() == errors;
        if fits {
            *self = list;
        }
        fits
    }

    fn list(&self, key: &str, values: &mut Vec<(String, serde_json::Value)>) {
        let mut elements = Vec::new();
        self.iter().for_each(|element| element.list(key, &mut elements));
        values.push((key.to_owned(), elements.into_iter().map(|(_, value)| value).collect()));
    }
}

/// For an array that may be absent, which isn't the same as empty.
impl<T: Merge + Default> Merge for Option<Vec<T>> {
    fn merge(&mut self, value: Value, walk: &mut Walk) -> bool {
        let null = value == Value::Null;
        let mut list = Vec::new();
        let fits = list.merge(value, walk);
        if fits {
            *self = (!null).then_some(list);
        }
        fits
    }

    fn list(&self, key: &str, values: &mut Vec<(String, serde_json::Value)>) {
        match self {
            Some(list) => list.list(key, values),
            None => values.push((key.to_owned(), serde_json::Value::Null)),
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Real(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(Value::Object(members))
    }
}

#[cfg(test)]
mod tests;
