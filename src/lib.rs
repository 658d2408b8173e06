//! mender-connect.
pub mod proto;
