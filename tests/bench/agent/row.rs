//! What a row of the table is.

use std::time::Duration;

use crate::stage::Agent;

pub const KIB: f64 = 1024.0;
pub const MIB: f64 = KIB * KIB;
pub const GIB: f64 = MIB * KIB;

/// How long things may take that take no time.
pub const SOON: Duration = Duration::from_secs(20);

/// One number.
#[derive(Debug, Clone)]
pub struct Figure {
    pub what: String,
    pub unit: &'static str,
    pub value: f64,
}

pub fn figure(what: impl Into<String>, unit: &'static str, value: f64) -> Figure {
    Figure { what: what.into(), unit, value }
}

/// Measures an agent that is ready, once for each round. The figures are the same ones each time.
pub type Measure = Box<dyn FnMut() -> Result<Vec<Figure>, String>>;

/// How thorough to be.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// How long what can be cut short goes on.
    pub span: Duration,
    pub quick: bool,
}

impl Scale {
    pub fn pick<T>(&self, thorough: T, quick: T) -> T {
        if self.quick { quick } else { thorough }
    }
}

type Prepare = Box<dyn Fn(&Agent, Scale) -> Result<Measure, String>>;

pub struct Row {
    pub name: String,
    pub about: String,
    pub prepare: Prepare,
}

pub fn row(
    name: impl Into<String>,
    about: impl Into<String>,
    prepare: impl Fn(&Agent, Scale) -> Result<Measure, String> + 'static,
) -> Row {
    Row { name: name.into(), about: about.into(), prepare: Box::new(prepare) }
}

/// The middle one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

/// The smallest value that so many per cent don't exceed.
pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100);
    values.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}
