//! The configuration: two JSON files become one validated [`Config`]. Runs on the main thread, and keeps nothing.
//!
//! `json` knows Go's rules for JSON, `file` the keys, `defaults` what is filled in, `validate` what is refused;
//! `survey` tells all of it to people. JSON keys are given in parentheses.

use std::io;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::Level;

use self::file::Settings;
use crate::sys::users::{User, UserError};

pub(crate) use allow::AllowError;
pub use allow::Allowed;

pub(crate) use json::JsonError;
pub(crate) use survey::{Origin, State, knows_no_login, survey};
pub(crate) use url::without_password;

mod allow;
mod defaults;
mod file;
mod json;
mod survey;
mod url;
mod validate;

/// The daemon's settings, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub shell: Shell,
    pub terminal: Terminal,
    pub sessions: Sessions,
    /// Not `FileTransfer.Disable`.
    pub file_transfer: bool,
    /// Not `PortForward.Disable`.
    pub port_forward: bool,
    /// `PortForward.Allow`; `None`: any target.
    pub forward_targets: Option<Vec<Allowed>>,
    /// Not `MenderClient.Disable`.
    pub mender_client: bool,
    /// `Limits.FileTransfer`; `None` unless `Limits.Enabled`.
    pub limits: Option<FileLimits>,
    pub auth: Auth,
    /// The base of the back-off between connection attempts, above zero (`ReconnectIntervalSeconds`).
    pub reconnect_interval: Duration,
}

/// The source of token and server URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Auth {
    /// mender-auth on the system bus (`Auth.Source`: `dbus`).
    Dbus,
    /// `Auth.Source`: `file`.
    File {
        /// Absolute path (`Auth.TokenFile`).
        token: PathBuf,
        /// `Auth.ServerURL`.
        server_url: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shell {
    /// Absolute path of an executable that /etc/shells lists (`ShellCommand`).
    pub command: PathBuf,
    /// Without the program's name (`ShellArguments`).
    pub arguments: Vec<String>,
    /// The user that it runs as (`User`).
    pub user: User,
    /// Set-uid programs such as sudo don't work in the terminal (`Terminal.NoNewPrivileges`).
    pub no_new_privileges: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terminal {
    /// Not `Terminal.Disable`.
    pub enabled: bool,
    /// Columns if the client names no size, above zero (`Terminal.Width`).
    pub width: u16,
    /// Rows if the client names no size, above zero (`Terminal.Height`).
    pub height: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sessions {
    /// `Sessions.StopExpired`, `.ExpireAfter`, `.ExpireAfterIdle`.
    pub expiry: Expiry,
    /// Sessions per user at a time, above zero (`Sessions.MaxPerUser`).
    pub max_per_user: u32,
    /// Output counts as activity, too (`Sessions.IdleIncludesOutput`).
    pub idle_includes_output: bool,
}

/// When a session is ended. Durations are above zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    Never,
    /// Since the last activity.
    Idle(Duration),
    /// Since the session's start.
    Age(Duration),
}

/// Limits of file transfer. "Put" is towards the device, "get" from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileLimits {
    /// Directory that transfers are confined to, as written: it may contain links (`Chroot`).
    pub chroot: Option<PathBuf>,
    /// Paths may lead through symbolic links (`FollowSymLinks`).
    pub(crate) follow_symlinks: bool,
    /// A put may replace a file (`AllowOverwrite`).
    pub(crate) allow_overwrite: bool,
    /// User name of a put file's owner (`OwnerPut`).
    pub owner_put: Option<String>,
    /// Group name of a put file (`GroupPut`).
    pub group_put: Option<String>,
    /// User names whose files may be got; empty: any (`OwnerGet`).
    pub(crate) owner_get: Vec<String>,
    /// Group names whose files may be got; empty: any (`GroupGet`).
    pub(crate) group_get: Vec<String>,
    /// If set, a put file's permissions are 0o777 without these bits, whatever the client asked for; at most 0o777
    /// (`Umask`, octal).
    pub umask: Option<u32>,
    /// In bytes (`MaxFileSize`).
    pub(crate) max_file_size: Option<NonZeroU64>,
    /// Over all sessions (`Counters.MaxBytesTxPerMinute`).
    pub(crate) max_tx_bytes_per_minute: Option<NonZeroU64>,
    /// Over all sessions (`Counters.MaxBytesRxPerMinute`).
    pub(crate) max_rx_bytes_per_minute: Option<NonZeroU64>,
    /// A put file may be set-uid or set-gid (`AllowSuid`).
    pub(crate) allow_suid: bool,
    /// Only regular files may be got (`RegularFilesOnly`).
    pub(crate) regular_files_only: bool,
    /// A put file gets the mode that the client sent, or `umask`'s (`PreserveMode`).
    pub(crate) preserve_mode: bool,
    /// A put file gets the owner and group that the client sent (`PreserveOwner`).
    pub(crate) preserve_owner: bool,
}

/// The texts are complete: no source is to be printed after them.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file exists but can't be read: a configuration file, or /etc/shells.
    #[error("open {}: {error}", file.display())]
    Open { file: PathBuf, error: io::Error },
    /// A configuration file isn't JSON, or has a value of the wrong type.
    #[error(transparent)]
    Json(#[from] JsonError),
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
    #[error("Auth.{0} is needed where Auth.Source is \"file\"")]
    AuthMissing(&'static str),
    #[error("Auth.TokenFile ({0}) is not an absolute path")]
    TokenFileNotAbsolute(String),
    #[error(transparent)]
    User(#[from] UserError),
    #[error("ShellCommand {0} is not present in /etc/shells")]
    ShellNotListed(String),
}

impl ConfigError {
    /// The key at fault; empty if a whole file is.
    fn key(&self) -> String {
        let key = match self {
            ConfigError::Json(_) => "",
            ConfigError::Open { .. }
            | ConfigError::ShellNotAbsolute(_)
            | ConfigError::ShellNotExecutable(_)
            | ConfigError::ShellNotListed(_) => "ShellCommand",
            ConfigError::NoUser | ConfigError::User(_) => "User",
            ConfigError::Allow(_) => "PortForward.Allow",
            ConfigError::AuthSource(_) => "Auth.Source",
            ConfigError::AuthMissing(key) => return format!("Auth.{key}"),
            ConfigError::TokenFileNotAbsolute(_) => "Auth.TokenFile",
        };
        key.to_owned()
    }
}

/// Log lines, kept apart from the logger so that tests can look at them.
type Notes = Vec<(Level, String)>;

const SHELLS: &str = "/etc/shells";

/// Reads `fallback`, then `main` over it, fills in defaults and checks the result.
///
/// Either file may be missing. What was defaulted, ignored or wrong is logged.
pub fn load(main: &Path, fallback: &Path) -> Result<Config, ConfigError> {
    let mut notes = Notes::new();
    let config = load_with(main, fallback, Path::new(SHELLS), &mut notes);
    for (level, text) in notes {
        log::log!(level, "{text}");
    }
    config
}

fn load_with(main: &Path, fallback: &Path, shells: &Path, notes: &mut Notes) -> Result<Config, ConfigError> {
    let settings = file::read_both(main, fallback, notes)?;
    complete(settings, notes, |command, user, notes| validate::device(command, user, shells, notes))
}

/// Fills in defaults and checks; `device` checks what depends on the device.
fn complete(
    mut settings: Settings,
    notes: &mut Notes,
    device: impl FnOnce(&str, &str, &mut Notes) -> Result<User, ConfigError>,
) -> Result<Config, ConfigError> {
    defaults::fill(&mut settings, notes);
    let forward_targets = match &settings.port_forward.allow {
        Some(entries) => Some(entries.iter().map(|e| Allowed::parse(e)).collect::<Result<_, _>>()?),
        None => None,
    };
    let auth = auth(settings.auth)?;
    let user = device(&settings.shell_command, &settings.user, notes)?;
    Ok(Config {
        shell: Shell {
            command: settings.shell_command.into(),
            arguments: settings.shell_arguments.unwrap_or_default(),
            user,
            no_new_privileges: settings.terminal.no_new_privileges,
        },
        terminal: Terminal {
            enabled: !settings.terminal.disable,
            width: settings.terminal.width,
            height: settings.terminal.height,
        },
        sessions: Sessions {
            expiry: expiry(&settings.sessions),
            max_per_user: settings.sessions.max_per_user,
            idle_includes_output: settings.sessions.idle_includes_output,
        },
        file_transfer: !settings.file_transfer.disable,
        port_forward: !settings.port_forward.disable,
        forward_targets,
        mender_client: !settings.mender_client.disable,
        limits: settings.limits.enabled.then(|| limits(settings.limits.file_transfer)),
        auth,
        reconnect_interval: Duration::from_secs(settings.reconnect_interval_seconds.unsigned_abs()),
    })
}

fn auth(raw: file::Auth) -> Result<Auth, ConfigError> {
    match validate::auth(&raw).into_iter().next() {
        Some(error) => Err(error),
        None if raw.source == defaults::AUTH_SOURCE => Ok(Auth::Dbus),
        None => Ok(Auth::File { token: raw.token_file.into(), server_url: raw.server_url }),
    }
}

fn expiry(sessions: &file::Sessions) -> Expiry {
    let seconds = |seconds: u32| Duration::from_secs(seconds.into());
    match (sessions.expire_after_idle, sessions.expire_after) {
        (0, 0) => Expiry::Never,
        (0, age) => Expiry::Age(seconds(age)),
        (idle, _) => Expiry::Idle(seconds(idle)),
    }
}

fn limits(raw: file::FileTransferLimits) -> FileLimits {
    let given = |text: String| (!text.is_empty()).then_some(text);
    FileLimits {
        chroot: given(raw.chroot).map(PathBuf::from),
        follow_symlinks: raw.follow_sym_links,
        allow_overwrite: raw.allow_overwrite,
        owner_put: given(raw.owner_put),
        group_put: given(raw.group_put),
        owner_get: raw.owner_get,
        group_get: raw.group_get,
        umask: given(raw.umask).map(|text| defaults::umask(&text).unwrap_or(defaults::STRICT_UMASK)),
        max_file_size: NonZeroU64::new(raw.max_file_size),
        max_tx_bytes_per_minute: NonZeroU64::new(raw.counters.max_bytes_tx_per_minute),
        max_rx_bytes_per_minute: NonZeroU64::new(raw.counters.max_bytes_rx_per_minute),
        allow_suid: raw.allow_suid,
        regular_files_only: raw.regular_files_only,
        preserve_mode: raw.preserve_mode,
        preserve_owner: raw.preserve_owner,
    }
}

/// As [`load`], from texts instead of files, on a device where every shell exists and every user is `user`. For the
/// fuzz target.
#[cfg(fuzzing)]
pub fn of_texts(main: &[u8], fallback: &[u8], user: &User) -> Result<Config, ConfigError> {
    let (mut settings, mut notes) = (Settings::default(), Notes::new());
    for text in [fallback, main] {
        file::lay(text, &mut settings)?.finish(Path::new("text"), &mut notes)?;
    }
    complete(settings, &mut notes, |_, name, _| Ok(User { name: name.to_owned(), ..user.clone() }))
}

#[cfg(test)]
mod tests;
