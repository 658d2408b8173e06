//! File transfer.
