//! The configuration: two JSON files become one validated [`Config`]. Runs on the main thread, and keeps nothing.
//!
//! `keys` is the table of all keys, `load` reads files against it and fills in defaults; here is what is
//! refused.

use std::fs;
use std::num::NonZeroU64;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::Level;

use crate::sys::users::{self, User};

pub use allow::Allowed;
pub(crate) use error::ConfigError;
pub(crate) use keys::Key;
pub(crate) use load::{Notes, Origin, Values, Walk, is_unset};
pub(crate) use url::without_password;

mod allow;
mod error;
mod keys;
mod load;
mod url;

/// The daemon's settings, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub shell: Shell,
    pub terminal: Terminal,
    pub sessions: Sessions,
    pub file_transfer: bool,
    pub port_forward: bool,
    /// `None`: any target.
    pub forward_targets: Option<Vec<Allowed>>,
    pub mender_client: bool,
    /// `Limits.FileTransfer`; `None` unless `Limits.Enabled`.
    pub limits: Option<FileLimits>,
    pub auth: Auth,
    /// The base of the back-off between connection attempts, above zero.
    pub reconnect_interval: Duration,
}

/// The source of token and server URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Auth {
    /// mender-auth on the system bus.
    Dbus,
    File {
        /// Absolute path.
        token: PathBuf,
        server_url: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shell {
    /// Absolute path of an executable that /etc/shells lists.
    pub command: PathBuf,
    /// Without the program's name.
    pub arguments: Vec<String>,
    pub user: User,
    /// Set-uid programs such as sudo don't work in the terminal.
    pub no_new_privileges: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terminal {
    pub enabled: bool,
    /// Columns if the client names no size, above zero.
    pub width: u16,
    /// Rows if the client names no size, above zero.
    pub height: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sessions {
    pub expiry: Expiry,
    /// Above zero.
    pub max_per_user: u32,
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

/// The section `Limits.FileTransfer`. A client puts files on the device and gets files from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileLimits {
    /// As written: it may contain links.
    pub chroot: Option<PathBuf>,
    pub(crate) follow_symlinks: bool,
    pub(crate) allow_overwrite: bool,
    pub owner_put: Option<String>,
    pub group_put: Option<String>,
    /// Names; empty: any.
    pub(crate) owner_get: Vec<String>,
    /// Names; empty: any.
    pub(crate) group_get: Vec<String>,
    /// If set, a put file's permissions are 0o777 without these bits, whatever the client asked for; at most 0o777.
    pub umask: Option<u32>,
    /// In bytes.
    pub(crate) max_file_size: Option<NonZeroU64>,
    /// Over all sessions.
    pub(crate) max_tx_bytes_per_minute: Option<NonZeroU64>,
    /// Over all sessions.
    pub(crate) max_rx_bytes_per_minute: Option<NonZeroU64>,
    pub(crate) allow_suid: bool,
    pub(crate) regular_files_only: bool,
    /// The mode is the one that the client sent, or `umask`'s.
    pub(crate) preserve_mode: bool,
    /// Owner and group are those that the client sent.
    pub(crate) preserve_owner: bool,
}

pub(crate) const SHELLS: &str = "/etc/shells";

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
    let values = load::read_both(main, fallback, notes)?.filled(notes);
    let config = validate(&values, user_of_shell(&values, shells)).map_err(first);
    if let Err(error @ ConfigError::ShellNotListed(_)) = &config {
        notes.push((Level::Error, error.to_string()));
    }
    config
}

/// The error that the daemon stops at.
fn first(mut errors: Vec<ConfigError>) -> ConfigError {
    errors.swap_remove(0)
}

/// Returns all errors, in upstream's order, but for those that follow from others. `values` have their defaults.
pub(crate) fn validate(
    values: &Values,
    user: Result<User, Vec<ConfigError>>,
) -> Result<Config, Vec<ConfigError>> {
    let mut errors = Vec::new();
    let forward_targets = values.list(Key::Allow).map(|entries| {
        let parse = |entry: &String| Allowed::parse(entry).map_err(|error| errors.push(error.into())).ok();
        entries.iter().filter_map(parse).collect()
    });
    let auth = auth(values, &mut errors);
    let user = match user {
        Ok(user) if errors.is_empty() => user,
        user => {
            errors.extend(user.err().into_iter().flatten());
            return Err(errors);
        }
    };
    Ok(Config {
        shell: Shell {
            command: values.text(Key::ShellCommand).into(),
            arguments: values.list(Key::ShellArguments).unwrap_or_default(),
            user,
            no_new_privileges: values.flag(Key::NoNewPrivileges),
        },
        terminal: Terminal {
            enabled: !values.flag(Key::DisableTerminal),
            width: values.number(Key::Width),
            height: values.number(Key::Height),
        },
        sessions: Sessions {
            expiry: expiry(values),
            max_per_user: values.number(Key::MaxPerUser),
            idle_includes_output: values.flag(Key::IdleIncludesOutput),
        },
        file_transfer: !values.flag(Key::DisableFileTransfer),
        port_forward: !values.flag(Key::DisablePortForward),
        forward_targets,
        mender_client: !values.flag(Key::DisableMenderClient),
        limits: values.flag(Key::Limits).then(|| limits(values)),
        auth,
        reconnect_interval: Duration::from_secs(values.number(Key::ReconnectInterval)),
    })
}

fn auth(values: &Values, errors: &mut Vec<ConfigError>) -> Auth {
    let token = values.text(Key::TokenFile);
    match values.text(Key::AuthSource) {
        "dbus" => return Auth::Dbus,
        "file" => {
            let missing =
                [Key::TokenFile, Key::AuthServerUrl].into_iter().filter(|key| values.text(*key).is_empty());
            errors.extend(missing.map(ConfigError::AuthMissing));
            if !token.is_empty() && !token.starts_with('/') {
                errors.push(ConfigError::TokenFileNotAbsolute(token.to_owned()));
            }
        }
        other => errors.push(ConfigError::AuthSource(other.to_owned())),
    }
    Auth::File { token: token.into(), server_url: values.text(Key::AuthServerUrl).to_owned() }
}

fn expiry(values: &Values) -> Expiry {
    let seconds = |key| Duration::from_secs(values.number(key));
    match (seconds(Key::ExpireAfterIdle), seconds(Key::ExpireAfter)) {
        (Duration::ZERO, Duration::ZERO) => Expiry::Never,
        (Duration::ZERO, age) => Expiry::Age(age),
        (idle, _) => Expiry::Idle(idle),
    }
}

fn limits(values: &Values) -> FileLimits {
    let given = |key| Some(values.text(key)).filter(|text| !text.is_empty()).map(str::to_owned);
    let above_zero = |key| NonZeroU64::new(values.number(key));
    FileLimits {
        chroot: given(Key::Chroot).map(PathBuf::from),
        follow_symlinks: values.flag(Key::FollowSymLinks),
        allow_overwrite: values.flag(Key::AllowOverwrite),
        owner_put: given(Key::OwnerPut),
        group_put: given(Key::GroupPut),
        owner_get: values.list(Key::OwnerGet).unwrap_or_default(),
        group_get: values.list(Key::GroupGet).unwrap_or_default(),
        umask: values.umask(),
        max_file_size: above_zero(Key::MaxFileSize),
        max_tx_bytes_per_minute: above_zero(Key::MaxBytesTxPerMinute),
        max_rx_bytes_per_minute: above_zero(Key::MaxBytesRxPerMinute),
        allow_suid: values.flag(Key::AllowSuid),
        regular_files_only: values.flag(Key::RegularFilesOnly),
        preserve_mode: values.flag(Key::PreserveMode),
        preserve_owner: values.flag(Key::PreserveOwner),
    }
}

/// Checks the shell and its user on this device. Returns the errors in upstream's order.
pub(crate) fn user_of_shell(values: &Values, shells: &Path) -> Result<User, Vec<ConfigError>> {
    let command = values.text(Key::ShellCommand);
    let executable = executable(command);
    let listed = if executable.is_ok() { listed(command, shells) } else { Ok(()) };
    match (executable, user(values.text(Key::User)), listed) {
        (Ok(()), Ok(user), Ok(())) => Ok(user),
        (executable, user, listed) => {
            Err([executable.err(), user.err(), listed.err()].into_iter().flatten().collect())
        }
    }
}

fn executable(command: &str) -> Result<(), ConfigError> {
    if !Path::new(command).is_absolute() {
        return Err(ConfigError::ShellNotAbsolute(command.to_owned()));
    }
    if !fs::metadata(command).is_ok_and(|metadata| metadata.permissions().mode() & 0o111 != 0) {
        return Err(ConfigError::ShellNotExecutable(command.to_owned()));
    }
    Ok(())
}

fn user(name: &str) -> Result<User, ConfigError> {
    if name.is_empty() { Err(ConfigError::NoUser) } else { Ok(users::lookup(name)?) }
}

/// Checks that `shells` has the line `command`. Small images have no /etc/shells: then only /bin/sh counts as listed.
fn listed(command: &str, shells: &Path) -> Result<(), ConfigError> {
    match fs::read(shells) {
        Ok(text) if String::from_utf8_lossy(&text).lines().any(|line| line == command) => Ok(()),
        Ok(_) => Err(ConfigError::ShellNotListed(command.to_owned())),
        Err(_) if command == keys::SHELL => Ok(()),
        Err(error) => Err(ConfigError::Open { file: shells.to_owned(), error }),
    }
}

/// dash ends at once if started with --login.
pub(crate) fn knows_no_login(command: &Path, arguments: &[String]) -> bool {
    arguments.iter().any(|argument| argument == "--login")
        && fs::canonicalize(command).is_ok_and(|program| program.ends_with("dash"))
}

/// As [`load`], from texts instead of files, on a device where every shell exists and every user is `user`. For the
/// fuzz target.
#[cfg(fuzzing)]
pub fn of_texts(main: &[u8], fallback: &[u8], user: &User) -> Result<Config, ConfigError> {
    let mut values = Values::default();
    for (text, origin) in [(fallback, Origin::Fallback), (main, Origin::Main)] {
        values.lay(text, origin)?.fit()?;
    }
    let values = values.filled(&mut Notes::new());
    let user = User { name: values.text(Key::User).to_owned(), ..user.clone() };
    validate(&values, Ok(user)).map_err(first)
}

#[cfg(test)]
pub(crate) mod tests;
