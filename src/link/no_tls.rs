//! In place of `tls.rs` where that feature is left out.

use std::sync::Arc;

use super::deadline::Deadline;
use super::endpoint::Endpoint;
use super::error::{LinkError, TlsFault};
use super::halves::Tls;

pub(super) enum Client {}

impl Client {
    pub(super) fn new(_: &Endpoint) -> Result<Self, LinkError> {
        let reason = "built without TLS, only http servers can be reached";
        Err(LinkError::Tls(reason.to_owned(), TlsFault::LeftOut))
    }

    pub(super) fn handshake(self, _: Deadline<'_>) -> Result<Arc<dyn Tls>, LinkError> {
        match self {}
    }
}
