//! Arguments, configuration, log, run; a `Result` becomes an exit code.
fn main() {}
