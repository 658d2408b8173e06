//! The token's expiry, which is all that is read of what is in it.

use data_encoding::BASE64URL_NOPAD;
use serde_json::Value;

/// The token's `exp`, in seconds since 1970; `None` if it has none or isn't a JSON web token.
pub(crate) fn expiry(token: &str) -> Option<u64> {
    let mut parts = token.split('.');
    let (payload, 3) = (parts.clone().nth(1)?, parts.by_ref().count()) else { return None };
    let payload = BASE64URL_NOPAD.decode(payload.trim_end_matches('=').as_bytes()).ok()?;
    let exp = serde_json::from_slice::<Value>(&payload).ok()?.get("exp")?.as_f64()?;
    // A cast doesn't overflow; the number may have a fraction (RFC 7519, NumericDate).
    Some(exp as u64)
}

/// A time span in everyday words.
pub(crate) fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expiry_is_read_where_there_is_one() {
        let token = |payload: &str| format!("h.{}.s", BASE64URL_NOPAD.encode(payload.as_bytes()));
        assert_eq!(expiry(&token(r#"{"exp":1700000000,"sub":"x"}"#)), Some(1_700_000_000));
        assert_eq!(expiry(&token(r#"{"exp":1.7e9}"#)), Some(1_700_000_000));
        assert_eq!(expiry(&token(r#"{"exp":1e300}"#)), Some(u64::MAX));
        for none in
            ["", "header.payload.signature", "a.b", &token("{}"), &token(r#"{"exp":"soon"}"#), &token("7")]
        {
            assert_eq!(expiry(none), None, "{none}");
        }
        assert_eq!(expiry(&format!("{}.more", token(r#"{"exp":1}"#))), None);
    }

    #[test]
    fn spans_have_one_unit() {
        let spans = [119, 120, 7199, 7200, 172_800].map(span);
        assert_eq!(spans, ["119 s", "2 min", "119 min", "2 h", "2 days"]);
    }
}
