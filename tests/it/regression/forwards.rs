//! Port forwarding.
