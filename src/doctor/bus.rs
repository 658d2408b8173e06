//! The steps to a token from mender-auth, with the daemon's own client.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use nix::unistd::geteuid;

use super::{Break, Report};
use crate::auth::{ANSWER_LIMIT, AuthEvent, Credentials, Manager, Refusal};
use crate::sys::reason;
use crate::sys::wake::Wake;

const NOT_ACCEPTED: &str = "Is the device accepted on the server? mender-auth gets a token only then. \
    Its log says more: journalctl -u mender-authd";

pub(crate) fn credentials(report: &mut Report) -> Result<Credentials, Break> {
    let (manager, answer) = ask(report).map_err(|e| {
        let advice = "Is D-Bus running (systemctl status dbus)? DBUS_SYSTEM_BUS_ADDRESS, if it is set, has to lead to it.";
        report.bad("bus", &reason(&e), advice)
    })?;
    match (&manager.owner, &answer) {
        (_, Err(Refusal::Absent(why))) => {
            let advice =
                "Is mender-auth running? systemctl status mender-authd (mender-client before Mender 4)";
            let found = format!("nobody is io.mender.AuthenticationManager on the bus: {why}");
            return Err(report.bad("owner", &found, advice));
        }
        (Some(owner), _) => report.good("owner", &format!("mender-auth is {owner}")),
        (None, _) => report.good("owner", "nobody yet, the bus starts mender-auth"),
    }
    if let Err(Refusal::Denied(why)) = &answer {
        let advice = if geteuid().is_root() {
            "The bus's policy has to let root call it: is io.mender.AuthenticationManager.conf in \
                    /usr/share/dbus-1/system.d or /etc/dbus-1/system.d?"
        } else {
            "Run this as root: the bus's policy lets only some users ask for the token."
        };
        return Err(report.bad("policy", why, advice));
    }
    report.good("policy", "lets GetJwtToken be called");

    let restart = "Its log says more: journalctl -u mender-authd. Restarting it may help: systemctl restart mender-authd";
    let (found, advice) = match &answer {
        Ok(Some(credentials)) => return Ok(credentials.clone()),
        Ok(None) if manager.lacks_server => ("mender-auth names no server for it", restart),
        Ok(None) => ("mender-auth has none", NOT_ACCEPTED),
        Err(Refusal::Silent(_)) => ("mender-auth doesn't answer in time", restart),
        Err(why) => (&*format!("mender-auth answers: {why}"), restart),
    };
    Err(report.bad("token", found, advice))
}

/// Connects to the bus, and waits until mender-auth answers or cannot.
fn ask(report: &mut Report) -> io::Result<(Manager, Result<Option<Credentials>, Refusal>)> {
    let mut manager = Manager::new(Arc::new(Wake::new()?), true);
    let start = Instant::now();
    let mut connected = false;
    loop {
        // Once connected the manager has a timer of its own.
        let limit = if connected { Instant::now() } else { start } + ANSWER_LIMIT;
        let events = manager.wait(limit)?;
        if let (false, Some(name)) = (connected, manager.name()) {
            let address = std::env::var("DBUS_SYSTEM_BUS_ADDRESS");
            let address = address.as_deref().unwrap_or("the system bus");
            report.good("bus", &format!("connected to {address} as {name}"));
            connected = true;
        }
        for event in events {
            if let AuthEvent::Answered(answer) = event {
                return Ok((manager, answer));
            }
        }
        if !connected && Instant::now() >= limit {
            return Err(io::Error::other(format!("no answer within {} s", ANSWER_LIMIT.as_secs())));
        }
    }
}
