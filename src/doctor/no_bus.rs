//! In the place of `bus` where the feature `dbus` is left out.

use super::{Break, Report};
use crate::auth::Credentials;

pub(crate) fn credentials(report: &mut Report) -> Result<Credentials, Break> {
    let why = "built without D-Bus, there is nothing to get a token from";
    Err(report.bad("bus", why, "Use an executable with it, or set Auth.Source to \"file\"."))
}
