//! The Mender client's commands: protocol 4. Stateless, mostly without a session; called in the link's reader
//! and done in a thread for each running command.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::{info, warn};

use super::Context;
use crate::outbox::FrameSink;
use crate::proto::{Frame, MENDER_CLIENT, Props};
use crate::sys::process;
use crate::sys::thread;

const COMMANDS: [&str; 2] = ["check-update", "send-inventory"];
/// The first one that exists is the client.
const CLIENTS: [&str; 2] = ["/usr/bin/mender-update", "/usr/bin/mender"];
const LIMIT: Duration = Duration::from_secs(600);
/// Those who wait for a running command. More get no answer.
const MAX_WAITING: usize = 64;

/// The commands that are running, with those who wait for their end.
#[derive(Debug, Default)]
pub struct Commands(Mutex<HashMap<String, Vec<(Frame, FrameSink)>>>);

impl Commands {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<(Frame, FrameSink)>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Obeys a frame: runs the command, or waits with others for the run under way. The answer goes to `sink`.
pub fn handle(context: &Arc<Context>, frame: &Frame, sink: &FrameSink) {
    let Some(command) = COMMANDS.into_iter().find(|command| *command == frame.typ) else {
        return answer(frame, sink, &Err("unknown message type".to_owned()));
    };
    {
        let mut running = context.commands.lock();
        if let Some(waiting) = running.get_mut(command) {
            if waiting.len() < MAX_WAITING {
                waiting.push((frame.clone(), sink.clone()));
            }
            return;
        }
        running.insert(command.to_owned(), vec![(frame.clone(), sink.clone())]);
    }
    let theirs = Arc::clone(context);
    let started = thread::spawn(command, thread::SMALL_STACK, move || {
        let result = run(command);
        finish(&theirs, command, &result);
    });
    if let Err(e) = started {
        finish(context, command, &Err(crate::sys::reason(&e)));
    }
}

fn finish(context: &Context, command: &str, result: &Result<(), String>) {
    match result {
        Ok(()) => info!("{command}: done"),
        Err(e) => warn!("{command}: {e}"),
    }
    let waiting = context.commands.lock().remove(command).unwrap_or_default();
    for (frame, sink) in waiting {
        answer(&frame, &sink, result);
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

fn answer(frame: &Frame, sink: &FrameSink, result: &Result<(), String>) {
    let status = if result.is_ok() { 1 } else { 2 };
    let reply = Frame::new(MENDER_CLIENT, &frame.typ, frame.sid.as_ref())
        .with_props(Props::new().with_i64("status", status));
    // A server that asks without end and doesn't read the answers gets no more.
    if sink.takes_replies() {
        sink.reply(&match result {
            Ok(()) => reply,
            Err(text) => reply.with_body(text.clone()),
        });
    }
}
