//! The executable: the library's `run`, with an allocator that wipes what is freed.

use std::process::ExitCode;

use mender_connect::Wiping;

#[global_allocator]
static MEMORY: Wiping = Wiping;

fn main() -> ExitCode {
    mender_connect::run()
}
