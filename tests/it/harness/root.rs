//! A root file system with next to nothing in it, read-only but for /data and /run: BusyBox, an account, a
//! system bus, and an agent that is started there without any environment. Takes root and BusyBox.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::daemon;
use super::program;
use super::rig::{Setup, is_root};

/// The account the shells run as; this machine hasn't got it.
pub const USER: &str = "pilot";
pub const UID: u32 = 54_321;
pub const GID: u32 = 54_320;
pub const GROUPS: [u32; 3] = [GID, 54_330, 54_331];

const BUSYBOX: &str = "/bin/busybox";

/// Of the mounts nobody else sees anything. The configuration and the bus have their usual places in there, so
/// the agent isn't told where they are.
const NAMESPACE: &str = r#"exec unshare --mount --propagation private /bin/sh -c '
    set -e
    cp mender-connect.conf "$ROOT/etc/mender/"
    mount --bind "$ROOT" "$ROOT"
    mount --bind "$ROOT/data" "$ROOT/data"
    mount -t tmpfs tmpfs "$ROOT/run"
    mkdir "$ROOT/run/dbus"
    touch "$ROOT/run/dbus/system_bus_socket"
    mount --bind bus "$ROOT/run/dbus/system_bus_socket"
    mount -t proc proc "$ROOT/proc"
    mount -t devpts -o ptmxmode=666 devpts "$ROOT/dev/pts"
    for node in null zero urandom tty; do
        mount --bind "/dev/$node" "$ROOT/dev/$node"
    done
    mount -o remount,bind,ro "$ROOT"
    for word; do
        shift
        case $word in
            --config | --fallback-config | *.conf) ;;
            *) set -- "$@" "$word" ;;
        esac
    done
    exec chroot "$ROOT" /bin/busybox env -i "$@"' sh "$@""#;

/// Why no agent can be started so.
pub fn obstacle() -> Option<&'static str> {
    if !is_root() {
        return Some("only root can give an agent another root");
    }
    if !Path::new(BUSYBOX).exists() {
        return Some("BusyBox is missing: install the package 'busybox-static'");
    }
    let made = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "true"])
        .output()
        .is_ok_and(|output| output.status.success());
    (!made).then_some("no mount namespace can be made here")
}

/// The root file system.
pub struct Root {
    dir: TempDir,
}

impl Root {
    pub fn new() -> Root {
        let root = Root { dir: tempfile::tempdir().expect("a temporary directory") };
        // Other users' way in.
        fs::set_permissions(root.dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        for folder in ["proc", "run", "data", "dev/pts", "etc/mender", "usr/bin"] {
            fs::create_dir_all(root.path(folder)).expect("create a folder");
        }
        for node in ["null", "zero", "urandom", "tty"] {
            root.write(&format!("dev/{node}"), "");
        }
        symlink("pts/ptmx", root.path("dev/ptmx")).expect("a link");
        root.install(Path::new(BUSYBOX));
        symlink("busybox", root.path("bin/sh")).expect("a link");
        let agent = daemon::command();
        for word in std::iter::once(agent.get_program()).chain(agent.get_args()) {
            if Path::new(word).is_absolute() {
                root.install(Path::new(word));
            }
        }
        root.write(
            "etc/passwd",
            &format!("root:x:0:0::/:/bin/sh\n{USER}:x:{UID}:{GID}::/home/{USER}:/bin/sh\n"),
        );
        let [_, some, others] = GROUPS;
        root.write(
            "etc/group",
            &format!("root:x:0:\n{USER}:x:{GID}:\ngpio:x:{some}:{USER}\ni2c:x:{others}:root,{USER}\n"),
        );
        // Only a login shell reads it.
        root.write(&format!("home/{USER}/.profile"), "LOGIN=yes\n");
        chown(root.path(&format!("home/{USER}")), Some(UID), Some(GID)).expect("chown");
        root
    }

    /// Where a path of this root lies for us.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.dir.path().join(inside.trim_start_matches('/'))
    }

    pub fn write(&self, inside: &str, text: &str) {
        let path = self.path(inside);
        fs::create_dir_all(path.parent().expect("a folder")).expect("create a folder");
        fs::write(path, text).expect("write");
    }

    /// Copies a program and the libraries it is linked with to where they are here.
    fn install(&self, program: &Path) {
        let listing = Command::new("ldd").arg(program).output().expect("run ldd").stdout;
        let listing = String::from_utf8(listing).expect("UTF-8");
        let libraries = listing.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new);
        for file in libraries.chain([program]) {
            let copy = self.path(file.to_str().expect("UTF-8"));
            fs::create_dir_all(copy.parent().expect("a folder")).expect("create a folder");
            program::copy(file, &copy);
        }
    }

    /// An agent that is started there.
    pub fn setup(&self) -> Setup {
        Setup::new().wrapper(NAMESPACE).env("ROOT", self.dir.path().to_str().expect("UTF-8"))
    }
}
