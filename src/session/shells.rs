//! The limits on shells.

use std::sync::{Arc, Mutex};

use crate::proto::UserId;
use crate::sys::lock;

/// Shells on the device at a time.
pub(crate) const MAX_SHELLS: usize = 16;

/// Why there can't be another shell. Clients know the texts.
pub(crate) const TOO_MANY: &str = "too many shells spawned";
const TOO_MANY_OF_USER: &str = "user has too many open sessions";

/// The user of each shell on the device.
#[derive(Debug, Default)]
pub(crate) struct Shells(Mutex<Vec<UserId>>);

/// The right to one shell, returned on drop.
#[derive(Debug)]
pub(crate) struct ShellPermit {
    shells: Arc<Shells>,
    user: UserId,
}

impl Shells {
    pub(crate) fn running(&self) -> usize {
        lock(&self.0).len()
    }

    /// For a user who may have `most` shells. The device's limit is checked first. The error is for the client.
    pub(crate) fn acquire(self: &Arc<Self>, user: &UserId, most: u32) -> Result<ShellPermit, &'static str> {
        let mut users = lock(&self.0);
        if users.len() >= MAX_SHELLS {
            return Err(TOO_MANY);
        }
        let of_user = users.iter().filter(|other| *other == user).count();
        if of_user >= usize::try_from(most).unwrap_or(usize::MAX) {
            return Err(TOO_MANY_OF_USER);
        }
        users.push(user.clone());
        Ok(ShellPermit { shells: Arc::clone(self), user: user.clone() })
    }
}

impl Drop for ShellPermit {
    fn drop(&mut self) {
        let mut users = lock(&self.shells.0);
        if let Some(place) = users.iter().position(|user| *user == self.user) {
            users.swap_remove(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_user_and_in_all() {
        let shells = Arc::<Shells>::default();
        let (a, b) = (UserId::from("a"), UserId::from(""));
        let first = shells.acquire(&a, 2).unwrap();
        let _second = shells.acquire(&a, 2).unwrap();
        assert_eq!(shells.acquire(&a, 2).unwrap_err(), TOO_MANY_OF_USER);
        let _other = shells.acquire(&b, 2).unwrap();
        drop(first);
        assert_eq!(shells.running(), 2);
        let _again = shells.acquire(&a, 2).unwrap();
        let many = Arc::<Shells>::default();
        let mut permits: Vec<_> = (0..MAX_SHELLS).map(|_| many.acquire(&a, 100).unwrap()).collect();
        assert_eq!(many.acquire(&a, 100).unwrap_err(), TOO_MANY);
        permits.pop();
        assert!(many.acquire(&a, 100).is_ok());
    }
}
