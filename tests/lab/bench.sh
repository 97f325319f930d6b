#!/bin/bash
# What VMs and pods cost and how fast disks and networks are, one after the other in one boot of the lab:
# bench.sh FOLDER PROGRAMS [ARGUMENTS]. The first part takes the arguments, SEALPOD_BENCH_GUEST is the program of
# the last. `make bench-lab` runs it.
set -euo pipefail
folder=$1 programs=$2
shift 2
"$programs/bench_vmm" "$folder" "$@"
SEALPOD_TEST_ACCELERATOR=kvm "$programs/bench_pods" "$folder"
cd vmm
SEALPOD_BENCH_FILE=$folder/speed.json "$SEALPOD_BENCH_GUEST" --ignored --exact speed::speed --nocapture
