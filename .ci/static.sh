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
        python3 -m pip --disable-pip-version-check install --quiet --target "$zig" "${zig_tools[@]}"
        echo "${zig_tools[*]}" >"$zig/versions"
    fi
    if [ ! -d "$(rustc --print sysroot)/lib/rustlib/src" ]; then
        may_install rust-src
        rustup component add rust-src
    fi
}

# static_cargo COMMAND TARGET… -- OPTIONS…: for the release profile, the standard library included.
static_cargo() {
    local command=$1 targets=() flags name zig=$built/tools/zig
    shift
    static_tools
    while [ "$1" != -- ]; do
        # zig brings crt and libc. Nothing unwinds: the tables would be a fifth of the executable.
        flags="-Clink-self-contained=no -Cforce-unwind-tables=no"
        case $1 in
        armv7-*) flags+=" -Ctarget-feature=+thumb-mode" ;;
        esac
        name=${1^^}
        local -x "CARGO_TARGET_${name//-/_}_RUSTFLAGS=$flags"
        targets+=(--target "$1")
        shift
    done
    shift
    # Building the standard library takes unstable options.
    local -x PYTHONPATH=$zig PATH=$zig/bin:$PATH RUSTC_BOOTSTRAP=1
    env -u RUSTFLAGS -u CARGO_ENCODED_RUSTFLAGS cargo-zigbuild "$command" --release --locked "${targets[@]}" \
        -Zbuild-std=std,panic_abort -Zbuild-std-features=optimize_for_size \
        -Ztrim-paths --config 'profile.release.trim-paths="all"' "$@"
}
