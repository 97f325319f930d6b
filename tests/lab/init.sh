#!/bin/busybox sh
# First program of the lab's initrd: the machine's file system, read-only, below a tmpfs that takes
# every write, becomes the root; the folder for results is mounted where it is on the machine.
run=/bin/busybox
$run mount -t proc proc /proc
$run mount -t devtmpfs dev /dev
$run mount -t sysfs sys /sys
for module in $($run cat /modules/order); do $run insmod "/modules/$module"; done
word() { $run sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
results=$(word lab.results)
$run mount -t virtiofs -o ro machine /lower || exec $run poweroff -f
$run mount -t tmpfs -o mode=755,size=70% writes /writes
$run mkdir /writes/upper /writes/work
$run mount -t overlay -o lowerdir=/lower,upperdir=/writes/upper,workdir=/writes/work lab /root ||
    exec $run poweroff -f
# No overlay of an overlay: what tests put below /tmp (a containerd) needs a file system of its own.
$run mount -t tmpfs -o mode=1777,size=50% tmp /root/tmp
$run mkdir -p "/root$results"
$run mount -t virtiofs results "/root$results" || exec $run poweroff -f
$run mount --move /dev /root/dev
$run umount /proc /sys
exec $run switch_root /root /bin/bash "$results/.inside" "$results"
