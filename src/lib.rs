//! mender-connect.
pub mod sys;
