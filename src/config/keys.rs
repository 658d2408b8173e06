//! The table of configuration keys. Parsing, defaults, `check` and the documentation's tests follow it.

use std::fmt;
use std::ops::RangeInclusive;

use serde_json::Value;

use self::Kind::{Flag, List, Map, Number, Objects, Text};

pub(super) const SHELL: &str = "/bin/sh";

/// Type and default. 0, an empty text and `null` for a list (unless that is the default) count as unset.
pub(super) enum Kind {
    Flag(bool),
    Number(RangeInclusive<i128>, u32),
    Text(&'static str),
    List(Option<&'static [&'static str]>),
    /// Strings by names of the file's choice.
    Map,
    /// Objects with the keys below this one.
    Objects,
}

const U16: RangeInclusive<i128> = 0..=u16::MAX as i128;
const U32: RangeInclusive<i128> = 0..=u32::MAX as i128;
const U64: RangeInclusive<i128> = 0..=u64::MAX as i128;
const I64: RangeInclusive<i128> = i64::MIN as i128..=i64::MAX as i128;
const ANY: Kind = List(Some(&[]));

macro_rules! keys {
    ($($key:ident $name:literal $kind:expr $(, deprecated $deprecated:literal)?;)*) => {
        #[derive(Clone, Copy, PartialEq, Eq)]
        pub enum Key { $($key),* }

        /// The last column is the name in upstream's warning, if the key is deprecated.
        static TABLE: &[(Key, &str, Kind, &[&str])] = &[$((Key::$key, $name, $kind, &[$($deprecated)?])),*];
    };
}

// `check` prints them in this order.
keys! {
    ShellCommand         "ShellCommand"                                     Text(SHELL);
    ShellArguments       "ShellArguments"                                   List(Some(&["--login"]));
    User                 "User"                                             Text("");
    Width                "Terminal.Width"                                   Number(U16, 80);
    Height               "Terminal.Height"                                  Number(U16, 40);
    DisableTerminal      "Terminal.Disable"                                 Flag(false);
    NoNewPrivileges      "Terminal.NoNewPrivileges"                         Flag(false);
    Environment          "Terminal.Environment"                             Map;
    StopExpired          "Sessions.StopExpired"                             Flag(true);
    ExpireAfter          "Sessions.ExpireAfter"                             Number(U32, 0);
    ExpireAfterIdle      "Sessions.ExpireAfterIdle"                         Number(U32, 600);
    MaxPerUser           "Sessions.MaxPerUser"                              Number(U32, 1);
    IdleIncludesOutput   "Sessions.IdleIncludesOutput"                      Flag(false);
    KeepDetached         "Sessions.KeepDetached"                            Number(U32, 300);
    KeepWhenUserLeaves   "Sessions.KeepWhenUserLeaves"                      Flag(false);
    Limits               "Limits.Enabled"                                   Flag(false);
    Chroot               "Limits.FileTransfer.Chroot"                       Text("");
    FollowSymLinks       "Limits.FileTransfer.FollowSymLinks"               Flag(false);
    AllowOverwrite       "Limits.FileTransfer.AllowOverwrite"               Flag(false);
    OwnerPut             "Limits.FileTransfer.OwnerPut"                     Text("");
    GroupPut             "Limits.FileTransfer.GroupPut"                     Text("");
    OwnerGet             "Limits.FileTransfer.OwnerGet"                     ANY;
    GroupGet             "Limits.FileTransfer.GroupGet"                     ANY;
    Umask                "Limits.FileTransfer.Umask"                        Text("");
    MaxFileSize          "Limits.FileTransfer.MaxFileSize"                  Number(U64, 0);
    MaxBytesTxPerMinute  "Limits.FileTransfer.Counters.MaxBytesTxPerMinute" Number(U64, 0);
    MaxBytesRxPerMinute  "Limits.FileTransfer.Counters.MaxBytesRxPerMinute" Number(U64, 0);
    AllowSuid            "Limits.FileTransfer.AllowSuid"                    Flag(false);
    RegularFilesOnly     "Limits.FileTransfer.RegularFilesOnly"             Flag(false);
    PreserveMode         "Limits.FileTransfer.PreserveMode"                 Flag(true);
    PreserveOwner        "Limits.FileTransfer.PreserveOwner"                Flag(true);
    ReconnectInterval    "ReconnectIntervalSeconds"                         Number(I64, 5);
    Heartbeat            "HeartbeatSeconds"                                 Number(10..=50, 25);
    DisableFileTransfer  "FileTransfer.Disable"                             Flag(false);
    DisablePortForward   "PortForward.Disable"                              Flag(false);
    Allow                "PortForward.Allow"                                List(None);
    ForwardIdle          "PortForward.IdleTimeout"                          Number(U32, 600);
    DisableMenderClient  "MenderClient.Disable"                             Flag(false);
    AuthSource           "Auth.Source"                                      Text("dbus");
    TokenFile            "Auth.TokenFile"                                   Text("");
    AuthServerUrl        "Auth.ServerURL"                                   Text("");
    // From before mender-auth: ignored, but a value of the wrong type is still an error.
    ServerUrl            "ServerURL"               Text(""),    deprecated "ServerURL";
    Servers              "Servers"                 Objects,     deprecated "Servers";
    ServersServerUrl     "Servers.ServerURL"       Text(""),    deprecated "Servers";
    ClientProtocol       "ClientProtocol"          Text(""),    deprecated "ClientProtocol";
    HttpsCertificate     "HttpsClient.Certificate" Text(""),    deprecated "HTTPSClient";
    HttpsKeyFile         "HttpsClient.Key"         Text(""),    deprecated "HTTPSClient";
    HttpsEngine          "HttpsClient.SSLEngine"   Text(""),    deprecated "HTTPSClient";
    SkipVerify           "SkipVerify"              Flag(false), deprecated "SkipVerify";
    ServerCertificate    "ServerCertificate"       Text(""),    deprecated "ServerCertificate";
}

/// Not derived, with each name a second time in the executable.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Key {
    pub(super) fn all() -> impl Iterator<Item = Key> {
        TABLE.iter().map(|row| row.0)
    }

    pub(crate) fn current() -> impl Iterator<Item = Key> {
        Key::all().filter(|key| key.deprecated().is_none())
    }

    pub(crate) fn name(self) -> &'static str {
        TABLE[self as usize].1
    }

    pub(super) fn kind(self) -> &'static Kind {
        &TABLE[self as usize].2
    }

    /// As upstream decides; it doesn't have the two keys for which 0 is a value.
    pub(crate) fn is_unset(self, value: &Value) -> bool {
        let zero_is_set = matches!(self, Key::KeepDetached | Key::ForwardIdle);
        value.is_null() || *value == "" || (*value == 0 && !zero_is_set)
    }

    pub(crate) fn deprecated(self) -> Option<&'static str> {
        TABLE[self as usize].3.first().copied()
    }

    /// Finds the key or section `member` (any case) directly below `section`; the name of the top is empty.
    pub(super) fn find(section: &str, member: &str) -> Option<(&'static str, Option<Key>)> {
        let path = join(section, member);
        let mut keys = Key::all().filter(|_| !member.contains('.'));
        keys.find_map(|key| match key.name().split_at_checked(path.len())? {
            (name, "") if name.eq_ignore_ascii_case(&path) => Some((name, Some(key))),
            (name, rest) if name.eq_ignore_ascii_case(&path) && rest.starts_with('.') => Some((name, None)),
            _ => None,
        })
    }
}

impl Kind {
    pub(super) fn default(&self) -> Value {
        match self {
            Flag(value) => (*value).into(),
            Number(_, value) => (*value).into(),
            Text(value) => (*value).into(),
            List(value) => (*value).into(),
            Map => Value::Object(serde_json::Map::new()),
            Objects => Value::Array(Vec::new()),
        }
    }
}

pub(super) fn join(path: &str, member: &str) -> String {
    if path.is_empty() { member.to_owned() } else { format!("{path}.{member}") }
}

#[cfg(test)]
mod tests;
