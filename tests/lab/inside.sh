#!/bin/bash
# The lab's PID 1 once the machine's file system is its root: fresh kernel file systems, cgroup v2 with
# all controllers, the modules that tests need; then the program, its status, and the end.
results=$1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t debugfs debugfs /sys/kernel/debug
modules=$(sed -n 's/.*lab\.modules=\([^ ]*\).*/\1/p' /proc/cmdline)
mount -t cgroup2 cgroup /sys/fs/cgroup
mkdir -p /dev/pts /dev/shm /run /var/lib/containerd
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs -o mode=755 run /run
# No overlay of an overlay: containerd's snapshots need a file system of their own.
mount -t tmpfs -o size=50% containerd /var/lib/containerd
mkdir -p /run/lock
ln -sf /proc/self/fd /dev/fd
ln -sf /proc/self/fd/0 /dev/stdin
ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr
# Processes leave the root group, so that controllers can be handed down.
mkdir /sys/fs/cgroup/lab
echo $$ >/sys/fs/cgroup/lab/cgroup.procs
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done
modprobe -a -d "$modules" kvm-amd vhost_vsock vhost_net tun veth bridge loop virtio_blk fuse act_mirred \
    cls_u32 cls_bpf sch_ingress
hostname lab
ip link set lo up
sysctl -qw net.ipv4.ip_forward=1 vm.overcommit_memory=1 kernel.printk="4 4 4 4"
echo always >/sys/kernel/mm/transparent_hugepage/enabled
echo advise >/sys/kernel/mm/transparent_hugepage/shmem_enabled
export SEALPOD_LAB=inside SEALPOD_LAB_RESULTS=$results
cut -d' ' -f1 /proc/uptime >"$results/.uptime"
out=$(grep -lx output /sys/class/virtio-ports/*/name)
out=/dev/$(basename "$(dirname "$out")")
bash "$results/.job" </dev/null >"$out" 2>&1
echo $? >"$results/.status"
sync
echo o >/proc/sysrq-trigger
sleep 60
