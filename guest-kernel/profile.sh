#!/bin/bash
# Shows where the guest kernel's boot time goes: boots target/guest/vmlinux under QEMU with an init
# that ends at once, from exec of QEMU to its exit, then once more with every initcall timed.
# Wall times mean something on a quiet machine only; CPU times bear some company.
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

# The host's time stamp counter, kHz: under TCG it is the guest's.
tsc_khz() {
	gcc -O1 -x c -o "$work/tsc" - <<-'C'
		#include <stdio.h>
		#include <time.h>
		#include <x86intrin.h>
		static double now(void)
		{
			struct timespec t;
			clock_gettime(CLOCK_MONOTONIC, &t);
			return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
		}
		int main(void)
		{
			double start = now();
			unsigned long long first = __rdtsc();
			nanosleep(&(struct timespec){ .tv_nsec = 50000000 }, 0);
			printf("%.0f\n", (__rdtsc() - first) / (now() - start));
		}
	C
	"$work/tsc"
}

# The arguments that docs/guest-kernel.md recommends for TCG.
machine=q35,hpet=off,smbus=off,sata=off,usb=off,vmport=off
append="console=ttyS0 quiet reboot=t noreplace-smp tsc=reliable tsc_early_khz=$(tsc_khz)
	mitigations=off acpi=off noapictimer no_timer_check"
append=$(echo $append)
boot() {
	# shellcheck disable=SC2086
	qemu-system-x86_64 -accel tcg,thread=multi -machine "$machine" -cpu max -smp 1 -m 256 \
		-nodefaults -no-user-config -display none -no-reboot -bios qboot.rom \
		-kernel "$kernel" -initrd "$floor" -serial stdio ${QEMU_ARGS:-} \
		-append "$append ${APPEND:-} $1" </dev/null
}

now() { echo "${EPOCHREALTIME/./}"; }

# 1. Undisturbed: exec, init's line on the console, exit, and QEMU's CPU time. Milliseconds.
TIMEFORMAT='%U %S'
for _ in $(seq "$rounds"); do
	start=$(now)
	reached=
	while read -r line; do
		case $line in *'init tsc'*) reached=$(now) ;; esac
	done < <({ time boot '-- tsc'; } 2>"$work/cpu"; now >"$work/end")
	[ -n "$reached" ] || { cat "$work/cpu" >&2; echo "profile: init was not reached" >&2; exit 1; }
	tail -1 "$work/cpu" | awk -v a=$((reached - start)) -v b=$(($(cat "$work/end") - start)) \
		'{ print a / 1000, b / 1000, ($1 + $2) * 1000 }'
done >"$work/runs"

# 2. Every initcall timed, printed only after init is reached, so that the console costs nothing.
boot 'initcall_debug log_buf_len=4M -- kmsg' | tr -d '\r' | sed -E 's/^<[0-9]+>//' >"$work/log"

column() { awk -v c="$1" '{ print $c }' "$work/runs" | sort -n | awk -v name="$2" '
	{ v[NR] = $1 } END { printf "  %-24s %6.0f ms %6.0f ms\n", name, v[1], v[int((NR + 1) / 2)] }'; }
printf 'from exec of QEMU, %3d runs    best    median\n' "$rounds"
column 1 "init runs"
column 2 "QEMU has ended"
column 3 "CPU time of QEMU"
echo

echo "milestones on the kernel's clock, which starts when the counter's frequency is known"
awk 'match($0, /^\[ *[0-9.]+\] /) {
		t = substr($0, 2, RLENGTH - 3) + 0
		text = substr($0, RLENGTH + 1)
		if (text ~ /^calling / && !calls++) text = "first initcall"
		else if (text !~ /^(tsc: Detected|SLUB:|Freeing SMP alt|smp: Brought up|Freeing unused kernel image .init|Run .init)/) next
		printf "  %9.1f ms  %+7.1f ms  %s\n", t * 1000, (t - last) * 1000, substr(text, 1, 60)
		last = t
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
		if (/Run .init/) exit
		if (n++) printf "%d %s\n", (t - last) * 1000000, before
		last = t; before = substr($0, 1, 100)
	}' "$work/log" | grep -v 'calling  ' | sort -rn | head -12 |
	awk '{ us = $1; $1 = ""; printf "  %8.1f ms after%s\n", us / 1000, $0 }'
