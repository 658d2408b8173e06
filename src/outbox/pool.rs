//! Reuses buffers: musl maps and unmaps the pages of each one, half of a download's time and a third of an upload's.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use crate::sys::lock;

#[derive(Debug, Clone)]
pub(crate) struct Pool {
    most: usize,
    buffers: Arc<Mutex<Vec<Vec<u8>>>>,
    lent: Arc<AtomicUsize>,
}

/// Returns its buffer to the pool on drop.
struct Part {
    buffer: Vec<u8>,
    range: Range<usize>,
    pool: Pool,
}

impl Pool {
    /// Keeps up to `most` unused buffers.
    pub(crate) fn new(most: usize) -> Self {
        Pool { most, buffers: Arc::default(), lent: Arc::default() }
    }

    /// Buffers that were taken and haven't returned.
    pub(crate) fn lent(&self) -> usize {
        self.lent.load(Ordering::Relaxed)
    }

    /// At least `size` bytes with any content, to be frozen.
    pub(crate) fn take(&self, size: usize) -> Vec<u8> {
        self.lent.fetch_add(1, Ordering::Relaxed);
        let mut buffers = lock(&self.buffers);
        if let Some(at) = buffers.iter().position(|buffer| buffer.len() >= size) {
            return buffers.swap_remove(at);
        }
        // Replace one that is too small.
        buffers.pop();
        vec![0; size]
    }

    /// The buffer returns to the pool when the last clone is dropped.
    pub(crate) fn freeze(&self, buffer: Vec<u8>, range: Range<usize>) -> Bytes {
        Bytes::from_owner(Part { buffer, range, pool: self.clone() })
    }

    pub(crate) fn clear(&self) {
        *lock(&self.buffers) = Vec::new();
    }
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[self.range.clone()]
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.pool.lent.fetch_sub(1, Ordering::Relaxed);
        let mut buffers = lock(&self.pool.buffers);
        if buffers.len() < self.pool.most {
            buffers.push(std::mem::take(&mut self.buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again_and_freed_when_asked() {
        let pool = Pool::new(2);
        let place = |size| {
            let buffer = pool.take(size);
            let place = buffer.as_ptr();
            drop(pool.freeze(buffer, 0..size));
            place
        };
        let first = place(10);
        assert_eq!(place(5), first);
        // A larger one takes its place.
        let larger = pool.take(20);
        assert!(lock(&pool.buffers).is_empty());
        let part = pool.freeze(larger, 3..5);
        assert_eq!(part, [0, 0][..]);
        drop((part.clone(), pool.freeze(vec![], 0..0), pool.freeze(vec![], 0..0)));
        drop(part);
        assert_eq!(lock(&pool.buffers).len(), 2);
        pool.clear();
        assert!(lock(&pool.buffers).is_empty());
    }
}
