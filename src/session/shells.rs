//! The limits on shells.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use crate::proto::UserId;

/// Shells on the device at a time.
pub(crate) const MAX_SHELLS: usize = 16;

/// Why there can't be another shell. Clients know the texts.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum Refusal {
    #[error("too many shells spawned")]
    Device,
    /// The user has Sessions.MaxPerUser shells.
    #[error("user has too many open sessions")]
    User,
}

/// Whose shells the device has.
#[derive(Debug, Default)]
pub(crate) struct Shells(Mutex<Vec<UserId>>);

/// The right to one shell, returned on drop.
#[derive(Debug)]
pub(crate) struct ShellPermit {
    shells: Arc<Shells>,
    user: UserId,
}

impl Shells {
    fn lock(&self) -> MutexGuard<'_, Vec<UserId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn running(&self) -> usize {
        self.lock().len()
    }

    /// Takes a permit for a user who may have `max_per_user` shells. The device's limit is checked first.
    pub(crate) fn acquire(
        self: &Arc<Self>,
        user: &UserId,
        max_per_user: u32,
    ) -> Result<ShellPermit, Refusal> {
        let mut users = self.lock();
        if users.len() >= MAX_SHELLS {
            return Err(Refusal::Device);
        }
        let of_user = users.iter().filter(|other| *other == user).count();
        if of_user >= usize::try_from(max_per_user).unwrap_or(usize::MAX) {
            return Err(Refusal::User);
        }
        users.push(user.clone());
        Ok(ShellPermit { shells: Arc::clone(self), user: user.clone() })
    }
}

impl Drop for ShellPermit {
    fn drop(&mut self) {
        let mut users = self.shells.lock();
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
        assert_eq!(shells.acquire(&a, 2).unwrap_err(), Refusal::User);
        let _other = shells.acquire(&b, 2).unwrap();
        drop(first);
        assert_eq!(shells.running(), 2);
        let _again = shells.acquire(&a, 2).unwrap();
        let many = Arc::<Shells>::default();
        let mut permits: Vec<_> = (0..MAX_SHELLS).map(|_| many.acquire(&a, 100).unwrap()).collect();
        assert_eq!(many.acquire(&a, 100).unwrap_err(), Refusal::Device);
        permits.pop();
        assert!(many.acquire(&a, 100).is_ok());
    }
}
