#!/bin/bash
# What VMs and pods cost, one after the other in one boot of the lab: bench.sh FOLDER PROGRAMS [ARGUMENTS].
# The first part takes the arguments. `make bench-lab` runs it.
set -euo pipefail
folder=$1 programs=$2
shift 2
"$programs/bench_vmm" "$folder" "$@"
SEALPOD_TEST_ACCELERATOR=kvm "$programs/bench_pods" "$folder"
