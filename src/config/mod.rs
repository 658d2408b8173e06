//! Two JSON files become one validated [`Config`]. `keys` is the table of all keys, `load` reads files against it and
//! fills in defaults; this file refuses bad values.

use std::fs;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::error;

use crate::sys::users::{self, User};

pub use allow::Allowed;
pub(crate) use keys::Key;
pub(crate) use load::{Origin, Values, Walk};

mod allow;
mod keys;
mod load;
#[cfg(fuzzing)]
#[path = "../../tests/fuzz/models/config.rs"]
pub(crate) mod model;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// An absolute path that /etc/shells lists.
    pub shell: PathBuf,
    pub arguments: Vec<String>,
    pub user: User,
    /// sudo and other set-uid programs then fail in the terminal.
    pub no_new_privileges: bool,
    /// Added to a login's variables, or replacing them.
    pub environment: Vec<(String, String)>,
    pub terminal: bool,
    /// Columns and rows unless the client names a size; above zero.
    pub width: u16,
    pub height: u16,
    pub expiry: Expiry,
    pub sessions_per_user: u32,
    pub idle_includes_output: bool,
    /// How long a shell that has lost its link waits for its user; 0: not at all.
    pub keep_detached: Duration,
    pub keep_when_user_leaves: bool,
    pub file_transfer: bool,
    pub port_forward: bool,
    /// `None`: any.
    pub forward_targets: Option<Vec<Allowed>>,
    /// Without traffic in either direction; 0: unlimited.
    pub forward_idle: Duration,
    pub mender_client: bool,
    /// `None` unless `Limits.Enabled`.
    pub limits: Option<FileLimits>,
    pub auth: Auth,
    /// Base of the back-off; above zero.
    pub reconnect_interval: Duration,
    pub heartbeat: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Auth {
    Dbus,
    /// `token` is absolute.
    File {
        token: PathBuf,
        server_url: String,
    },
}

/// Durations are above zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    Never,
    Idle(Duration),
    Age(Duration),
}

/// "Put" is to the device, "get" from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileLimits {
    /// May lead through symbolic links.
    pub chroot: Option<PathBuf>,
    pub(crate) follow_symlinks: bool,
    pub(crate) allow_overwrite: bool,
    pub owner_put: Option<String>,
    pub group_put: Option<String>,
    /// Empty: any. `group_get` as well.
    pub(crate) owner_get: Vec<String>,
    pub(crate) group_get: Vec<String>,
    /// If set, uploaded files get mode 0o777 without these bits, whatever the client sent. At most 0o777.
    pub umask: Option<u32>,
    pub(crate) max_file_size: Option<NonZeroU64>,
    /// Over all sessions, as `max_rx_bytes_per_minute`.
    pub(crate) max_tx_bytes_per_minute: Option<NonZeroU64>,
    pub(crate) max_rx_bytes_per_minute: Option<NonZeroU64>,
    pub(crate) allow_suid: bool,
    pub(crate) regular_files_only: bool,
    /// As the client sent it, unless `umask` is set.
    pub(crate) preserve_mode: bool,
    pub(crate) preserve_owner: bool,
}

/// The texts are complete: print no source after them.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A configuration file or /etc/shells exists, but cannot be read.
    #[error("open {}: {}", file.display(), crate::sys::reason(error))]
    Open { file: PathBuf, error: io::Error },
    #[error("Error parsing mender configuration file: {0}")]
    Syntax(serde_json::Error),
    #[error(transparent)]
    Misfit(#[from] Misfit),
    /// Right type, unusable value.
    #[error("{1}")]
    Unusable(Key, String),
    #[error("ShellCommand {0} is not present in /etc/shells")]
    ShellNotListed(String),
}

#[derive(Debug, Clone, thiserror::Error)]
#[error("Error parsing config file: {}: {text}", if path.is_empty() { "top level" } else { path })]
pub struct Misfit {
    /// `None` for a section or a whole file.
    pub(crate) key: Option<Key>,
    /// As the file spells it: `Terminal.width`, `Servers[0].ServerURL`; empty for the whole file.
    pub(crate) path: String,
    pub(crate) text: String,
}

pub(crate) const SHELLS: &str = "/etc/shells";

/// Reads `fallback`, then `main` over it; either may be missing. Logs defaults, ignored keys and errors.
pub fn load(main: &Path, fallback: &Path) -> Result<Config, ConfigError> {
    load_with(main, fallback, Path::new(SHELLS))
}

fn load_with(main: &Path, fallback: &Path, shells: &Path) -> Result<Config, ConfigError> {
    let values = load::read_both(main, fallback)?.filled();
    let config =
        validate(&values, user_of_shell(&values, shells)).map_err(|mut errors| errors.swap_remove(0));
    if let Err(error @ ConfigError::ShellNotListed(_)) = &config {
        error!("{error}");
    }
    config
}

/// Returns all errors in upstream's order, without those that follow from others. `values` have their defaults.
pub(crate) fn validate(
    values: &Values,
    user: Result<User, Vec<ConfigError>>,
) -> Result<Config, Vec<ConfigError>> {
    let mut errors = Vec::new();
    let mut unusable = |key, why| errors.push(ConfigError::Unusable(key, why));
    let forward_targets = values.list(Key::Allow).map(|entries| {
        let mut refuse = |entry, why| unusable(Key::Allow, format!("PortForward.Allow: {entry:?}: {why}"));
        entries.iter().filter_map(|entry| Allowed::parse(entry).map_err(|e| refuse(entry, e)).ok()).collect()
    });
    let auth = auth(values, &mut unusable);
    let environment = values.map(Key::Environment);
    for (name, value) in &environment {
        if name.is_empty() || name.contains('=') || format!("{name}{value}").contains('\0') {
            let why = format!("Terminal.Environment: no variable can be {name:?}={value:?}");
            unusable(Key::Environment, why);
        }
    }
    let user = user.map_err(|more| errors.extend(more)).ok();
    let Some(user) = user.filter(|_| errors.is_empty()) else { return Err(errors) };
    let given = |key| Some(values.text(key)).filter(|text| !text.is_empty()).map(str::to_owned);
    let above_zero = |key| NonZeroU64::new(values.number(key));
    let limits = || FileLimits {
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
    };
    let seconds = |key| Duration::from_secs(values.number(key));
    Ok(Config {
        shell: values.text(Key::ShellCommand).into(),
        arguments: values.list(Key::ShellArguments).unwrap_or_default(),
        user,
        no_new_privileges: values.flag(Key::NoNewPrivileges),
        environment,
        terminal: !values.flag(Key::DisableTerminal),
        width: values.number(Key::Width),
        height: values.number(Key::Height),
        expiry: match (seconds(Key::ExpireAfterIdle), seconds(Key::ExpireAfter)) {
            (Duration::ZERO, Duration::ZERO) => Expiry::Never,
            (Duration::ZERO, age) => Expiry::Age(age),
            (idle, _) => Expiry::Idle(idle),
        },
        sessions_per_user: values.number(Key::MaxPerUser),
        idle_includes_output: values.flag(Key::IdleIncludesOutput),
        keep_detached: seconds(Key::KeepDetached),
        keep_when_user_leaves: values.flag(Key::KeepWhenUserLeaves),
        file_transfer: !values.flag(Key::DisableFileTransfer),
        port_forward: !values.flag(Key::DisablePortForward),
        forward_targets,
        forward_idle: seconds(Key::ForwardIdle),
        mender_client: !values.flag(Key::DisableMenderClient),
        limits: values.flag(Key::Limits).then(limits),
        auth,
        reconnect_interval: seconds(Key::ReconnectInterval),
        heartbeat: seconds(Key::Heartbeat),
    })
}

fn auth(values: &Values, unusable: &mut impl FnMut(Key, String)) -> Auth {
    let (token, server_url) = (values.text(Key::TokenFile), values.text(Key::AuthServerUrl));
    match values.text(Key::AuthSource) {
        "dbus" => return Auth::Dbus,
        "file" => {
            for (key, text) in [(Key::TokenFile, token), (Key::AuthServerUrl, server_url)] {
                if text.is_empty() {
                    unusable(key, format!("{} is needed where Auth.Source is \"file\"", key.name()));
                }
            }
            if !token.is_empty() && !token.starts_with('/') {
                unusable(Key::TokenFile, format!("Auth.TokenFile ({token}) is not an absolute path"));
            }
            // At the start or reload that brings it, instead of at each attempt to connect.
            let scheme = server_url.trim_start().split_once("://").map_or("", |(scheme, _)| scheme);
            let is_known = matches!(&*scheme.to_ascii_lowercase(), "https" | "http" | "wss" | "ws");
            if !server_url.is_empty() && !is_known {
                let why = "Auth.ServerURL has no scheme, or an unknown one: https://NAME is its usual form";
                unusable(Key::AuthServerUrl, why.to_owned());
            }
        }
        other => {
            let why = format!("Auth.Source {other:?} is not known, only \"dbus\" and \"file\" are");
            unusable(Key::AuthSource, why);
        }
    }
    Auth::File { token: token.into(), server_url: server_url.to_owned() }
}

/// Checks the shell and its user against this device; errors are in upstream's order.
pub(crate) fn user_of_shell(values: &Values, shells: &Path) -> Result<User, Vec<ConfigError>> {
    let (command, name) = (values.text(Key::ShellCommand), values.text(Key::User));
    let wrong = match fs::metadata(command) {
        _ if !Path::new(command).is_absolute() => Some("an absolute path"),
        Ok(metadata) if metadata.permissions().mode() & 0o111 != 0 => None,
        _ => Some("executable"),
    };
    let text = |what| format!("given shell ({command}) is not {what}");
    let mut errors = Vec::from_iter(wrong.map(|what| ConfigError::Unusable(Key::ShellCommand, text(what))));
    let user = match name {
        "" => Err("please provide a user to run the shell as".to_owned()),
        name => users::lookup(name).map_err(|error| error.to_string()),
    };
    let user = user.map_err(|why| errors.push(ConfigError::Unusable(Key::User, why))).ok();
    match fs::read(shells) {
        _ if wrong.is_some() => {}
        Ok(text) if String::from_utf8_lossy(&text).lines().any(|line| line == command) => {}
        Ok(_) => errors.push(ConfigError::ShellNotListed(command.to_owned())),
        // Small images lack /etc/shells: then /bin/sh is the only shell allowed.
        Err(_) if command == keys::SHELL => {}
        Err(error) => errors.push(ConfigError::Open { file: shells.to_owned(), error }),
    }
    user.filter(|_| errors.is_empty()).ok_or(errors)
}

/// dash exits at once if started with --login.
pub(crate) fn knows_no_login(command: &Path, arguments: &[String]) -> bool {
    arguments.iter().any(|argument| argument == "--login")
        && fs::canonicalize(command).is_ok_and(|program| program.ends_with("dash"))
}

/// Strips user and password from a URL for display. `url` may be any text.
pub(crate) fn without_password(url: &str) -> String {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find('/').map_or(url.len(), |at| start + at);
    match url[start..end].rfind('@') {
        Some(at) => format!("{}{}", &url[..start], &url[start + at + 1..]),
        None => url.to_owned(),
    }
}

#[cfg(test)]
pub(crate) mod tests;
