//! mender-connect.
