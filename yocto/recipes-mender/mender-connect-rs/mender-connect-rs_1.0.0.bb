SUMMARY = "Remote terminal, files and ports of a device through its Mender server"
DESCRIPTION = "Takes the place of Mender's own mender-connect: same server, clients, configuration and command line."
HOMEPAGE = "${MCRS_REPOSITORY}"
BUGTRACKER = "${@d.getVar('MCRS_REPOSITORY') and d.getVar('MCRS_REPOSITORY') + '/issues'}"
SECTION = "net"

require ${BPN}-cargo.inc
# The unit tests have libdbus compiled in whatever the agent has.
MCRS_LIBDBUS = "${@bb.utils.contains('PACKAGECONFIG', 'system-dbus', d.getVar('PTEST_ENABLED') or '0', '1', d)}"
MCRS_LICENSE = "${MCRS_LICENSES}${@' & (AFL-2.1 | GPL-2.0-or-later)' if d.getVar('MCRS_LIBDBUS') == '1' else ''}"
# oe-core that reads SPDX expressions warns of the operators that all before it want.
MCRS_SPDX = "${@os.path.exists(os.path.join(d.getVar('COREBASE') or '', 'meta/lib/oe/spdx_license.py'))}"
LICENSE = "${@d.getVar('MCRS_LICENSE').replace('&', 'AND').replace('|', 'OR') if d.getVar('MCRS_SPDX') == 'True' else d.getVar('MCRS_LICENSE')}"
LIC_FILES_CHKSUM = "file://LICENSE;md5=3b83ef96387f14655fc854ddc3c6bd57"

# Of any commit: the classes add which, so that package feeds tell two of them apart.
PV .= "+git"
# The commit that the layer's checkout is at. See the layer's README for building from elsewhere.
MCRS_GIT ?= "git://${MCRS_CHECKOUT};protocol=file;usehead=1;nobranch=1"
# With this name the source is in the default S of all series.
SRC_URI = "${MCRS_GIT};destsuffix=${BP} file://mender-connect.conf file://run-ptest"
require ${BPN}-crates.inc
SRCREV ?= "${AUTOREV}"

# Without cargo-update-recipe-crates, whose task takes the lock files of the tests, too: yocto/update-crates is for that.
inherit cargo pkgconfig ptest siteinfo systemd update-rc.d

# The crate of this name on crates.io is none.
SPDX_PACKAGE_URLS = ""
# What is found in Mender's own program, written in Go, isn't in this one.
CVE_PRODUCT = "mender-connect-rs"

PACKAGECONFIG ??= "system-dbus tls"
PACKAGECONFIG[system-dbus] = ",,dbus"
PACKAGECONFIG[tls] = ",,"

# Not by PACKAGECONFIG_CONFARGS, which only the newer series' class hands to cargo.
MCRS_FEATURES = "dbus \
    ${@bb.utils.filter('PACKAGECONFIG', 'tls', d)} \
    ${@bb.utils.contains('PACKAGECONFIG', 'system-dbus', '', 'vendored-dbus', d)}"
CARGO_BUILD_FLAGS += "--no-default-features --features '${MCRS_FEATURES}'"
# What .cargo/config.toml says of time_t and of the vendored libdbus. That file isn't read here.
RUSTFLAGS:append:libc-musl = " ${@'--cfg=libc_unstable_time64' if d.getVar('SITEINFO_BITS') == '32' else ''}"
CFLAGS:append = " -DHAVE_POLL=1 -DHAVE_MONOTONIC_CLOCK=1 -DHAVE_GETRESUID=1"
# DEBUG_PREFIX_MAP covers S and B only, but the crates' C is compiled in CARGO_HOME: without this, do_package_qa finds
# the build's path in the debug information (buildpaths).
CFLAGS += "-ffile-prefix-map=${CARGO_HOME}=${TARGET_DBGSRC_DIR}/cargo_home"
# The packaging splits the debug information off.
export CARGO_PROFILE_RELEASE_STRIP = "none"
# Older Rust builds libstd-rs such that nothing that aborts links with it. A panic ends the agent either way.
MCRS_STD_RUST = "${@(d.getVar('PREFERRED_VERSION_rust-native') or d.getVar('RUSTVERSION') or '0').rstrip('%')}"
MCRS_PANIC ?= "${@'abort' if bb.utils.vercmp_string_op(d.getVar('MCRS_STD_RUST'), '1.94', '>=') else 'unwind'}"
export CARGO_PROFILE_RELEASE_PANIC = "${MCRS_PANIC}"

# Before the crates are fetched: without this, the first of them that needs the newer Rust fails.
python mender_connect_rs_check_rust() {
    import re

    rust = d.getVar("PREFERRED_VERSION_rust-native") or d.getVar("RUSTVERSION") or ""
    needed = d.getVar("MCRS_RUST")
    found = re.match(r"(\d+)\.(\d+)", rust)
    if found and [int(part) for part in found.groups()] < [int(part) for part in needed.split(".")[:2]]:
        bb.fatal("mender-connect-rs needs Rust %s or newer, but this build's is %s. With scarthgap, add the branch "
                 "scarthgap/rust of https://git.yoctoproject.org/meta-lts-mixins to bblayers.conf." % (needed, rust))
}
do_fetch[prefuncs] += "mender_connect_rs_check_rust"

MENDER_CONNECT_SHELL ??= "/bin/sh"
MENDER_CONNECT_USER ??= "nobody"

# The configuration is that of SRC_URI; what it doesn't say comes from the variables.
python do_prepare_mender_connect_conf() {
    import json

    given = os.path.join(d.getVar("UNPACKDIR") or d.getVar("WORKDIR"), "mender-connect.conf")
    with open(given) as file:
        try:
            conf = json.load(file)
        except ValueError as error:
            bb.fatal("%s: %s" % (given, error))

    # The agent doesn't tell upper from lower case.
    present = [key.lower() for key in conf]
    if "shellcommand" not in present:
        conf["ShellCommand"] = d.getVar("MENDER_CONNECT_SHELL")
    if "user" not in present:
        conf["User"] = d.getVar("MENDER_CONNECT_USER")

    with open(os.path.join(d.getVar("B"), "mender-connect.conf"), "w") as file:
        json.dump(conf, file, indent=4, sort_keys=True)
        file.write("\n")
}
do_prepare_mender_connect_conf[doc] = "Completes the configuration file with MENDER_CONNECT_SHELL and MENDER_CONNECT_USER"
do_prepare_mender_connect_conf[vardeps] += "MENDER_CONNECT_SHELL MENDER_CONNECT_USER"
addtask prepare_mender_connect_conf after do_compile before do_install

SYSTEMD_SERVICE:${PN} = "mender-connect.service"
INITSCRIPT_NAME = "mender-connect"
INITSCRIPT_PARAMS = "defaults 90 10"

do_install() {
    install -D -m 0755 ${B}/target/${CARGO_TARGET_SUBDIR}/mender-connect ${D}${bindir}/mender-connect
    install -D -m 0600 ${B}/mender-connect.conf ${D}${sysconfdir}/mender/mender-connect.conf
    install -D -m 0644 ${S}/docs/man/mender-connect.8 ${D}${mandir}/man8/mender-connect.8
    install -D -m 0644 ${S}/docs/man/mender-connect.conf.5 ${D}${mandir}/man5/mender-connect.conf.5

    if ${@bb.utils.contains('DISTRO_FEATURES', 'systemd', 'true', 'false', d)}; then
        install -D -m 0644 ${S}/yocto/files/mender-connect.service ${D}${systemd_system_unitdir}/mender-connect.service
    fi
    if ${@bb.utils.contains('DISTRO_FEATURES', 'sysvinit', 'true', 'false', d)} ||
        ! ${@bb.utils.contains('DISTRO_FEATURES', 'systemd', 'true', 'false', d)}; then
        install -D -m 0755 ${S}/yocto/files/mender-connect.init ${D}${sysconfdir}/init.d/mender-connect
    fi
}

# Not by ptest-cargo: that class builds the integration tests, too, which need the source, and the agent once more, with
# the tests' features, for do_install to find.
do_compile_ptest() {
    export RUSTFLAGS="${RUSTFLAGS}"
    "${CARGO}" test --no-run --lib --target-dir ${B}/ptest ${CARGO_BUILD_FLAGS}
}
do_compile_ptest_base[cleandirs] = "${B}/ptest"

do_install_ptest() {
    # cargo adds a hash to the name.
    tests=$(find ${B}/ptest/${CARGO_TARGET_SUBDIR}/deps -name 'mender_connect-*' ! -name '*.d')
    install -D -m 0755 $tests ${D}${PTEST_PATH}/unit-tests
}
# The tests that compare the source's pages with the code name its folder.
INSANE_SKIP:${PN}-ptest += "buildpaths"

CONFFILES:${PN} = "${sysconfdir}/mender/mender-connect.conf"

RDEPENDS:${PN} = "mender-auth"
# The version of upstream's package that this one passes for: meta-mender's inventory script conflicts with all but that
# of its release.
def mcrs_upstream_version(d):
    import glob
    recipes = glob.glob("%s/recipes-mender/mender-connect/mender-connect_*.*.*.bb" % d.getVar("LAYERDIR_MENDER"))
    versions = [os.path.basename(recipe)[len("mender-connect_"):-len(".bb")] for recipe in recipes]
    released = [version for version in versions if version.replace(".", "").isdigit()]
    return max(released, key=lambda version: [int(part) for part in version.split(".")], default="3.0.0")

MCRS_UPSTREAM_VERSION ?= "${@mcrs_upstream_version(d)}"
RPROVIDES:${PN} = "mender-connect (= ${MCRS_UPSTREAM_VERSION})"
RREPLACES:${PN} = "mender-connect"
RCONFLICTS:${PN} = "mender-connect"
