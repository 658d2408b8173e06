//! "Did you mean …?" for unknown keys. Pure.

/// The key of the same name elsewhere, if there is just one; otherwise the most similar one.
pub(super) fn suggest<'a>(unknown: &str, known: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
    // Objects are keys, too.
    let objects = known.clone().flat_map(|key| key.match_indices('.').map(|(at, _)| &key[..at]));
    let keys: Vec<&str> = known.chain(objects).collect();
    let last = |key: &'a str| key.rsplit('.').next().unwrap_or(key);
    let name = unknown.rsplit('.').next().unwrap_or(unknown);
    let mut same = keys.iter().copied().filter(|key| last(key).eq_ignore_ascii_case(name));
    if let (Some(key), None) = (same.next(), same.next()) {
        return Some(key);
    }
    let most = if name.len() < 6 { 1 } else { 2 };
    let unknown = unknown.to_ascii_lowercase();
    let near = keys.into_iter().map(|key| (distance(&unknown, &key.to_ascii_lowercase()), key));
    near.filter(|(distance, _)| *distance <= most).min_by_key(|(distance, _)| *distance).map(|(_, key)| key)
}

/// Edit distance: letters changed, added, dropped, or swapped with their neighbour.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    // Bounds the work for a very long key, which resembles none of ours anyway.
    if a.len().abs_diff(b.len()) > 2 {
        return usize::MAX;
    }
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let changed = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = changed.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_near_or_elsewhere_is_suggested() {
        let known = ["User", "Terminal.Disable", "Terminal.Width", "Limits.FileTransfer.Chroot"];
        let known = known.into_iter().chain(["FileTransfer.Disable", "Sessions.ExpireAfter", "Auth.Source"]);
        for (unknown, meant) in [
            ("Chroot", Some("Limits.FileTransfer.Chroot")),
            ("FileTransfer.chroot", Some("Limits.FileTransfer.Chroot")),
            ("Terminal.User", Some("User")),
            ("Terminal.Wdith", Some("Terminal.Width")),
            ("Usr", Some("User")),
            ("Uesr", Some("User")),
            ("Terminl", Some("Terminal")),
            ("Limits.FileTransfr", Some("Limits.FileTransfer")),
            ("Sesions", Some("Sessions")),
            ("Sessions.ExpiresAftr", Some("Sessions.ExpireAfter")),
            ("Disable", None),
            ("Path", None),
            ("Usage", None),
            ("Frobnicate", None),
            ("", None),
        ] {
            assert_eq!(suggest(unknown, known.clone()), meant, "{unknown}");
        }
    }

    #[test]
    fn slips_of_the_pen_are_counted() {
        for (a, b, slips) in [("", "", 0), ("a", "a", 0), ("ab", "ba", 1), ("abc", "ab", 1), ("ab", "xy", 2)]
        {
            assert_eq!(distance(a, b), slips, "{a} {b}");
            assert_eq!(distance(b, a), slips, "{a} {b}");
        }
        assert_eq!(distance(&"x".repeat(100_000), "Width"), usize::MAX);
    }
}
