//! What the status line says: the link and how long it has been so, the session's id, the time from the last key to
//! the shell's answer, a download's rate, and the keys.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::display::Display;
use crate::harness::wait::{Watched, millis, secs, spawn};
use crate::transfer::Load;

const EVERY: Duration = millis(250);
/// A key without an answer for longer has none: a program has turned the echo off.
const FORGOTTEN: Duration = secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    Up,
    Cut,
    /// No longer cut; the agent is to connect.
    Awaited,
    Back,
}

/// The facts; a thread keeps the line up to date.
pub struct Status {
    shared: Arc<Shared>,
}

struct Shared {
    facts: Watched<Facts>,
    display: Arc<Display>,
}

struct Facts {
    link: Link,
    since: Instant,
    session: String,
    /// The first key that isn't answered yet.
    typed: Option<Instant>,
    echo: Option<Duration>,
    load: Option<Load>,
    /// The download's bytes a while ago.
    mark: (Instant, u64),
    /// In bytes per second.
    rate: Option<f64>,
    over: bool,
}

impl Status {
    pub fn new(display: &Arc<Display>) -> Status {
        let now = Instant::now();
        let facts = Facts {
            link: Link::Up,
            since: now,
            session: String::new(),
            typed: None,
            echo: None,
            load: None,
            mark: (now, 0),
            rate: None,
            over: false,
        };
        let shared = Arc::new(Shared { facts: Watched::new(facts), display: Arc::clone(display) });
        let ticking = Arc::clone(&shared);
        let tick = move || {
            ticking.show();
            while ticking.facts.wait(EVERY, |f| f.over.then_some(())).is_none() {
                ticking.show();
            }
        };
        spawn("status", tick);
        Status { shared }
    }

    /// The link has changed, and a download on it is over.
    pub fn link(&self, link: Link) {
        self.shared.facts.update(|f| {
            (f.link, f.since) = (link, Instant::now());
            (f.typed, f.echo, f.load) = (None, None, None);
        });
        self.shared.show();
    }

    pub fn session(&self, sid: &str) {
        self.shared.facts.update(|f| sid.clone_into(&mut f.session));
    }

    pub fn typed(&self) {
        let now = Instant::now();
        self.shared.facts.update(|f| f.typed = f.typed.filter(|at| now - *at < FORGOTTEN).or(Some(now)));
    }

    pub fn answered(&self) {
        self.shared.facts.update(|f| {
            if let Some(echo) = f.typed.take().map(|at| at.elapsed()).filter(|echo| *echo < FORGOTTEN) {
                f.echo = Some(echo);
            }
        });
    }

    /// No more lines.
    pub fn end(&self) {
        self.shared.facts.update(|f| {
            f.over = true;
            f.load = None;
        });
    }

    /// Stops the download that is under way, else starts one.
    pub fn toggle_load(&self, start: impl FnOnce() -> Load) {
        self.shared.facts.update(|f| {
            let running = f.load.take().filter(|load| load.end().is_none());
            if running.is_none() {
                (f.load, f.mark, f.rate) = (Some(start()), (Instant::now(), 0), None);
            }
        });
        self.shared.show();
    }
}

impl Shared {
    fn show(&self) {
        let Some(width) = self.display.width() else { return };
        let line = self.facts.update(|f| {
            f.measure(Instant::now());
            f.line(width)
        });
        self.display.set_line(&line);
    }
}

impl Facts {
    fn measure(&mut self, now: Instant) {
        let Some(load) = &self.load else { return };
        let (then, before) = self.mark;
        let span = (now - then).as_secs_f64();
        if span >= 1.0 {
            let bytes = load.bytes();
            self.rate = Some((bytes - before) as f64 / span);
            self.mark = (now, bytes);
        }
    }

    fn line(&self, width: usize) -> String {
        let seconds = self.since.elapsed().as_secs();
        let since = format!("{}:{:02}", seconds / 60, seconds % 60);
        let mut parts = vec![match self.link {
            Link::Up => format!("link up {since}"),
            Link::Cut => format!("link cut {since}, the shell goes on"),
            Link::Awaited => format!("waiting for the agent {since}"),
            Link::Back => format!("link back {since}"),
        }];
        if let Some(echo) = self.echo {
            let millis = echo.as_secs_f64() * 1000.0;
            parts.push(format!("echo {millis:.digits$} ms", digits = usize::from(millis < 10.0)));
        }
        let mut loading = false;
        if let Some(load) = &self.load {
            let end = load.end();
            loading = end.is_none();
            parts.push(end.unwrap_or_else(|| self.rate.map_or_else(|| "download".to_owned(), rate)));
        }
        match self.link {
            Link::Awaited => {}
            Link::Cut => parts.push("Ctrl-^ give it back".to_owned()),
            Link::Up | Link::Back => {
                parts.push("Ctrl-^ cut".to_owned());
                parts.push(format!("Ctrl-_ {}", if loading { "stop" } else { "download" }));
            }
        }
        let room = |parts: &[String], more: &str| {
            1 + parts.iter().map(|part| part.len() + 2).sum::<usize>() + more.len() <= width
        };
        // The keys come first where there is little room.
        let leave = "Ctrl-] leave";
        if self.link != Link::Awaited && room(&parts, leave) {
            parts.push(leave.to_owned());
        }
        // The harness counts in an id's last part.
        let id = self.session.rsplit('-').next().unwrap_or_default();
        let session = format!("session {}", id.trim_start_matches('0'));
        if !id.is_empty() && room(&parts, &session) {
            parts.insert(1, session);
        }
        format!(" {}", parts.join("  "))
    }
}

fn rate(bytes: f64) -> String {
    let mbits = bytes * 8.0 / 1e6;
    if mbits < 10.0 { format!("{mbits:.2} Mbit/s") } else { format!("{mbits:.0} Mbit/s") }
}
