#!/bin/bash
# Records which system calls the confined threads of sealpod-vmm make: while the shim's VM tests run in the
# lab (src/confine/seen.txt), and while tests run that need no VM (src/confine/seen-here.txt; `--here`
# makes this one alone). Needs strace and root. Arguments are filters of the VM tests' names.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
cd "$here/.."

if [ "${SEALPOD_LAB:-}" = inside ]; then
    cd shim
    for program in $SEALPOD_LAB_TESTS; do
        # The results of the tests say whether the record is whole.
        strace -f -Y -s 0 -e raw=ioctl,seccomp -o "$SEALPOD_LAB_RESULTS/trace" \
            "$program" --test-threads=1 "$@"
    done
    exit
fi

# Turns a trace into a record. A line is "1234<thread> call(arguments…" or "1234<thread> <... call resumed>…";
# what counts comes after the thread's own seccomp(SECCOMP_SET_MODE_FILTER = 1).
record() {
    echo "# What confined threads were seen to do: vmm/seen.sh makes this."
    sed -nE 's/^([0-9]+)<(vcpu|devices|disks|main|sealpod-vmm)[0-9]*> ([a-z0-9_]+)\(([^,)]*)(, (0x[0-9a-f]+))?.*/\1 \2 \3 \4 \6/p' "$@" | awk '
        { kind = $2 == "sealpod-vmm" ? "main" : $2 == "disks" ? "devices" : $2 }
        $3 == "seccomp" { if ($4 == "0x1") confined[$1] = 1; next }
        confined[$1] { print kind, $3 ($3 == "ioctl" ? " " $5 : "") }' |
        LC_ALL=C sort -u
}

# Paths of test programs, as cargo tells them.
tests() {
    cargo test -q --no-run --message-format=json "$@" |
        sed -n 's|.*"executable":"\([^"]*/deps/[^"]*\)".*|\1|p' | sort -u | tr '\n' ' '
}

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

seen_here() {
    local program
    for program in $(tests -p sealpod-vmm --test confine --test virtio); do
        (cd vmm && strace -f -Y -s 0 -e raw=ioctl,seccomp -o "$results/here.${program##*/}" "$program" confine thread_can)
    done
    record "$results"/here.* >"$here/src/confine/seen-here.txt"
}
seen_here
[ "${1:-}" != --here ] || exit 0

if [ -z "${SEALPOD_LAB_TESTS:-}" ]; then
    cargo build -q -p sealpod-vmm
    SEALPOD_LAB_TESTS=$(tests -p sealpod-shim --test vm -p sealpod-vmm --test guest)
    SEALPOD_TEST_VMM=${CARGO_TARGET_DIR:-$PWD/target}/debug/sealpod-vmm
    export SEALPOD_LAB_TESTS SEALPOD_TEST_VMM
fi
export SEALPOD_LAB_ENV="SEALPOD_LAB_TESTS SEALPOD_TEST_VMM"
status=0
tests/lab/run.sh -o "$results" "$here/seen.sh" "$@" || status=$?

record "$results/trace" >"$here/src/confine/seen.txt"
exit $status
