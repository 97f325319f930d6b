#!/bin/bash
# What a fresh Debian 12 machine with Rust needs, by purpose; each purpose is done once and costs
# nothing afterwards. Build tools and QEMU are installed by apt; every client that the tests drive
# (three containerds, runc, CNI plugins, Docker, Redis, busybox) is unpacked into $SEALPOD_CACHE and
# never installed, so the machine's own containerd and Docker are not touched.
#
#   setup.sh build      what `make build` needs
#   setup.sh clients    what `make demo`, `make test` and `make bench` need besides
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
# shellcheck source=tests/setup/apt.sh
. "$here/apt.sh"

build() {
    command -v cargo >/dev/null || die "cargo is not on PATH: install Rust (rustup.rs) first"
    machine_packages gcc libc6-dev make pkg-config bc bison flex libelf-dev libssl-dev cpio xz-utils \
        gzip file python3-minimal rsync libseccomp-dev libcap-ng-dev protobuf-compiler
}

clients() {
    machine_packages iproute2 iptables procps util-linux qemu-system-x86/bookworm-backports
    unpacked bookworm containerd-1.6 containerd
    unpacked trixie containerd-1.7 containerd
    unpacked sid containerd-2.1 containerd
    unpacked bookworm tools runc containernetworking-plugins busybox-static
    unpacked bookworm redis redis-server redis-tools libjemalloc2 liblua5.1-0 liblzf1 libhiredis0.14 \
        lua-cjson lua-bitop libssl3 libatomic1 libsystemd0
    unpacked sid docker docker.io docker-cli tini
}

for purpose in "$@"; do
    case $purpose in
    build | clients) "$purpose" ;;
    *) die "unknown purpose $purpose (known: build, clients)" ;;
    esac
done
