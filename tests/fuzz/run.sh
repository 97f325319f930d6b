#!/bin/bash
# Runs the fuzz targets, several at a time, for so many seconds altogether; a crash, a hang or a failed
# assertion fails the script and leaves the input that caused it. Touches only target/fuzz of the
# project.
#
#   tests/fuzz/run.sh [SECONDS] [TARGET...]
set -euo pipefail

seconds=${1:-120}
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

# All targets but the program that writes the seeds.
[ $# -gt 0 ] || set -- $(cd targets && ls ./*.rs | sed -n 's|^\./\(.*\)\.rs$|\1|p' | grep -vx seeds)
mkdir -p "$out"
echo "fuzz: building"
if ! cargo "+$toolchain" fuzz build --fuzz-dir . --target-dir "$out/target" >"$out/build.log" 2>&1; then
    echo "fuzz: the targets do not build; the end of $out/build.log:" >&2
    tail -n 40 "$out/build.log" >&2
    exit 1
fi
programs=$(ls -d "$out"/target/*/release | head -n 1)
rm -rf "$out/seeds"
"$programs/seeds" "$out/seeds"

jobs=$(nproc)
# Every target gets the same share of the time.
share=$((seconds * (jobs < $# ? jobs : $#) / $#))
[ "$share" -gt 0 ] || share=1

fuzz() {
    mkdir -p "$out/corpus/$1" "$out/crashes/$1" "$out/seeds/$1"
    # -timeout: one input, seconds; -rss_limit_mb covers the sanitizer's own shadow.
    ASAN_OPTIONS=detect_odr_violation=0 "$programs/$1" "$out/corpus/$1" "$out/seeds/$1" \
        -max_total_time="$share" -timeout=20 -rss_limit_mb=2048 -max_len=16384 -print_final_stats=1 \
        -artifact_prefix="$out/crashes/$1/" >"$out/$1.log" 2>&1
}

failed=()
running=()
finish() {
    local target=${running[0]%%:*} pid=${running[0]##*:}
    running=("${running[@]:1}")
    if wait "$pid"; then
        echo "fuzz: $target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$out/$target.log") inputs in $share s"
    else
        echo "fuzz: $target FAILED; the end of $out/$target.log:" >&2
        tail -n 40 "$out/$target.log" >&2
        failed+=("$target")
    fi
}
for target; do
    [ ${#running[@]} -lt "$jobs" ] || finish
    fuzz "$target" &
    running+=("$target:$!")
done
while [ ${#running[@]} -gt 0 ]; do finish; done
[ ${#failed[@]} -eq 0 ] || { echo "fuzz: failed: ${failed[*]}" >&2; exit 1; }
echo "fuzz: no failure"
