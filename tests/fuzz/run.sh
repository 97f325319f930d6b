#!/bin/sh
# Runs every fuzz target for so many seconds each; a crash, a hang or a failed assertion fails the
# script and leaves the input that caused it. Touches only target/fuzz of the project.
#
#   tests/fuzz/run.sh [SECONDS] [TARGET...]
set -eu

seconds=${1:-60}
case $seconds in
    ''|*[!0-9]*) echo "usage: $0 [SECONDS] [TARGET...]" >&2; exit 2 ;;
esac
[ $# -gt 0 ] && shift
cd "$(dirname "$0")"
out=$(cd ../.. && pwd)/target/fuzz
toolchain=${SEALPOD_FUZZ_TOOLCHAIN:-nightly}

if ! cargo "+$toolchain" --version >/dev/null 2>&1; then
    echo "fuzz: the Rust toolchain \"$toolchain\" is not installed: rustup toolchain install $toolchain --profile minimal" >&2
    exit 3
fi
if ! cargo "+$toolchain" fuzz --version >/dev/null 2>&1; then
    echo "fuzz: installing cargo-fuzz (a minute or two)"
    if ! cargo install cargo-fuzz --locked --quiet; then
        echo "fuzz: cargo-fuzz is not installed and cannot be: cargo install cargo-fuzz" >&2
        exit 3
    fi
fi

[ $# -gt 0 ] || set -- vsock_packets vsock_rings agent_requests
mkdir -p "$out"
echo "fuzz: seeds"
cargo "+$toolchain" run --quiet --target-dir "$out/target" --bin seeds -- "$out/seeds"
failed=
for target; do
    echo "fuzz: building $target"
    cargo "+$toolchain" fuzz build --fuzz-dir . --target-dir "$out/target" "$target"
done
for target; do
    mkdir -p "$out/corpus/$target" "$out/crashes/$target"
    echo "fuzz: $target for $seconds s"
    # -timeout: one input, seconds; -rss_limit_mb covers the sanitizer's own shadow.
    if cargo "+$toolchain" fuzz run --fuzz-dir . --target-dir "$out/target" "$target" \
        "$out/corpus/$target" "$out/seeds/$target" -- \
        -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -max_len=8192 -print_final_stats=1 \
        -artifact_prefix="$out/crashes/$target/" >"$out/$target.log" 2>&1
    then
        grep -E 'stat::number_of_executed_units|Done ' "$out/$target.log" || true
    else
        echo "fuzz: $target FAILED; the end of $out/$target.log:" >&2
        tail -n 40 "$out/$target.log" >&2
        failed="$failed $target"
    fi
done
[ -z "$failed" ] || { echo "fuzz: failed:$failed" >&2; exit 1; }
echo "fuzz: no failure"
