//! The configuration: two JSON files become one validated [`Config`]. Runs on the main thread, once at start.
//!
//! `json` knows Go's rules for JSON, `file` the keys; here are defaults and validation.
//! JSON keys are given in parentheses.

use std::fs;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::Level;

use self::file::Settings;
use crate::sys::users::{self, User, UserError};

pub use allow::{AllowError, Allowed};
pub use json::JsonError;

mod allow;
mod file;
mod json;

const DEFAULT_SHELL: &str = "/bin/sh";
const DEFAULT_WIDTH: u16 = 80;
const DEFAULT_HEIGHT: u16 = 40;
const DEFAULT_IDLE_SECONDS: u32 = 600;
const DEFAULT_RECONNECT: Duration = Duration::from_secs(5);
/// Takes the place of a umask that can't be read: it lets nobody but the owner in.
const STRICT_UMASK: u32 = 0o077;

/// The settings of the daemon, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What a terminal runs.
    pub shell: Shell,
    /// The remote terminal (`Terminal`).
    pub terminal: Terminal,
    /// Terminal sessions (`Sessions`).
    pub sessions: Sessions,
    /// Whether files may be transferred (not `FileTransfer.Disable`).
    pub file_transfer: bool,
    /// Whether ports may be forwarded (not `PortForward.Disable`).
    pub port_forward: bool,
    /// Which targets ports may be forwarded to; `None`: any (`PortForward.Allow`).
    pub forward_targets: Option<Vec<Allowed>>,
    /// Whether the server may talk to the Mender client (not `MenderClient.Disable`).
    pub mender_client: bool,
    /// Limits of file transfer (`Limits.FileTransfer`); `None` unless `Limits.Enabled`.
    pub limits: Option<FileLimits>,
    /// Where token and server URL come from (`Auth`).
    pub auth: Auth,
    /// The base of the back-off between connection attempts, above zero (`ReconnectIntervalSeconds`).
    pub reconnect_interval: Duration,
}

/// Where token and server URL come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Auth {
    /// From mender-auth on the system bus (`Auth.Source`: `dbus`).
    Dbus,
    /// From a file (`Auth.Source`: `file`).
    File {
        /// Absolute path of the file that has the token (`Auth.TokenFile`).
        token: PathBuf,
        /// The server's URL (`Auth.ServerURL`).
        server_url: String,
    },
}

/// What a terminal runs, and as whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shell {
    /// Absolute path of an executable that /etc/shells lists (`ShellCommand`).
    pub command: PathBuf,
    /// Its arguments, without the zeroth (`ShellArguments`).
    pub arguments: Vec<String>,
    /// Whom it runs as (`User`).
    pub user: User,
    /// Whether nothing in it can become more than the user is: sudo and the like don't work
    /// (`Terminal.NoNewPrivileges`).
    pub no_new_privileges: bool,
}

/// The remote terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terminal {
    /// Whether there is one (not `Terminal.Disable`).
    pub enabled: bool,
    /// Columns of a terminal whose client names no size, above zero (`Terminal.Width`).
    pub width: u16,
    /// Rows of a terminal whose client names no size, above zero (`Terminal.Height`).
    pub height: u16,
}

/// Terminal sessions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sessions {
    /// When a session is ended (`Sessions.StopExpired`, `.ExpireAfter`, `.ExpireAfterIdle`).
    pub expiry: Expiry,
    /// How many sessions a user may have at a time, above zero (`Sessions.MaxPerUser`).
    pub max_per_user: u32,
    /// Whether output is activity, too (`Sessions.IdleIncludesOutput`).
    pub idle_includes_output: bool,
}

/// When a session is ended. Durations are above zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// Only by its user.
    Never,
    /// This long after its last activity.
    Idle(Duration),
    /// This long after its start.
    Age(Duration),
}

/// Limits of file transfer. "Put" is towards the device, "get" from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileLimits {
    /// The directory that transfers are confined to, as written: it may hold links (`Chroot`).
    pub chroot: Option<PathBuf>,
    /// Whether paths may lead through symbolic links (`FollowSymLinks`).
    pub follow_symlinks: bool,
    /// Whether a put may replace a file (`AllowOverwrite`).
    pub allow_overwrite: bool,
    /// Name of the user who owns what is put (`OwnerPut`).
    pub owner_put: Option<String>,
    /// Name of the group that owns what is put (`GroupPut`).
    pub group_put: Option<String>,
    /// Names of the users whose files may be got; empty: anybody's (`OwnerGet`).
    pub owner_get: Vec<String>,
    /// Names of the groups whose files may be got; empty: any (`GroupGet`).
    pub group_get: Vec<String>,
    /// If set, a put file's permissions are 0o777 without these bits, whatever came with it; at most 0o777
    /// (`Umask`, octal).
    pub umask: Option<u32>,
    /// Most bytes that a file may have (`MaxFileSize`).
    pub max_file_size: Option<NonZeroU64>,
    /// Most bytes sent per minute, over all sessions (`Counters.MaxBytesTxPerMinute`).
    pub max_tx_bytes_per_minute: Option<NonZeroU64>,
    /// Most bytes received per minute, over all sessions (`Counters.MaxBytesRxPerMinute`).
    pub max_rx_bytes_per_minute: Option<NonZeroU64>,
    /// Whether a put file may be set-uid or set-gid (`AllowSuid`).
    pub allow_suid: bool,
    /// Whether only regular files may be got (`RegularFilesOnly`).
    pub regular_files_only: bool,
    /// Whether a put file gets the mode that came with it, or that of `umask` (`PreserveMode`).
    pub preserve_mode: bool,
    /// Whether a put file gets the owner and group that came with it (`PreserveOwner`).
    pub preserve_owner: bool,
}

/// Why there is no configuration. The texts are complete: there is no source to print after them.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file exists but can't be read: a configuration file, or /etc/shells.
    #[error("open {}: {error}", file.display())]
    Open {
        /// The file.
        file: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A configuration file isn't JSON, or has a value of the wrong type.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// `ShellCommand` doesn't start with a slash.
    #[error("given shell ({0}) is not an absolute path")]
    ShellNotAbsolute(String),
    /// `ShellCommand` doesn't exist, or nobody may execute it.
    #[error("given shell ({0}) is not executable")]
    ShellNotExecutable(String),
    /// `User` is missing or empty.
    #[error("please provide a user to run the shell as")]
    NoUser,
    /// `PortForward.Allow` has an entry that means nothing.
    #[error(transparent)]
    Allow(#[from] AllowError),
    /// `Auth.Source` is neither of the two.
    #[error("Auth.Source {0:?} is not known, only \"dbus\" and \"file\" are")]
    AuthSource(String),
    /// With `Auth.Source` `file`, another key is missing.
    #[error("Auth.{0} is needed where Auth.Source is \"file\"")]
    AuthMissing(&'static str),
    /// `Auth.TokenFile` doesn't start with a slash.
    #[error("Auth.TokenFile ({0}) is not an absolute path")]
    TokenFileNotAbsolute(String),
    /// `User` can't be found.
    #[error(transparent)]
    User(#[from] UserError),
    /// `ShellCommand` is no line of /etc/shells.
    #[error("ShellCommand {0} is not present in /etc/shells")]
    ShellNotListed(String),
}

/// Log lines, kept apart from the logger so that tests can look at them.
type Notes = Vec<(Level, String)>;

/// Reads `fallback`, then `main` over it, fills in defaults and checks the result.
///
/// Either file may be missing. What was defaulted, ignored or wrong is logged.
pub fn load(main: &Path, fallback: &Path) -> Result<Config, ConfigError> {
    let mut notes = Notes::new();
    let config = load_with(main, fallback, Path::new("/etc/shells"), &mut notes);
    for (level, text) in notes {
        log::log!(level, "{text}");
    }
    config
}

fn load_with(main: &Path, fallback: &Path, shells: &Path, notes: &mut Notes) -> Result<Config, ConfigError> {
    let settings = file::read_both(main, fallback, notes)?;
    complete(settings, notes, |command, user, notes| validate(command, user, shells, notes))
}

/// Fills in defaults and checks; `validate` is for what only the device can tell.
fn complete(
    mut settings: Settings,
    notes: &mut Notes,
    validate: impl FnOnce(&str, &str, &mut Notes) -> Result<User, ConfigError>,
) -> Result<Config, ConfigError> {
    if settings.shell_command.is_empty() {
        notes.push((Level::Warn, format!("ShellCommand is empty, defaulting to {DEFAULT_SHELL}")));
        settings.shell_command = DEFAULT_SHELL.to_owned();
    }
    let arguments = settings.shell_arguments.take().unwrap_or_else(|| {
        notes.push((Level::Warn, "ShellArguments is empty, defaulting to [--login]".to_owned()));
        vec!["--login".to_owned()]
    });
    let or = |value, default| if value == 0 { default } else { value };
    let terminal = Terminal {
        enabled: !settings.terminal.disable,
        width: or(settings.terminal.width, DEFAULT_WIDTH),
        height: or(settings.terminal.height, DEFAULT_HEIGHT),
    };
    let sessions = Sessions {
        expiry: expiry(&settings.sessions, notes),
        max_per_user: settings.sessions.max_per_user.max(1),
        idle_includes_output: settings.sessions.idle_includes_output,
    };
    let reconnect_interval = reconnect_interval(settings.reconnect_interval_seconds, notes);
    let limits = settings.limits.enabled.then(|| limits(settings.limits.file_transfer, notes));

    let forward_targets = match &settings.port_forward.allow {
        Some(entries) => Some(entries.iter().map(|e| Allowed::parse(e)).collect::<Result<_, _>>()?),
        None => None,
    };

    let auth = auth(settings.auth)?;

    let user = validate(&settings.shell_command, &settings.user, notes)?;
    Ok(Config {
        shell: Shell {
            command: settings.shell_command.into(),
            arguments,
            user,
            no_new_privileges: settings.terminal.no_new_privileges,
        },
        terminal,
        sessions,
        file_transfer: !settings.file_transfer.disable,
        port_forward: !settings.port_forward.disable,
        forward_targets,
        mender_client: !settings.mender_client.disable,
        limits,
        auth,
        reconnect_interval,
    })
}

fn auth(raw: file::Auth) -> Result<Auth, ConfigError> {
    match raw.source.as_str() {
        "" | "dbus" => return Ok(Auth::Dbus),
        "file" => {}
        _ => return Err(ConfigError::AuthSource(raw.source)),
    }
    for (key, value) in [("TokenFile", &raw.token_file), ("ServerURL", &raw.server_url)] {
        if value.is_empty() {
            return Err(ConfigError::AuthMissing(key));
        }
    }
    if !raw.token_file.starts_with('/') {
        return Err(ConfigError::TokenFileNotAbsolute(raw.token_file));
    }
    Ok(Auth::File { token: raw.token_file.into(), server_url: raw.server_url })
}

fn expiry(sessions: &file::Sessions, notes: &mut Notes) -> Expiry {
    if !sessions.stop_expired {
        return Expiry::Never;
    }
    let seconds = |seconds: u32| Duration::from_secs(seconds.into());
    match (sessions.expire_after_idle, sessions.expire_after) {
        (0, 0) => {
            notes.push((Level::Info, "Defaulting ExpireAfterIdle to 10m0s".to_owned()));
            Expiry::Idle(seconds(DEFAULT_IDLE_SECONDS))
        }
        (0, age) => Expiry::Age(seconds(age)),
        (idle, 0) => Expiry::Idle(seconds(idle)),
        (idle, _) => {
            let text = "ExpireAfter and ExpireAfterIdle are mutually exclusive, ignoring ExpireAfter";
            notes.push((Level::Warn, text.to_owned()));
            Expiry::Idle(seconds(idle))
        }
    }
}

fn reconnect_interval(seconds: i64, notes: &mut Notes) -> Duration {
    match u64::try_from(seconds) {
        Ok(0) => DEFAULT_RECONNECT,
        // Nobody waits longer than that, and sums with it can't overflow.
        Ok(seconds) => Duration::from_secs(seconds.min(u32::MAX.into())),
        Err(_) => {
            let text = format!("ReconnectIntervalSeconds is negative, defaulting to {DEFAULT_RECONNECT:?}");
            notes.push((Level::Warn, text));
            DEFAULT_RECONNECT
        }
    }
}

fn limits(raw: file::FileTransferLimits, notes: &mut Notes) -> FileLimits {
    let given = |text: String| (!text.is_empty()).then_some(text);
    FileLimits {
        chroot: given(raw.chroot).map(PathBuf::from),
        follow_symlinks: raw.follow_sym_links,
        allow_overwrite: raw.allow_overwrite,
        owner_put: given(raw.owner_put),
        group_put: given(raw.group_put),
        owner_get: raw.owner_get,
        group_get: raw.group_get,
        umask: given(raw.umask).map(|text| umask(&text, notes)),
        max_file_size: NonZeroU64::new(raw.max_file_size),
        max_tx_bytes_per_minute: NonZeroU64::new(raw.counters.max_bytes_tx_per_minute),
        max_rx_bytes_per_minute: NonZeroU64::new(raw.counters.max_bytes_rx_per_minute),
        allow_suid: raw.allow_suid,
        regular_files_only: raw.regular_files_only,
        preserve_mode: raw.preserve_mode,
        preserve_owner: raw.preserve_owner,
    }
}

/// A umask that can't be read isn't fatal: that would take the terminal away from whoever has to correct it.
fn umask(text: &str, notes: &mut Notes) -> u32 {
    match u32::from_str_radix(text, 8) {
        Ok(bits) => bits & 0o777,
        Err(_) => {
            let text = format!(
                "Limits.FileTransfer.Umask {text:?} is not an octal number, using {STRICT_UMASK:03o} instead"
            );
            notes.push((Level::Error, text));
            STRICT_UMASK
        }
    }
}

fn validate(command: &str, user: &str, shells: &Path, notes: &mut Notes) -> Result<User, ConfigError> {
    if !Path::new(command).is_absolute() {
        return Err(ConfigError::ShellNotAbsolute(command.to_owned()));
    }
    if !fs::metadata(command).is_ok_and(|metadata| metadata.permissions().mode() & 0o111 != 0) {
        return Err(ConfigError::ShellNotExecutable(command.to_owned()));
    }
    if user.is_empty() {
        return Err(ConfigError::NoUser);
    }
    let user = users::lookup(user)?;
    if !is_listed(command, shells)? {
        let error = ConfigError::ShellNotListed(command.to_owned());
        notes.push((Level::Error, error.to_string()));
        return Err(error);
    }
    Ok(user)
}

/// Whether `shells` has the line `command`. Small images have no /etc/shells: then only /bin/sh counts as listed.
fn is_listed(command: &str, shells: &Path) -> Result<bool, ConfigError> {
    match fs::read(shells) {
        Ok(text) => Ok(String::from_utf8_lossy(&text).lines().any(|line| line == command)),
        Err(_) if command == DEFAULT_SHELL => Ok(true),
        Err(error) => Err(ConfigError::Open { file: shells.to_owned(), error }),
    }
}

/// As [`load`], of files with these texts, on a device that has every shell and whose every user is `user`. For the
/// fuzz target.
#[cfg(fuzzing)]
pub fn of_texts(main: &[u8], fallback: &[u8], user: &User) -> Result<Config, ConfigError> {
    let (mut settings, mut notes) = (Settings::default(), Notes::new());
    for text in [fallback, main] {
        file::lay(Path::new("text"), text, &mut settings, &mut notes)?;
    }
    complete(settings, &mut notes, |_, name, _| Ok(User { name: name.to_owned(), ..user.clone() }))
}

#[cfg(test)]
mod tests;
