//! The main thread: it waits for the authentication manager, signals, the link and deadlines in one
//! poll(2), lets the [`machine`] decide, and takes the actions.

pub(crate) mod machine;
mod past;
mod service;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use log::{debug, error, info, warn};
use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use thiserror::Error;

use self::machine::{Action, Event, Machine, State};
use self::past::Past;
use self::service::Service;
use crate::auth::{self, AuthEvent, Credentials, Source, SourceError};
use crate::config::{Config, ConfigError};
use crate::link::{self, Link, LinkError, LinkEvent, ProxySettings};
use crate::proto::Frame;
use crate::session::{Device, Router};
use crate::status;
use crate::sys::privilege::{self, Needs};
use crate::sys::signals::Signals;
use crate::sys::wake::Wake;
use crate::sys::{PollSet, clock};

/// Limit of the sessions' clean-up at the end. The init system is promised two seconds.
const STOP_LIMIT: Duration = Duration::from_millis(1700);

#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A basic system call failed.
    #[error("out of resources: {}", crate::sys::reason(.0))]
    System(#[from] io::Error),
}

/// Runs the daemon until SIGTERM or SIGINT. On SIGHUP `load` reads the configuration again. A bus that is lost later
/// is waited for; one that is missing at the start is an error.
pub(crate) fn run(
    config: Config,
    load: impl Fn() -> Result<Config, ConfigError> + 'static,
    signals: &Signals,
) -> Result<(), Error> {
    Supervisor::new(config, Box::new(load))?.run(signals)
}

/// The privileges that a daemon with this configuration needs.
pub(crate) fn needs(config: &Config) -> Needs {
    let privileged_shells = config.terminal.enabled && !config.shell.no_new_privileges;
    Needs {
        shells: config.terminal.enabled,
        root_shells: privileged_shells && config.shell.user.uid.is_root(),
        files: config.file_transfer,
        privileged_programs: privileged_shells || config.mender_client,
    }
}

/// The link's epoch, and the event.
type Report = (u64, LinkEvent);

struct Supervisor {
    machine: Machine,
    load: Box<dyn Fn() -> Result<Config, ConfigError>>,
    service: Service,
    /// The last reload failed: the files differ from the configuration in use.
    outdated: bool,
    past: Past,
    source: Box<dyn Source>,
    context: Arc<Device>,
    proxies: Arc<ProxySettings>,
    link: Option<Link>,
    /// Incremented per link; events of an older link are ignored.
    epoch: u64,
    /// Links that haven't reported their end yet, including [`Supervisor::link`]; at most a few.
    unfinished: usize,
    reporter: Sender<Report>,
    reports: Receiver<Report>,
    wake: Arc<Wake>,
    status: status::Listener,
}

impl Supervisor {
    fn new(config: Config, load: Box<dyn Fn() -> Result<Config, ConfigError>>) -> Result<Self, Error> {
        let wake = Arc::new(Wake::new()?);
        // At most two reports a link, and links are made one after another.
        let (reporter, reports) = crossbeam_channel::unbounded();
        Ok(Supervisor {
            past: Past::new(Instant::now()),
            machine: Machine::new(config.reconnect_interval, random),
            load,
            service: Service::new(Instant::now()),
            outdated: false,
            source: auth::source(&config.auth, &wake, true)?,
            context: Device::new(config),
            proxies: Arc::new(ProxySettings::from_environment()),
            link: None,
            epoch: 0,
            unfinished: 0,
            reporter,
            reports,
            status: status::Listener::open(&wake),
            wake,
        })
    }

    fn run(mut self, signals: &Signals) -> Result<(), Error> {
        while self.machine.state != State::Stopping {
            self.wait(signals)?;
            while let Some(signal) = signals.next() {
                self.handle_signal(signal, signals.lost_terminal());
            }
            self.wake.clear();
            let auth = self.source.process(Instant::now())?;
            // Any answer means that the source is up.
            if !auth.is_empty() && !self.service.is_ready() {
                self.service.ready();
            }
            for event in latest(auth) {
                self.step(Event::Auth(event));
            }
            while let Ok(report) = self.reports.try_recv() {
                self.handle_report(report);
            }
            self.step(Event::Tick);
            let now = Instant::now();
            let link = &mut self.link;
            self.service.feed(now, || link.as_mut().is_none_or(|link| link.makes_progress(now)));
            let stale = if self.outdated { "; the configuration was not reloaded, see the log" } else { "" };
            self.service.status(self.machine.describe(&self.server(), None) + stale);
            self.status
                .answer(&self.context, now, || self.past.report(&self.machine, &self.context.config(), now));
        }
        self.service.stopping();
        self.stop();
        Ok(())
    }

    fn wait(&self, signals: &Signals) -> io::Result<()> {
        let mut set = PollSet::new();
        set.add(signals.as_fd(), PollFlags::POLLIN);
        set.add(self.wake.as_fd(), PollFlags::POLLIN);
        if let Some((fd, events)) = self.source.watch() {
            set.add(fd, events);
        }
        self.status.watch(&mut set);
        let deadlines = [
            self.machine.deadline(),
            self.source.deadline(),
            self.service.deadline(),
            self.status.deadline(),
        ];
        set.wait(deadlines.into_iter().flatten().min())
    }

    fn handle_signal(&mut self, signal: Signal, lost_terminal: bool) {
        match signal {
            Signal::SIGTERM | Signal::SIGINT => {
                info!("{} received, ending", signal.as_str());
                self.step(Event::Stop);
            }
            Signal::SIGHUP if lost_terminal => {
                info!("the terminal is gone, ending");
                self.step(Event::Stop);
            }
            Signal::SIGHUP => {
                info!("SIGHUP received, reading the configuration");
                self.reload();
                self.step(Event::Hurry);
            }
            Signal::SIGUSR1 => self.log_status(),
            _ => {}
        }
    }

    /// Reloads the configuration: all of it or, with the reason in the log, nothing.
    fn reload(&mut self) {
        let ready = self.service.is_ready();
        if ready {
            self.service.reloading();
        }
        match (self.load)() {
            Ok(config) => self.outdated = !self.adopt(config),
            Err(e) => {
                error!("the old configuration stays: {e}");
                self.outdated = true;
            }
        }
        if ready {
            self.service.ready();
        }
    }

    /// Replaces the configuration. False if that is impossible.
    fn adopt(&mut self, config: Config) -> bool {
        let old = self.context.config();
        if config == *old {
            info!("the configuration has not changed");
            return true;
        }
        if !privilege::suffices_for(needs(&config)) {
            error!(
                "the old configuration stays: the new one takes privileges that were given up at the start; restart to use it"
            );
            return false;
        }
        if config.auth != old.auth {
            match auth::source(&config.auth, &self.wake, false) {
                Ok(source) => self.source = source,
                Err(e) => {
                    error!("the old configuration stays: {e}");
                    return false;
                }
            }
        }
        self.machine.base = config.reconnect_interval;
        self.context.reconfigure(config);
        info!("the new configuration is in use");
        true
    }

    fn handle_report(&mut self, (epoch, event): Report) {
        if matches!(event, LinkEvent::Lost(_)) {
            self.unfinished -= 1;
        }
        if epoch == self.epoch && self.link.is_some() {
            self.handle_link(event);
        }
    }

    fn handle_link(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Connected => {
                info!("Connection established with {}", self.server());
                self.step(Event::Connected);
            }
            LinkEvent::Lost(reason) => {
                let dialled = matches!(self.machine.state, State::Dialling);
                self.past.lost(dialled, reason.to_string(), Instant::now());
                let (server, token) = (self.server(), self.machine.credentials.as_ref());
                if dialled {
                    error!(
                        "connection manager failed to connect to {}{}: {reason}; len(token)={}",
                        server.trim_end_matches('/'),
                        link::PATH,
                        token.map_or(0, |c| c.token.len())
                    );
                } else {
                    warn!("connection with {server} lost: {reason}");
                }
                let (unauthorized, retry_after) = match reason {
                    LinkError::Refused { status, retry_after } => (status == 401, retry_after),
                    _ => (false, None),
                };
                self.step(Event::Lost { unauthorized, retry_after });
            }
        }
    }

    fn step(&mut self, event: Event) {
        let before = self.machine.state;
        for action in self.machine.step(event, Instant::now()) {
            match action {
                Action::Close => self.link = None,
                Action::Dial => self.dial(),
                Action::Ask => self.source.ask(Instant::now()),
                Action::Fetch => self.source.fetch(Instant::now()),
                Action::LogWait(wait) => {
                    info!("connectionmanager backoff: retrying in {:.1}s", wait.as_secs_f64());
                }
                Action::LogUnauthorized => {
                    let (sessions, shells) = self.context.counts();
                    info!("dbusEventLoop terminated {sessions} sessions, {shells} shells");
                }
                Action::LogNoReconnect(why) => {
                    error!("error reconnecting: {why}");
                    self.past.failed_because(why, Instant::now());
                }
            }
        }
        if self.machine.state != before {
            debug!("{before:?} -> {:?}", self.machine.state);
            self.past.changed(self.machine.state, Instant::now());
        }
    }

    fn dial(&mut self) {
        self.link = None;
        let Some(credentials) = self.machine.credentials.clone() else { return };
        self.epoch += 1;
        let (epoch, reports, wake) = (self.epoch, self.reporter.clone(), Arc::clone(&self.wake));
        let report = move |event| {
            let _ = reports.send((epoch, event));
            wake.notify();
        };
        let context = Arc::clone(&self.context);
        let accept = move |outbox: &Arc<_>| {
            Ok(Box::new(Inbound(Router::new(&context, outbox)?)) as Box<dyn link::Inbound>)
        };
        match Link::dial(credentials, Arc::clone(&self.proxies), accept, report) {
            Ok(link) => {
                self.link = Some(link);
                self.unfinished += 1;
            }
            Err(e) => self.handle_link(LinkEvent::Lost(e.into())),
        }
    }

    fn server(&self) -> String {
        self.machine.credentials.as_ref().map_or_else(String::new, Credentials::shown_server_url)
    }

    fn log_status(&self) {
        info!("mender-connect daemon v{}", env!("CARGO_PKG_VERSION"));
        info!(" status: {}", self.machine.describe(&self.server(), Some(Instant::now())));
        self.context.log_status();
    }

    /// Ends and reaps every session's processes, as far as that is possible in time.
    fn stop(mut self) {
        let deadline = Instant::now() + STOP_LIMIT;
        self.status.close();
        self.link = None;
        // A link's reader drops its router, and so the sessions, before it reports the end.
        while self.unfinished > 0
            && let Ok(report) = self.reports.recv_deadline(deadline)
        {
            self.handle_report(report);
        }
        if !self.context.wait_until_quiet(deadline) {
            warn!("some processes did not end in time");
        }
    }
}

/// Drops queued token announcements that a later one supersedes. Revocations are kept.
fn latest(events: Vec<AuthEvent>) -> Vec<AuthEvent> {
    let is_token = |event: &AuthEvent| matches!(event, AuthEvent::Announced(Some(_)));
    let mut kept: Vec<AuthEvent> = Vec::with_capacity(events.len());
    for event in events {
        match kept.last_mut() {
            Some(last) if is_token(last) && is_token(&event) => *last = event,
            _ => kept.push(event),
        }
    }
    kept
}

/// A uniform number from the system's random source.
fn random() -> u64 {
    // Early in a boot there may be no randomness yet: the clock has to do.
    getrandom::u64()
        .unwrap_or_else(|_| u64::from(clock::now().subsec_nanos()).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// Passes frames from the link to the sessions.
struct Inbound(Router);

impl link::Inbound for Inbound {
    fn frame(&mut self, frame: Frame) {
        self.0.route(frame);
    }

    fn pause(&mut self) {
        self.0.announce();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_of_piled_up_tokens_counts() {
        let token = |name| AuthEvent::Announced(Credentials::new(name, "http://x"));
        let none = AuthEvent::Announced(None);
        let events = vec![token("a"), token("b"), none.clone(), token("c"), token("d")];
        assert_eq!(latest(events), vec![token("b"), none, token("d")]);
    }
}
