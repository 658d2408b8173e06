//! mender-connect.

pub mod auth;
pub mod backoff;
pub mod cli;
pub mod config;
pub mod link;
pub mod logging;
pub mod outbox;
pub mod proto;
pub mod session;
pub mod supervisor;
pub mod sys;
