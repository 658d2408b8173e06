//! An allocator that wipes freed memory: libraries copy the token and typed passwords.

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;

/// In bytes. Larger blocks hold files and output; a token is never larger than the headers that a server accepts.
const LARGEST: usize = 16 * 1024;

/// Wipes blocks of up to 16 KiB when they are freed.
pub struct Wiping;

// SAFETY: memory comes from the system's allocator and goes back to it with the same layout. Writes stay
// within a block that its owner has given up.
unsafe impl GlobalAlloc for Wiping {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if layout.size() <= LARGEST {
            // SAFETY: the block has that size and is the caller's to give up.
            unsafe { block.write_bytes(0, layout.size()) };
            // Best effort: otherwise the compiler would drop a write that nobody reads.
            black_box(block);
        }
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(block, layout) }
    }

    // The default `realloc` moves a block by these functions; the system's would leave a copy behind.
}

/// Wipes the strings of a processed message: libdbus reuses freed messages.
#[cfg(feature = "dbus")]
pub(crate) fn wipe_texts(message: &mut dbus::Message) {
    let mut arguments = message.iter_init();
    loop {
        if let Some(text) = arguments.get::<&str>() {
            let (start, length) = (text.as_ptr().addr(), text.len());
            // By address: the text was borrowed for reading only.
            let start = std::ptr::with_exposed_provenance_mut::<u8>(start);
            // SAFETY: these bytes are the text without the zero behind it, in memory of libdbus that lives as long as
            // the message. The message is borrowed exclusively, and no borrow of the text lives any more.
            unsafe { start.write_bytes(0, length) };
            black_box(start);
        }
        if !arguments.next() {
            return;
        }
    }
}
