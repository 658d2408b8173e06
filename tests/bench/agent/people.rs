//! Rows that people feel: output through the released server, a terminal after one whose tab was closed, and a device
//! after an outage.

use std::collections::VecDeque;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::envelope::{Header, Kind};
use crate::harness::network::{self, with_network};
use crate::harness::program;
use crate::interrupt::unblocked;
use crate::row::{Figure, KIB, MIB, Measure, Row, SOON, Scale, figure, row};
use crate::stage::{Agent, Stage, Way, config, folder};
use crate::terminal::{ECHO, new_shell, start_shell, stop_shell, type_in};

/// Messages of a session that wait for its client at the released server. The server drops further ones.
const SLOTS: usize = 25;
const OUTPUT: &str = "stty raw -echo; printf READY; while read go; do seq 1 900000; done";
/// Bytes of that.
const PRINTED: usize = 6_188_895;

pub fn rows() -> Vec<Row> {
    let fast = Reader { message: Duration::from_micros(30), rate: 200.0 * MIB };
    let slow = Reader { message: Duration::from_micros(30), rate: MIB };
    let mut rows = vec![
        row("released-fast", "seq 1 900000 through the released server's 25 slots, to a fast client", {
            move |agent, _| prepare_released(agent, fast)
        }),
        row("released-slow", "the same to a client that reads 1 MiB/s", move |agent, _| {
            prepare_released(agent, slow)
        }),
        row("next-terminal", "a user's terminal after one whose tab was closed without a word", prepare_next),
    ];
    for seconds in [5, 60] {
        let about = format!("the link after a server that was away for {seconds} s");
        rows.push(row(format!("return-server-{seconds}s"), about, move |agent, _| {
            let stage = Stage::start(agent, &config("exit 0"), Way::Direct)?;
            stage.measured(move |stage| {
                let outage = || {
                    std::thread::sleep(Duration::from_secs(seconds));
                    Ok(())
                };
                Ok(vec![figure("back after", "s", stage.lose(true, outage)?.as_secs_f64())])
            })
        }));
    }
    let about = "the link after the device was without a route for 60 s; as root";
    rows.push(row("return-route-60s", about, |agent, _| {
        let agent = agent.clone();
        Ok(Box::new(move || return_of_route(&agent)))
    }));
    rows
}

/// A client, and the server's connection to it.
#[derive(Debug, Clone, Copy)]
struct Reader {
    /// For each message.
    message: Duration,
    /// Bytes per second.
    rate: f64,
}

fn prepare_released(agent: &Agent, reader: Reader) -> Result<Measure, String> {
    let stage = Stage::start(agent, &config(OUTPUT), Way::Direct)?;
    stage.measured(move |stage| {
        let session = stage.session();
        start_shell(&mut stage.link, session)?;
        stage.link.passes_pings = true;
        let figures = print_through_slots(stage, session, reader);
        stage.link.passes_pings = false;
        stop_shell(&mut stage.link, session)?;
        figures
    })
}

fn print_through_slots(stage: &mut Stage, session: u32, reader: Reader) -> Result<Vec<Figure>, String> {
    let link = &mut stage.link;
    type_in(link, session, b"\n")?;
    let started = Instant::now();
    // The waiting messages, and when the client has each.
    let mut slots: VecDeque<(Instant, Header)> = VecDeque::new();
    let (mut sent, mut lost, mut last) = (0, 0, started);
    loop {
        while let Some((at, header)) = slots.front().cloned().filter(|(at, _)| *at <= Instant::now()) {
            slots.pop_front();
            last = at;
            if header.kind == Kind::Ping {
                link.pong(&header)?;
            }
        }
        if sent >= PRINTED && slots.is_empty() {
            break;
        }
        let patience = Instant::now() + SOON;
        let Some(header) = link.next(slots.front().map_or(patience, |(at, _)| *at))? else {
            if slots.is_empty() {
                return Err(format!("{sent} of {PRINTED} bytes, and no more for {SOON:?}"));
            }
            continue;
        };
        sent += header.body;
        if slots.len() >= SLOTS {
            lost += header.body;
            continue;
        }
        let takes = reader.message + Duration::from_secs_f64(header.body as f64 / reader.rate);
        let begins = slots.back().map_or(last, |(at, _)| *at).max(Instant::now());
        slots.push_back((begins + takes, header));
    }
    let seconds = last.saturating_duration_since(started).as_secs_f64();
    Ok(vec![
        figure("lost", "KiB", lost as f64 / KIB),
        figure("lost, of all", "%", lost as f64 / PRINTED as f64 * 100.0),
        figure("took", "s", seconds),
    ])
}

fn prepare_next(agent: &Agent, _: Scale) -> Result<Measure, String> {
    let mut config = config(ECHO);
    config["Sessions"] = json!({ "MaxPerUser": 1 });
    let stage = Stage::start(agent, &config, Way::Direct)?;
    stage.measured(|stage| {
        let (closed, next) = (stage.session(), stage.session());
        let link = &mut stage.link;
        start_shell(link, closed)?;
        link.gone = Some(closed);
        let started = Instant::now();
        loop {
            link.put(&new_shell(next))?;
            if link.expect(next, Kind::New, SOON)?.status == 1 {
                break;
            }
            if started.elapsed() > Duration::from_secs(200) {
                return Err("no terminal for 200 s".to_owned());
            }
            link.rest(Instant::now() + Duration::from_millis(250))?;
        }
        let took = started.elapsed();
        link.gone = None;
        stop_shell(link, next)?;
        Ok(vec![figure("opens after", "s", took.as_secs_f64())])
    })
}

/// In network namespaces.
fn return_of_route(agent: &Agent) -> Result<Vec<Figure>, String> {
    let (result, returned) = mpsc::channel();
    let agent = agent.clone();
    with_network(move |network| {
        let measure = || {
            let dir = folder()?;
            let path = dir.path().join("agent");
            let (net, program) = (network.namespace(), agent.path.display());
            let script = format!("#!/bin/sh\nexec nsenter --net={net} {program} \"$@\"\n");
            unblocked(|| program::write(&path, script.as_bytes()));
            let agent = Agent { path, ..agent };
            let mut stage = Stage::start(&agent, &config("exit 0"), Way::At(network::SERVER))?;
            let took = stage.lose(false, || {
                network.near("ip route del default");
                std::thread::sleep(Duration::from_secs(60));
                network.near("ip route add default via 192.0.2.1");
                Ok(())
            })?;
            Ok(vec![figure("back after", "s", took.as_secs_f64())])
        };
        let _ = result.send(measure());
    });
    returned.recv().map_err(|_| "no network can be made here".to_owned())?
}
