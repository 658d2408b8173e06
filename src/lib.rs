//! mender-connect.
pub mod cli;
pub mod config;
pub mod sys;
