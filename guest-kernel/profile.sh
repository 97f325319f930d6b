#!/bin/bash
# Shows where the guest kernel's boot time goes: boots target/guest/vmlinux under QEMU with an init
# that ends at once, from exec of QEMU to its exit, then once more with every initcall timed.
# It measures; options belong in fragments/, recommended arguments in docs/guest-kernel.md.
#
#   profile.sh [VMLINUX]
#
#   ROUNDS      runs of the plain measurement, default 10
#   QEMU_ARGS   more arguments for QEMU, e.g. devices
#   APPEND      more kernel arguments
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
guest=${SEALPOD_GUEST_DIR:-$here/../target/guest}
kernel=${1:-$guest/vmlinux}
floor=$guest/floor.cpio
rounds=${ROUNDS:-10}

for file in "$kernel" "$floor"; do
	[ -s "$file" ] || { echo "profile: $file is missing; run make -C guest-kernel first" >&2; exit 1; }
done
command -v qemu-system-x86_64 >/dev/null || { echo "profile: qemu-system-x86_64 is missing" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The arguments that docs/guest-kernel.md recommends for TCG.
boot() {
	# shellcheck disable=SC2086
	qemu-system-x86_64 -accel tcg,thread=multi -machine "$machine" -cpu max -smp 1 -m 256 \
		-nodefaults -no-user-config -display none -no-reboot -bios qboot.rom \
		-kernel "$kernel" -initrd "$floor" -serial stdio ${QEMU_ARGS:-} \
		-append "$append ${APPEND:-} $1" </dev/null
}
machine=q35,hpet=off,smbus=off,sata=off,usb=off,vmport=off
append="console=ttyS0 quiet reboot=t mitigations=off"

now() { echo "${EPOCHREALTIME/./}"; }

# 1. Undisturbed: exec, init's line on the console, exit. Microseconds.
for _ in $(seq "$rounds"); do
	start=$(now)
	reached=
	while read -r line; do
		case $line in *'init tsc'*) reached=$(now) ;; esac
	done < <(boot '-- tsc'; now >"$work/end")
	wait $! || true
	[ -n "$reached" ] || { echo "profile: init was not reached" >&2; exit 1; }
	echo "$((reached - start)) $(($(cat "$work/end") - start))"
done | sort -n >"$work/runs"

# 2. Every initcall timed, printed only after init is reached, so that the console costs nothing.
boot 'initcall_debug log_buf_len=4M -- kmsg' | tr -d '\r' | sed -E 's/^<[0-9]+>//' >"$work/log"

awk -v rounds="$rounds" '
	{ init[NR] = $1; end[NR] = $2; sum += $2 }
	END {
		m = int((NR + 1) / 2)
		printf "from exec of QEMU, %d runs     best    median\n", rounds
		printf "  init runs                %6.0f ms %6.0f ms\n", init[1] / 1000, init[m] / 1000
		printf "  QEMU has ended           %6.0f ms %6.0f ms\n\n", end[1] / 1000, end[m] / 1000
	}' "$work/runs"

echo "kernel clock (starts when the time stamp counter is known)"
awk 'match($0, /^\[ *[0-9.]+\] /) {
		t = substr($0, 2, RLENGTH - 3) + 0
		text = substr($0, RLENGTH + 1)
		if (!seen[0]++) first = t
		if (text ~ /^(Linux version|tsc: Detected|Memory:|Calibrating delay|smp: Brought up|Freeing unused kernel|Run \/init)/ ||
		    text ~ /^calling  (.*)initcall/ ) printf "  %9.3f s  %+7.1f ms  %s\n", t, (t - last) * 1000, substr(text, 1, 60)
		if (text ~ /^calling /) { if (!calls++) printf "  %9.3f s  %+7.1f ms  first initcall\n", t, (t - last) * 1000 ; else next }
		if (text ~ /^(Linux version|tsc: Detected|Memory:|Calibrating delay|smp: Brought up|Freeing unused kernel|Run \/init)/) last = t
	}' "$work/log"

echo
echo "slowest initcalls"
sed -nE 's/^\[ *([0-9.]+)\] initcall ([^ ]+) returned (-?[0-9]+) after ([0-9]+) usecs.*/\4 \2/p' "$work/log" |
	awk '{ n++; sum += $1; print } END { printf "%d all %d initcalls\n", sum, n }' | sort -rn | head -25 |
	awk '{ us = $1; $1 = ""; printf "  %8.1f ms %s\n", us / 1000, $0 }'

echo
echo "longest silences of the log"
awk 'match($0, /^\[ *[0-9.]+\] /) {
		t = substr($0, 2, RLENGTH - 3) + 0
		if (n++) printf "%d %s\n", (t - last) * 1000000, before
		last = t; before = substr($0, 1, 100)
	}' "$work/log" | grep -v 'calling  ' | sort -rn | head -12 |
	awk '{ us = $1; $1 = ""; printf "  %8.1f ms after%s\n", us / 1000, $0 }'
