//! What a configuration file may say, and how the two files are laid over each other.
//! Field names are the JSON keys; what they mean is told at [`super::Config`].

use std::fs;
use std::io;
use std::path::Path;

use log::Level;

use super::json::{self, Merge, Object};
use super::{ConfigError, Notes};

/// Declares which key goes to which field. Keys are in lower case, as [`Object::field`] gets them.
macro_rules! keys {
    ($object:ty { $($key:literal => $field:ident),* $(,)? }) => {
        impl Object for $object {
            fn field(&mut self, key: &str) -> Option<&mut dyn Merge> {
                match key {
                    $($key => Some(&mut self.$field),)*
                    _ => None,
                }
            }
        }
    };
}

#[derive(Debug, Default)]
pub(super) struct Settings {
    pub shell_command: String,
    pub shell_arguments: Option<Vec<String>>,
    pub user: String,
    pub terminal: Terminal,
    pub sessions: Sessions,
    pub limits: Limits,
    pub reconnect_interval_seconds: i64,
    pub file_transfer: Switch,
    pub port_forward: PortForward,
    pub mender_client: Switch,
    pub auth: Auth,
}

keys!(Settings {
    "shellcommand" => shell_command,
    "shellarguments" => shell_arguments,
    "user" => user,
    "terminal" => terminal,
    "sessions" => sessions,
    "limits" => limits,
    "reconnectintervalseconds" => reconnect_interval_seconds,
    "filetransfer" => file_transfer,
    "portforward" => port_forward,
    "menderclient" => mender_client,
    "auth" => auth,
});

#[derive(Debug, Default)]
pub(super) struct Switch {
    pub disable: bool,
}

keys!(Switch { "disable" => disable });

#[derive(Debug, Default)]
pub(super) struct Auth {
    pub source: String,
    pub token_file: String,
    pub server_url: String,
}

keys!(Auth { "source" => source, "tokenfile" => token_file, "serverurl" => server_url });

#[derive(Debug, Default)]
pub(super) struct PortForward {
    pub disable: bool,
    pub allow: Option<Vec<String>>,
}

keys!(PortForward { "disable" => disable, "allow" => allow });

#[derive(Debug, Default)]
pub(super) struct Terminal {
    pub width: u16,
    pub height: u16,
    pub disable: bool,
    pub no_new_privileges: bool,
}

keys!(Terminal {
    "width" => width,
    "height" => height,
    "disable" => disable,
    "nonewprivileges" => no_new_privileges,
});

#[derive(Debug)]
pub(super) struct Sessions {
    pub stop_expired: bool,
    pub expire_after: u32,
    pub expire_after_idle: u32,
    pub max_per_user: u32,
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
    "stopexpired" => stop_expired,
    "expireafter" => expire_after,
    "expireafteridle" => expire_after_idle,
    "maxperuser" => max_per_user,
    "idleincludesoutput" => idle_includes_output,
});

#[derive(Debug, Default)]
pub(super) struct Limits {
    pub enabled: bool,
    pub file_transfer: FileTransferLimits,
}

keys!(Limits { "enabled" => enabled, "filetransfer" => file_transfer });

#[derive(Debug)]
pub(super) struct FileTransferLimits {
    pub chroot: String,
    pub follow_sym_links: bool,
    pub allow_overwrite: bool,
    pub owner_put: String,
    pub group_put: String,
    pub owner_get: Vec<String>,
    pub group_get: Vec<String>,
    pub umask: String,
    pub max_file_size: u64,
    pub counters: Counters,
    pub allow_suid: bool,
    pub regular_files_only: bool,
    pub preserve_mode: bool,
    pub preserve_owner: bool,
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
    "chroot" => chroot,
    "followsymlinks" => follow_sym_links,
    "allowoverwrite" => allow_overwrite,
    "ownerput" => owner_put,
    "groupput" => group_put,
    "ownerget" => owner_get,
    "groupget" => group_get,
    "umask" => umask,
    "maxfilesize" => max_file_size,
    "counters" => counters,
    "allowsuid" => allow_suid,
    "regularfilesonly" => regular_files_only,
    "preservemode" => preserve_mode,
    "preserveowner" => preserve_owner,
});

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub max_bytes_tx_per_minute: u64,
    pub max_bytes_rx_per_minute: u64,
}

keys!(Counters {
    "maxbytestxperminute" => max_bytes_tx_per_minute,
    "maxbytesrxperminute" => max_bytes_rx_per_minute,
});

/// Keys from the time when the agent found its server by itself. They must still have the right types.
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
    "serverurl" => server_url,
    "servers" => servers,
    "clientprotocol" => client_protocol,
    "httpsclient" => https_client,
    "skipverify" => skip_verify,
    "servercertificate" => server_certificate,
});

#[derive(Debug, Default)]
struct Server {
    server_url: String,
}

keys!(Server { "serverurl" => server_url });

#[derive(Debug, Default)]
struct HttpsClient {
    certificate: String,
    key: String,
    ssl_engine: String,
}

keys!(HttpsClient { "certificate" => certificate, "key" => key, "sslengine" => ssl_engine });

impl Deprecated {
    fn warn(&self, notes: &mut Notes) {
        let client = &self.https_client;
        for (name, given) in [
            ("ServerURL", !self.server_url.is_empty()),
            ("Servers", !self.servers.is_empty()),
            ("ClientProtocol", !self.client_protocol.is_empty()),
            (
                "HTTPSClient",
                [&client.certificate, &client.key, &client.ssl_engine].iter().any(|s| !s.is_empty()),
            ),
            ("SkipVerify", self.skip_verify),
            ("ServerCertificate", !self.server_certificate.is_empty()),
        ] {
            if given {
                notes.push((Level::Warn, format!("{name} field is deprecated, ignoring.")));
            }
        }
    }
}

struct Document<'a> {
    settings: &'a mut Settings,
    deprecated: Deprecated,
}

impl Object for Document<'_> {
    fn field(&mut self, key: &str) -> Option<&mut dyn Merge> {
        self.settings.field(key).or_else(|| self.deprecated.field(key))
    }
}

/// Reads both files, where they exist, into one: what `main` says wins over `fallback`.
pub(super) fn read_both(main: &Path, fallback: &Path, notes: &mut Notes) -> Result<Settings, ConfigError> {
    let mut settings = Settings::default();
    let mut any = false;
    for file in [fallback, main] {
        match read(file, &mut settings, notes) {
            Ok(true) => notes.push((Level::Info, format!("Loaded configuration file: {}", file.display()))),
            Ok(false) => continue,
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

/// Lays one file over `settings`; false when there is no such file.
fn read(file: &Path, settings: &mut Settings, notes: &mut Notes) -> Result<bool, ConfigError> {
    let text = match fs::read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(ConfigError::Open { file: file.to_owned(), error }),
    };
    lay(file, &text, settings, notes)?;
    Ok(true)
}

/// Lays the text of a file over `settings`.
pub(super) fn lay(
    file: &Path,
    text: &[u8],
    settings: &mut Settings,
    notes: &mut Notes,
) -> Result<(), ConfigError> {
    let mut document = Document { settings, deprecated: Deprecated::default() };
    let unknown = json::merge(text, &mut document)?;
    for key in unknown {
        notes.push((Level::Warn, format!("{}: ignoring unknown key {key}", file.display())));
    }
    document.deprecated.warn(notes);
    Ok(())
}

#[cfg(test)]
mod tests;
