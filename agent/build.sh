#!/bin/bash
# Builds the agent as a static program for the guest and puts it where the initramfs packer looks.
#   agent/build.sh [--dev] [--of PACKAGE]     --dev: the quick profile, larger and slower
#                                             PACKAGE: another init, sealpod-hostile-agent for tests
# Needs Rust and libseccomp's static library (Debian: libseccomp-dev).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."
target=x86_64-unknown-linux-gnu
profile=release package=sealpod-agent
while [ $# -gt 0 ]; do
	case $1 in
	--dev) profile=dev; shift ;;
	--of) package=${2:?--of needs a package}; shift 2 ;;
	*) echo "agent: unknown argument $1; known are --dev, --of PACKAGE" >&2; exit 1 ;;
	esac
done

lib=${LIBSECCOMP_LIB_PATH:-/usr/lib/x86_64-linux-gnu}
if [ ! -e "$lib/libseccomp.a" ]; then
	echo "agent: $lib/libseccomp.a is missing: apt-get install libseccomp-dev" >&2
	exit 1
fi
# --target even though it is the host's: procedural macros are host code and must not become static.
flags="-C target-feature=+crt-static -C relocation-model=static"
# The index of the tables to unwind by: a panic ends the guest, nobody unwinds.
flags+=" -C link-arg=-Wl,--no-eh-frame-hdr"
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS=$flags
# The guest holds it in memory, twice while it boots: small before fast.
export CARGO_PROFILE_RELEASE_OPT_LEVEL=z
export LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=$lib
cargo build -p "$package" --profile "$profile" --target "$target"

built=${CARGO_TARGET_DIR:-target}/$target/$([ "$profile" = dev ] && echo debug || echo release)/$package
out=${SEALPOD_GUEST_DIR:-target/guest}
mkdir -p "$out"
# The tables to unwind by are a tenth of the program. Nobody unwinds: a panic ends the guest.
objcopy --remove-section=.eh_frame "$built" "$out/$package.new"
# It says what it is, and that it does nothing here.
says=$("$out/$package.new" 2>&1) || true
if [[ $says != *"init of a sealpod guest"* ]]; then
	echo "agent: $out/$package.new does not start" >&2
	exit 1
fi
if cmp -s "$out/$package.new" "$out/$package"; then
	rm "$out/$package.new"
else
	mv "$out/$package.new" "$out/$package"
fi
echo "agent: $out/$package, $(stat -c %s "$out/$package") bytes" >&2
