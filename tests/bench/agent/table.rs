//! The figures as Markdown.

use std::fmt;

use crate::row::{Figure, median};

pub struct Table {
    agents: Vec<String>,
    lines: Vec<Line>,
}

struct Line {
    row: String,
    what: String,
    unit: &'static str,
    /// The median for each agent.
    values: Vec<Option<f64>>,
}

impl Table {
    pub fn new(agents: Vec<String>) -> Table {
        Table { agents, lines: Vec::new() }
    }

    /// Adds a row: for each agent and each round the figures.
    pub fn add(&mut self, row: &str, figures: &[Vec<Vec<Figure>>]) {
        let first = figures.iter().flatten().next();
        let Some(kinds) = first else {
            let values = vec![None; self.agents.len()];
            self.lines.push(Line { row: row.to_owned(), what: String::new(), unit: "", values });
            return;
        };
        for kind in kinds {
            let values = figures.iter().map(|rounds| {
                let same = |figure: &&Figure| figure.what == kind.what;
                let values: Vec<f64> =
                    rounds.iter().filter_map(|round| round.iter().find(same)).map(|f| f.value).collect();
                (!values.is_empty()).then(|| median(values))
            });
            let values = values.collect();
            self.lines.push(Line { row: row.to_owned(), what: kind.what.clone(), unit: kind.unit, values });
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        let compared = self.agents.len() > 1;
        let last = self.agents.last().map_or("", String::as_str);
        let mut head = vec!["row".to_owned(), "figure".to_owned()];
        head.extend(self.agents.iter().cloned());
        if compared {
            let others = &self.agents[..self.agents.len() - 1];
            head.extend(others.iter().map(|name| format!("{name} / {last}")));
        }
        writeln!(out, "| {} |", head.join(" | "))?;
        writeln!(out, "|---|---|{}", "---:|".repeat(head.len() - 2))?;
        let mut before = "";
        for line in &self.lines {
            let name = if line.row == before { "" } else { &line.row };
            before = &line.row;
            let unit = if line.unit.is_empty() { String::new() } else { format!(" ({})", line.unit) };
            let mut cells = vec![name.to_owned(), format!("{}{unit}", line.what)];
            cells.extend(line.values.iter().map(|value| value.map_or("–".to_owned(), number)));
            if compared && let Some((last, others)) = line.values.split_last() {
                cells.extend(others.iter().map(|value| match (value, last) {
                    (Some(value), Some(last)) if *last != 0.0 => number(value / last),
                    _ => "–".to_owned(),
                }));
            }
            writeln!(out, "| {} |", cells.join(" | "))?;
        }
        Ok(())
    }
}

/// Three digits that count.
pub fn number(value: f64) -> String {
    match value.abs() {
        100.0.. => {
            let digits = format!("{value:.0}");
            let (sign, digits) = digits.split_at(usize::from(value < 0.0));
            let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
            format!("{sign}{}", groups.join(","))
        }
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        0.01.. => format!("{value:.3}"),
        0.0 => "0".to_owned(),
        _ => format!("{value:.5}"),
    }
}

/// Figures for people who watch.
pub fn line(figures: &[Figure]) -> String {
    let words: Vec<String> =
        figures.iter().map(|f| format!("{} {} {}", f.what, number(f.value), f.unit)).collect();
    words.join(", ")
}

/// What this was measured on.
pub fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or(std::env::consts::ARCH, |(_, name)| name.trim());
    format!("{cores} cores, Linux {}, {model}.", kernel.trim())
}
