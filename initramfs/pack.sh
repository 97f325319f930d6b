#!/bin/bash
# Packs one static program as /init, with the few folders and the one node that it needs, into an
# initramfs: a newc cpio archive, uncompressed (docs/guest-kernel.md has the measurements). The same
# program gives the same bytes anywhere: fixed order, times, owners and inode numbers, no root needed.
# The layout of the guest's root belongs here; what runs in it does not.
#
#   pack.sh [--init FILE] [--out FILE]    default: the agent as agent/build.sh leaves it, initramfs.cpio
#   pack.sh --floor [--out FILE]          poweroff-init, built on the spot, floor.cpio
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
guest=${SEALPOD_GUEST_DIR:-$here/../target/guest}

die() { echo "initramfs: $*" >&2; exit 1; }

# One archive entry: name, octal mode, file with its content or "-", device numbers.
ino=0
entry() {
	local name=$1 mode=$2 file=$3 major=${4:-0} minor=${5:-0} size=0 links=1
	ino=$((ino + 1))
	[ "$file" = - ] || size=$(stat -Lc %s "$file")
	[ $((8#$mode & 8#170000)) -ne $((8#040000)) ] || links=2
	printf '070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X' \
		$ino $((8#$mode)) 0 0 $links 0 "$size" 0 0 "$major" "$minor" $((${#name} + 1)) 0
	printf '%s\0' "$name"
	pad $((110 + ${#name} + 1))
	[ "$file" = - ] || { cat "$file"; pad "$size"; }
}

# Zeroes up to the next multiple of four.
pad() {
	local n=$(((4 - $1 % 4) % 4))
	while [ $n -gt 0 ]; do printf '\0'; n=$((n - 1)); done
}

archive() {
	entry dev 040755 -
	entry dev/console 020600 - 5 1
	entry init 100755 "$1"
	entry proc 040555 -
	entry run 040755 -
	entry sys 040555 -
	entry tmp 041777 -
	entry 'TRAILER!!!' 0 -
}

build_floor() {
	command -v gcc >/dev/null || die "gcc is missing: apt-get install gcc"
	gcc -Os -Wall -Wextra -Werror -static -nostdlib -nostartfiles -ffreestanding -fno-pie -no-pie \
		-fno-stack-protector -fno-asynchronous-unwind-tables -Wl,--build-id=none \
		-Wl,-z,noseparate-code -s -o "$1" "$here/poweroff-init.c"
}

init=$guest/sealpod-agent out=$guest/initramfs.cpio floor=
while [ $# -gt 0 ]; do
	case $1 in
	--init) init=${2:?--init needs a file}; shift 2 ;;
	--out) out=${2:?--out needs a file}; shift 2 ;;
	--floor) floor=1; [ "$out" != "$guest/initramfs.cpio" ] || out=$guest/floor.cpio; shift ;;
	*) die "unknown argument $1; known are --init FILE, --out FILE, --floor" ;;
	esac
done

mkdir -p "$(dirname "$out")"
work=$(mktemp -d "$(dirname "$out")/.pack.XXXXXX")
trap 'rm -rf "$work"' EXIT
[ -z "$floor" ] || { init=$work/init; build_floor "$init"; }

[ -f "$init" ] || die "$init: there is no such file; build the agent first or name it with --init"
[ "$(head -c4 "$init" | od -An -tx1 | tr -d ' ')" = 7f454c46 ] || die "$init: not an ELF program"
# PT_INTERP means a dynamic loader, which the guest does not have.
! LC_ALL=C readelf -lW "$init" | grep -q INTERP ||
	die "$init: not static; build it with RUSTFLAGS='-C target-feature=+crt-static'"

archive "$init" >"$work/cpio"
cmp -s "$work/cpio" "$out" || mv "$work/cpio" "$out"
echo "initramfs: $(realpath --relative-to=. "$out") holds $(stat -c %s "$out") bytes"
