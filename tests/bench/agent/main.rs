//! Measures a whole agent from outside: the real executable, ours or somebody else's, with a private bus, a
//! manager and a server on loopback. `tests/bench/README.md` says what is measured.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "outages and slow targets last for a time")]
#![allow(dead_code, reason = "the harness serves the integration tests first")]

mod churn;
mod cores;
mod envelope;
mod files;
mod forwarder;
mod forwards;
#[path = "../../it/harness/mod.rs"]
mod harness;
mod interrupt;
mod limits;
mod link;
mod mixed;
mod options;
mod people;
mod process;
mod resources;
mod row;
mod stage;
mod table;
mod terminal;
mod yardstick;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Duration;

use options::{Options, Wish};
use row::{Figure, Measure, Row, Scale};
use stage::Agent;
use table::Table;

fn main() -> ExitCode {
    let rows = rows();
    let options = match options::parse(std::env::args().skip(1), &rows) {
        Ok(Wish::Run(options)) => options,
        Ok(Wish::Help) => {
            print!("{}", options::HELP);
            return ExitCode::SUCCESS;
        }
        Ok(Wish::List) => {
            for row in rows {
                println!("{:24} {}", row.name, row.about);
            }
            return ExitCode::SUCCESS;
        }
        Ok(Wish::Yardstick) => {
            println!("{}\n", table::machine());
            return end(yardstick::run());
        }
        Err(why) => {
            eprintln!("agent: {why}\n\n{}", options::HELP);
            return ExitCode::from(2);
        }
    };
    if let Err(why) = interrupt::catch() {
        eprintln!("agent: {why}");
        return ExitCode::FAILURE;
    }
    println!("{}\n", table::machine());
    if options.limits {
        let agent = options.agents.last().expect("there is always one");
        return end(limits::run(agent, &rows, scale(&options), options.rounds));
    }
    let mut table = Table::new(options.agents.iter().map(|agent| agent.name.clone()).collect());
    for row in rows.iter().filter(|row| options.wants(&row.name)) {
        if interrupt::is_interrupted() {
            break;
        }
        measure(row, &options, &mut table);
    }
    print!("{table}");
    if interrupt::is_interrupted() { ExitCode::from(130) } else { ExitCode::SUCCESS }
}

fn end(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("agent: {why}");
            ExitCode::FAILURE
        }
    }
}

fn rows() -> Vec<Row> {
    let rows = [
        resources::rows(),
        terminal::rows(),
        mixed::rows(),
        files::rows(),
        forwards::rows(),
        churn::rows(),
        people::rows(),
    ];
    rows.into_iter().flatten().collect()
}

fn scale(options: &Options) -> Scale {
    let span = if options.quick { 1 } else { 5 };
    Scale { span: Duration::from_secs(span), quick: options.quick }
}

/// Measures all agents in turns.
fn measure(row: &Row, options: &Options, table: &mut Table) {
    let scale = scale(options);
    let mut ready: Vec<Option<Measure>> = Vec::new();
    for agent in &options.agents {
        let prepared = guarded(|| (row.prepare)(agent, scale));
        ready.push(prepared.map_err(|why| fail(row, agent, &why)).ok());
    }
    let mut figures: Vec<Vec<Vec<Figure>>> = vec![Vec::new(); ready.len()];
    for round in 1..=options.rounds {
        for ((agent, measure), figures) in options.agents.iter().zip(&mut ready).zip(&mut figures) {
            let Some(once) = measure else { continue };
            match guarded(once) {
                Ok(measured) => {
                    eprintln!("{} {round} {}: {}", row.name, agent.name, table::line(&measured));
                    figures.push(measured);
                }
                Err(why) => {
                    fail(row, agent, &why);
                    *measure = None;
                }
            }
        }
    }
    table.add(&row.name, &figures);
}

fn fail(row: &Row, agent: &Agent, why: &str) {
    eprintln!("{} {}: –, since {why}", row.name, agent.name);
}

/// The harness fails by panicking.
fn guarded<T>(run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    if interrupt::is_interrupted() {
        return Err("interrupted".to_owned());
    }
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.or_else(|| panic.downcast_ref().map(|text: &&str| (*text).to_owned())).unwrap_or_default())
    })
}
