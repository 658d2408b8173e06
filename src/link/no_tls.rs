//! In place of `tls.rs` where that feature is left out.

use super::endpoint::Endpoint;
use super::error::{LinkError, TlsFault};
use super::halves::Handshake;

pub(super) fn client(_: &Endpoint) -> Result<Handshake, LinkError> {
    let reason = "built without TLS, only http servers can be reached";
    Err(LinkError::Tls(reason.to_owned(), TlsFault::LeftOut))
}
