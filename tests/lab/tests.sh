#!/bin/bash
# The tests that need KVM, in the lab: builds them and sealpod-vmm here, runs them there. Arguments are
# filters of test names.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."

if [ "${SEALPOD_LAB:-}" != inside ] && [ -z "${SEALPOD_LAB_TESTS:-}" ]; then
    cargo build -q -p sealpod-vmm
    # Paths of the test programs, as cargo tells them.
    SEALPOD_LAB_TESTS=$(cargo test -q --no-run --message-format=json -p sealpod-shim --test vm -p sealpod-vmm --test guest |
        sed -n 's/.*"executable":"\([^"]*\/deps\/[^"]*\)".*/\1/p' | sort -u | tr '\n' ' ')
    SEALPOD_TEST_VMM=${CARGO_TARGET_DIR:-$PWD/target}/debug/sealpod-vmm
    export SEALPOD_LAB_TESTS SEALPOD_TEST_VMM
    export SEALPOD_LAB_ENV="SEALPOD_LAB_TESTS SEALPOD_TEST_VMM"
    exec tests/lab/run.sh "$0" "$@"
fi

cd shim
failed=0
for program in $SEALPOD_LAB_TESTS; do
    "$program" --test-threads=1 "$@" || failed=1
done
exit $failed
