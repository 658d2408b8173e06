//! One test for each bug that was found in the field or by attacking the agent, with its story. Each fails without
//! its fix.

#[cfg(feature = "dbus")]
mod addresses;
#[cfg(feature = "dbus")]
mod bounds;
#[cfg(feature = "dbus")]
mod bus;
#[cfg(all(feature = "dbus", feature = "tls"))]
mod certificates;
#[cfg(feature = "dbus")]
mod counted;
#[cfg(feature = "dbus")]
mod files;
#[cfg(feature = "dbus")]
mod forwards;
#[cfg(feature = "dbus")]
mod hostile;
#[cfg(feature = "dbus")]
mod log;
#[cfg(feature = "dbus")]
mod network;
#[cfg(feature = "dbus")]
mod operator;
#[cfg(feature = "dbus")]
mod storage;
#[cfg(feature = "dbus")]
mod terminal;
#[cfg(feature = "dbus")]
mod users;
#[cfg(feature = "dbus")]
mod ways;
