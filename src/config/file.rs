//! The keys of a configuration file, and how the two files are merged.
//! Field names are the JSON keys; [`super::Config`] documents them.

use std::fs;
use std::io;
use std::path::Path;

use log::Level;

use super::json::{self, JsonError, Merge, Object, Walk, keys};
use super::{ConfigError, Notes};

#[derive(Debug, Default)]
pub(super) struct Settings {
    pub(crate) shell_command: String,
    pub(crate) shell_arguments: Option<Vec<String>>,
    pub(crate) user: String,
    pub(crate) terminal: Terminal,
    pub(crate) sessions: Sessions,
    pub(crate) limits: Limits,
    pub(crate) reconnect_interval_seconds: i64,
    pub(crate) file_transfer: Switch,
    pub(crate) port_forward: PortForward,
    pub(crate) mender_client: Switch,
    pub(crate) auth: Auth,
}

keys!(Settings {
    "ShellCommand" => shell_command,
    "ShellArguments" => shell_arguments,
    "User" => user,
    "Terminal" => terminal,
    "Sessions" => sessions,
    "Limits" => limits,
    "ReconnectIntervalSeconds" => reconnect_interval_seconds,
    "FileTransfer" => file_transfer,
    "PortForward" => port_forward,
    "MenderClient" => mender_client,
    "Auth" => auth,
});

#[derive(Debug, Default)]
pub(super) struct Switch {
    pub(crate) disable: bool,
}

keys!(Switch { "Disable" => disable });

#[derive(Debug, Default)]
pub(super) struct Auth {
    pub(crate) source: String,
    pub(crate) token_file: String,
    pub(crate) server_url: String,
}

keys!(Auth { "Source" => source, "TokenFile" => token_file, "ServerURL" => server_url });

#[derive(Debug, Default)]
pub(super) struct PortForward {
    pub(crate) disable: bool,
    pub(crate) allow: Option<Vec<String>>,
}

keys!(PortForward { "Disable" => disable, "Allow" => allow });

#[derive(Debug, Default)]
pub(super) struct Terminal {
    pub(crate) width: u16,
    pub(crate) height: u16,
    pub(crate) disable: bool,
    pub(crate) no_new_privileges: bool,
}

keys!(Terminal {
    "Width" => width,
    "Height" => height,
    "Disable" => disable,
    "NoNewPrivileges" => no_new_privileges,
});

#[derive(Debug)]
pub(super) struct Sessions {
    pub(crate) stop_expired: bool,
    pub(crate) expire_after: u32,
    pub(crate) expire_after_idle: u32,
    pub(crate) max_per_user: u32,
    pub idle_includes_output: bool,
}

impl Default for Sessions {
    fn default() -> Self {
        Self {
            stop_expired: true,
            expire_after: 0,
            expire_after_idle: 0,
            max_per_user: 0,
            idle_includes_output: false,
        }
    }
}

keys!(Sessions {
    "StopExpired" => stop_expired,
    "ExpireAfter" => expire_after,
    "ExpireAfterIdle" => expire_after_idle,
    "MaxPerUser" => max_per_user,
    "IdleIncludesOutput" => idle_includes_output,
});

#[derive(Debug, Default)]
pub(super) struct Limits {
    pub(crate) enabled: bool,
    pub(crate) file_transfer: FileTransferLimits,
}

keys!(Limits { "Enabled" => enabled, "FileTransfer" => file_transfer });

#[derive(Debug)]
pub(super) struct FileTransferLimits {
    pub(crate) chroot: String,
    pub(crate) follow_sym_links: bool,
    pub(crate) allow_overwrite: bool,
    pub(crate) owner_put: String,
    pub(crate) group_put: String,
    pub(crate) owner_get: Vec<String>,
    pub(crate) group_get: Vec<String>,
    pub(crate) umask: String,
    pub(crate) max_file_size: u64,
    pub(crate) counters: Counters,
    pub(crate) allow_suid: bool,
    pub(crate) regular_files_only: bool,
    pub(crate) preserve_mode: bool,
    pub(crate) preserve_owner: bool,
}

impl Default for FileTransferLimits {
    fn default() -> Self {
        Self {
            chroot: String::new(),
            follow_sym_links: false,
            allow_overwrite: false,
            owner_put: String::new(),
            group_put: String::new(),
            owner_get: Vec::new(),
            group_get: Vec::new(),
            umask: String::new(),
            max_file_size: 0,
            counters: Counters::default(),
            allow_suid: false,
            regular_files_only: false,
            preserve_mode: true,
            preserve_owner: true,
        }
    }
}

keys!(FileTransferLimits {
    "Chroot" => chroot,
    "FollowSymLinks" => follow_sym_links,
    "AllowOverwrite" => allow_overwrite,
    "OwnerPut" => owner_put,
    "GroupPut" => group_put,
    "OwnerGet" => owner_get,
    "GroupGet" => group_get,
    "Umask" => umask,
    "MaxFileSize" => max_file_size,
    "Counters" => counters,
    "AllowSuid" => allow_suid,
    "RegularFilesOnly" => regular_files_only,
    "PreserveMode" => preserve_mode,
    "PreserveOwner" => preserve_owner,
});

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(crate) max_bytes_tx_per_minute: u64,
    pub(crate) max_bytes_rx_per_minute: u64,
}

keys!(Counters {
    "MaxBytesTxPerMinute" => max_bytes_tx_per_minute,
    "MaxBytesRxPerMinute" => max_bytes_rx_per_minute,
});

/// Keys from the time when the agent found its server without mender-auth. A value of the wrong type is still an
/// error.
#[derive(Debug, Default)]
struct Deprecated {
    server_url: String,
    servers: Vec<Server>,
    client_protocol: String,
    https_client: HttpsClient,
    skip_verify: bool,
    server_certificate: String,
}

keys!(Deprecated {
    "ServerURL" => server_url,
    "Servers" => servers,
    "ClientProtocol" => client_protocol,
    "HttpsClient" => https_client,
    "SkipVerify" => skip_verify,
    "ServerCertificate" => server_certificate,
});

#[derive(Debug, Default)]
struct Server {
    server_url: String,
}

keys!(Server { "ServerURL" => server_url });

#[derive(Debug, Default)]
struct HttpsClient {
    certificate: String,
    key: String,
    ssl_engine: String,
}

keys!(HttpsClient { "Certificate" => certificate, "Key" => key, "SSLEngine" => ssl_engine });

impl Deprecated {
    /// The keys that are set, as upstream's warnings name them.
    fn used(&self) -> Vec<&'static str> {
        let client = &self.https_client;
        let all = [
            ("ServerURL", !self.server_url.is_empty()),
            ("Servers", !self.servers.is_empty()),
            ("ClientProtocol", !self.client_protocol.is_empty()),
            (
                "HTTPSClient",
                [&client.certificate, &client.key, &client.ssl_engine].iter().any(|s| !s.is_empty()),
            ),
            ("SkipVerify", self.skip_verify),
            ("ServerCertificate", !self.server_certificate.is_empty()),
        ];
        all.into_iter().filter(|(_, used)| *used).map(|(name, _)| name).collect()
    }
}

struct Document<'a> {
    settings: &'a mut Settings,
    deprecated: Deprecated,
}

impl Object for Document<'_> {
    fn field(&mut self, key: &str) -> Option<(&'static str, &mut dyn Merge)> {
        self.settings.field(key).or_else(|| self.deprecated.field(key))
    }

    fn fields(&self) -> Vec<(&'static str, &dyn Merge)> {
        self.settings.fields()
    }
}

/// Reads both files, if they exist. Values in `main` win over `fallback`.
pub(super) fn read_both(main: &Path, fallback: &Path, notes: &mut Notes) -> Result<Settings, ConfigError> {
    let mut settings = Settings::default();
    let mut any = false;
    for file in [fallback, main] {
        match read(file, &mut settings).and_then(|read| read.map(|laid| laid.finish(file, notes)).transpose())
        {
            Ok(Some(())) => {
                notes.push((Level::Info, format!("Loaded configuration file: {}", file.display())));
            }
            Ok(None) => continue,
            Err(error) => {
                let text = format!("Error loading configuration from file: {} ({error})", file.display());
                notes.push((Level::Error, text));
                return Err(error);
            }
        }
        any = true;
    }
    if !any {
        notes.push((Level::Info, "No configuration files present. Using defaults".to_owned()));
    }
    Ok(settings)
}

/// Applies to `settings` whatever fits in one file; `None` if there is no such file.
pub(super) fn read(file: &Path, settings: &mut Settings) -> Result<Option<Laid>, ConfigError> {
    let text = match fs::read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ConfigError::Open { file: file.to_owned(), error }),
    };
    Ok(Some(lay(&text, settings)?))
}

pub(super) struct Laid {
    pub(crate) walk: Walk,
    /// Deprecated keys that are set.
    pub(crate) deprecated: Vec<&'static str>,
}

/// Applies to `settings` whatever fits in `text`.
pub(super) fn lay(text: &[u8], settings: &mut Settings) -> Result<Laid, JsonError> {
    let mut document = Document { settings, deprecated: Deprecated::default() };
    let walk = json::merge(text, &mut document)?;
    Ok(Laid { walk, deprecated: document.deprecated.used() })
}

impl Laid {
    /// Notes what was ignored, unless there is an error.
    pub(super) fn finish(self, file: &Path, notes: &mut Notes) -> Result<(), ConfigError> {
        if let Some((_, error)) = self.walk.errors.into_iter().next() {
            return Err(error.into());
        }
        for key in self.walk.unknown {
            notes.push((Level::Warn, format!("{}: ignoring unknown key {key}", file.display())));
        }
        for name in self.deprecated {
            notes.push((Level::Warn, format!("{name} field is deprecated, ignoring.")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
