//! The command line.

use std::path::PathBuf;

use crate::row::Row;
use crate::stage::Agent;

pub const HELP: &str = "\
Measures an agent from outside and prints a table.

  cargo bench --locked --bench agent -- [options]

  --agent NAME=PATH    an executable to measure, in place of this project's release build. Given twice or more,
                       they are measured in turns, and the last one is what the others are compared with
  --only ROW[,ROW]     only these rows, or those whose names begin so
  --rounds N           how often each figure is measured; the median is printed (default 3)
  --quick              short and rough, in one round
  --limits             measures what the machine does without an agent, too, and prints the last agent beside that
  --yardstick          measures what the bench itself could take, from an agent that costs nothing
  --list               lists the rows
  --help               says this
";

pub struct Options {
    pub agents: Vec<Agent>,
    pub rounds: usize,
    pub quick: bool,
    pub limits: bool,
    only: Vec<String>,
}

/// What was asked for.
pub enum Wish {
    Run(Options),
    Help,
    Yardstick,
    List,
}

impl Options {
    pub fn wants(&self, row: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == row)
    }
}

pub fn parse(mut args: impl Iterator<Item = String>, rows: &[Row]) -> Result<Wish, String> {
    let mut options =
        Options { agents: Vec::new(), rounds: 0, quick: false, limits: false, only: Vec::new() };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--agent" => options.agents.push(agent(&value()?)?),
            "--only" => options.only.extend(value()?.split(',').map(str::to_owned)),
            "--rounds" => options.rounds = value()?.parse().map_err(|_| "--rounds needs a number")?,
            "--quick" => options.quick = true,
            "--limits" => options.limits = true,
            "--yardstick" => return Ok(Wish::Yardstick),
            "--list" => return Ok(Wish::List),
            "--help" | "-h" => return Ok(Wish::Help),
            // cargo's own.
            "--bench" => {}
            _ => return Err(format!("unknown option {arg}")),
        }
    }
    let mut only = Vec::new();
    for wanted in &options.only {
        let named = |test: &dyn Fn(&str) -> bool| -> Vec<String> {
            rows.iter().map(|row| row.name.clone()).filter(|name| test(name)).collect()
        };
        let exactly = named(&|name| name == wanted);
        let found = if exactly.is_empty() { named(&|name| name.starts_with(wanted)) } else { exactly };
        if found.is_empty() {
            return Err(format!("no row is or begins with {wanted}"));
        }
        only.extend(found);
    }
    options.only = only;
    if options.agents.is_empty() {
        let path = PathBuf::from(env!("CARGO_BIN_EXE_mender-connect"));
        options.agents.push(Agent { name: "here".to_owned(), path });
    }
    if options.rounds == 0 {
        options.rounds = if options.quick { 1 } else { 3 };
    }
    Ok(Wish::Run(options))
}

fn agent(text: &str) -> Result<Agent, String> {
    let (name, path) = text.split_once('=').ok_or("--agent needs NAME=PATH")?;
    let path = std::path::absolute(path).map_err(|e| format!("{path}: {e}"))?;
    if !path.is_file() {
        return Err(format!("no executable at {}", path.display()));
    }
    Ok(Agent { name: name.to_owned(), path })
}
