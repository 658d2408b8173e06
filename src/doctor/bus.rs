//! The steps of a token from mender-auth: the daemon's own client, driven until it has an answer.

use std::sync::Arc;
use std::time::Instant;

use nix::unistd::geteuid;

use super::{Break, Report};
use crate::auth::{ANSWER_LIMIT, AuthEvent, Credentials, Manager, Refusal, SourceError};
use crate::sys::reason;
use crate::sys::wake::Wake;

const NOT_ACCEPTED: &str = "Is the device accepted on the server? mender-auth gets a token only then. \
    Its log says more: journalctl -u mender-authd";

pub(crate) fn credentials(report: &mut Report) -> Result<Credentials, Break> {
    let no_bus = |report: &mut Report, SourceError::Bus(why)| {
        let advice = "Is D-Bus running (systemctl status dbus)? DBUS_SYSTEM_BUS_ADDRESS, if it is set, has to lead to it.";
        report.bad("bus", &why, advice)
    };
    let mut limit = Instant::now() + ANSWER_LIMIT;
    let wake = Wake::new().map_err(|e| no_bus(report, SourceError::Bus(reason(&e))))?;
    let mut manager = Manager::new(Arc::new(wake), true);
    let mut connected = false;
    let answer = loop {
        let events = manager.wait(limit).map_err(|e| no_bus(report, e))?;
        if let (false, Some(name)) = (connected, manager.name()) {
            let address = std::env::var("DBUS_SYSTEM_BUS_ADDRESS");
            let address = address.as_deref().unwrap_or("the system bus");
            report.good("bus", &format!("connected to {address} as {name}"));
            connected = true;
            // The manager reports an answer that doesn't come; this only keeps the loop from spinning.
            limit = Instant::now() + ANSWER_LIMIT * 2;
        }
        let answer = events.into_iter().find_map(|event| match event {
            AuthEvent::Answered(credentials) => Some(Ok(credentials)),
            AuthEvent::Unanswered(refusal) => Some(Err(refusal)),
            AuthEvent::Changed(_) => None,
        });
        if let Some(answer) = answer {
            break answer;
        }
        if !connected && Instant::now() >= limit {
            let why = format!("no answer within {} s", ANSWER_LIMIT.as_secs());
            return Err(no_bus(report, SourceError::Bus(why)));
        }
    };

    match (&manager.owner, &answer) {
        (_, Err(Refusal::Absent(_))) => {
            let start =
                "Is mender-auth running? systemctl status mender-authd (mender-client before Mender 4)";
            return Err(report.bad("owner", "nobody is io.mender.AuthenticationManager on the bus", start));
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
    match answer {
        Ok(Some(credentials)) => Ok(credentials),
        Ok(None) if manager.lacks_server => {
            Err(report.bad("token", "mender-auth names no server for it", restart))
        }
        Ok(None) => Err(report.bad("token", "mender-auth has none", NOT_ACCEPTED)),
        Err(Refusal::Silent(_)) => Err(report.bad("token", "mender-auth doesn't answer in time", restart)),
        Err(why) => Err(report.bad("token", &format!("mender-auth answers: {why}"), restart)),
    }
}
