//! Checks that keep the daemon from starting.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use log::Level;

use super::file::{Auth, Settings};
use super::{Allowed, ConfigError, Notes, defaults};
use crate::sys::users::{self, User};

/// All errors, for `check`; the daemon stops at the first.
pub(super) fn all(settings: &Settings, shells: &Path) -> Vec<ConfigError> {
    let entries = settings.port_forward.allow.iter().flatten();
    let mut errors: Vec<ConfigError> =
        entries.filter_map(|entry| Allowed::parse(entry).err()).map(Into::into).collect();
    errors.extend(auth(&settings.auth));
    let command = &settings.shell_command;
    errors.extend(executable(command).and_then(|()| listed(command, shells)).err());
    errors.extend(user(&settings.user).err());
    errors
}

pub(super) fn auth(raw: &Auth) -> Vec<ConfigError> {
    match raw.source.as_str() {
        defaults::AUTH_SOURCE => return Vec::new(),
        "file" => {}
        other => return vec![ConfigError::AuthSource(other.to_owned())],
    }
    let needed = [("TokenFile", &raw.token_file), ("ServerURL", &raw.server_url)];
    let missing = needed.into_iter().filter(|(_, value)| value.is_empty());
    let mut errors: Vec<_> = missing.map(|(key, _)| ConfigError::AuthMissing(key)).collect();
    if !raw.token_file.is_empty() && !raw.token_file.starts_with('/') {
        errors.push(ConfigError::TokenFileNotAbsolute(raw.token_file.clone()));
    }
    errors
}

/// Checks what depends on the device. Returns the first error, in upstream's order.
pub(super) fn device(
    command: &str,
    name: &str,
    shells: &Path,
    notes: &mut Notes,
) -> Result<User, ConfigError> {
    executable(command)?;
    let user = user(name)?;
    if let Err(error) = listed(command, shells) {
        if matches!(error, ConfigError::ShellNotListed(_)) {
            notes.push((Level::Error, error.to_string()));
        }
        return Err(error);
    }
    Ok(user)
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
        Err(_) if command == defaults::SHELL => Ok(()),
        Err(error) => Err(ConfigError::Open { file: shells.to_owned(), error }),
    }
}
