//! The project on a distribution: its packages, the layer for Yocto, init systems, and the commands of
//! its pages, on machines of their own. `tests/lab/run` runs them; most take root and Debian.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod buildroot;
mod docs;
#[path = "../it/harness/mod.rs"]
#[allow(dead_code, reason = "the harness serves the tests of behaviour first")]
mod harness;
mod inits;
mod machine;
mod packaging;
mod restart;
mod sbom;
mod unprivileged;
mod yocto;
