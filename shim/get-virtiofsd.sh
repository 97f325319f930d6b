#!/usr/bin/env bash
# Builds virtiofsd (the Rust one, a program of its own: its types do not unify with newer rust-vmm
# crates) into the cache and prints the binary's path on standard output. Idempotent: a second run
# only prints. Progress goes to standard error.
#
#   SEALPOD_CACHE   cache folder (default ~/.cache/sealpod)
set -euo pipefail

version=1.14.0
cache=${SEALPOD_CACHE:-$HOME/.cache/sealpod}
root=$cache/virtiofsd-$version
binary=$root/bin/virtiofsd

say() { printf 'virtiofsd: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

usable() { [[ -x $binary ]] && "$binary" --version >/dev/null 2>&1; }

if usable; then
    printf '%s\n' "$binary"
    exit 0
fi

command -v cargo >/dev/null || die "cargo is not installed; get Rust from your distribution or https://rustup.rs"

# Development files of the two C libraries it links; Debian's package names.
missing=()
[[ -e /usr/include/seccomp.h ]] || missing+=(libseccomp-dev)
[[ -e /usr/include/cap-ng.h ]] || missing+=(libcap-ng-dev)
if ((${#missing[@]})); then
    if [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then
        say "installing ${missing[*]}"
        DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 install -y \
            --no-install-recommends "${missing[@]}" >&2 || {
            say "package lists may be old; updating them"
            apt-get -qq -o DPkg::Lock::Timeout=600 update >&2
            DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 install -y \
                --no-install-recommends "${missing[@]}" >&2
        }
    else
        die "missing: ${missing[*]}. Install them, e.g.: sudo apt-get install ${missing[*]}"
    fi
fi

mkdir -p "$cache"
exec 9>"$cache/virtiofsd-$version.lock"
if ! flock -n 9; then
    say "another build is running; waiting for it"
    flock 9
fi
if usable; then
    printf '%s\n' "$binary"
    exit 0
fi

say "building $version into $root (one to three minutes, once)"
# Its own build folder: this build must neither wait for nor disturb the workspace's.
target=$(mktemp -d "$cache/virtiofsd-build.XXXXXX")
trap 'rm -rf "$target"' EXIT
(cd / && nice cargo install virtiofsd --locked --version "=$version" --root "$root" \
    --target-dir "$target" --no-track --force >&2) || die "the build failed; the messages above say why"
usable || die "$binary does not run"
say "done"
printf '%s\n' "$binary"
