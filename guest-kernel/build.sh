#!/bin/bash
# Builds one flavour of the guest kernel from fragments/ over tinyconfig, and puts it into
# target/guest/. Everything slow is kept outside the tree, under a key made of the source's version,
# the compiler and the options asked for: a second run builds nothing.
# How a kernel is made belongs here; what is in it belongs in fragments/, where the source comes from
# in source.sh.
#
#   build.sh plain|confidential     build, unless the cache has it, and publish
#   build.sh check                  only merge and verify the configuration of both flavours
#   build.sh update                 forget the downloaded source, so that the next build takes the newest
#
#   KERNEL_SOURCE   a folder or a tarball with Linux 6.12 or newer; default: Debian's linux-source-6.12
#   SEALPOD_CACHE   default: ~/.cache/sealpod
#   JOBS            default: the number of CPUs
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${SEALPOD_CACHE:-$HOME/.cache/sealpod}
guest=${SEALPOD_GUEST_DIR:-$here/../target/guest}
jobs=${JOBS:-$(nproc)}

# Fragments of each flavour, in the order in which they are merged.
plain=(base virtio containers filesystems verity bpf)
confidential=("${plain[@]}" confidential)
# Raised when this script makes another kernel of the same source and configuration.
recipe=1
# Roughly how many objects a build has: only the progress display uses it.
objects=2300

say() { echo "guest-kernel: $*"; }
die() { say "$@" >&2; exit 1; }

. "$here/source.sh"

# Text of a flavour's fragments, in order; the published key depends on it.
fragments() {
	local -n list=$1
	local f
	for f in "${list[@]}"; do printf '%s\n' "$here/fragments/$f.config"; done
}

key_of() {
	{
		source_version
		patches_version
		gcc --version | head -1
		fragments "$1" | xargs grep -hE '^(# )?CONFIG_'
		echo "recipe $recipe"
	} | sha256sum | cut -c1-16
}

in_tree() { make -s -C "$source" O="$out" ARCH=x86_64 "$@"; }

# Merges a flavour's fragments over tinyconfig into $out/.config, then compares every line asked for
# with what Kconfig made of it.
configure() {
	local flavour=$1 file line name got bad=0
	mapfile -t files < <(fragments "$flavour")
	in_tree tinyconfig >/dev/null
	(cd "$out" && "$source/scripts/kconfig/merge_config.sh" -m -Q -O "$out" .config "${files[@]}" >/dev/null)
	in_tree olddefconfig >/dev/null
	for file in "${files[@]}"; do
		while read -r line; do
			case $line in
			CONFIG_*=*)
				name=${line%%=*}
				grep -qxF -- "$line" "$out/.config" && continue ;;
			'# CONFIG_'*' is not set')
				name=${line#\# } name=${name%% *}
				grep -q "^$name=" "$out/.config" || continue ;;
			'' | '#'*) continue ;;
			*) die "$file: not a configuration line: $line" ;;
			esac
			got=$(grep -E "^(# )?$name[ =]" "$out/.config" || echo "nothing: no such option, or a dependency is missing")
			say "$flavour: option $name of fragment ${file##*/} did not stick: wanted '$line', got '$got'" >&2
			bad=$((bad + 1))
		done <"$file"
	done
	[ $bad -eq 0 ] || die "$flavour: $bad option(s) did not stick"
	say "$flavour: every option of ${#files[@]} fragments is in the configuration"
}

# Runs make in the background and shows how far it is.
compile() {
	local log=$out/build.log began=$SECONDS done_now
	# Without our own make's flags: a silent one would leave nothing to count in the log.
	env -u MAKEFLAGS -u MFLAGS make -C "$source" O="$out" ARCH=x86_64 KBUILD_BUILD_TIMESTAMP='Thu Jan 1 00:00:00 UTC 1970' \
		KBUILD_BUILD_USER=sealpod KBUILD_BUILD_HOST=sealpod -j"$jobs" vmlinux bzImage >"$log" 2>&1 &
	local make_pid=$!
	trap 'kill '$make_pid' 2>/dev/null' EXIT
	while kill -0 $make_pid 2>/dev/null; do
		sleep 1
		[ $(((SECONDS - began) % 10)) -eq 0 ] || continue
		done_now=$(grep -cE '^  (CC|AS|AR|LD) ' "$log" || true)
		say "$1: $done_now of about $objects objects, $((SECONDS - began)) s"
	done
	wait $make_pid || { tail -n 20 "$log" >&2; die "$1: the build failed; the log above is the end of $log"; }
	trap - EXIT
	say "$1: built in $((SECONDS - began)) s"
}

build() {
	local flavour=$1 key kept
	need_tools
	key=$(key_of "$flavour")
	kept=$cache/guest-kernel/$flavour-$key
	mkdir -p "$cache/guest-kernel"
	if [ ! -s "$kept/vmlinux" ]; then
		exec 9>"$cache/guest-kernel/lock"
		flock 9
	fi
	if [ ! -s "$kept/vmlinux" ]; then
		prepare_source
		out=$cache/build/$flavour-$key
		mkdir -p "$out"
		configure "$flavour"
		compile "$flavour"
		rm -rf "$kept.new" && mkdir "$kept.new"
		objcopy --strip-all "$out/vmlinux" "$kept.new/vmlinux"
		readelf -nW "$kept.new/vmlinux" | grep -q Xen || die "$flavour: vmlinux has no PVH note"
		cp "$out/arch/x86/boot/bzImage" "$out/.config" "$out/System.map" "$kept.new/"
		rm -rf "$kept" && mv "$kept.new" "$kept"
		rm -rf "$out"
	fi
	exec 9>&-
	local suffix=
	[ "$flavour" = plain ] || suffix=-$flavour
	publish "$kept/vmlinux" "vmlinux$suffix"
	publish "$kept/bzImage" "bzImage$suffix"
	publish "$kept/.config" "config$suffix"
	publish "$kept/System.map" "System.map$suffix"
	say "$flavour: $(source_version), key $key, vmlinux $(stat -c %s "$kept/vmlinux") bytes, bzImage $(stat -c %s "$kept/bzImage") bytes"
}

# Puts a file into target/guest/ in one step, and only if it is another one.
publish() {
	mkdir -p "$guest"
	cmp -s "$1" "$guest/$2" && return
	cp "$1" "$guest/.$2.new"
	mv "$guest/.$2.new" "$guest/$2"
}

case ${1:-} in
plain | confidential) build "$1" ;;
check)
	need_tools
	prepare_source
	out=$(mktemp -d)
	trap 'rm -rf "$out"' EXIT
	configure plain
	configure confidential
	;;
update) rm -rf "$cache/guest-kernel/source" "$cache/guest-kernel/package" ;;
*) die "usage: build.sh plain|confidential|check|update" ;;
esac
