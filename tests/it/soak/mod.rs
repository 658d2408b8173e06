//! Everything at once: sessions of all protocols that compare each byte, while the link is cut, tokens change, and
//! manager, bus and agent are restarted, killed or stopped. In between all pause, and the idle agent must hold what
//! it held before. `tests/soak` runs it.

mod files;
mod mischief;
mod record;
mod stage;
mod store;
mod work;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::sys::signal::Signal;

use self::files::{Downloads, Uploads};
use self::mischief::{Deck, round};
use self::record::{Idle, Record};
use self::stage::{Chance, Stage, hush_workers};
use self::store::Store;
use self::work::Keeper;
use crate::commands;
use crate::harness::device::{Device, Generation};
use crate::harness::proc;
use crate::harness::program;
use crate::harness::rig::{Rig, Setup, TOKEN, network_of_our_own};
use crate::harness::server::Server;
use crate::harness::wait::{SOON, eventually, secs, skip};

/// Rounds after which the agent is killed: short lives, then a long one. Much later once more.
const KILLS: [usize; 3] = [1, 3, 1000];
/// Rounds after which it is restarted.
const RESTARTS: [usize; 4] = [2, 4, 40, 400];

/// The test's /usr/bin, in which the Mender client is a fake. Nobody else sees it.
const NAMESPACE: &str = r#"exec unshare --mount --propagation private /bin/sh -c '
    set -e
    mount --bind /usr/bin /mnt
    [ -d bin ] || { mkdir bin; ln -s /mnt/* bin/; }
    mount --bind bin /usr/bin
    exec "$@"' sh "$@""#;

/// Of glibc's arenas each keeps what it once had, which would hide a leak.
fn setup(store: &Store) -> Setup {
    let setup = Setup::new().set("ReconnectIntervalSeconds", 1).flag("--debug").env("MALLOC_ARENA_MAX", "1");
    let setup = setup.env("NOTIFY_SOCKET", &store.name).env("FDSTORE", "32");
    // Most terminals are of users who don't come back, so these have to go soon.
    let setup = setup.set("Sessions", serde_json::json!({ "KeepDetached": 2 }));
    if commands::obstacle().is_none() { setup.wrapper(NAMESPACE) } else { setup }
}

/// Everything the mischief is done to.
struct Scene {
    rig: Rig,
    store: Store,
    /// A second server, of the other generation.
    other: Server,
    at_other: bool,
    stage: Arc<Stage>,
    chance: Chance,
    link: Device,
    token: String,
    serial: u64,
    acts: BTreeMap<&'static str, u64>,
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}

#[test]
#[ignore = "takes SOAK_SECONDS: see tests/soak"]
fn everything_at_once() {
    let start = Instant::now();
    let span = secs(number("SOAK_SECONDS", 120));
    let seed =
        number("SOAK_SEED", u64::from(start.elapsed().subsec_nanos()) ^ u64::from(std::process::id()) << 20);
    println!("SOAK_SECONDS={} SOAK_SEED={seed}", span.as_secs());
    hush_workers();
    // Its changes are nobody else's.
    if let Some(why) = network_of_our_own() {
        return skip(why);
    }
    let store = Store::new();
    let (rig, link) = setup(&store).connected();
    let stage = Arc::new(Stage::default());
    let mut chance = Chance(seed);
    let other = Server::start(Generation::Released);
    let (dir, down) = (rig.dir.path().to_owned(), Downloads::new(&rig.dir.path().join("down"), &mut chance));
    let up = ["up-1", "up-2", "up-3"].map(|name| Uploads::new(dir.join(name), &mut chance));
    if dir.join("bin").exists() {
        program::write(&dir.join("bin/mender-update"), work::CLIENT.as_bytes());
    }
    let mut scene = Scene {
        rig,
        store,
        other,
        at_other: false,
        stage: Arc::clone(&stage),
        chance: Chance(chance.number()),
        link: link.clone(),
        token: TOKEN.to_owned(),
        serial: 0,
        acts: BTreeMap::new(),
    };
    scene.settle();
    let idle = Idle::of(scene.rig.daemon.pid());

    let mut next = || Chance(chance.number());
    let mut workers = Vec::new();
    for _ in 0..4 {
        workers.push(stage.employ("terminal", next(), work::terminal));
    }
    for _ in 0..3 {
        workers.push(stage.employ("tcp", next(), work::tcp));
    }
    for up in up.clone() {
        workers.push(stage.employ("upload", next(), move |link, chance| up.job(link, chance)));
    }
    for _ in 0..3 {
        let down = Arc::clone(&down);
        workers.push(stage.employ("download", next(), move |link, chance| down.job(link, chance)));
    }
    let mut keeper = Keeper::default();
    workers.push(stage.employ("keeper", next(), move |link, chance| keeper.job(link, chance)));
    workers.push(stage.employ("udp", next(), work::udp));
    workers.push(stage.employ("command", next(), work::command));
    workers.push(stage.employ("control", next(), work::control));
    workers.push(stage.employ("nonsense", next(), work::nonsense));

    let (mut record, mut deck) = (Record::new(), Deck::new());
    for number in 1.. {
        round(&mut scene, &mut deck, secs(8));
        let killed = KILLS.contains(&number);
        if killed {
            scene.kill();
        } else if RESTARTS.contains(&number) {
            scene.restart();
        }
        if killed || RESTARTS.contains(&number) {
            record.next_life();
        }
        stage.pause();
        scene.settle();
        if killed {
            up.iter().for_each(|up| up.sweep(&scene.link, &mut scene.chance));
        }
        idle.wait(scene.rig.daemon.pid());
        up.iter().for_each(|up| up.check());
        assert_nothing_left(&scene);
        record.take(scene.rig.daemon.pid(), idle, stage.checked());
        if start.elapsed() >= span {
            break;
        }
        stage.resume();
    }

    let (outcomes, checked) = stage.end();
    for worker in workers {
        worker.join().expect("a worker's panics are caught");
    }
    let returns = work::RETURNS.load(Ordering::Relaxed);
    println!("{} MiB compared, {returns} returns to a shell; mischief: {:?}", checked >> 20, scene.acts);
    assert!(returns > 0, "nobody came back to a shell");
    for (name, outcome) in outcomes {
        println!("{name}: {} jobs done, {} cut", outcome.done, outcome.cut);
        assert!(outcome.done > 0, "no {name} was ever done");
    }
    scene.rig.daemon.signal(Signal::SIGTERM);
    assert_eq!(scene.rig.daemon.wait_exit(SOON).code(), Some(0));
    record.assert_flat();
}

/// Neither processes nor words of panic; temporary files are looked for elsewhere.
fn assert_nothing_left(scene: &Scene) {
    eventually(SOON, "no background job to be left", || (!proc::has_argument(work::MARK)).then_some(()));
    let log = scene.rig.daemon.take_log();
    let panics: Vec<&String> =
        log.iter().filter(|line| line.contains("panic") || line.contains("internal error")).collect();
    assert!(panics.is_empty(), "{panics:#?}");
}
