//! The Yocto layer: its lists against Cargo.lock, and what its recipe does, run by the few lines of
//! bitbake in bitbake.py.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::harness::daemon::executable;
use crate::harness::program;
use crate::harness::wait::skip;
use crate::machine::Machine;

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn recipes() -> PathBuf {
    root().join("yocto/recipes-mender/mender-connect-rs")
}

pub fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The tool's path if it is there.
pub fn available(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok();
    if !found {
        skip(&format!("{tool} is missing"));
    }
    found
}

/// The quoted value of a line that starts with `key = `.
fn value<'a>(text: &'a str, key: &str) -> &'a str {
    let start = format!("{key} = \"");
    let line = text.lines().find_map(|line| line.strip_prefix(&start));
    line.unwrap_or_else(|| panic!("no {key}")).trim_end_matches('"')
}

pub fn mode(path: impl AsRef<Path>) -> u32 {
    let path = path.as_ref();
    let data = fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    data.permissions().mode() & 0o7777
}

fn bitbake(settings: &Value, words: &[&str]) -> Output {
    let mut command = Command::new("python3");
    command.arg(root().join("tests/lab/bitbake.py")).arg(settings.to_string()).args(words);
    command.output().expect("run python3")
}

fn get(settings: &Value, name: &str) -> String {
    let output = bitbake(settings, &["get", name]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let values: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    values[name].as_str().unwrap_or_else(|| panic!("{name} isn't set")).to_owned()
}

fn run(settings: &Value, function: &str) -> Result<(), String> {
    let output = bitbake(settings, &["run", function]);
    let said = String::from_utf8(output.stderr).expect("UTF-8");
    if output.status.success() { Ok(()) } else { Err(said) }
}

#[test]
fn crates_are_those_of_the_lock() {
    let lock = read(root().join("Cargo.lock"));
    let mut locked = BTreeMap::new();
    for package in lock.split("[[package]]").skip(1) {
        if package.contains("\nsource = ") {
            let crate_ = (value(package, "name").to_owned(), value(package, "version").to_owned());
            locked.insert(crate_, value(package, "checksum").to_owned());
        }
    }
    assert!(locked.len() > 100, "{} crates", locked.len());

    let list = read(recipes().join("mender-connect-rs-crates.inc"));
    let mut fetched = BTreeMap::new();
    for line in list.lines().filter_map(|line| line.trim().strip_prefix("crate://crates.io/")) {
        let (crate_, name) = line.trim_end_matches(" \\").split_once(";name=").expect("a name");
        let (crate_, version) = crate_.split_once('/').expect("a version");
        assert_eq!(name, format!("{crate_}-{version}"));
        let checksum = value(&list, &format!("SRC_URI[{name}.sha256sum]")).to_owned();
        let twice = fetched.insert((crate_.to_owned(), version.to_owned()), checksum);
        assert!(twice.is_none(), "twice: {name}");
    }
    assert_eq!(fetched, locked, "run yocto/update-crates");
    assert_eq!(list.matches(".sha256sum]").count(), fetched.len(), "checksums without a crate");
}

#[test]
fn recipe_is_of_this_version_and_licence() {
    let recipe = recipes().join(concat!("mender-connect-rs_", env!("CARGO_PKG_VERSION"), ".bb"));
    let found: Vec<_> = fs::read_dir(recipes())
        .expect("the recipe's folder")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "bb"))
        .collect();
    assert_eq!(found, std::slice::from_ref(&recipe));

    let sum = Command::new("md5sum").arg(root().join("LICENSE")).output().expect("run md5sum");
    let sum = String::from_utf8(sum.stdout).expect("UTF-8");
    let sum = sum.split_whitespace().next().expect("a sum");
    assert_eq!(value(&read(recipe), "LIC_FILES_CHKSUM"), format!("file://LICENSE;md5={sum}"));
    assert_eq!(read(root().join("yocto/LICENSE")), read(root().join("LICENSE")));
}

/// A copy of what the generator reads and writes.
fn project() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for name in ["src", "tests"] {
        symlink(root().join(name), dir.path().join(name)).expect("a link");
    }
    let folder = dir.path().join("yocto/recipes-mender/mender-connect-rs");
    fs::create_dir_all(&folder).expect("a folder");
    fs::create_dir_all(dir.path().join("yocto/files/debian")).expect("a folder");
    for name in ["Cargo.toml", "Cargo.lock", "yocto/update-crates", "yocto/files/debian/changelog"] {
        fs::copy(root().join(name), dir.path().join(name)).expect("a copy");
    }
    for name in ["mender-connect-rs-crates.inc", "mender-connect-rs-cargo.inc"] {
        fs::copy(recipes().join(name), folder.join(name)).expect("a copy");
    }
    dir
}

fn update_crates(project: &Path, arguments: &[&str]) -> Result<(), String> {
    let mut command = Command::new("python3");
    command.arg(project.join("yocto/update-crates")).args(arguments).env("CARGO_NET_OFFLINE", "true");
    let output = command.output().expect("run python3");
    let said = [output.stdout, output.stderr].concat();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8(said).expect("UTF-8")) }
}

#[test]
fn generated_files_are_current() {
    if available("python3") {
        update_crates(root(), &["--check"]).expect("run yocto/update-crates");
    }
}

#[test]
fn generator_notices_and_mends_what_drifted() {
    if !available("python3") {
        return;
    }
    let project = project();
    update_crates(project.path(), &["--check"]).expect("a copy is current");

    let folder = project.path().join("yocto/recipes-mender/mender-connect-rs");
    for (name, from, to) in [
        ("mender-connect-rs-crates.inc", "crate://crates.io/ring/", "crate://crates.io/rung/"),
        ("mender-connect-rs-cargo.inc", " & ISC", ""),
        ("mender-connect-rs-cargo.inc", "_RUST = \"1.", "_RUST = \"2."),
    ] {
        let good = read(folder.join(name));
        assert!(good.contains(from), "{name}: {from}");
        fs::write(folder.join(name), good.replace(from, to)).expect("write");
        let said = update_crates(project.path(), &["--check"]).expect_err(from);
        assert!(said.contains(from.trim()) && said.contains("yocto/update-crates"), "{said}");
        update_crates(project.path(), &[]).expect("an update");
        assert_eq!(read(folder.join(name)), good);
    }

    let lock = read(project.path().join("Cargo.lock"));
    let git = lock.replacen("registry+https://github.com/rust-lang/crates.io-index", "git+https://a/b", 1);
    fs::write(project.path().join("Cargo.lock"), git).expect("write");
    let said = update_crates(project.path(), &[]).expect_err("a crate that isn't from crates.io");
    assert!(said.contains("can only fetch from crates.io"), "{said}");
}

/// Cargo.toml alone names the publisher.
#[test]
fn the_publisher_is_named_in_one_place() {
    if !available("python3") {
        return;
    }
    let manifest = read(root().join("Cargo.toml"));
    let publisher = manifest.lines().find_map(|line| line.strip_prefix("authors = [\"")).expect("authors");
    let publisher = publisher.trim_end_matches("\"]");
    let address = publisher.split_once(" <").expect("an address").1.trim_end_matches('>');
    let mut paths = Vec::new();
    files(&root().join("yocto"), &mut paths);
    for path in paths {
        let named = read(&path).contains(address);
        assert_eq!(named, path.ends_with("files/debian/changelog"), "{}", path.display());
    }
    // Nobody can have a host of that name (RFC 2606). There is no placeholder for a URL.
    let placeholder = address.ends_with(".invalid");
    assert_eq!(placeholder, !manifest.contains("\nrepository = "), "one of the two isn't filled in");

    let project = project();
    let url = "https://example.com/agent";
    let anonymous = manifest.lines().filter(|line| !line.starts_with("repository = "));
    let filled = anonymous.collect::<Vec<_>>().join("\n").replace(publisher, "Jo O'Neill <jo@example.com>");
    let filled = filled.replacen("\n[[bin]]", &format!("repository = \"{url}\"\n\n[[bin]]"), 1);
    fs::write(project.path().join("Cargo.toml"), filled).expect("write");
    let said = update_crates(project.path(), &["--check"]).expect_err("another publisher");
    assert!(said.contains("Jo O'Neill") && said.contains(url), "{said}");
    update_crates(project.path(), &[]).expect("an update");
    let changelog = read(project.path().join("yocto/files/debian/changelog"));
    assert!(changelog.contains("\n -- Jo O'Neill <jo@example.com>  "), "{changelog}");
    let inc = project.path().join("yocto/recipes-mender/mender-connect-rs/mender-connect-rs-cargo.inc");
    assert!(read(inc).contains(&format!("\nMCRS_REPOSITORY ?= \"{url}\"\n")));
    for (repository, tracker) in [("", String::new()), (url, format!("{url}/issues"))] {
        let settings = json!({ "MCRS_REPOSITORY": repository });
        assert_eq!(get(&settings, "HOMEPAGE"), repository);
        assert_eq!(get(&settings, "BUGTRACKER"), tracker);
    }
}

#[test]
fn features_follow_packageconfig() {
    if !available("python3") {
        return;
    }
    let manifest = read(root().join("Cargo.toml"));
    let features = manifest.split("\n[features]\n").nth(1).expect("features").split("\n[").next();
    let defaults = "--no-default-features --features";
    for (packageconfig, wanted, vendored) in [
        (None, "dbus tls", false),
        (Some("system-dbus"), "dbus", false),
        (Some("tls"), "dbus tls vendored-dbus", true),
    ] {
        let settings = packageconfig.map_or(json!({}), |p| json!({ "PACKAGECONFIG": p }));
        let flags = get(&settings, "CARGO_BUILD_FLAGS").split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(flags.replace(" '", "'"), format!("{defaults} '{wanted}'").replace(" '", "'"));
        for feature in wanted.split(' ') {
            let line = format!("\n{feature} = ");
            assert!(format!("\n{}", features.expect("text")).contains(&line), "no feature {feature}");
        }
        let licence = get(&settings, "LICENSE");
        assert_eq!(licence.contains(" & (AFL-2.1 | GPL-2.0-or-later)"), vendored, "{licence}");
        assert!(licence.starts_with("Apache-2.0 & "), "{licence}");
        let mut tested = settings;
        tested["PTEST_ENABLED"] = json!("1");
        assert!(
            get(&tested, "LICENSE").ends_with(" & (AFL-2.1 | GPL-2.0-or-later)"),
            "the unit tests' licence"
        );
        let of_libdbus = read(root().join(".cargo/config.toml"));
        let of_libdbus = value(&of_libdbus, "HOST_CFLAGS");
        let flags = get(&c_settings(packageconfig), "CFLAGS");
        assert!(flags.starts_with("-g -O2 ") && flags.ends_with(&format!(" {of_libdbus}")), "{flags}");
    }
}

/// oe-core before and after it took SPDX expressions.
#[test]
fn licence_has_the_operators_that_the_series_reads() {
    if !available("python3") {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let settings = json!({ "COREBASE": dir.path(), "PACKAGECONFIG": "tls" });
    let old = get(&settings, "LICENSE");
    let module = dir.path().join("meta/lib/oe/spdx_license.py");
    fs::create_dir_all(module.parent().expect("a parent")).expect("a folder");
    fs::write(module, "").expect("write");
    let new = get(&settings, "LICENSE");
    assert!(new.ends_with(" AND (AFL-2.1 OR GPL-2.0-or-later)"), "{new}");
    assert_eq!(new.replace("AND", "&").replace("OR", "|"), old);
}

/// A panic ends the agent either way, see daemon.rs. Rust 1.88's libstd-rs has a panic_abort that the linker refuses in
/// programs that abort; 1.94's hasn't.
#[test]
fn panics_are_as_the_standard_library_has_them() {
    if !available("python3") {
        return;
    }
    for (rust, wanted) in [("1.88.0%", "unwind"), ("1.94.1", "abort"), ("1.100%", "abort"), ("%", "unwind")] {
        let settings = json!({ "RUSTVERSION": rust });
        assert_eq!(get(&settings, "CARGO_PROFILE_RELEASE_PANIC"), wanted, "{rust}");
    }
}

/// The class's task would take the lock files of the tests, too, and runs by itself in devtool upgrade.
#[test]
fn crates_are_listed_by_the_project_alone() {
    let recipe = read(recipes().join(concat!("mender-connect-rs_", env!("CARGO_PKG_VERSION"), ".bb")));
    let inherited: Vec<_> = recipe.lines().filter_map(|line| line.strip_prefix("inherit ")).collect();
    assert!(!inherited.concat().contains("cargo-update-recipe-crates"), "{inherited:?}");
}

const DEBUG_SOURCES: &str = "/usr/src/debug/mender-connect-rs/1.0.0";

/// What oe-core sets for C compilers.
fn c_settings(packageconfig: Option<&str>) -> Value {
    let mut settings =
        json!({ "CFLAGS": "-g -O2", "CARGO_HOME": "/build/cargo_home", "TARGET_DBGSRC_DIR": DEBUG_SOURCES });
    if let Some(packageconfig) = packageconfig {
        settings["PACKAGECONFIG"] = json!(packageconfig);
    }
    settings
}

/// oe-core's own maps cover S and B, but ring's and libdbus's C is compiled below CARGO_HOME. On wrynose
/// do_package_qa fails for a debug file with a path of the build in it.
#[test]
fn debug_information_names_no_folder_of_the_build() {
    if !available("python3") || !available("cc") {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let home = dir.path().join("cargo_home");
    let sources = home.join("bitbake/ring-0.17.14");
    fs::create_dir_all(&sources).expect("a folder");
    fs::write(sources.join("curve.c"), "int curve(void) { return 25519; }\n").expect("write");
    for packageconfig in [None, Some("tls")] {
        let mut settings = c_settings(packageconfig);
        settings["CARGO_HOME"] = json!(home);
        let flags = get(&settings, "CFLAGS");
        let mut cc = Command::new("cc");
        cc.args(flags.split_whitespace()).args(["-gz=none", "-c", "-o", "curve.o"]);
        cc.arg(sources.join("curve.c")).current_dir(&sources);
        assert!(cc.status().expect("run cc").success(), "{flags}");
        let object = fs::read(sources.join("curve.o")).expect("an object file");
        let object = String::from_utf8_lossy(&object);
        let mapped = format!("{DEBUG_SOURCES}/cargo_home/bitbake/ring-0.17.14");
        assert!(object.contains(&mapped), "{flags}");
        assert!(!object.contains(dir.path().to_str().expect("UTF-8")), "{flags}");
    }
}

/// The flags for 32-bit musl are those of .cargo/config.toml, which neither build system reads.
#[test]
fn time_has_64_bits_wherever_the_project_says_so() {
    let config = read(root().join(".cargo/config.toml"));
    let Some(flags) = config.lines().find_map(|line| line.strip_prefix("rustflags = [\"")) else {
        panic!("no flags in {config}");
    };
    let flags = flags.trim_end_matches("\"]");
    if available("python3") {
        for (bits, wanted) in [("32", format!(" {flags}")), ("64", String::new())] {
            let settings = json!({ "SITEINFO_BITS": bits });
            assert_eq!(get(&settings, "RUSTFLAGS:append:libc-musl").trim_end(), wanted, "{bits} bits");
        }
    }
    let package = root().join("yocto/files/buildroot/package/mender-connect-rs/mender-connect-rs.mk");
    assert!(read(package).contains(&format!("$(if $(BR2_ARCH_IS_64),,{flags})")));
}

#[test]
fn source_is_the_checkout_unless_told_otherwise() {
    if !available("python3") {
        return;
    }
    let checkout = fs::canonicalize(root()).expect("this checkout");
    let source = get(&json!({}), "SRC_URI");
    let here = format!("git://{};protocol=file;usehead=1;", checkout.display());
    assert!(source.starts_with(&here), "{source}");
    assert_eq!(get(&json!({}), "SRCREV"), "AUTOINC");
    let version = concat!(env!("CARGO_PKG_VERSION"), "+git");
    assert_eq!(get(&json!({}), "PV"), version, "two commits mustn't have the same version");
    assert!(source.contains(&format!(";destsuffix=mender-connect-rs-{version} ")));
    assert!(source.contains(" file://mender-connect.conf "), "{source}");

    let remote = json!({ "MCRS_GIT": "git://host/it.git;branch=main", "SRCREV": "0123" });
    assert!(get(&remote, "SRC_URI").starts_with("git://host/it.git;branch=main;destsuffix="));
    assert_eq!(get(&remote, "SRCREV"), "0123");
}

#[test]
fn takes_the_place_of_upstreams_package() {
    if !available("python3") {
        return;
    }
    assert_eq!(get(&json!({}), "PREFERRED_RPROVIDER_mender-connect"), "mender-connect-rs");
    let other = json!({ "PREFERRED_RPROVIDER_mender-connect": "mender-connect" });
    assert_eq!(get(&other, "PREFERRED_RPROVIDER_mender-connect"), "mender-connect");
    assert_eq!(get(&json!({}), "RPROVIDES:mender-connect-rs"), "mender-connect (= 3.0.0)");
    let layer = tempfile::tempdir().unwrap();
    let recipes = layer.path().join("recipes-mender/mender-connect");
    fs::create_dir_all(&recipes).unwrap();
    for version in ["2.3.4", "3.0.9", "3.0.10", "3.1.0-build4", "git"] {
        fs::write(recipes.join(format!("mender-connect_{version}.bb")), "").unwrap();
    }
    let beside = json!({ "LAYERDIR_MENDER": layer.path() });
    assert_eq!(get(&beside, "RPROVIDES:mender-connect-rs"), "mender-connect (= 3.0.10)");
    let newer = json!({ "MCRS_UPSTREAM_VERSION": "3.0.1" });
    assert_eq!(get(&newer, "RPROVIDES:mender-connect-rs"), "mender-connect (= 3.0.1)");
    for (name, wanted) in [("RREPLACES", "mender-connect"), ("RCONFLICTS", "mender-connect")] {
        assert_eq!(get(&json!({}), &format!("{name}:mender-connect-rs")), wanted);
    }
    let conf = get(&json!({ "sysconfdir": "/etc" }), "CONFFILES:mender-connect-rs");
    assert_eq!(conf, "/etc/mender/mender-connect.conf");
}

/// The text from the heading on, up to the next one of its level.
fn section<'a>(page: &'a str, heading: &str) -> &'a str {
    let level = heading.split(' ').next().expect("a level");
    let start = page.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading}")) + 1;
    let rest = &page[start + heading.len()..];
    &rest[..rest.find(&format!("\n{level} ")).unwrap_or(rest.len())]
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files(&path, found);
        } else {
            found.push(path);
        }
    }
}

/// meta-mender's mender-setup class warns of every variable MENDER_* that conf/mender-vars.json doesn't list. These are
/// in it, since upstream's recipe has them.
#[test]
fn variables_with_menders_prefix_are_menders() {
    let known = ["MENDER_CONNECT_SHELL", "MENDER_CONNECT_USER"];
    let mut paths = Vec::new();
    files(&root().join("yocto"), &mut paths);
    // Buildroot prescribes the names in its external tree.
    paths.retain(|path| !path.starts_with(root().join("yocto/files/buildroot")));
    let mut texts: Vec<(PathBuf, String)> =
        paths.into_iter().map(|path| (path.clone(), read(path))).collect();
    let guide = read(root().join("docs/guide.md"));
    texts.push(("docs/guide.md".into(), section(&guide, "## Yocto and Buildroot").to_owned()));

    let mut found = 0;
    for (path, text) in &texts {
        for (start, _) in text.match_indices("MENDER_") {
            let part_of_a_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if text[..start].ends_with(part_of_a_name) {
                continue;
            }
            let name = text[start..].split(|c| !part_of_a_name(c)).next().expect("a name");
            // The prefix by itself, where it is talked about, and what shells find.
            if !["MENDER_", "MENDER_SESSION_ID", "MENDER_USER_ID"].contains(&name) {
                assert!(known.contains(&name), "{}: {name}", path.display());
                found += 1;
            }
        }
    }
    assert!(found >= 2 * known.len(), "the variables aren't where they were looked for");
}

#[test]
fn an_old_rust_is_named_before_anything_is_built() {
    if !available("python3") {
        return;
    }
    assert!(get(&json!({}), "do_fetch[prefuncs]").contains("mender_connect_rs_check_rust"));
    assert_eq!(get(&json!({}), "MCRS_RUST"), env!("CARGO_PKG_RUST_VERSION"));
    for (settings, fits) in [
        (json!({ "RUSTVERSION": "1.75%" }), false),
        (json!({ "RUSTVERSION": "1.87.1" }), false),
        (json!({ "RUSTVERSION": "1.100.0%", "PREFERRED_VERSION_rust-native": "1.9%" }), false),
        (json!({ "RUSTVERSION": "1.88.0%" }), true),
        (json!({ "RUSTVERSION": "1.75%", "PREFERRED_VERSION_rust-native": "1.100%" }), true),
        (json!({ "RUSTVERSION": "2.0" }), true),
        (json!({}), true),
        (json!({ "RUSTVERSION": "%" }), true),
    ] {
        let result = run(&settings, "mender_connect_rs_check_rust");
        assert_eq!(result.is_ok(), fits, "{settings}: {result:?}");
        if let Err(said) = result {
            assert!(said.contains("needs Rust 1.88") && said.contains("meta-lts-mixins"), "{said}");
        }
    }
}

/// Runs the recipe's task over a configuration of SRC_URI.
fn prepared(given: &str, mut settings: Value, folder: &str) -> Result<Value, String> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::write(dir.path().join("mender-connect.conf"), given).expect("write");
    let build = dir.path().join("build");
    fs::create_dir(&build).expect("a folder");
    settings["WORKDIR"] = json!("/nonexistent");
    settings[folder] = json!(dir.path());
    settings["B"] = json!(build);
    run(&settings, "do_prepare_mender_connect_conf")?;
    Ok(serde_json::from_str(&read(build.join("mender-connect.conf"))).expect("JSON"))
}

#[test]
fn configuration_is_completed_with_shell_and_user() {
    if !available("python3") {
        return;
    }
    let own = read(recipes().join("files/mender-connect.conf"));
    let defaults = json!({ "ShellCommand": "/bin/sh", "User": "nobody" });
    for folder in ["WORKDIR", "UNPACKDIR"] {
        assert_eq!(prepared(&own, json!({}), folder), Ok(defaults.clone()));
    }

    let settings = json!({ "MENDER_CONNECT_SHELL": "/bin/bash", "MENDER_CONNECT_USER": "root" });
    let wanted = json!({ "ShellCommand": "/bin/bash", "User": "root" });
    assert_eq!(prepared(&own, settings.clone(), "UNPACKDIR"), Ok(wanted));

    let given = r#"{"USER": "pi", "Terminal": {"Width": 90}, "PortForward": {"Allow": ["tcp/*:22"]}}"#;
    let mut wanted: Value = serde_json::from_str(given).expect("JSON");
    wanted["ShellCommand"] = json!("/bin/bash");
    assert_eq!(prepared(given, settings, "UNPACKDIR"), Ok(wanted));

    let said = prepared("{\"User\": }", json!({}), "UNPACKDIR").expect_err("no JSON");
    assert!(said.contains("FATAL") && said.contains("mender-connect.conf"), "{said}");

    let watched = get(&json!({}), "do_prepare_mender_connect_conf[vardeps]");
    assert_eq!(watched.trim(), "MENDER_CONNECT_SHELL MENDER_CONNECT_USER");
}

#[test]
fn installs_what_the_init_system_needs() {
    if !available("python3") {
        return;
    }
    for (features, unit, script) in [
        ("systemd pam", true, false),
        ("sysvinit", false, true),
        ("systemd sysvinit", true, true),
        ("", false, true),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (build, image) = (dir.path().join("build"), dir.path().join("image"));
        fs::create_dir_all(build.join("target/a-b/release")).expect("a folder");
        fs::write(build.join("target/a-b/release/mender-connect"), "ELF").expect("write");
        fs::write(build.join("mender-connect.conf"), "{}").expect("write");
        let settings = json!({
            "B": build, "D": image, "S": root(), "DISTRO_FEATURES": features, "bindir": "/usr/bin", "sysconfdir": "/etc",
            "mandir": "/usr/share/man",
            "systemd_system_unitdir": "/lib/systemd/system", "CARGO_TARGET_SUBDIR": "a-b/release",
        });
        run(&settings, "do_install").expect("do_install");

        assert_eq!(mode(image.join("usr/bin/mender-connect")), 0o755);
        assert_eq!(mode(image.join("etc/mender/mender-connect.conf")), 0o600);
        assert_eq!(mode(image.join("etc/mender")), 0o755);
        for page in ["8/mender-connect.8", "5/mender-connect.conf.5"] {
            assert_eq!(mode(image.join(format!("usr/share/man/man{page}"))), 0o644);
        }
        let unit_file = image.join("lib/systemd/system/mender-connect.service");
        let script_file = image.join("etc/init.d/mender-connect");
        assert_eq!((unit_file.exists(), script_file.exists()), (unit, script), "{features}");
        if unit {
            assert_eq!(mode(&unit_file), 0o644);
        }
        if script {
            assert_eq!(mode(&script_file), 0o755);
        }
    }
    assert_eq!(get(&json!({}), "SYSTEMD_SERVICE:mender-connect-rs"), "mender-connect.service");
    assert_eq!(get(&json!({}), "INITSCRIPT_NAME"), "mender-connect");
}

/// For the package of tests cargo builds those of the library, and nothing that do_install takes.
#[test]
fn the_package_of_tests_has_the_librarys() {
    if !available("python3") {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let deps = dir.path().join("build/ptest/a-b/release/deps");
    let (cargo, graph, ptest) =
        (dir.path().join("cargo"), dir.path().join("graph"), dir.path().join("image/usr/lib/ptest"));
    // Instead of the build: the real one's plan of it, and files such as it leaves.
    let script = format!(
        "#!/bin/sh -e
        RUSTC_BOOTSTRAP=1 {cargo} \"$@\" -Zunstable-options --unit-graph >{graph}
        mkdir -p {deps}
        cd {deps}
        echo tests >mender_connect-012d
        touch mender_connect-012d.d libmender_connect-012.rlib other-012\n",
        cargo = env!("CARGO"),
        graph = graph.display(),
        deps = deps.display(),
    );
    program::write(&cargo, script.as_bytes());
    let settings = json!({
        "CARGO": cargo, "CARGO_BUILD_FLAGS": "-v --frozen --release", "RUSTFLAGS": "",
        "B": dir.path().join("build"), "CARGO_TARGET_SUBDIR": "a-b/release",
        "D": dir.path().join("image"), "PTEST_PATH": "/usr/lib/ptest",
    });
    run(&settings, "do_compile_ptest").expect("do_compile_ptest");
    let graph: Value = serde_json::from_str(&read(&graph)).expect("JSON");
    let roots = graph["roots"].as_array().expect("roots").iter();
    let units: Vec<_> =
        roots.map(|root| &graph["units"][root.as_u64().expect("an index") as usize]).collect();
    let [unit] = units[..] else { panic!("{units:?}") };
    assert_eq!((&unit["mode"], &unit["target"]["kind"]), (&json!("test"), &json!(["lib"])));
    assert_eq!(unit["features"], json!(["dbus", "tls"]));

    run(&settings, "do_install_ptest").expect("do_install_ptest");
    assert_eq!(read(ptest.join("unit-tests")), "tests\n");
    assert_eq!(mode(ptest.join("unit-tests")), 0o755);
    assert!(get(&settings, "SRC_URI").contains(" file://run-ptest"));
}

/// By ptest-runner's format, where the source isn't.
#[test]
fn the_package_of_tests_passes_on_a_device() {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["test", "--locked", "--lib", "--no-run", "--message-format=json"]).current_dir(root());
    let built = cargo.output().expect("run cargo");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let messages = String::from_utf8(built.stdout).expect("UTF-8");
    let mut messages = messages.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let unit_tests = messages.find_map(|message| message["executable"].as_str().map(PathBuf::from));

    let Some(machine) = Machine::start() else { return };
    machine.install(&executable(), "/usr/bin/mender-connect");
    machine.write(
        "/etc/mender/mender-connect.conf",
        include_str!("../../yocto/files/debian/mender-connect.conf"),
    );
    machine.install(&unit_tests.expect("an executable"), "/usr/lib/ptest/unit-tests");
    machine.install(&recipes().join("files/run-ptest"), "/usr/lib/ptest/run-ptest");
    machine.sh(&format!("mount -t tmpfs tmpfs {}", root().display()));
    let (status, said) = machine.try_sh("/usr/lib/ptest/run-ptest");
    let names =
        |result: &str| -> Vec<&str> { said.lines().filter_map(|line| line.strip_prefix(result)).collect() };
    let passed = names("PASS: ");
    assert!(names("FAIL: ").is_empty() && status == Some(0), "{status:?}: {said}");
    assert_eq!(passed[..4], ["version", "check", "doctor", "unknown_command"]);
    assert!(passed.len() > 150, "{said}");

    machine.write("/usr/bin/mender-connect", "#!/bin/sh\nkill -ABRT $$\n");
    machine.write("/usr/lib/ptest/unit-tests", "#!/bin/sh\necho 'test a::b ... FAILED'; exit 101\n");
    let (status, said) = machine.try_sh("/usr/lib/ptest/run-ptest");
    assert_eq!(status, Some(1));
    for name in [&passed[..4], &["a::b"]].concat() {
        assert!(said.contains(&format!("FAIL: {name}\n")), "{name}: {said}");
    }
}
