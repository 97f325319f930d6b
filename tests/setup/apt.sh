# shellcheck shell=bash
# Debian packages of other suites without touching the machine: sourced, not run. A private apt
# configuration (own lists, cache and sources) names the suites; the mirror is the one that the
# machine's own sources use. Only $SEALPOD_CACHE is written to, except by `machine_packages`.

SEALPOD_CACHE=${SEALPOD_CACHE:-$HOME/.cache/sealpod}

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() { printf 'sealpod: %s\n' "$*" >&2; exit 1; }

# Runs a command with its output in a log file; the log is shown when it fails.
quietly() {
    local log
    log=$(mktemp)
    if "$@" >"$log" 2>&1; then rm -f "$log"; return 0; fi
    local rc=$?
    cat "$log" >&2
    rm -f "$log"
    return $rc
}

# Debian archives that the machine's apt uses, one `suite URI` per line.
machine_archives() {
    # shellcheck disable=SC2016  # apt expands these
    apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        awk '$2 == "main" && $1 ~ /^(bookworm|stable|oldstable)/ { print $1, $3 }' | sort -u
}

# Writes the private configuration and fetches its lists, at most once a day. The lists are this
# process's alone from here to private_apt_done: apt must not read what another fetches just now.
private_apt_init() {
    APT_DIR=$SEALPOD_CACHE/apt
    mkdir -p "$APT_DIR"/{lists/partial,archives/partial,parts}
    exec {apt_lock}>"$SEALPOD_CACHE/apt.lock"
    flock "$apt_lock"
    local keyring=/usr/share/keyrings/debian-archive-keyring.gpg mirror signed
    [ -r "$keyring" ] || die "$keyring is missing (package debian-archive-keyring)"
    mirror=$(machine_archives | awk '$1 ~ /^(bookworm|stable|oldstable)$/ { print $2; exit }')
    [ -n "$mirror" ] || die "apt has no Debian 12 archive in its sources (looked for suite bookworm, component main)"
    signed="deb [signed-by=$keyring]"
    # What may be installed on the machine: its own suites and the backports.
    { machine_archives | sed "s|^\(.*\) \(.*\)$|$signed \2 \1 main|"
      echo "$signed $mirror bookworm-backports main"; } | sort -u >"$APT_DIR/machine.list.new"
    # What may be downloaded and unpacked.
    { cat "$APT_DIR/machine.list.new"
      echo "$signed $mirror trixie main"
      echo "$signed $mirror sid main"; } >"$APT_DIR/sources.list.new"
    : >"$APT_DIR/status"
    cat >"$APT_DIR/apt.conf" <<CONF
Dir::State "$APT_DIR";
Dir::State::lists "$APT_DIR/lists";
Dir::State::status "$APT_DIR/status";
Dir::Cache "$APT_DIR";
Dir::Cache::archives "$APT_DIR/archives";
Dir::Etc::sourcelist "$APT_DIR/sources.list";
Dir::Etc::sourceparts "$APT_DIR/parts";
Dir::Etc::preferencesparts "$APT_DIR/parts";
Dir::Etc::preferences "$APT_DIR/preferences";
APT::Sandbox::User "root";
Acquire::Languages "none";
CONF
    if ! cmp -s "$APT_DIR/sources.list.new" "$APT_DIR/sources.list" ||
        [ -z "$(find "$APT_DIR/updated" -mmin -1440 2>/dev/null)" ]; then
        mv "$APT_DIR/machine.list.new" "$APT_DIR/machine.list"
        mv "$APT_DIR/sources.list.new" "$APT_DIR/sources.list"
        say "fetching package lists (private, in $APT_DIR)"
        if quietly apt-get -c "$APT_DIR/apt.conf" update; then
            touch "$APT_DIR/updated"
        elif [ ! -e "$APT_DIR/updated" ]; then
            die "the private package lists could not be fetched"
        fi
    fi
    rm -f "$APT_DIR"/*.list.new
}

private_apt_done() { exec {apt_lock}>&-; }

# unpacked SUITE NAME PACKAGE...: downloads the packages of SUITE and unpacks them together into
# $SEALPOD_CACHE/debs/NAME. Done already for the same list of packages: nothing happens.
unpacked() {
    local suite=$1 name=$2 dir
    shift 2
    dir=$SEALPOD_CACHE/debs/$name
    if [ "$(cat "$dir/.packages" 2>/dev/null)" = "$suite $*" ]; then return 0; fi
    private_apt_init
    # Another process may have done it meanwhile.
    if [ "$(cat "$dir/.packages" 2>/dev/null)" = "$suite $*" ]; then private_apt_done; return 0; fi
    say "unpacking $* ($suite)"
    rm -rf "$dir" "$dir.part"
    mkdir -p "$dir.part"
    (
        cd "$dir.part" || exit 1
        # A version of exactly this suite: `package/suite`.
        quietly apt-get -c "$APT_DIR/apt.conf" download "${@/%//$suite}" || exit 1
        for deb in ./*.deb; do dpkg -x "$deb" . || exit 1; done
        rm -f ./*.deb
    ) || die "packages of $suite could not be had: $*"
    echo "$suite $*" >"$dir.part/.packages"
    mv "$dir.part" "$dir"
    private_apt_done
}

# machine_packages PACKAGE...: installs what is missing, by the machine's own package manager.
# A package of bookworm-backports is written `name/bookworm-backports`; what it needs and the machine
# does not have comes from there too, where it is newer. The machine's sources are left as they are.
machine_packages() {
    local missing=() p suite
    local -A of_suite=()
    for p in "$@"; do
        dpkg-query -W -f '${db:Status-Abbrev}' "${p%%/*}" 2>/dev/null | grep -q '^ii' && continue
        missing+=("${p%%/*}")
        suite=${p#"${p%%/*}"}
        of_suite[${suite:-/}]+=" ${p%%/*}"
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || die "these packages are needed; install them as root: ${missing[*]}"
    private_apt_init
    say "installing ${missing[*]}"
    for suite in "${!of_suite[@]}"; do
        local from=()
        [ "$suite" = / ] || from=(-t "${suite#/}")
        # The private lists with the machine's own state of what is installed; nothing is started.
        # shellcheck disable=SC2086  # words
        DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 quietly apt-get -y --no-install-recommends \
            -o Dir::Etc::sourcelist="$APT_DIR/machine.list" -o Dir::Etc::sourceparts="$APT_DIR/parts" \
            -o Dir::State::lists="$APT_DIR/lists" "${from[@]}" install ${of_suite[$suite]} ||
            die "apt could not install:${of_suite[$suite]}"
    done
    private_apt_done
}
