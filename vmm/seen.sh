#!/bin/bash
# Records which system calls the confined threads of sealpod-vmm make while the shim's VM tests run in the
# lab: src/confine/seen.txt. Needs strace. Arguments are filters of test names.
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

if [ -z "${SEALPOD_LAB_TESTS:-}" ]; then
    cargo build -q -p sealpod-vmm
    SEALPOD_LAB_TESTS=$(cargo test -q --no-run --message-format=json -p sealpod-shim --test vm |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | sort -u | tr '\n' ' ')
    SEALPOD_TEST_VMM=${CARGO_TARGET_DIR:-$PWD/target}/debug/sealpod-vmm
    export SEALPOD_LAB_TESTS SEALPOD_TEST_VMM
fi
export SEALPOD_LAB_ENV="SEALPOD_LAB_TESTS SEALPOD_TEST_VMM"
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
status=0
tests/lab/run.sh -o "$results" "$here/seen.sh" "$@" || status=$?

# A line is "1234<thread> call(arguments…" or "1234<thread> <... call resumed>…"; what counts comes after
# the thread's own seccomp(SECCOMP_SET_MODE_FILTER = 1).
sed -nE 's/^([0-9]+)<(vcpu|devices|sealpod-vmm)[0-9]*> ([a-z0-9_]+)\(([^,)]*)(, (0x[0-9a-f]+))?.*/\1 \2 \3 \4 \6/p' \
    "$results/trace" | awk '
    { kind = $2 == "sealpod-vmm" ? "main" : $2 }
    $3 == "seccomp" { if ($4 == "0x1") confined[$1] = 1; next }
    confined[$1] { print kind, $3 ($3 == "ioctl" ? " " $5 : "") }' |
    sort -u >"$results/seen"
{
    echo "# What confined threads were seen to do: vmm/seen.sh makes this."
    cat "$results/seen"
} >"$here/src/confine/seen.txt"
exit $status
