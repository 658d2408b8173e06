//! The main thread: polls everything, asks [`machine`] what to do, and does it.

pub(crate) mod machine;

use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use log::{debug, error, info, warn};
use nix::poll::PollFlags;
use nix::sys::signal::Signal;

use self::machine::{Action, Event, Machine};
use crate::auth::{self, Source};
use crate::config::{Auth, Config, ConfigError};
use crate::link::{self, Endpoint, Link, LinkError};
use crate::session::stats::seconds;
use crate::session::{self, Device, Router};
use crate::status::{self, State, Status};
use crate::sys::clock::Jumps;
use crate::sys::manager::Service;
use crate::sys::netlink::Netlink;
use crate::sys::privilege::{self, Needs};
use crate::sys::process;
use crate::sys::signals::Signals;
use crate::sys::wake::Wake;
use crate::sys::{PollSet, children, reason};

/// For the sessions' clean-up at the end. Init systems are promised 2 s.
const STOP_LIMIT: Duration = Duration::from_millis(1700);

type Error = Box<dyn std::error::Error>;

pub(crate) fn needs(config: &Config) -> Needs {
    let privileged_shells = config.terminal && !config.no_new_privileges;
    Needs {
        shells: config.terminal,
        root_shells: privileged_shells && config.user.uid.is_root(),
        files: config.file_transfer,
        privileged_programs: privileged_shells || config.mender_client,
    }
}

struct Supervisor {
    machine: Machine,
    load: Box<dyn Fn() -> Result<Config, ConfigError>>,
    service: Service,
    /// The last reload failed: the files differ from the configuration in use.
    outdated: bool,
    started: Instant,
    last_error: Option<(String, Instant)>,
    source: Box<dyn Source>,
    context: Arc<Device>,
    link: Option<Link>,
    /// `link` alone sends them: nobody hears of one that was closed.
    reports: Receiver<Result<(), LinkError>>,
    /// Each link's thread has a clone of the sender, and drops it when it ends.
    threads: (Sender<Infallible>, Receiver<Infallible>),
    wake: Arc<Wake>,
    status: status::Server,
    /// `None` if the kernel lacks it.
    network: Option<Netlink>,
    clock: Option<Jumps>,
}

/// SIGHUP calls `load` for a new configuration. Fails if the bus is missing at the start.
pub(crate) fn run(
    config: Config,
    load: impl Fn() -> Result<Config, ConfigError> + 'static,
    signals: &Signals,
) -> Result<(), Error> {
    let (wake, now) = (Arc::new(Wake::new().map_err(LinkError::Resources)?), Instant::now());
    let context = Device::new(config);
    session::adopt_all(&context);
    let mut supervisor = Supervisor {
        machine: Machine::new(context.config().reconnect_interval, random, now),
        load: Box::new(load),
        service: Service::new(now),
        outdated: false,
        started: now,
        last_error: None,
        source: auth::source(&context.config().auth, &wake, true)?,
        context,
        link: None,
        reports: bounded(0).1,
        threads: bounded(0),
        status: status::Server::open(&wake),
        wake,
        network: Netlink::open()
            .inspect_err(|e| warn!("the kernel doesn't tell when the network changes: {}", reason(e)))
            .ok(),
        clock: Jumps::watch().ok(),
    };
    let result = supervisor.serve(signals);
    supervisor.stop();
    result
}

impl Supervisor {
    fn serve(&mut self, signals: &Signals) -> Result<(), Error> {
        while self.machine.state != State::Stopping {
            self.wait(signals).map_err(LinkError::Resources)?;
            while let Some(signal) = signals.next() {
                self.handle_signal(signal, signals.lost_terminal());
            }
            self.wake.clear();
            self.look_at_network();
            let auth = self.source.process(Instant::now());
            let auth = auth.map_err(|e| format!("mender-connect dbus failed to connect, error: {e}"))?;
            // Any answer means that the source is up.
            if !auth.is_empty() && !self.service.ready {
                self.service.ready();
            }
            auth.into_iter().for_each(|event| self.step(Event::Auth(event)));
            while let Ok(report) = self.reports.try_recv() {
                self.handle_link(report);
            }
            self.step(Event::Tick);
            let now = Instant::now();
            self.service.feed(now, || self.link.as_ref().is_none_or(|link| link.makes_progress(now)));
            let stale = if self.outdated { "; the configuration was not reloaded, see the log" } else { "" };
            self.service.status(self.machine.describe(None) + stale);
            self.status.answer(now, || {
                let connection = self.machine.connection(self.last_error.as_ref(), now);
                let (token, uptime) = (self.machine.token_length(), seconds(self.started, now));
                Status::new(connection, token, uptime, &self.context, now)
            });
        }
        self.service.send("STOPPING=1");
        Ok(())
    }

    fn wait(&self, signals: &Signals) -> io::Result<()> {
        let mut set = PollSet::default();
        let inputs = [signals.fd.as_fd(), self.wake.as_fd()].into_iter();
        let inputs = inputs.chain(self.network.iter().map(|network| network.socket.as_fd()));
        let inputs = inputs.chain(self.clock.iter().map(|clock| clock.timer.as_fd()));
        inputs.for_each(|fd| set.add(fd, PollFlags::POLLIN));
        self.source.watch(&mut set);
        self.status.watch(&mut set);
        set.until(&[self.machine.deadline(), self.service.deadline()]);
        set.wait().map(drop)
    }

    fn look_at_network(&mut self) {
        let changes = self.network.as_mut().map(Netlink::read).unwrap_or_default();
        let jumped = self.clock.as_mut().is_some_and(Jumps::occurred);
        let lost = changes.gone && self.link.as_ref().is_some_and(Link::ends_without_address);
        if changes.new || jumped || lost {
            self.step(Event::NetworkChanged);
        }
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
                self.step(Event::RetryNow);
            }
            Signal::SIGCHLD => process::reap_orphans(),
            Signal::SIGUSR1 => {
                info!("mender-connect daemon v{}", env!("CARGO_PKG_VERSION"));
                info!(" status: {}", self.machine.describe(Some(Instant::now())));
                self.context.log_status();
            }
            _ => {}
        }
    }

    /// Adopts all of the new configuration or, with the reason in the log, nothing.
    fn reload(&mut self) {
        self.service.reloading();
        let result = (self.load)().map_err(Error::from).and_then(|config| self.adopt(config));
        self.outdated = result.is_err();
        if let Err(e) = result {
            error!("the old configuration stays: {e}");
        }
        if self.service.ready {
            self.service.ready();
        }
    }

    fn adopt(&mut self, config: Config) -> Result<(), Error> {
        let old = self.context.config();
        if config == *old {
            info!("the configuration has not changed");
            return Ok(());
        }
        if !privilege::suffices_for(needs(&config)) {
            let why = "the new one takes privileges that were given up at the start; restart to use it";
            return Err(why.into());
        }
        if config.auth != old.auth {
            // A link that works isn't given up for one that never will.
            if let Auth::File { server_url, .. } = &config.auth {
                Endpoint::parse(server_url)?;
            }
            self.source = auth::source(&config.auth, &self.wake, false)?;
        }
        self.machine.base = config.reconnect_interval;
        self.context.reconfigure(config);
        info!("the new configuration is in use");
        Ok(())
    }

    fn handle_link(&mut self, report: Result<(), LinkError>) {
        let server = self.machine.server().unwrap_or_default();
        let Err(reason) = report else {
            info!("Connection established with {server}");
            return self.step(Event::Connected);
        };
        self.last_error = Some((reason.to_string(), Instant::now()));
        let length = self.machine.token_length().unwrap_or_default();
        if self.machine.state == State::Dialling {
            let url = format!("{}{}", server.trim_end_matches('/'), link::PATH);
            error!("connection manager failed to connect to {url}: {reason}; len(token)={length}");
        } else {
            warn!("connection with {server} lost: {reason}");
        }
        let is_local = || Endpoint::parse(&server).is_ok_and(|server| server.is_loopback());
        let (refused, retry_after) = match reason {
            // The forwarder of Mender's client 3 says so when it can't reach its server.
            LinkError::Refused { status: 503, retry_after: None } if is_local() => (None, None),
            // Not the server: a network's login page, or one that leads there.
            LinkError::Refused { status: ..400 | 511, .. } => (None, None),
            LinkError::Refused { status, retry_after } => (Some(status), retry_after),
            _ => (None, None),
        };
        self.step(Event::Lost { refused, retry_after });
    }

    fn step(&mut self, event: Event) {
        let before = self.machine.state;
        for action in self.machine.step(event, Instant::now()) {
            match action {
                Action::Close => (self.link, self.reports) = (None, bounded(0).1),
                Action::Dial => self.dial(),
                Action::Ask => self.source.ask(Instant::now()),
                Action::Fetch => self.source.fetch(Instant::now()),
                Action::Ping => self.link.iter().for_each(Link::ping),
                Action::LogNetworkChanged => info!("the network or the clock has changed"),
                Action::LogWait(wait) => {
                    info!("connectionmanager backoff: retrying in {:.1}s", wait.as_secs_f64());
                }
                Action::LogUnauthorized => {
                    let (sessions, shells) = self.context.counts();
                    self.context.shells.close();
                    info!("dbusEventLoop terminated {sessions} sessions, {shells} shells");
                }
                Action::LogNoReconnect(why) => {
                    error!("error reconnecting: {why}");
                    self.last_error = Some((why, Instant::now()));
                }
            }
        }
        if self.machine.state != before {
            debug!("{before:?} -> {:?}", self.machine.state);
        }
    }

    fn dial(&mut self) {
        // A link sends at most two reports.
        let (reporter, reports) = bounded(2);
        (self.link, self.reports) = (None, reports);
        let Some(credentials) = self.machine.credentials.clone() else { return };
        let (wake, thread) = (Arc::clone(&self.wake), self.threads.0.clone());
        let report = move |result| {
            let _ = &thread;
            // Fails if the link was closed.
            let _ = reporter.send(result);
            wake.notify();
        };
        let heartbeat = self.context.config().heartbeat;
        let context = Arc::clone(&self.context);
        let table = context.new_table();
        context.shells.open();
        let accept = move |outbox: &_| {
            let mut router = Router::new(&context, table, outbox);
            move |frame| router.route(frame)
        };
        match Link::dial(credentials, heartbeat, accept, report.clone()) {
            Ok(link) => self.link = Some(link),
            Err(e) => report(Err(e.into())),
        }
    }

    /// Ends and reaps the processes of all sessions, as far as time allows.
    fn stop(self) {
        let deadline = Instant::now() + STOP_LIMIT;
        // Shells that the store keeps are left to the next agent from here on.
        self.context.store.iter().for_each(|store| store.end());
        self.context.shells.close();
        drop((self.status, self.link, self.threads.0));
        // A link's thread says goodbye and drops its router, which ends the sessions, before it ends. Nothing is ever sent.
        let _ = self.threads.1.recv_deadline(deadline);
        if !self.context.wait_until_quiet(&self.wake, deadline) {
            warn!("some processes did not end in time");
            children::leave_descriptors_behind();
        }
    }
}

/// Unlike getrandom(2), this doesn't wait for randomness early in a boot.
fn random() -> u64 {
    RandomState::new().hash_one(0)
}
