#!/bin/bash
# Runs every test of the workspace; the last line is the count of all of them. Boots at most two VMs
# at once. Uses cargo-nextest where it is installed, else cargo's own runner. Arguments are passed on
# (a filter, for instance).
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/.." || exit 1

# A missing set-up is a failure: `make test` has just made it.
export SEALPOD_TEST_REQUIRE=${SEALPOD_TEST_REQUIRE:-1}

if command -v cargo-nextest >/dev/null && [ -z "${SEALPOD_NO_NEXTEST:-}" ]; then
    # nextest runs no documentation tests; they come first, its closing line last.
    cargo test -q --workspace --doc || exit 1
    exec cargo nextest run --config-file tests/nextest.toml --workspace "$@"
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
cargo test --workspace --no-fail-fast -- --test-threads=2 "$@" 2>&1 | tee "$log"
rc=${PIPESTATUS[0]}
# One closing line of all binaries: the sums of cargo's own.
awk '/^test result:/ { passed += $4; failed += $6; skipped += $8 }
     END { printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped }' "$log"
exit "$rc"
