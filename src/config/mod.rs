//! The configuration.

pub mod json;
