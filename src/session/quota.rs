//! The limit on shells. Dropping a permit returns it.

use std::collections::HashMap;
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

/// The device's shells, counted by user.
#[derive(Debug, Default)]
pub(crate) struct ShellQuota {
    running: Mutex<HashMap<UserId, usize>>,
}

/// The right to one shell, returned on drop.
#[derive(Debug)]
pub(crate) struct ShellPermit {
    quota: Arc<ShellQuota>,
    user: UserId,
}

impl ShellQuota {
    fn lock(&self) -> MutexGuard<'_, HashMap<UserId, usize>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All shells on the device.
    pub(crate) fn running(&self) -> usize {
        self.lock().values().sum()
    }

    /// Takes a permit for a user who may have `max_per_user` shells. The device's limit is checked first.
    pub(crate) fn acquire(
        self: &Arc<Self>,
        user: &UserId,
        max_per_user: u32,
    ) -> Result<ShellPermit, Refusal> {
        let mut running = self.lock();
        let of_user = check(&running, user, max_per_user)?;
        running.insert(user.clone(), of_user + 1);
        Ok(ShellPermit { quota: Arc::clone(self), user: user.clone() })
    }

    /// As [`ShellQuota::acquire`], without taking a permit.
    pub(crate) fn check(&self, user: &UserId, max_per_user: u32) -> Result<(), Refusal> {
        check(&self.lock(), user, max_per_user).map(drop)
    }
}

fn check(running: &HashMap<UserId, usize>, user: &UserId, max_per_user: u32) -> Result<usize, Refusal> {
    if running.values().sum::<usize>() >= MAX_SHELLS {
        return Err(Refusal::Device);
    }
    let of_user = running.get(user).copied().unwrap_or(0);
    if of_user >= usize::try_from(max_per_user).unwrap_or(usize::MAX) {
        return Err(Refusal::User);
    }
    Ok(of_user)
}

impl Drop for ShellPermit {
    fn drop(&mut self) {
        let mut running = self.quota.lock();
        match running.get_mut(&self.user) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                running.remove(&self.user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_user_and_in_all() {
        let quota = Arc::<ShellQuota>::default();
        let (a, b) = (UserId::from("a"), UserId::from(""));
        let first = quota.acquire(&a, 2).unwrap();
        let _second = quota.acquire(&a, 2).unwrap();
        assert_eq!(quota.acquire(&a, 2).unwrap_err(), Refusal::User);
        let _other = quota.acquire(&b, 2).unwrap();
        drop(first);
        assert_eq!(quota.running(), 2);
        let _again = quota.acquire(&a, 2).unwrap();
        let many = Arc::<ShellQuota>::default();
        let mut permits: Vec<_> = (0..MAX_SHELLS).map(|_| many.acquire(&a, 100).unwrap()).collect();
        assert_eq!(many.acquire(&a, 100).unwrap_err(), Refusal::Device);
        permits.pop();
        assert!(many.acquire(&a, 100).is_ok());
    }
}
