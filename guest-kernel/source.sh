# Where the kernel's source comes from, what is mended in it (patches/), and the tools that building it
# needs. Sourced by build.sh, which sets $here and $cache and provides say and die; sets $source. Nothing
# here knows flavours or options.
package=linux-source-6.12
tools=(bc bison flex gcc libc6-dev libelf-dev libssl-dev lz4 make patch perl xz-utils)
source=

# Installs what is missing where that is possible, else says what to install.
need_tools() {
	local p missing=()
	command -v dpkg-query >/dev/null || return 0
	for p in "${tools[@]}"; do
		[ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	[ "$(id -u)" = 0 ] || die "packages are missing; as root: apt-get install ${missing[*]}"
	say "installing ${missing[*]}"
	apt-get update -qq || die "apt-get update failed"
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null ||
		die "apt-get could not install ${missing[*]}"
}

# One line that changes when the source does. Downloads Debian's package where that has not been done.
source_version() {
	if [ -z "${KERNEL_SOURCE:-}" ]; then
		debian_package
		basename "$deb" .deb
	elif [ -d "$KERNEL_SOURCE" ]; then
		[ -f "$KERNEL_SOURCE/Kbuild" ] || die "KERNEL_SOURCE=$KERNEL_SOURCE: not a Linux source folder"
		find "$KERNEL_SOURCE" -type f -printf '%P %s %T@\n' | LC_ALL=C sort | sha256sum | sed 's/^/folder /'
	elif [ -f "$KERNEL_SOURCE" ]; then
		sha256sum <"$KERNEL_SOURCE" | sed 's/^/tarball /'
	else
		die "KERNEL_SOURCE=$KERNEL_SOURCE: neither a folder nor a tarball"
	fi
}

# One line that changes when what is mended does; what a patch says of itself does not count.
patches_version() { sed -s '1,/^--- /{/^--- /!d}' "$here"/patches/*.patch | sha256sum | cut -c1-16; }

# Mends the tree in a folder, as far as its release has not been mended already.
mend() {
	local tree=$1 patch
	for patch in "$here"/patches/*.patch; do
		! mended "$tree" "$patch" || continue
		patch -d "$tree" -p1 --force --fuzz=0 <"$patch" >"$tree/mend.log" 2>&1 ||
			die "${patch##*/} does not fit this source: $(tail -n 3 "$tree/mend.log" | tr '\n' ' ')"
		rm "$tree/mend.log"
		say "mended: ${patch##*/}"
	done
}

mended() { patch -d "$1" -p1 --force --reverse --dry-run --fuzz=0 <"$2" >/dev/null 2>&1; }

# Sets $source to an unpacked and mended tree.
prepare_source() {
	if [ -d "${KERNEL_SOURCE:-}" ]; then
		source=$(realpath "$KERNEL_SOURCE")
		[ ! -f "$source/.config" ] || die "KERNEL_SOURCE=$source has been built in; run 'make mrproper' there"
		local patch
		for patch in "$here"/patches/*.patch; do
			# A folder is its owner's: nothing is written into it.
			mended "$source" "$patch" || die "KERNEL_SOURCE=$source lacks ${patch##*/}: apply it with patch -p1, or name a tarball"
		done
		return
	fi
	local version
	version="$(source_version) $(patches_version)"
	source=$cache/guest-kernel/source/$(sha256sum <<<"$version" | cut -c1-16)
	[ ! -f "$source/Kbuild" ] || return 0
	say "unpacking the source"
	rm -rf "$source" "$source.new" && mkdir -p "$source.new"
	if [ -n "${KERNEL_SOURCE:-}" ]; then
		unpack <"$KERNEL_SOURCE"
	else
		debian_package
		dpkg-deb --fsys-tarfile "$deb" | tar -xO "./usr/src/$package.tar.xz" | unpack
	fi
	[ -f "$source.new/Kbuild" ] || die "${KERNEL_SOURCE:-$package}: not a Linux source archive"
	mend "$source.new"
	mv "$source.new" "$source"
}

# Unpacks an archive of any compression from standard input, without the two folders that are half of
# the source and no part of any guest.
unpack() {
	local archive=$source.new/archive
	cat >"$archive"
	tar -C "$source.new" --strip-components=1 --exclude='*/Documentation/*/*' \
		--exclude='*/drivers/gpu/drm/amd/include' -xf "$archive"
	rm "$archive"
}

# Sets $deb to Debian's source package. It comes from the mirror that this machine's apt uses, from
# the release, its security updates or its backports, through lists of our own: no file of the
# machine's apt is changed, and no root is needed.
debian_package() {
	local dir=$cache/guest-kernel/package
	mkdir -p "$dir"
	deb=$(find "$dir" -maxdepth 1 -name "$package"'_*.deb' | sort -V | tail -1)
	[ -z "$deb" ] || return 0
	command -v apt-get >/dev/null ||
		die "no apt-get here: name a Linux 6.12 source folder or tarball with KERNEL_SOURCE="
	local codename mirror
	codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
	rm -rf "$dir" && mkdir -p "$dir/lists/partial" "$dir/archives/partial"
	# The archive's own URI, and the suites that apt already reads for this release.
	apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
		awk -v c="$codename" '$2 == c || index($2, c "-") == 1' | sort -u >"$dir/suites"
	mirror=$(awk -v c="$codename" '$2 == c { print $1; exit }' "$dir/suites")
	[ -n "$mirror" ] || die "apt has no source for $codename; name a Linux source with KERNEL_SOURCE="
	echo "$mirror $codename-backports" >>"$dir/suites"
	sort -u "$dir/suites" | sed 's/^/deb /; s/$/ main/' >"$dir/sources.list"
	local options=(-o "Dir::Etc::sourcelist=$dir/sources.list" -o "Dir::Etc::sourceparts=/dev/null"
		-o "Dir::State::lists=$dir/lists" -o "Dir::Cache::archives=$dir/archives"
		-o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache=" -o "Acquire::Languages=none"
		-o "APT::Sandbox::User=root")
	say "downloading $package (150 MB)" >&2
	apt-get "${options[@]}" -qq update >&2 || die "apt-get update failed for $(tr '\n' ' ' <"$dir/suites")"
	(cd "$dir" && apt-get "${options[@]}" -qq download "$package" >&2) ||
		die "$package is in none of: $(tr '\n' ' ' <"$dir/suites")"
	rm -rf "$dir/lists" "$dir/archives"
	deb=$(find "$dir" -maxdepth 1 -name "$package"'_*.deb')
}
