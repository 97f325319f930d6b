#!/bin/bash
# The lab: runs a program on real KVM, wherever this is. Where the machine's own KVM is real the program
# simply runs. Elsewhere a throw-away machine boots under QEMU, whose emulated AMD processor has SVM,
# so that Debian's kernel in it has a real kvm-amd; the program runs there as root, sees this machine's
# file system (its writes vanish), and its output and exit status come back. docs/lab.md has the rest.
#
#   run.sh [-m MiB] [-c CPUS] [-t SECONDS] [-o FOLDER] PROGRAM [ARGUMENTS]
#
#   -o FOLDER      kept: the program finds it as $SEALPOD_LAB_RESULTS and may write to it
#   SEALPOD_LAB    "always": the lab even where KVM is real; "never": no lab. Default: as KVM is
#
# Exit status: the program's; 124 when it took too long; 125 when the lab ended without one.
set -uo pipefail
here=$(dirname "$(readlink -f "$0")")
memory=4096 cpus=2 patience=900 results=
usage() { sed -n '7,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while getopts m:c:t:o: option; do
    case $option in
    m) memory=$OPTARG ;;
    c) cpus=$OPTARG ;;
    t) patience=$OPTARG ;;
    o) results=$OPTARG ;;
    *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || usage
. "$here/setup.sh"
program=$(command -v "$1") || die "lab: there is no program $1"
program=$(readlink -f "$program")
shift

# As the shim's probe has it; without a built `sealpod` nobody can tell, and the lab is safe.
kvm_is_real() {
    local sealpod found
    for sealpod in "$here"/../../target/{release,debug}/sealpod; do
        [ -x "$sealpod" ] || continue
        found=$("$sealpod" check --json 2>/dev/null)
        grep -A2 '"name": "KVM"' <<<"$found" | grep -q '"state": "ok"'
        return
    done
    return 1
}

work=$(mktemp -d)
results=${results:-$work/kept}
mkdir -p "$results"
results=$(readlink -f "$results")
daemons=()
finish() {
    [ ${#daemons[@]} -eq 0 ] || kill "${daemons[@]}" 2>/dev/null
    wait
    rm -rf "$work"
}
trap finish EXIT

case ${SEALPOD_LAB:-auto} in
always) ;;
never | inside) direct=1 ;;
auto) if kvm_is_real; then direct=1; fi ;;
*) die "SEALPOD_LAB is \"${SEALPOD_LAB}\": allowed are auto, always, never" ;;
esac
if [ -n "${direct:-}" ]; then
    SEALPOD_LAB_RESULTS=$results timeout --foreground "$patience" "$program" "$@"
    exit
fi

lab_setup
virtiofsd=$("$here/../../shim/get-virtiofsd.sh") || exit 125
cp "$here/inside.sh" "$results/.inside"
rm -f "$results/.status"
{
    echo '#!/bin/bash'
    printf 'cd %q || exit 125\n' "$PWD"
    for name in PATH HOME SEALPOD_CACHE ${SEALPOD_LAB_ENV:-}; do
        [ -z "${!name:-}" ] || printf 'export %s=%q\n' "$name" "${!name}"
    done
    printf 'exec'
    printf ' %q' "$program" "$@"
    echo
} >"$results/.job"

# Serves a folder; the machine's own never for writing.
share() {
    local name=$1 folder=$2
    shift 2
    "$virtiofsd" --socket-path="$work/$name" --shared-dir="$folder" --sandbox=none \
        --no-announce-submounts --inode-file-handles=never --log-level=error "$@" 2>"$work/$name.log" &
    daemons+=($!)
}
share machine / --readonly --cache=always
share results "$results" --cache=auto
for ((i = 0; i < 200; i++)); do
    [ -S "$work/machine" ] && [ -S "$work/results" ] && break
    sleep 0.05
done

# tsc=reliable: otherwise its clock is the HPET, each reading of it an exit to QEMU, and guests inside
# get no usable clock. no_timer_check: on a busy machine the kernel finds that its timer does not work.
# isolcpus=0, and one more processor: the first must run no guest, because the others clear a flag of it whenever they
# load the state of the FPU, and meanwhile it loses others, such as whether it runs one (docs/lab.md).
# Mitigations: nobody attacks the lab.
# shellcheck disable=SC2086  # SEALPOD_LAB_QEMU is words
timeout --foreground -k 5 "$patience" qemu-system-x86_64 -M q35,memory-backend=memory \
    -accel tcg,thread=multi,tb-size=1024 -cpu max -smp $((cpus + 1)) -m "$memory" \
    -object "memory-backend-memfd,id=memory,size=${memory}M,share=on" \
    -nodefaults -no-user-config -display none -no-reboot \
    -kernel "$lab_kernel" -initrd "$lab_initrd" \
    -append "console=ttyS0 quiet panic=-1 oops=panic isolcpus=0 mitigations=off nokaslr tsc=reliable no_timer_check lab.results=$results lab.modules=${lab_modules%/lib/modules/*} ${SEALPOD_LAB_APPEND:-}" \
    -chardev "socket,id=machine,path=$work/machine" \
    -device vhost-user-fs-pci,chardev=machine,tag=machine,queue-size=1024 \
    -chardev "socket,id=results,path=$work/results" \
    -device vhost-user-fs-pci,chardev=results,tag=results,queue-size=1024 \
    -device virtio-serial-pci -add-fd fd=3,set=1 \
    -chardev file,id=output,path=/dev/fdset/1,append=on \
    -device virtserialport,chardev=output,name=output \
    -serial "file:$results/console.log" \
    -device virtio-rng-pci ${SEALPOD_LAB_QEMU:-} </dev/null 3>&1 1>&2 | cat
ended=${PIPESTATUS[0]}
if [ -s "$results/.status" ]; then exit "$(cat "$results/.status")"; fi
[ $ended != 124 ] || { say "lab: not done after $patience s"; exit 124; }
say "lab: no exit status came back (QEMU ended with $ended); the end of its console:"
tail -n 20 "$results/console.log" >&2
exit 125
