//! Why a configuration is refused.

use std::io;
use std::path::PathBuf;

use super::keys::Key;

/// The texts are complete: no source is to be printed after them.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file exists but can't be read: a configuration file, or /etc/shells.
    #[error("open {}: {error}", file.display())]
    Open { file: PathBuf, error: io::Error },
    #[error("Error parsing mender configuration file: {0}")]
    Syntax(serde_json::Error),
    #[error(transparent)]
    Misfit(#[from] Misfit),
    /// The value has the right type, but can't be used.
    #[error("{1}")]
    Unusable(Key, String),
    #[error("ShellCommand {0} is not present in /etc/shells")]
    ShellNotListed(String),
}

impl ConfigError {
    /// The key at fault; `None` if a whole file is.
    pub(crate) fn key(&self) -> Option<Key> {
        match self {
            ConfigError::Syntax(_) => None,
            ConfigError::Misfit(misfit) => misfit.key,
            ConfigError::Unusable(key, _) => Some(*key),
            ConfigError::Open { .. } | ConfigError::ShellNotListed(_) => Some(Key::ShellCommand),
        }
    }
}

/// A value of the wrong type or out of range.
#[derive(Debug, Clone, thiserror::Error)]
#[error("Error parsing config file: {}: {text}", if path.is_empty() { "top level" } else { path })]
pub struct Misfit {
    /// `None` for a section or the whole file.
    pub(crate) key: Option<Key>,
    /// In the file's own spelling: `Terminal.width`, `Servers[0].ServerURL`; empty for the whole file.
    pub(crate) path: String,
    /// Names the expected and the found type or number.
    pub(crate) text: String,
}
