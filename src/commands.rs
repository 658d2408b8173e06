//! Protocol 4, the Mender client's commands, which need no session. The link's reader calls this; each running command
//! has a thread.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use log::info;

use crate::audit::Record;
use crate::outbox::Outbox;
use crate::proto::{Frame, MENDER_CLIENT, Map};
use crate::sys::{lock, process, reason, thread};

const COMMANDS: [&str; 2] = ["check-update", "send-inventory"];
/// The first of these that exists is run.
const CLIENTS: [&str; 2] = ["/usr/bin/mender-update", "/usr/bin/mender"];
const LIMIT: Duration = Duration::from_secs(600);
/// Requests that wait for a running command; further ones get no answer.
const MAX_WAITING: usize = 64;

#[derive(Default)]
pub(crate) struct Commands(Mutex<HashMap<&'static str, Vec<Waiting>>>);

struct Waiting {
    request: Frame,
    outbox: Outbox,
    since: Instant,
}

/// Runs the command, or joins the run in progress. The answer goes to `outbox`, unless that is full.
pub(crate) fn handle(commands: &Arc<Commands>, frame: &Frame, outbox: &Outbox) {
    let Some(command) = COMMANDS.into_iter().find(|command| *command == frame.typ) else {
        outbox.try_reply(&answer(frame, &Err("unknown message type".to_owned())));
        return;
    };
    let one = Waiting { request: frame.without_body(), outbox: outbox.clone(), since: Instant::now() };
    let mut running = lock(&commands.0);
    let waiting = running.entry(command).or_default();
    if waiting.len() < MAX_WAITING {
        waiting.push(one);
    }
    if waiting.len() > 1 {
        return;
    }
    drop(running);
    let theirs = Arc::clone(commands);
    let body = move || finish(&theirs, command, &run(command));
    if let Err(e) = thread::spawn(command, thread::SMALL_STACK, body) {
        finish(commands, command, &Err(reason(&e)));
    }
}

/// Answers are dropped if the outbox is full: a thread for each run would wait for a link that is slow or isn't read.
fn finish(commands: &Commands, command: &str, result: &Result<(), String>) {
    let waiting = lock(&commands.0).remove(command).unwrap_or_default();
    for Waiting { request, outbox, since } in waiting {
        Record::new("command", request.sid.as_ref(), &request.user())
            .with("command", command)
            .since(since, Instant::now())
            .with("result", if result.is_ok() { "ok" } else { "failed" })
            .text("reason", result.as_ref().err().map_or("", String::as_str))
            .log(result.is_ok());
        outbox.try_reply(&answer(&request, result));
    }
}

fn run(command: &str) -> Result<(), String> {
    let client = CLIENTS
        .into_iter()
        .find(|client| Path::new(client).exists())
        .ok_or_else(|| format!("Cannot find Mender client binary, tried [{}]", CLIENTS.join(" ")))?;
    info!("running {client} {command}");
    process::run(Path::new(client), command, LIMIT)
}

fn answer(frame: &Frame, result: &Result<(), String>) -> Frame {
    let status = if result.is_ok() { 1 } else { 2 };
    let reply = Frame::new(MENDER_CLIENT, &frame.typ, frame.sid.as_ref())
        .with_props(Map::new().with_i64("status", status));
    match result {
        Ok(()) => reply,
        Err(text) => reply.with_body(text.clone()),
    }
}
