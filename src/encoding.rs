//! Hexadecimal and base64 (RFC 4648). A crate for any alphabet would make the executable 13 KB larger.

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn base64(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits =
            [0, 1, 2].iter().fold(0, |bits, at| bits << 8 | usize::from(*chunk.get(*at).unwrap_or(&0)));
        let digit =
            |at| if at <= chunk.len() { char::from(ALPHABET[bits >> (18 - 6 * at) & 63]) } else { '=' };
        text.extend((0..4).map(digit));
    }
    text
}

/// Padded or not.
pub(crate) fn from_base64url(text: &str) -> Option<Vec<u8>> {
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0, 0);
    for digit in text.trim_end_matches('=').bytes() {
        let value = match digit {
            b'-' => 62,
            b'_' => 63,
            _ => ALPHABET[..62].iter().position(|known| *known == digit)?,
        };
        bits = (bits << 6 | value) & 0xfff;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use data_encoding::{BASE64, BASE64URL, BASE64URL_NOPAD, HEXLOWER};

    #[test]
    fn all_lengths_and_digits() {
        let all: Vec<u8> = (0..=255).collect();
        for bytes in (0..=all.len()).map(|length| &all[all.len() - length..]) {
            assert_eq!(hex(bytes), HEXLOWER.encode(bytes));
            assert_eq!(base64(bytes), BASE64.encode(bytes));
            for text in [BASE64URL.encode(bytes), BASE64URL_NOPAD.encode(bytes)] {
                assert_eq!(from_base64url(&text).as_deref(), Some(bytes), "{text}");
            }
        }
        assert_eq!(from_base64url("a+b/"), None);
        assert_eq!(from_base64url("a b"), None);
    }
}
