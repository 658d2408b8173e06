//! Reuses buffers: musl maps and unmaps the pages of each one, half of a download's time and a third of an upload's.

use std::sync::{Arc, Mutex};

use crate::sys::lock;

#[derive(Clone)]
pub(crate) struct Pool {
    most: usize,
    buffers: Arc<Mutex<Vec<Vec<u8>>>>,
}

/// Returns its buffer to the pool on drop.
pub(crate) struct Lent {
    pub(crate) buffer: Vec<u8>,
    pool: Pool,
}

impl Pool {
    /// Keeps up to `most` unused buffers.
    pub(crate) fn new(most: usize) -> Self {
        Pool { most, buffers: Arc::default() }
    }

    /// Buffers that haven't returned: each has a clone of the only pool.
    pub(crate) fn lent(&self) -> usize {
        Arc::strong_count(&self.buffers) - 1
    }

    /// At least `size` bytes with any content.
    pub(crate) fn take(&self, size: usize) -> Lent {
        let mut buffers = lock(&self.buffers);
        let buffer = match buffers.iter().position(|buffer| buffer.len() >= size) {
            Some(at) => buffers.swap_remove(at),
            None => {
                // Replace one that is too small.
                buffers.pop();
                vec![0; size]
            }
        };
        Lent { buffer, pool: self.clone() }
    }

    pub(crate) fn clear(&self) {
        *lock(&self.buffers) = Vec::new();
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut buffers = lock(&self.pool.buffers);
        if buffers.len() < self.pool.most {
            buffers.push(std::mem::take(&mut self.buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn buffers_are_used_again_and_freed_when_asked() {
        let pool = Pool::new(2);
        let place = |size| {
            let lent = pool.take(size);
            lent.buffer.as_ptr()
        };
        let first = place(10);
        assert_eq!(place(5), first);
        // A larger one takes its place.
        let larger = pool.take(20);
        assert!(lock(&pool.buffers).is_empty());
        let message = Bytes::from_owner(larger).slice(3..5);
        assert_eq!(message, [0, 0][..]);
        let others = (message.clone(), pool.take(1), pool.take(1));
        assert_eq!(pool.lent(), 3);
        drop(others);
        assert_eq!(pool.lent(), 1);
        drop(message);
        assert_eq!((pool.lent(), lock(&pool.buffers).len()), (0, 2));
        pool.clear();
        assert!(lock(&pool.buffers).is_empty());
    }
}
