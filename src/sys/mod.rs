//! What the operating system offers, behind safe functions.

pub mod users;
