//! URLs as they may be shown.

/// Removes user and password; `url` may be any text.
pub(crate) fn without_password(url: &str) -> String {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find('/').map_or(url.len(), |at| start + at);
    match url[start..end].rfind('@') {
        Some(at) => format!("{}{}", &url[..start], &url[start + at + 1..]),
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_password_of_a_url_are_not_shown() {
        for (url, shown) in [
            ("https://a:b@host:1/p@th", "https://host:1/p@th"),
            ("a:b@host", "host"),
            ("https://a:b@c@host", "https://host"),
            ("http://localhost:5000", "http://localhost:5000"),
            ("", ""),
        ] {
            assert_eq!(without_password(url), shown);
        }
    }
}
