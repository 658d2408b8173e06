# Sourced by the scripts here: cargo for static executables, with zig as the C compiler and linker of every target.
. .ci/may-install

# Cargo's target directory: CARGO_TARGET_DIR or a configuration file may move it out of the checkout.
built=$(cargo metadata --format-version 1 --no-deps)
built=$(python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])' <<<"$built")

# zig's own allocator, from 0.16 on, keeps three times as much memory as musl's.
zig_tools=(ziglang==0.15.2 cargo-zigbuild==0.24.0)

# What static_cargo needs, where it is missing.
static_tools() {
    local zig=$built/tools/zig
    if [ "$(cat "$zig/versions" 2>/dev/null)" != "${zig_tools[*]}" ]; then
        may_install "${zig_tools[*]}"
        rm -rf "$zig"
        # Neither of what people set for installing elsewhere goes with --target.
        PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 python3 -m pip --disable-pip-version-check install --quiet \
            --target "$zig" "${zig_tools[@]}"
        echo "${zig_tools[*]}" >"$zig/versions"
    fi
    if [ ! -d "$(rustc --print sysroot)/lib/rustlib/src" ]; then
        may_install rust-src
        rustup component add rust-src
    fi
}

# static_cargo COMMAND TARGET… -- OPTIONS…: for the release profile, the standard library included.
static_cargo() {
    local command=$1 targets=() flags name without=() zig=$built/tools/zig
    shift
    static_tools
    while [ "$1" != -- ]; do
        # zig brings crt and libc. Nothing unwinds: the tables would be a fifth of the executable.
        flags="-Clink-self-contained=no -Cforce-unwind-tables=no"
        case $1 in
        armv7-*) flags+=" -Ctarget-feature=+thumb-mode" ;;
        esac
        # Not by ${1^^}: a Turkish locale makes another letter of the i.
        name=CARGO_TARGET_$(tr a-z- A-Z_ <<<"$1")
        local -x "${name}_RUSTFLAGS=$flags"
        without+=(-u "${name}_LINKER")
        targets+=(--target "$1")
        shift
    done
    shift
    # The compilers and flags of other builds would get into these.
    for name in RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CC CFLAGS AR "${!CC_@}" "${!CFLAGS_@}" "${!AR_@}" "${!TARGET_@}"; do
        without+=(-u "$name")
    done
    # Building the standard library takes unstable options.
    local -x PYTHONPATH=$zig PATH=$zig/bin:$PATH RUSTC_BOOTSTRAP=1 CARGO_INCREMENTAL=0
    local -x CARGO_ZIGBUILD_CACHE_DIR=$built/tools/cache ZIG_GLOBAL_CACHE_DIR=$built/tools/cache/zig
    env "${without[@]}" cargo-zigbuild "$command" --release --locked --target-dir "$built" "${targets[@]}" \
        -Zbuild-std=std,panic_abort -Zbuild-std-features=optimize_for_size \
        -Ztrim-paths --config 'profile.release.trim-paths="all"' "$@"
}
