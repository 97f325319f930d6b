#!/bin/bash
# The end-to-end suite on real KVM, that is with sealpod-vmm: builds the test program and the shim here,
# runs each test in the lab as a process of its own, prints one line for each and counts at the end.
# docs/lab.md says what passes. The output of each test is kept below target/lab/e2e.
#
#   e2e.sh [-a] [-v VERSION] [FILTER…]
#
#   FILTER       parts of test names; without any, the list `chosen` below
#   -a           every test
#   -v VERSION   containerd: 1.6, 1.7 (the default), 2.1, or sandbox (2.1, sandboxes by the shim)
#
# An emulated processor with SVM is not perfect: where the lab's own kernel dies (docs/lab.md), it is booted again and
# the suite goes on with the test at which that happened; so it does where the lab hangs. A test at which it dies twice has failed.
#
# SEALPOD_TEST_PROFILE=debug takes the development build;
# SEALPOD_LAB_MINUTES (60) ends the lab.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."

# One or two tests of each kind.
chosen=(
    lifecycle::run_prints lifecycle::the_container_has lifecycle::exec_prints lifecycle::a_paused
    lifecycle::events lifecycle::exec_survives io::every_byte_of_stdin io::a_terminal_is_one
    files::a_bind_mount files::locks_and_links network::a_server_is_reached options::limits_are
    options::a_container_over options::the_clock bad_input::a_kernel_that_is_none
    bad_input::an_initramfs_that_is_none cri_pod::containers_of_a_pod cri_pod::exec_sync_gives
    cri_pod::stats_count cri_pod::a_removed_pod cri_files::a_config_map cri_files::a_raw_block
    cri_security::a_privileged cri_streams::a_streaming_exec_passes cri_streams::port_forward_reaches_a_server_in
    failure::shim_killed failure::vm_killed failure::virtiofsd_killed failure::containerd_killed_idle
    failure_agent::agent_killed_idle many::eight_pods redis:: templates::
    attestation::a_device_is_released_to_an_affirmed
)
# Everything in the lab takes some 8 times as long.
patience=6
# Of one test, seconds.
limit=300
# Boots of the lab.
boots_max=9

inside() {
    local results=$SEALPOD_LAB_RESULTS name begin status
    cd tests
    while read -r name; do
        begin=$SECONDS
        status=0
        timeout -k 5 $limit "$SEALPOD_LAB_E2E" --exact "$name" --nocapture \
            >"$results/${name//::/-}.log" 2>&1 </dev/null || status=$?
        echo "$name $status" >>"$results/done"
        printf '%s %4d s  %s\n' "$([ $status = 0 ] && echo ok || echo "FAILED ($status)")" \
            $((SECONDS - begin)) "$name"
    done <"$results/tests"
}

if [ -n "${SEALPOD_LAB_E2E:-}" ]; then
    inside
    exit
fi

version=1.7 every=
while getopts av: option; do
    case $option in
    a) every=1 ;;
    v) version=$OPTARG ;;
    *) sed -n '6,13s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
if [ -n "$every" ] && [ $# -gt 0 ]; then
    echo "e2e: -a is every test; it takes no filter ($*)" >&2
    exit 2
fi
case $version in
1.6 | 1.7 | 2.1) suffix=containerd_${version/./_} ;;
sandbox) suffix=sandbox_api ;;
*) echo "e2e: no version $version: 1.6, 1.7, 2.1, sandbox" >&2; exit 2 ;;
esac

profile=${SEALPOD_TEST_PROFILE:-release}
cargo build -q --profile "${profile/debug/dev}" -p sealpod-shim -p sealpod-vmm -p sealpod-attestation
SEALPOD_LAB_E2E=$(cargo test -q --no-run --message-format=json -p sealpod-tests --test e2e |
    sed -n 's/.*"executable":"\([^"]*\/deps\/e2e-[^"]*\)".*/\1/p' | sort -u)

results=${CARGO_TARGET_DIR:-$PWD/target}/lab/e2e
rm -rf "$results"
mkdir -p "$results"
wanted() {
    if [ -n "$every" ]; then cat; return; fi
    [ $# -gt 0 ] || set -- "${chosen[@]}"
    grep -F -f <(printf '%s\n' "$@")
}
# Tests that drive no containerd, or one of their own choice, are of every version.
"$SEALPOD_LAB_E2E" --list --format terse | sed -n 's/: test$//p' |
    grep -E "::$suffix\$|^[a-z_]+::[a-z_0-9]+\$" | wanted "$@" >"$results/tests"

export SEALPOD_LAB_E2E SEALPOD_TEST_PROFILE=$profile SEALPOD_TEST_REQUIRE=1
export SEALPOD_TEST_ACCELERATOR=kvm SEALPOD_TEST_PATIENCE=${SEALPOD_TEST_PATIENCE:-$patience}
export SEALPOD_LAB_ENV="SEALPOD_LAB_E2E SEALPOD_TEST_PROFILE SEALPOD_TEST_REQUIRE SEALPOD_TEST_ACCELERATOR
    SEALPOD_TEST_PATIENCE SEALPOD_SOAK CARGO_TARGET_DIR"
all=$(wc -l <"$results/tests") died=
: >"$results/done"
deadline=$((SECONDS + 60 * ${SEALPOD_LAB_MINUTES:-60}))
for ((boot = 1; boot <= boots_max && SECONDS < deadline; boot++)); do
    touch "$results/done"
    tests/lab/run.sh -t $((deadline - SECONDS)) -o "$results" "$PWD/tests/lab/e2e.sh" &
    lab=$!
    # A test that is over its time ends by itself, unless the lab hangs.
    while kill -0 $lab 2>/dev/null; do
        sleep 5
        quiet=$(($(date +%s) - $(stat -c %Y "$results/done")))
        [ $quiet -lt $((limit + 60)) ] || { pkill -P $lab || true; }
    done
    status=0
    wait $lab || status=$?
    # Its own status, and "no status came back".
    [ $status = 125 ] || break
    mv "$results/console.log" "$results/console-$boot.log"
    cut -d ' ' -f 1 "$results/done" | grep -vxF -f - "$results/tests" >"$results/left" || break
    first=$(head -n 1 "$results/left")
    echo "e2e: the lab died at $first, see console-$boot.log" >&2
    if [ "$first" = "$died" ]; then
        echo "$first lab" >>"$results/done"
        sed -i 1d "$results/left"
    fi
    died=$first
    mv "$results/left" "$results/tests"
done
passed=$(grep -c ' 0$' "$results/done" || true)
failed=$(($(wc -l <"$results/done") - passed))
echo "$passed passed, $failed failed, $((all - passed - failed)) not run; boots of the lab: $boot"
[ "$passed" = "$all" ]
