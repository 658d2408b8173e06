//! Clients and users who mean harm.
