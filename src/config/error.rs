//! Why a configuration is refused.

use std::io;
use std::path::PathBuf;

use super::allow::AllowError;
use super::keys::Key;
use crate::sys::users::UserError;

/// The texts are complete: no source is to be printed after them.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file exists but can't be read: a configuration file, or /etc/shells.
    #[error("open {}: {error}", file.display())]
    Open { file: PathBuf, error: io::Error },
    #[error("Error parsing mender configuration file: {0}")]
    Syntax(serde_json::Error),
    /// Valid JSON, but a value of the wrong type or out of range.
    #[error(transparent)]
    Misfit(#[from] Misfit),
    #[error("given shell ({0}) is not an absolute path")]
    ShellNotAbsolute(String),
    /// `ShellCommand` doesn't exist, or nobody may execute it.
    #[error("given shell ({0}) is not executable")]
    ShellNotExecutable(String),
    #[error("please provide a user to run the shell as")]
    NoUser,
    #[error(transparent)]
    Allow(#[from] AllowError),
    #[error("Auth.Source {0:?} is not known, only \"dbus\" and \"file\" are")]
    AuthSource(String),
    /// A key that is required with `Auth.Source` `file`.
    #[error("{} is needed where Auth.Source is \"file\"", .0.name())]
    AuthMissing(Key),
    #[error("Auth.TokenFile ({0}) is not an absolute path")]
    TokenFileNotAbsolute(String),
    #[error(transparent)]
    User(#[from] UserError),
    #[error("ShellCommand {0} is not present in /etc/shells")]
    ShellNotListed(String),
}

impl ConfigError {
    /// The key at fault; `None` if a whole file is.
    pub(crate) fn key(&self) -> Option<Key> {
        Some(match self {
            ConfigError::Syntax(_) => return None,
            ConfigError::Misfit(misfit) => return misfit.key,
            ConfigError::Open { .. }
            | ConfigError::ShellNotAbsolute(_)
            | ConfigError::ShellNotExecutable(_)
            | ConfigError::ShellNotListed(_) => Key::ShellCommand,
            ConfigError::NoUser | ConfigError::User(_) => Key::User,
            ConfigError::Allow(_) => Key::Allow,
            ConfigError::AuthSource(_) => Key::AuthSource,
            ConfigError::AuthMissing(key) => *key,
            ConfigError::TokenFileNotAbsolute(_) => Key::TokenFile,
        })
    }
}

/// A value of the wrong type or out of range.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "Error parsing config file: {}: expected {expected}, found {found}",
    if path.is_empty() { "top level" } else { path }
)]
pub struct Misfit {
    /// `None` for a section or the whole file.
    pub(crate) key: Option<Key>,
    /// In the file's own spelling: `Terminal.width`, `Servers[0].ServerURL`; empty for the whole file.
    pub(crate) path: String,
    pub(crate) expected: String,
    /// A number itself; of other values the type.
    pub(crate) found: String,
}
