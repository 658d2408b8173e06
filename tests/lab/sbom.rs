//! What `.ci/release` writes beside an executable: a bill of materials and the licences. Looked at where the tests
//! run with such an executable, which MENDER_CONNECT names. And where both go, with a compiler that does nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::harness::daemon::executable;
use crate::harness::program;
use crate::harness::wait::{skip, tell};
use crate::yocto::{available, read, root};

const STD: &str = "pkg:generic/rust-std@";

struct Bill {
    /// target/TARGET/release
    folder: PathBuf,
    json: Value,
}

impl Bill {
    fn of_the_executable() -> Option<Bill> {
        if std::env::var_os("MENDER_CONNECT").is_none() {
            tell("looked at where MENDER_CONNECT names an executable of .ci/release");
            return None;
        }
        let folder = executable().parent().unwrap().to_owned();
        let Ok(text) = fs::read(folder.join("mender-connect.cdx.json")) else {
            skip("the executable isn't one of .ci/release: there is no bill of materials");
            return None;
        };
        Some(Bill { folder, json: serde_json::from_slice(&text).unwrap() })
    }

    fn target(&self) -> &str {
        self.folder.parent().unwrap().file_name().unwrap().to_str().unwrap()
    }

    fn root(&self) -> &Value {
        &self.json["metadata"]["component"]
    }

    fn components(&self) -> &[Value] {
        self.json["components"].as_array().unwrap()
    }

    /// All that is needed from one component on, not looking further behind some.
    fn needs<'a>(&'a self, from: &'a str, behind: &str) -> BTreeSet<&'a str> {
        let edges = self.json["dependencies"].as_array().unwrap().iter();
        let edges: BTreeMap<&str, &Vec<Value>> =
            edges.map(|edge| (text(&edge["ref"]), edge["dependsOn"].as_array().unwrap())).collect();
        let mut seen = BTreeSet::from([from]);
        let mut waiting = vec![from];
        while let Some(next) = waiting.pop() {
            let further = edges[next].iter().map(text).filter(|needed| !needed.starts_with(behind));
            waiting.extend(further.filter(|needed| seen.insert(needed)));
        }
        seen
    }

    /// The crates that cargo names, without the program itself.
    fn crates(&self, edges: &str) -> BTreeSet<String> {
        let mut command = Command::new(env!("CARGO"));
        command.args(["tree", "--locked", "--prefix=none", "--format={p}", "--edges", edges]);
        command.args(["--target", self.target()]).current_dir(env!("CARGO_MANIFEST_DIR"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let tree = String::from_utf8(output.stdout).unwrap();
        let purl = |line: &str| {
            let (name, version) = line.split_once(" v").unwrap();
            format!("pkg:cargo/{name}@{}", version.split(' ').next().unwrap())
        };
        tree.lines().filter(|line| !line.starts_with("mender-connect v")).map(purl).collect()
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn sha256(file: &Path) -> String {
    let digest = Sha256::digest(fs::read(file).unwrap());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn set<'a>(items: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    items.into_iter().map(str::to_owned).collect()
}

#[test]
fn it_is_this_executables_bill() {
    let Some(bill) = Bill::of_the_executable() else { return };
    assert_eq!(bill.root()["hashes"][0]["content"], *sha256(&executable()));
    assert_eq!(bill.root()["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(bill.root()["properties"][0]["value"], *bill.target());
    // These would differ each time.
    assert!(bill.json.get("serialNumber").is_none() && bill.json["metadata"].get("timestamp").is_none());
}

#[test]
fn its_crates_are_those_that_cargo_names() {
    let Some(bill) = Bill::of_the_executable() else { return };
    let root = text(&bill.root()["bom-ref"]);
    let of_std = bill.needs(root, "pkg:cargo/").into_iter().find(|part| part.starts_with(STD)).unwrap();
    let mut found = bill.needs(root, STD);
    found.retain(|part| part.starts_with("pkg:cargo/"));
    assert_eq!(set(found), bill.crates("normal,build"));

    let linked = bill.components().iter().filter(|component| component["scope"] == "required");
    let linked = set(linked.map(|component| text(&component["purl"])));
    let mut wanted = bill.crates("normal,no-proc-macro");
    wanted.extend(set(bill.needs(of_std, "-")));
    wanted.extend(set(bill.needs(root, "-").into_iter().filter(|part| part.starts_with("pkg:generic/"))));
    wanted.remove(root);
    assert_eq!(linked, wanted);
}

#[test]
fn every_component_is_identified_and_needed() {
    let Some(bill) = Bill::of_the_executable() else { return };
    let lock = include_str!("../../Cargo.lock");
    let refs = set(bill.components().iter().map(|component| text(&component["bom-ref"])));
    for component in bill.components() {
        let (name, version) = (text(&component["name"]), text(&component["version"]));
        if text(&component["purl"]).starts_with("pkg:cargo/") {
            let hash = text(&component["hashes"][0]["content"]);
            assert_eq!(hash.len(), 64, "{name}");
            let locked = format!("name = \"{name}\"\nversion = \"{version}\"\n");
            let of_this = lock.split_once(&locked).map(|(_, rest)| rest.split("\n\n").next().unwrap());
            assert!(of_this.is_none_or(|rest| rest.contains(hash)), "{name}");
        } else {
            assert!(text(&component["cpe"]).contains(version), "{name}");
        }
    }
    for name in ["libdbus", "musl", "rust-std", "zig"] {
        assert!(refs.iter().any(|part| part.starts_with(&format!("pkg:generic/{name}@"))), "{name}");
    }
    let mut needed = set(bill.needs(text(&bill.root()["bom-ref"]), "-"));
    needed.remove(text(&bill.root()["bom-ref"]));
    assert_eq!(refs, needed);
    assert_eq!(refs.len(), bill.components().len());
}

#[test]
fn every_component_has_its_licence_in_full() {
    let Some(bill) = Bill::of_the_executable() else { return };
    let licences = fs::read_to_string(bill.folder.join("THIRD-PARTY-LICENSES")).unwrap();
    let listed: BTreeSet<&str> = licences.lines().collect();
    // Above each text stands whose it is.
    let (rule, end) = (format!("\n{}\n", "=".repeat(80)), format!("\n{}\n\n", "-".repeat(80)));
    let texts: Vec<(String, &str)> = licences
        .split(&rule)
        .filter_map(|part| part.split_once(&end))
        .map(|(titles, text)| (titles.replace('\n', " "), text))
        .collect();
    for component in bill.components() {
        let title = format!("{} {}", text(&component["name"]), text(&component["version"]));
        let licence = &component["licenses"][0];
        let licence = text(if licence["expression"].is_null() {
            &licence["license"]["id"]
        } else {
            &licence["expression"]
        });
        let line = format!("{title}: {licence}");
        assert!(listed.contains(&*line) || listed.contains(&*format!("{line}, in the build only")), "{line}");
        let mut own = texts.iter().filter(|(titles, _)| titles.split(", ").any(|one| one == title));
        assert!(own.any(|(_, text)| text.len() > 500), "{title}");
    }
}

const TARGET: &str = "x86_64-unknown-linux-musl";

/// A copy of what `.ci/release` takes, where the compiler only writes a file and Rust's own sources are next to none.
struct Project {
    dir: tempfile::TempDir,
}

impl Project {
    fn new() -> Project {
        let project = Project { dir: tempfile::tempdir().unwrap() };
        for name in
            ["Cargo.toml", "Cargo.lock", ".ci/release", ".ci/static.sh", ".ci/may-install", ".ci/sbom"]
        {
            let copy = project.path("checkout").join(name);
            fs::create_dir_all(copy.parent().unwrap()).unwrap();
            fs::copy(root().join(name), copy).unwrap();
        }
        for name in ["src", "tests"] {
            symlink(root().join(name), project.path("checkout").join(name)).unwrap();
        }
        project.write("sysroot/lib/rustlib/src/rust/library/Cargo.lock", "package = []\n");
        let sysroot = project.path("sysroot");
        project.program(
            "bin/rustc",
            &format!(
                "[ \"$*\" != '--print sysroot' ] || exec echo '{}'\nPATH=${{PATH#*:}} exec rustc \"$@\"",
                sysroot.display()
            ),
        );
        project
    }

    /// Without links on the way: cargo and Python name paths so.
    fn path(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.dir.path()).unwrap().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        program::write(&path, format!("#!/bin/sh\n{script}\n").as_bytes());
    }

    /// The compiler where `.ci/static.sh` puts it, building into a folder as cargo would.
    fn with_compiler(&self, built: &str) {
        let script = read(root().join(".ci/static.sh"));
        let versions = script.split_once("zig_tools=(").unwrap().1.split(')').next().unwrap();
        let zig = format!("{built}/tools/zig");
        self.write(&format!("{zig}/versions"), &format!("{versions}\n"));
        for licence in ["LICENSE", "lib/libunwind/LICENSE.TXT", "lib/libc/musl/COPYRIGHT"] {
            self.write(&format!("{zig}/ziglang/{licence}"), "Permission is granted\n");
        }
        self.write(
            &format!("{zig}/ziglang/lib/libc/musl/src/internal/version.h"),
            "#define VERSION \"1.2.5\"\n",
        );
        let graph = json!({"roots": [0], "units": [{
            "target": {"kind": ["bin"], "name": "mender-connect", "src_path": self.path("checkout/src/main.rs")},
            "platform": TARGET, "mode": "build", "features": [], "dependencies": [],
        }]});
        self.write("graph", &graph.to_string());
        let (graph, release) = (self.path("graph"), self.path(built).join(TARGET).join("release"));
        let (graph, release) = (graph.display(), release.display());
        let environment = self.path("environment");
        let environment = environment.display();
        self.program(
            &format!("{zig}/bin/cargo-zigbuild"),
            &format!(
                "(env; echo \"ARGUMENTS=$*\") >'{environment}'
                case \"$*\" in
                *--unit-graph*) cat '{graph}' ;;
                *) mkdir -p '{release}' && echo built >'{release}/mender-connect' ;;
                esac"
            ),
        );
    }

    fn release<'a>(
        &self,
        environment: impl IntoIterator<Item = (&'a str, PathBuf)>,
        options: &[&str],
    ) -> Output {
        let mut command = Command::new(self.path("checkout/.ci/release"));
        command.arg(TARGET).arg("--").args(options);
        for name in ["CARGO_TARGET_DIR", "CARGO_BUILD_TARGET_DIR", "SETUP"] {
            command.env_remove(name);
        }
        // Neither the user's configuration of cargo nor a download.
        command.env("CARGO_HOME", self.path("cargo")).env("PIP_NO_INDEX", "1");
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        command.env("PATH", path).envs(environment).output().unwrap()
    }
}

/// The compiler's place and that of the results is cargo's target directory, wherever that is.
#[test]
fn the_bill_lies_beside_the_executable_wherever_cargo_builds() {
    if !available("python3") {
        return;
    }
    for (variable, configured, built) in [
        (None, None, "checkout/target"),
        (Some("CARGO_TARGET_DIR"), None, "elsewhere"),
        (Some("CARGO_BUILD_TARGET_DIR"), None, "elsewhere"),
        (None, Some("[build]\ntarget-dir = \"../configured\"\n"), "configured"),
    ] {
        let project = Project::new();
        project.with_compiler(built);
        if let Some(configured) = configured {
            project.write("checkout/.cargo/config.toml", configured);
        }
        let output = project.release(variable.map(|name| (name, project.path(built))), &[]);
        assert!(output.status.success(), "{built}: {}", String::from_utf8_lossy(&output.stderr));

        let folder = project.path(built).join(TARGET).join("release");
        let bill = read(folder.join("mender-connect.cdx.json"));
        let bill: Value = serde_json::from_str(&bill).unwrap();
        let hash = &bill["metadata"]["component"]["hashes"][0]["content"];
        assert_eq!(*hash, *sha256(&folder.join("mender-connect")), "{built}");
        assert!(read(folder.join("THIRD-PARTY-LICENSES")).contains("\nmusl 1.2.5: MIT\n"), "{built}");
        assert_eq!(project.path("checkout/target").exists(), built == "checkout/target", "{built}");
    }
}

#[test]
fn a_target_directory_that_only_cargo_build_knows_is_refused_before_the_build() {
    if !available("python3") {
        return;
    }
    let project = Project::new();
    project.with_compiler("checkout/target");
    for options in [&["--target-dir", "elsewhere"][..], &["--target-dir=elsewhere"]] {
        let output = project.release([], options);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("CARGO_TARGET_DIR"), "{said}");
        assert!(!project.path("checkout/target").join(TARGET).exists(), "built all the same");
    }
}

/// Others' compilers and flags would change the bytes, or take the flags of .cargo/config.toml away. Nothing is written to
/// the user's home.
#[test]
fn the_environment_of_other_builds_is_none_of_a_release() {
    if !available("python3") {
        return;
    }
    let project = Project::new();
    project.with_compiler("checkout/target");
    let of_target = "x86_64_unknown_linux_musl";
    let linker = format!("CARGO_TARGET_{}_LINKER", of_target.to_uppercase());
    let [cc, cflags, ar] = ["CC", "CFLAGS", "AR"].map(|name| format!("{name}_{of_target}"));
    let mut others =
        vec!["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CC", "CFLAGS", "AR", "TARGET_CC", "TARGET_CFLAGS"];
    others.extend([linker.as_str(), &cc, &cflags, &ar]);
    let mut settings: Vec<_> = others.iter().map(|name| (*name, PathBuf::from("another"))).collect();
    settings.push(("CARGO_INCREMENTAL", "1".into()));
    let output = project.release(settings, &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let environment = read(project.path("environment"));
    let value = |name: &str| environment.lines().find_map(|line| line.strip_prefix(&format!("{name}=")));
    for name in others {
        assert_eq!(value(name), None, "{name}");
    }
    assert_eq!(value("CARGO_INCREMENTAL"), Some("0"));
    let cache = project.path("checkout/target/tools/cache");
    for name in ["CARGO_ZIGBUILD_CACHE_DIR", "ZIG_GLOBAL_CACHE_DIR"] {
        assert!(value(name).is_some_and(|folder| Path::new(folder).starts_with(&cache)), "{name}");
    }
    // Over what an option --config says.
    let target = format!(" --target-dir {} ", project.path("checkout/target").display());
    assert!(value("ARGUMENTS").is_some_and(|arguments| arguments.contains(&target)));
    let flags = value(&linker.replace("LINKER", "RUSTFLAGS"));
    assert!(flags.is_some_and(|flags| flags.contains("-Clink-self-contained=no")), "{flags:?}");
}

/// Turkish has no capital I for i.
#[test]
fn a_release_is_built_in_any_language() {
    let sources = Path::new("/usr/share/i18n/locales/tr_TR");
    if !available("python3") || !available("localedef") {
        return;
    }
    if !sources.exists() {
        return skip("the Debian package locales is missing");
    }
    let project = Project::new();
    project.with_compiler("checkout/target");
    let locales = project.path("locales");
    fs::create_dir(&locales).unwrap();
    let mut localedef = Command::new("localedef");
    localedef.args(["-i", "tr_TR", "-f", "UTF-8"]).arg(locales.join("tr_TR.UTF-8"));
    assert!(localedef.output().unwrap().status.success());
    let output = project.release([("LOCPATH", locales), ("LC_ALL", "tr_TR.UTF-8".into())], &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Many have pip ask for a virtual environment, which a folder of its own isn't.
#[test]
fn the_compiler_is_fetched_whatever_pip_is_told() {
    if !available("python3") {
        return;
    }
    let project = Project::new();
    let asked = project.path("asked");
    let script =
        "case \"$*\" in *'-m pip'*) env >'ASKED'; exit 9 ;; esac\nPATH=${PATH#*:} exec python3 \"$@\"";
    project.program("bin/python3", &script.replace("ASKED", asked.to_str().unwrap()));
    let names = ["PIP_USER", "PIP_REQUIRE_VIRTUALENV"];
    let output = project.release(names.map(|name| (name, PathBuf::from("1"))), &[]);
    assert_eq!(output.status.code(), Some(9), "{}", String::from_utf8_lossy(&output.stderr));
    let environment = read(asked);
    for name in names {
        assert!(environment.lines().any(|line| line == format!("{name}=0")), "{name}");
    }
}
