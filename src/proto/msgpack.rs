//! Msgpack: a reader for the envelope, which accepts any width and order and copies nothing, and one for typed bodies.
//! Neither recurses without limit or allocates what a length only claims.

use rmp::Marker;
use serde::Deserialize;
use thiserror::Error;

/// Bodies are flat; deeper nesting is an attempt to exhaust the stack.
const MAX_DEPTH: usize = 16;
/// In bytes, for two paths and their names. Longer bodies are cut off: a list of small numbers takes eight times its
/// length.
const MAX_BODY: usize = 10 << 10;

/// Accepts integers of any width, texts as str or bin, unknown keys.
pub fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, rmp_serde::decode::Error> {
    let mut deserializer = rmp_serde::Deserializer::from_read_ref(body.get(..MAX_BODY).unwrap_or(body));
    deserializer.set_max_depth(MAX_DEPTH);
    T::deserialize(&mut deserializer)
}

#[derive(Debug, Error, PartialEq)]
pub enum DecodeError {
    #[error("the message is cut off")]
    Truncated,
    #[error("{0} is of the wrong type")]
    Type(&'static str),
    #[error("{0} is out of range")]
    Range(&'static str),
    #[error("the header is missing")]
    NoHeader,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Cursor<'a> {
    pub(crate) rest: &'a [u8],
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Value<'a> {
    Nil,
    Bool,
    Int(i128),
    Float(f64),
    /// str or bin.
    Blob(&'a [u8]),
    Map,
    /// Array or extension.
    Other,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: u64) -> Result<&'a [u8], DecodeError> {
        let n = usize::try_from(n).unwrap_or(usize::MAX);
        let (taken, rest) = self.rest.split_at_checked(n).ok_or(DecodeError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    /// Reads one value, and returns the number of values nested in it, which are still to be read.
    fn element(&mut self) -> Result<(Value<'a>, u64), DecodeError> {
        use Marker::*;
        let marker = Marker::from_u8(self.take(1)?[0]);
        let length = match marker {
            Reserved => return Err(DecodeError::Type("a value")),
            Null | True | False | FixPos(_) | FixNeg(_) => 0,
            U8 | I8 | FixExt1 => 1,
            U16 | I16 | FixExt2 => 2,
            U32 | I32 | F32 | FixExt4 => 4,
            U64 | I64 | F64 | FixExt8 => 8,
            FixExt16 => 16,
            FixStr(n) | FixArray(n) | FixMap(n) => n.into(),
            Str8 | Bin8 | Ext8 => number(self.take(1)?),
            Str16 | Bin16 | Ext16 | Array16 | Map16 => number(self.take(2)?),
            Str32 | Bin32 | Ext32 | Array32 | Map32 => number(self.take(4)?),
        };
        let value = match marker {
            FixArray(_) | Array16 | Array32 => return Ok((Value::Other, length)),
            FixMap(_) | Map16 | Map32 => return Ok((Value::Map, 2 * length)),
            Null => Value::Nil,
            True | False => Value::Bool,
            FixPos(n) => Value::Int(n.into()),
            FixNeg(n) => Value::Int(n.into()),
            U8 | U16 | U32 | U64 => Value::Int(number(self.take(length)?).into()),
            I8 | I16 | I32 | I64 => {
                let unused = 64 - 8 * length;
                Value::Int(((number(self.take(length)?) << unused) as i64 >> unused).into())
            }
            F32 => Value::Float(f32::from_bits(number(self.take(length)?) as u32).into()),
            F64 => Value::Float(f64::from_bits(number(self.take(length)?))),
            FixStr(_) | Str8 | Str16 | Str32 | Bin8 | Bin16 | Bin32 => Value::Blob(self.take(length)?),
            // An extension has a byte of type besides its data.
            _ => self.take(length + 1).map(|_| Value::Other)?,
        };
        Ok((value, 0))
    }

    /// Skips `count` values, however deep.
    pub(crate) fn skip(&mut self, mut count: u64) -> Result<(), DecodeError> {
        // Each value takes at least a byte, so the end of the message bounds the loop.
        while count > 0 {
            let (_, inner) = self.element()?;
            count = (count - 1).saturating_add(inner);
        }
        Ok(())
    }

    /// Skips `count` values, and returns their bytes.
    pub(crate) fn raw(&mut self, count: u64) -> Result<&'a [u8], DecodeError> {
        let start = self.rest;
        self.skip(count)?;
        Ok(&start[..start.len() - self.rest.len()])
    }

    /// The number of pairs; `None` for nil.
    pub(crate) fn map(&mut self, what: &'static str) -> Result<Option<u32>, DecodeError> {
        match self.element()? {
            (Value::Nil, _) => Ok(None),
            (Value::Map, inner) => Ok(Some((inner / 2) as u32)),
            _ => Err(DecodeError::Type(what)),
        }
    }

    /// Skips the contents of maps and arrays.
    pub(crate) fn value(&mut self) -> Result<Value<'a>, DecodeError> {
        let (value, inner) = self.element()?;
        self.skip(inner)?;
        Ok(value)
    }

    /// A str or bin; `None` for nil.
    pub(crate) fn blob(&mut self, what: &'static str) -> Result<Option<&'a [u8]>, DecodeError> {
        match self.value()? {
            Value::Nil => Ok(None),
            Value::Blob(bytes) => Ok(Some(bytes)),
            _ => Err(DecodeError::Type(what)),
        }
    }

    /// `None` for nil.
    pub(crate) fn int<T: TryFrom<i128>>(&mut self, what: &'static str) -> Result<Option<T>, DecodeError> {
        match self.value()? {
            Value::Nil => Ok(None),
            Value::Int(n) => T::try_from(n).map(Some).map_err(|_| DecodeError::Range(what)),
            _ => Err(DecodeError::Type(what)),
        }
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_of_every_width_are_numbers() {
        let forms: [(&[u8], i128); 11] = [
            (&[0x07], 7),
            (&[0xff], -1),
            (&[0xcc, 0xff], 255),
            (&[0xcd, 1, 0], 256),
            (&[0xce, 0, 0, 0, 1], 1),
            (&[0xcf, 255, 255, 255, 255, 255, 255, 255, 255], u64::MAX.into()),
            (&[0xd0, 0x80], -128),
            (&[0xd1, 255, 255], -1),
            (&[0xd2, 0, 0, 0, 9], 9),
            (&[0xd3, 0, 0, 0, 0, 0, 0, 0, 80], 80),
            (&[0xd3, 255, 255, 255, 255, 255, 255, 255, 255], -1),
        ];
        for (bytes, number) in forms {
            let mut cursor = Cursor { rest: bytes };
            assert_eq!(cursor.value(), Ok(Value::Int(number)));
            assert!(cursor.rest.is_empty());
        }
    }

    #[test]
    fn skipping_is_bounded_by_the_message() {
        // A hundred thousand arrays inside each other. Miri takes its time.
        let mut deep = vec![0x91; if cfg!(miri) { 1000 } else { 100_000 }];
        deep.push(0xc0);
        let mut cursor = Cursor { rest: &deep };
        assert_eq!(cursor.skip(1), Ok(()));
        assert!(cursor.rest.is_empty());
        for claim in
            [&[0xdd, 255, 255, 255, 255][..], &[0xdf, 255, 255, 255, 255], &[0xc6, 255, 255, 255, 255]]
        {
            assert_eq!(Cursor { rest: claim }.skip(1), Err(DecodeError::Truncated));
            assert!(Cursor { rest: claim }.value().is_err());
        }
        assert!(matches!(Cursor { rest: &[0xc1] }.skip(1), Err(DecodeError::Type(_))));
    }
}
