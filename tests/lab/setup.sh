# shellcheck shell=bash
# What the lab needs besides the packages of tests/setup: Debian's cloud kernel with its modules, kept
# unpacked in $SEALPOD_CACHE, and a small initrd that reaches the machine's file system. Sourced by
# run.sh; a second run repeats nothing.
# shellcheck source=tests/setup/apt.sh
. "$here/../setup/apt.sh"

# The lab's kernel is of this series: Debian 12's own.
series=6.1.0

# Sets lab_kernel and lab_initrd.
lab_setup() {
    machine_packages qemu-system-x86/bookworm-backports busybox-static kmod cpio gzip
    local dir=$SEALPOD_CACHE/debs/lab-kernel
    [ -s "$dir/.done" ] || lab_fetch_kernel "$dir"
    release=$(cat "$dir/.done")
    lab_kernel=$dir/boot/vmlinuz-$release
    lab_modules=$dir/lib/modules/$release
    lab_initrd=$dir/initrd-$(cat "$here/init.sh" "$here/setup.sh" | sha256sum | cut -c1-16).gz
    [ -s "$lab_initrd" ] || lab_pack_initrd "$dir"
}

# Newest kernel of the series that the machine's archives have.
lab_fetch_kernel() {
    local dir=$1 package
    private_apt_init
    package=$(apt-cache -c "$APT_DIR/apt.conf" pkgnames "linux-image-$series-" |
        grep -E '^linux-image-[0-9.]+-[0-9]+-cloud-amd64$' | sort -V | tail -1)
    [ -n "$package" ] || die "no archive has a package linux-image-$series-*-cloud-amd64"
    say "unpacking $package"
    rm -rf "$dir" "$dir.part"
    mkdir -p "$dir.part"
    (
        cd "$dir.part" && quietly apt-get -c "$APT_DIR/apt.conf" download "$package" &&
            dpkg -x ./*.deb . && rm ./*.deb && depmod -b . "${package#linux-image-}"
    ) || die "$package could not be had"
    echo "${package#linux-image-}" >"$dir.part/.done"
    mv "$dir.part" "$dir"
    private_apt_done
}

# busybox, init.sh and the modules that reach the two shares, in the order in which they are loaded.
lab_pack_initrd() {
    local dir=$1 root module
    root=$(mktemp -d)
    mkdir -p "$root"/{bin,dev,lower,modules,proc,root,sys,writes}
    cp "$(command -v busybox)" "$root/bin/busybox"
    install -m 755 "$here/init.sh" "$root/init"
    for module in virtio_pci virtiofs overlay virtio_console; do
        modprobe -d "$dir" -S "$release" --show-depends "$module"
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r module; do
        cp "$module" "$root/modules/"
        basename "$module" >>"$root/modules/order"
    done
    (cd "$root" && find . | cpio --quiet -o -H newc | gzip -1) >"$lab_initrd.part"
    rm -rf "$root"
    mv "$lab_initrd.part" "$lab_initrd"
}
