//! A network of two: the server's side is the calling thread's network namespace, the agent has one of its own. Nothing
//! of it is seen in the machine's network.

use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, unshare};

use super::device::Generation;
use super::rig::{Setup, is_root};
use super::server::Server;
use super::wait::{SOON, eventually, skip, spawn};

/// The server's. Not of the agent's network: the way to it is the default route.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// Starts the agent in its namespace.
const NAMESPACE: &str = r#"exec nsenter --net="/proc/$NAMESPACE/ns/net" "$@""#;

pub struct Network {
    /// Keeps the agent's namespace.
    holder: Child,
}

/// Runs a test in a thread whose network is the server's side; says so where that isn't possible.
pub fn with_network(test: impl FnOnce(&Network) + Send + 'static) {
    if !is_root() {
        return skip("only root can make networks");
    }
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let result = spawn(&name, move || match Network::new() {
        Ok(network) => test(&network),
        Err(why) => skip(&why),
    });
    if let Err(panic) = result.join() {
        std::panic::resume_unwind(panic);
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let told = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{command:?}: {told}")) }
}

impl Network {
    fn new() -> Result<Network, String> {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|e| format!("no network namespace can be made here: {e}"))?;
        let mut holder = Command::new("unshare");
        holder.args(["--net", "sleep", "infinity"]).stdin(Stdio::null());
        let holder = holder.spawn().map_err(|e| format!("cannot run unshare: {e}"))?;
        let network = Network { holder };
        let ours = std::fs::read_link("/proc/thread-self/ns/net").expect("our namespace");
        let theirs = network.namespace();
        let parent = std::fs::read_link("/proc/self/ns/net").expect("the machine's namespace");
        eventually(SOON, "the agent's namespace", || {
            std::fs::read_link(&theirs).ok().filter(|theirs| *theirs != ours && *theirs != parent)
        });
        let pid = network.holder.id();
        network.try_far(&format!("ip link add far type veth peer name near netns {pid}"))?;
        network.far("ip link set lo up");
        network.far("ip addr add 192.0.2.1/24 dev far");
        network.far("ip link set far up");
        network.answer();
        network.near("ip link set lo up");
        network.near("ip addr add 192.0.2.2/24 dev near");
        network.near("ip link set near up");
        network.near("ip route add default via 192.0.2.1");
        // The kernel may take a second to say so, and that is a change of the network.
        network.near("until ip link show near | grep -q 'state UP'; do sleep 0.02; done");
        Ok(network)
    }

    fn try_far(&self, command: &str) -> Result<(), String> {
        run(Command::new("sh").args(["-c", command]))
    }

    /// Runs a command on the server's side.
    pub fn far(&self, command: &str) {
        self.try_far(command).unwrap_or_else(|e| panic!("{e}"));
    }

    /// Runs a command in the agent's namespace.
    pub fn near(&self, command: &str) {
        let net = format!("--net={}", self.namespace());
        run(Command::new("nsenter").args([&net, "sh", "-c", command])).unwrap_or_else(|e| panic!("{e}"));
    }

    /// The file of the agent's namespace.
    pub fn namespace(&self) -> String {
        format!("/proc/{}/ns/net", self.holder.id())
    }

    /// From now on nothing answers at the server's address, nor says that there is nothing.
    pub fn go_dark(&self) {
        self.far(&format!("ip addr del {SERVER}/32 dev lo"));
    }

    /// Ends the darkness.
    pub fn answer(&self) {
        self.far(&format!("ip addr add {SERVER}/32 dev lo"));
    }

    pub fn server(&self) -> Server {
        Server::bind((SERVER, 0).into(), Generation::New)
    }

    /// An agent in its namespace, with this server.
    pub fn agent(&self, setup: Setup, server: &Server) -> Setup {
        let setup = setup.wrapper(NAMESPACE).env("NAMESPACE", &self.holder.id().to_string());
        setup.url(&format!("http://{}", server.address()))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
