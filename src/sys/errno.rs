//! Errors as Go words them, for clients and operators who compare with its texts.

use std::io;

use nix::errno::Errno;

/// Go's texts that differ from nix's.
const WORDS: [(Errno, &str); 9] = [
    (Errno::EAGAIN, "resource temporarily unavailable"),
    (Errno::EBADF, "bad file descriptor"),
    (Errno::EDQUOT, "disk quota exceeded"),
    (Errno::EIO, "input/output error"),
    (Errno::ELOOP, "too many levels of symbolic links"),
    (Errno::ENFILE, "too many open files in system"),
    (Errno::ENOMEM, "cannot allocate memory"),
    (Errno::EOPNOTSUPP, "operation not supported"),
    (Errno::EXDEV, "invalid cross-device link"),
];

/// Go's text for an error: lower case, without the number.
pub(crate) fn reason(error: &io::Error) -> String {
    let Some(errno) = error.raw_os_error().map(Errno::from_raw) else { return error.to_string() };
    let known = WORDS.iter().find(|(known, _)| *known == errno);
    let mut text = known.map_or(errno.desc(), |(_, words)| words).to_owned();
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_lowercase();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_in_gos_words() {
        let words = |errno: Errno| reason(&errno.into());
        assert_eq!(words(Errno::ENOENT), "no such file or directory");
        assert_eq!(words(Errno::EMFILE), "too many open files");
        assert_eq!(words(Errno::EAGAIN), "resource temporarily unavailable");
        assert_eq!(words(Errno::ENOMEM), "cannot allocate memory");
        assert_eq!(reason(&io::Error::other("no number")), "no number");
    }
}
