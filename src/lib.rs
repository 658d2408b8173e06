//! mender-connect.
pub mod config;
pub mod sys;
