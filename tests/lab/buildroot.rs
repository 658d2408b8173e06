//! The Buildroot package, with a few lines in place of Buildroot: its variables, and the commands that
//! install it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::yocto::{available, mode, read, root};

/// What the package uses of Buildroot, and a target that installs as Buildroot does.
const BUILDROOT: &str = r#"
comma := ,
INSTALL = install
qstrip = $(strip $(subst ",,$(1)))
UPPERCASE = $(shell printf %s '$(1)' | tr a-z- A-Z_)
RUSTC_TARGET_NAME = armv7-unknown-linux-musleabihf
NORMALIZED_ARCH = arm
cargo-package = PACKAGES += $(notdir $(patsubst %/,%,$(dir $(lastword $(MAKEFILE_LIST)))))
include $(BR2_EXTERNAL_MENDER_CONNECT_RS_PATH)/external.mk

$(BUILD_DIR)/stamp:
	$(MENDER_CONNECT_RS_INSTALL_TARGET_CMDS)
	$(if $(BR2_INIT_SYSTEMD),$(MENDER_CONNECT_RS_INSTALL_INIT_SYSTEMD))
	$(if $(BR2_INIT_SYSV),$(MENDER_CONNECT_RS_INSTALL_INIT_SYSV))

show-%:
	$(info $($*))@:
"#;

/// Runs make with Buildroot's settings.
fn make(external: &Path, settings: &[&str], target: &str) -> Result<String, String> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let makefile = dir.path().join("Makefile");
    fs::write(&makefile, BUILDROOT).expect("write");
    let mut command = Command::new("make");
    command.args(["--no-print-directory", "-s", "-f"]).arg(makefile).arg(target);
    command.arg(format!("BR2_EXTERNAL_MENDER_CONNECT_RS_PATH={}", external.display())).args(settings);
    // The settings of a make that these tests were started by.
    command.env_remove("MAKEFLAGS").env_remove("MFLAGS").env_remove("MAKELEVEL");
    let output = command.output().expect("run make");
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned())
    } else {
        Err(String::from_utf8(output.stderr).expect("UTF-8"))
    }
}

fn show(settings: &[&str], name: &str) -> String {
    make(&root().join("yocto/files/buildroot"), settings, &format!("show-{name}")).expect("make")
}

#[test]
fn source_is_the_checkout_unless_told_otherwise() {
    if !available("make") || !available("git") {
        return;
    }
    assert_eq!(show(&[], "PACKAGES"), "mender-connect-rs");
    assert_eq!(show(&[], "MENDER_CONNECT_RS_SITE_METHOD"), "git");
    assert_eq!(show(&[], "MENDER_CONNECT_RS_SITE"), format!("file://{}", root().display()));
    let head = Command::new("git").arg("-C").arg(root()).args(["rev-parse", "HEAD"]).output();
    let head = String::from_utf8(head.expect("run git").stdout).expect("UTF-8");
    assert_eq!(show(&[], "MENDER_CONNECT_RS_VERSION"), head.trim());

    let remote = [
        r#"BR2_PACKAGE_MENDER_CONNECT_RS_REPOSITORY="https://host/it.git""#,
        r#"BR2_PACKAGE_MENDER_CONNECT_RS_REVISION="v9""#,
    ];
    assert_eq!(show(&remote, "MENDER_CONNECT_RS_SITE"), "https://host/it.git");
    assert_eq!(show(&remote, "MENDER_CONNECT_RS_VERSION"), "v9");
}

#[test]
fn without_git_the_package_says_so_once_it_is_selected() {
    if !available("make") {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let copy = dir.path().join("product/copy");
    fs::create_dir_all(copy.join("yocto/files")).expect("a folder");
    let external = copy.join("yocto/files/buildroot");
    symlink(root().join("yocto/files/buildroot"), &external).expect("a link");
    make(&external, &[], "show-PACKAGES").expect("not selected");
    let refused = || {
        let said =
            make(&external, &["BR2_PACKAGE_MENDER_CONNECT_RS=y"], "show-PACKAGES").expect_err("no git");
        assert!(said.contains("is no git checkout"), "{said}");
    };
    refused();

    // A copy in another project's checkout: that one's commit isn't a commit of the source.
    if available("git") {
        let git = |words: &[&str]| {
            let mut git = Command::new("git");
            git.args(["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgSign=false"]).args(words);
            let done = git.current_dir(dir.path().join("product")).output().expect("run git");
            assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
        };
        git(&["init", "--quiet"]);
        git(&["commit", "--quiet", "--allow-empty", "--message=product"]);
        refused();
        git(&["worktree", "add", "--quiet", "../tree"]);
        let (tree, copied) = (dir.path().join("tree"), dir.path().join("product/copy/yocto"));
        fs::rename(copied, tree.join("yocto")).expect("move");
        let external = tree.join("yocto/files/buildroot");
        make(&external, &["BR2_PACKAGE_MENDER_CONNECT_RS=y"], "show-PACKAGES").expect("a work tree");
    }
}

#[test]
fn features_licences_and_flags() {
    if !available("make") {
        return;
    }
    let options = "--bin mender-connect --no-default-features --features dbus";
    assert_eq!(show(&[], "MENDER_CONNECT_RS_CARGO_BUILD_OPTS"), options);
    let tls = show(&["BR2_PACKAGE_MENDER_CONNECT_RS_TLS=y"], "MENDER_CONNECT_RS_CARGO_BUILD_OPTS");
    assert_eq!(tls, format!("{options},tls"));

    let licences = read(root().join("yocto/recipes-mender/mender-connect-rs/mender-connect-rs-cargo.inc"));
    let shown = show(&[], "MENDER_CONNECT_RS_LICENSE");
    assert!(shown.starts_with("Apache-2.0, "), "{shown}");
    assert!(licences.contains(&format!("\"{}\"", shown.replace(", ", " & "))), "{shown}");

    // Buildroot's own profile comes before.
    let profile = show(&[], "MENDER_CONNECT_RS_CARGO_ENV");
    let manifest = read(root().join("Cargo.toml"));
    let release = manifest.split("\n[profile.release]\n").nth(1).expect("a profile");
    let mut wanted = Vec::new();
    for key in ["opt-level", "lto", "codegen-units"] {
        let line = release.lines().find_map(|line| line.strip_prefix(&format!("{key} = "))).expect(key);
        let name = key.to_uppercase().replace('-', "_");
        wanted.push(format!("CARGO_PROFILE_RELEASE_{name}=\"{}\"", line.trim_matches('"')));
    }
    assert_eq!(profile.split_whitespace().collect::<Vec<_>>(), wanted);

    let start = "CARGO_TARGET_ARMV7_UNKNOWN_LINUX_MUSLEABIHF_RUSTFLAGS=\"-Ctarget-feature=-crt-static";
    let arm = show(&["BR2_TOOLCHAIN_USES_MUSL=y"], "MENDER_CONNECT_RS_CARGO_ENV");
    let (time, link) = ("--cfg=libc_unstable_time64", "-Clink-arg=-Wl,--allow-multiple-definition");
    assert_eq!(arm, format!("{} {start} {time} {link}\"", wanted.join(" ")));
    let aarch64 = ["BR2_TOOLCHAIN_USES_MUSL=y", "BR2_ARCH_IS_64=y", "NORMALIZED_ARCH=aarch64"];
    let aarch64 = show(&aarch64, "MENDER_CONNECT_RS_CARGO_ENV");
    assert_eq!(aarch64.trim_end_matches(['"', ' ']), format!("{} {start}", wanted.join(" ")));
}

#[test]
fn an_old_rust_is_named_before_anything_is_downloaded() {
    if !available("make") {
        return;
    }
    let external = root().join("yocto/files/buildroot");
    for (version, fits) in [("1.82.0", false), ("1.9.0", false), ("1.88.0", true), ("1.100.1", true)] {
        for provider in ["RUST_BIN_VERSION", "RUST_VERSION"] {
            let version = format!("{provider}={version}");
            make(&external, &[&version], "show-PACKAGES").expect("not selected");
            let result = make(&external, &["BR2_PACKAGE_MENDER_CONNECT_RS=y", &version], "show-PACKAGES");
            assert_eq!(result.is_ok(), fits, "{version}: {result:?}");
            let needed = concat!("needs Rust ", env!("CARGO_PKG_RUST_VERSION"), " or newer");
            assert!(result.is_ok() || result.is_err_and(|said| said.contains(needed)));
        }
    }
}

#[test]
fn installs_what_the_init_system_needs() {
    if !available("make") {
        return;
    }
    for (init, profile, unit, script) in [
        (&["BR2_INIT_SYSTEMD=y"][..], "release", true, false),
        (&["BR2_INIT_SYSV=y"], "release", false, true),
        (&["BR2_ENABLE_DEBUG=y"], "debug", false, false),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (build, target) = (dir.path().join("build"), dir.path().join("target"));
        let programs = build.join("target/armv7-unknown-linux-musleabihf").join(profile);
        fs::create_dir_all(&programs).expect("a folder");
        fs::write(programs.join("mender-connect"), "ELF").expect("write");
        symlink(root().join("yocto"), build.join("yocto")).expect("a link");
        let (build, target_) =
            (format!("BUILD_DIR={}", build.display()), format!("TARGET_DIR={}", target.display()));
        let mut settings = vec![
            r#"BR2_PACKAGE_MENDER_CONNECT_RS_SHELL="/bin/bash""#,
            r#"BR2_PACKAGE_MENDER_CONNECT_RS_USER="root""#,
            &build,
            &target_,
        ];
        settings.extend(init);
        let stamp = format!("{}/stamp", build.trim_start_matches("BUILD_DIR="));
        make(&root().join("yocto/files/buildroot"), &settings, &stamp).expect("an installation");

        assert_eq!(mode(target.join("usr/bin/mender-connect")), 0o755);
        let conf: serde_json::Value =
            serde_json::from_str(&read(target.join("etc/mender/mender-connect.conf"))).expect("JSON");
        assert_eq!(conf, serde_json::json!({ "ShellCommand": "/bin/bash", "User": "root" }));
        let unit_file = target.join("usr/lib/systemd/system/mender-connect.service");
        let script_file = target.join("etc/init.d/S43mender-connect");
        assert_eq!((unit_file.exists(), script_file.exists()), (unit, script), "{init:?}");
        if script {
            assert_eq!(mode(script_file), 0o755);
        }
    }
    let permissions = show(&[], "MENDER_CONNECT_RS_PERMISSIONS");
    assert_eq!(permissions, "/etc/mender/mender-connect.conf f 600 0 0 - - - - -");
}

/// An empty option leaves the other one where it is.
#[test]
fn each_option_is_one_key_of_the_configuration() {
    if !available("make") {
        return;
    }
    for (shell, user) in [("", "pi"), ("/bin/sh", ""), ("/opt/a shell", "a user")] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let build = dir.path().join("build");
        let programs = build.join("target/armv7-unknown-linux-musleabihf/release");
        fs::create_dir_all(&programs).expect("a folder");
        fs::write(programs.join("mender-connect"), "ELF").expect("write");
        let settings = [
            format!("BR2_PACKAGE_MENDER_CONNECT_RS_SHELL=\"{shell}\""),
            format!("BR2_PACKAGE_MENDER_CONNECT_RS_USER=\"{user}\""),
            format!("BUILD_DIR={}", build.display()),
            format!("TARGET_DIR={}", dir.path().join("target").display()),
        ];
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        let stamp = build.join("stamp");
        make(&root().join("yocto/files/buildroot"), &settings, stamp.to_str().expect("UTF-8"))
            .expect("an installation");
        let conf = read(dir.path().join("target/etc/mender/mender-connect.conf"));
        let conf: serde_json::Value = serde_json::from_str(&conf).expect("JSON");
        assert_eq!(conf, serde_json::json!({ "ShellCommand": shell, "User": user }));
    }
}

/// Every option that the package reads is one that it offers, and the other way round.
#[test]
fn options_are_declared_and_used() {
    let folder = root().join("yocto/files/buildroot/package/mender-connect-rs");
    let (config, makefile) = (read(folder.join("Config.in")), read(folder.join("mender-connect-rs.mk")));
    let declared: Vec<_> = config.lines().filter_map(|line| line.strip_prefix("config ")).collect();
    assert!(declared.len() > 3, "{declared:?}");
    for option in &declared {
        assert!(makefile.contains(&format!("$({option})")), "{option} isn't used");
    }
    for used in makefile.split("$(BR2_PACKAGE_MENDER_CONNECT_RS").skip(1) {
        let name = format!("BR2_PACKAGE_MENDER_CONNECT_RS{}", used.split(')').next().expect("its end"));
        assert!(declared.contains(&name.as_str()), "{name} isn't declared");
    }
}
