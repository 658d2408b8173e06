//! Buffers that are used again and again while there is much to carry. To allocate one for each message would mean to
//! have its pages mapped and unmapped each time, too, with musl's allocator.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A few buffers that nobody uses now.
#[derive(Debug)]
pub struct Spares {
    most: usize,
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl Spares {
    /// Keeps at most so many.
    pub fn new(most: usize) -> Self {
        Spares { most, buffers: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of at least so many bytes, of any content.
    pub fn take(&self, size: usize) -> Vec<u8> {
        let mut buffers = self.lock();
        let fitting = buffers.iter().position(|bytes| bytes.len() >= size);
        fitting.map_or_else(|| vec![0; size], |at| buffers.swap_remove(at))
    }

    /// Keeps a buffer for later, if there is room.
    pub fn give(&self, bytes: Vec<u8>) {
        let mut buffers = self.lock();
        if buffers.len() < self.most {
            buffers.push(bytes);
        }
    }

    /// Gives the memory of all of them back.
    pub fn clear(&self) {
        *self.lock() = Vec::new();
    }

    /// How many there are.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.lock().len()
    }
}
