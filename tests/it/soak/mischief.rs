//! What is done to the link, the server, the manager, the bus and the agent meanwhile, and how all is well again.

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::stage::{Chance, Stage};
use super::work::KEEPER;
use super::{Scene, setup};
use crate::harness::client::{new_sid, size};
use crate::harness::device::{Device, Reading};
use crate::harness::manager::Answer;
use crate::harness::msg::{self, CONTROL, FILES, Ints, SHELL};
use crate::harness::proc;
use crate::harness::rest::path_body;
use crate::harness::rig::Setup;
use crate::harness::server::{Reply, Server};
use crate::harness::wait::{SOON, eventually, millis, secs};
use crate::harness::wire;

/// One kind of mischief.
pub type Act = (&'static str, fn(&mut Scene));

pub const ACTS: [Act; 22] = [
    ("close frame", Scene::close_frame),
    ("reset", Scene::reset),
    ("hang-up", Scene::hang_up),
    ("half a frame", Scene::half_a_frame),
    ("stall, cut", Scene::stall_and_cut),
    ("stall", Scene::stall),
    ("slow server", Scene::slow_server),
    ("hostile frames", Scene::hostile_frames),
    ("too large", Scene::too_large),
    ("server away", Scene::server_away),
    ("dial trouble", Scene::dial_trouble),
    ("network changes", Scene::network_changes),
    ("new token", Scene::new_token),
    ("new URL", Scene::new_url),
    ("no token", Scene::no_token),
    ("many tokens", Scene::many_tokens),
    ("manager anew", Scene::manager_anew),
    ("manager's nonsense", Scene::nonsense),
    ("bus anew", Scene::bus_anew),
    ("SIGHUP", Scene::reload),
    ("SIGUSR1", Scene::status),
    ("SIGSTOP", Scene::freeze),
];

impl Scene {
    /// Does it, and waits until the agent is connected again as it should be.
    pub fn act(&mut self, (name, act): Act) {
        let over = self.link.is_over().then(|| self.link.wait_end(SOON));
        assert!(over.is_none(), "before {name:?} the link was lost by itself: {over:?}");
        act(self);
        self.settle();
        *self.acts.entry(name).or_default() += 1;
    }

    /// Waits for a link with the current token, which nothing that was done before is about to end.
    pub fn settle(&mut self) {
        let (deadline, mut nudge) = (Instant::now() + secs(60), Instant::now() + millis(1500));
        let right = |link: &Device, token: &str| {
            !link.is_over() && link.request().header("Authorization") == Some(&format!("Bearer {token}"))
        };
        let mut found = Some(self.link.clone());
        loop {
            for server in [&self.rig.server, &self.other] {
                let mut wait = millis(50);
                while let Some(link) = server.try_device(std::mem::take(&mut wait)) {
                    found = Some(link).filter(|link| right(link, &self.token)).or(found);
                }
            }
            found = found.filter(|link| right(link, &self.token));
            if let Some(link) = &found
                && self.is_connected()
                && self.answers(link)
            {
                self.link = link.clone();
                return self.stage.set_link(link);
            }
            if Instant::now() >= nudge {
                // The back-off gets long when so much goes wrong.
                self.rig.daemon.signal(Signal::SIGHUP);
                nudge = Instant::now() + secs(5);
            }
            assert!(Instant::now() < deadline, "no link with {}", self.token);
        }
    }

    /// What the agent says. All signals sent before have been obeyed then.
    fn is_connected(&self) -> bool {
        let mark = self.rig.daemon.mark();
        self.rig.daemon.signal(Signal::SIGUSR1);
        self.rig.daemon.wait_for_log_after(mark, " status: ", SOON).contains("connected to")
    }

    /// Whether the link works. Of pings in quick succession only the last is answered, so it is tried again.
    fn answers(&self, link: &Device) -> bool {
        (0..SOON.as_secs()).any(|_| link.is_over() || link.answers(new_sid().as_bytes(), secs(1)))
            && !link.is_over()
    }

    fn between(&mut self, least: usize, most: usize) -> Duration {
        millis(self.chance.between(least, most) as u64)
    }

    /// What was done must not have been felt, but by those who look at their watches.
    fn assert_undisturbed(&self, after: &str) {
        self.stage.assert_well();
        assert!(self.answers(&self.link), "the link didn't stand {after}: {}", self.link.wait_end(SOON));
    }

    fn server(&mut self) -> &mut Server {
        if self.at_other { &mut self.other } else { &mut self.rig.server }
    }

    /// The manager will answer with a token that was never used before.
    fn renew(&mut self) {
        self.serial += 1;
        self.token = format!("token-{}", self.serial);
        let url = self.server().url();
        self.rig.manager.set(&self.token, &url);
    }

    fn announce(&mut self) {
        self.renew();
        let url = self.server().url();
        self.rig.manager.signal(&self.token, &url);
    }

    // ---- the link

    fn close_frame(&mut self) {
        let code = [1000_u16, 1001, 1011][self.chance.below(3)];
        let _ = self.link.try_frame(true, wire::CLOSE, &code.to_be_bytes());
        self.link.wait_end(SOON);
    }

    fn reset(&mut self) {
        self.link.reset();
    }

    fn hang_up(&mut self) {
        self.link.hang_up();
    }

    fn half_a_frame(&mut self) {
        let frame = wire::encode(true, wire::BINARY, &vec![0x82; 1 << 20]);
        let end = self.chance.between(1, 100_000);
        let _ = self.link.write(&frame[..end]);
        if self.chance.one_in(2) { self.link.reset() } else { self.link.hang_up() }
    }

    fn stall_and_cut(&mut self) {
        self.link.set_reading(Reading::Paused);
        let span = self.between(100, 2000);
        self.stage.watch(span);
        self.link.reset();
    }

    fn stall(&mut self) {
        self.link.set_reading(Reading::Paused);
        let span = self.between(100, 3000);
        self.stage.watch(span);
        self.link.set_reading(Reading::Full);
        self.assert_undisturbed("a stall");
    }

    fn slow_server(&mut self) {
        self.link.set_reading(Reading::Rate(1 << 20));
        let span = self.between(100, 2000);
        self.stage.watch(span);
        self.link.set_reading(Reading::Full);
        self.assert_undisturbed("a slow server");
    }

    /// Good messages with some bytes changed. They may open sessions, so the link has to go.
    fn hostile_frames(&mut self) {
        // A name that no change makes another session's.
        let (sid, user) = ("of a hostile peer".to_owned(), ("user_id", "u".into()));
        let good = [
            msg::message(CONTROL, "ping", &sid, std::slice::from_ref(&user), b"body"),
            msg::message(SHELL, "new", &sid, &[&size(80, 24)[..], std::slice::from_ref(&user)].concat(), b""),
            msg::message(SHELL, "resize", &sid, &size(80, 24), b""),
            msg::message(FILES, "stat", &sid, &[user], &path_body("/")),
        ];
        for _ in 0..self.chance.between(1, 300) {
            let mut bytes = msg::encode(&good[self.chance.below(good.len())], Ints::Wide);
            for _ in 0..self.chance.between(1, 3) {
                let at = self.chance.below(bytes.len());
                bytes[at] = self.chance.number() as u8;
            }
            if self.link.try_frame(true, wire::BINARY, &bytes).is_err() {
                break;
            }
        }
        assert!(self.answers(&self.link), "hostile frames ended the link");
        self.link.reset();
    }

    fn too_large(&mut self) {
        let _ = self.link.try_frame(true, wire::BINARY, &vec![0xc4; (1 << 20) + 2000]);
        self.link.wait_end(SOON);
    }

    // ---- the server

    fn server_away(&mut self) {
        self.server().stop();
        self.link.reset();
        let span = self.between(100, 2000);
        self.stage.watch(span);
        self.server().resume();
    }

    fn dial_trouble(&mut self) {
        let replies = [
            Reply::status(500),
            Reply::status(401),
            Reply::Garbage,
            Reply::Silence,
            Reply::Close,
            Reply::WrongAccept,
        ];
        let reply = replies[self.chance.below(replies.len())].clone();
        self.server().script([reply]);
        self.link.reset();
    }

    // ---- the network

    /// Another address comes and goes, of which the kernel tells the agent. The link's own stays.
    fn network_changes(&mut self) {
        for _ in 0..self.chance.between(1, 20) {
            for verb in ["add", "del"] {
                let ip = Command::new("ip").args(["address", verb, "192.0.2.1/32", "dev", "lo"]).status();
                assert!(ip.is_ok_and(|status| status.success()), "cannot change the network");
            }
        }
        self.assert_undisturbed("a change of the network");
    }

    // ---- the manager and the bus

    fn new_token(&mut self) {
        self.announce();
    }

    fn new_url(&mut self) {
        self.at_other = !self.at_other;
        self.announce();
    }

    fn no_token(&mut self) {
        self.rig.manager.change("", "");
        self.link.wait_end(SOON);
        let span = self.between(1, 1000);
        self.stage.watch(span);
        self.announce();
    }

    fn many_tokens(&mut self) {
        self.renew();
        let url = self.server().url();
        self.rig.manager.flood(200, &self.token, &url);
    }

    fn manager_anew(&mut self) {
        self.rig.manager.vanish();
        self.renew();
        self.rig.manager.appear();
    }

    fn nonsense(&mut self) {
        self.rig.manager.answer_get(Answer::WrongTypes);
        self.rig.manager.signal_nonsense();
        self.rig.manager.answer_get(Answer::Normal);
        self.assert_undisturbed("nonsense");
    }

    fn bus_anew(&mut self) {
        self.rig.bus.restart();
        self.renew();
        self.rig.manager.appear();
    }

    // ---- the agent

    fn reload(&mut self) {
        for _ in 0..20 {
            self.rig.daemon.signal(Signal::SIGHUP);
        }
        self.assert_undisturbed("SIGHUP");
    }

    fn status(&mut self) {
        for _ in 0..20 {
            self.rig.daemon.signal(Signal::SIGUSR1);
        }
        self.assert_undisturbed("SIGUSR1");
    }

    fn freeze(&mut self) {
        self.rig.daemon.freeze();
        let span = self.between(1, 2000);
        self.stage.watch(span);
        self.rig.daemon.thaw();
        self.assert_undisturbed("SIGSTOP");
    }

    /// Kills the agent, as a power cut would, and starts it again.
    pub fn kill(&mut self) {
        let children = proc::children(self.rig.daemon.pid());
        self.rig.daemon.signal(Signal::SIGKILL);
        self.rig.daemon.wait_exit(SOON);
        self.link.wait_end(SOON);
        // It had no time to describe its shells.
        self.store.clear();
        for child in children {
            eventually(SOON, "a killed agent's shell to end", || (!proc::is_running(child)).then_some(()));
        }
        self.start(setup(&self.store));
    }

    /// Restarts the agent as an upgrade does. A service manager keeps the keeper's shell.
    pub fn restart(&mut self) {
        self.rig.daemon.signal(Signal::SIGTERM);
        assert_eq!(self.rig.daemon.wait_exit(SOON).code(), Some(0));
        self.link.wait_end(SOON);
        let setup = setup(&self.store);
        self.start(match self.store.take(KEEPER) {
            Some((name, descriptors)) => setup.descriptors(descriptors, &name),
            None => setup,
        });
    }

    fn start(&mut self, setup: Setup) {
        self.rig.restart(&setup);
        self.rig.daemon.wait_for_log("Connection established", SOON);
        self.settle();
    }
}

/// Acts in a random order, each as often as the others.
pub struct Deck(Vec<Act>);

impl Deck {
    pub fn new() -> Deck {
        Deck(Vec::new())
    }

    pub fn next(&mut self, chance: &mut Chance) -> Act {
        if self.0.is_empty() {
            self.0 = ACTS.into();
            chance.shuffle(&mut self.0);
        }
        self.0.pop().expect("just filled")
    }
}

/// Does mischief for about so long.
pub fn round(scene: &mut Scene, deck: &mut Deck, span: Duration) {
    let end = Instant::now() + span;
    while Instant::now() < end {
        let peace = scene.between(20, 1000);
        Stage::watch(&scene.stage, peace);
        let act = deck.next(&mut scene.chance);
        scene.act(act);
    }
}
