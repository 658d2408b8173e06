//! Looks up the account of the shells, when the configuration is read and at each login, in a thread: a directory
//! service may hang. glibc asks NSS (LDAP, systemd-userdb and so on), musl only reads /etc/passwd and /etc/group.

use std::ffi::CString;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::{self, Gid, Uid};

use super::thread;

const LIMIT: Duration = Duration::from_secs(5);
/// Concurrent look-ups, including hung ones.
const MAX_LOOK_UPS: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub(crate) name: String,
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    /// For setgroups(2), including the primary group.
    pub(crate) groups: Vec<Gid>,
    /// May not exist.
    pub(crate) home: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum UserError {
    #[error("user: unknown user {0}")]
    Unknown(String),
    /// Trying again later may help.
    #[error("user: cannot look up {name}: {errno}")]
    Database { name: String, errno: Errno },
}

/// Groups may have changed since `known` was looked up; `known` is used if the database does not answer.
pub(crate) fn current(known: &User) -> Result<User, UserError> {
    match lookup(&known.name) {
        Err(e @ UserError::Database { .. }) => {
            log::warn!("{e}: {} gets the groups that were known before", known.name);
            Ok(known.clone())
        }
        other => other,
    }
}

/// Cloned by each look-up in progress.
static LOOK_UPS: LazyLock<Arc<()>> = LazyLock::new(Arc::default);

pub fn lookup(name: &str) -> Result<User, UserError> {
    let failed = |errno| UserError::Database { name: name.to_owned(), errno };
    let (counted, wanted) = (Arc::clone(&LOOK_UPS), name.to_owned());
    // One is the static's.
    if Arc::strong_count(&counted) > MAX_LOOK_UPS + 1 {
        return Err(failed(Errno::EBUSY));
    }
    let (report, answer) = crossbeam_channel::bounded(1);
    let ask = move || {
        let _ = report.send(ask(&wanted));
        drop(counted);
    };
    thread::spawn("user", thread::LOOKUP_STACK, ask).map_err(|_| failed(Errno::EAGAIN))?;
    let user = answer.recv_timeout(LIMIT).unwrap_or(Err(Errno::ETIMEDOUT)).map_err(failed)?;
    user.ok_or_else(|| UserError::Unknown(name.to_owned()))
}

fn ask(name: &str) -> nix::Result<Option<User>> {
    let entry = match unistd::User::from_name(name) {
        // getpwnam_r(3): some databases report an unknown name as an error.
        Err(Errno::ENOENT | Errno::ESRCH) => None,
        other => other?,
    };
    let Some(unistd::User { name, uid, gid, dir: home, .. }) = entry else {
        if cfg!(target_env = "musl") {
            log::info!("users are looked up in /etc/passwd only: this build has no NSS");
        }
        return Ok(None);
    };
    let c_name = CString::new(name.as_str()).map_err(|_| Errno::EINVAL)?;
    let groups = unistd::getgrouplist(&c_name, gid)?;
    Ok(Some(User { name, uid, gid, groups, home }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_found_with_its_primary_group() {
        let root = lookup("root").unwrap();
        assert_eq!(root.name, "root");
        assert!(root.uid.is_root());
        assert!(root.groups.contains(&root.gid));
        assert!(root.home.is_absolute());
    }

    #[test]
    fn unknown_names_have_the_exact_text() {
        for name in ["no-such-user-here", "", "a\0b", "root:x"] {
            let error = lookup(name).unwrap_err();
            assert!(matches!(error, UserError::Unknown(_)), "{error:?}");
            assert_eq!(error.to_string(), format!("user: unknown user {name}"));
        }
    }
}
