# shellcheck shell=bash
# Functions to make a Debian root and to run commands in it, shared by fresh_root_check.sh and nested_kvm_check.sh, which
# source this file after lib.sh from the project's folder. They set `work` (a new folder, removed at the end), `fresh`
# (the new root in it) and `environment` (the environment of commands in it).

# new_work_folder: make `work` and remove it when the script ends. Needs root.
new_work_folder() {
    [[ $EUID -eq 0 ]] || fail "entering another root needs root" "Run: sudo $0"
    command -v mmdebstrap >/dev/null || fail "mmdebstrap is missing" "Run: scripts/setup.sh"
    work=$(mktemp -d "${TMPDIR:-/var/tmp}/x07-fresh-root.XXXXXXXX")
    fresh=$work/root
    # The mounts are in their own namespace and end with it. --one-file-system protects a mount that remains.
    trap 'rm -rf --one-file-system -- "$work"' EXIT
    chmod 0711 "$work"
}

# make_root INCLUDE PLACE [MMDEBSTRAP OPTION...]: make a minimal root with the packages INCLUDE, and copy this tree to the
# folder PLACE in it.
make_root() {
    local include=$1 place=$2 file name suite sources=() settings
    shift 2
    # The host's package sources, except local folders, which do not exist in the new root.
    shopt -s nullglob
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources}; do
        if grep -qs 'https\?://' "$file" && ! grep -qs '\(file\|copy\):' "$file"; then sources+=("$file"); fi
    done
    mapfile -t settings < <(apt-config dump | grep '^Acquire::\(http\|https\|Retries\|Check-\)' | sed 's/^/--aptopt=/')
    suite=$(. /etc/os-release && printf '%s' "$VERSION_CODENAME")

    step "Making a bare Debian root ($suite)"
    mmdebstrap --quiet --mode=root --variant=apt --include="$include" "${settings[@]}" "$@" \
        "$suite" "$fresh" "${sources[@]}"

    mkdir -p -- "$fresh$place"
    tar --create --exclude=./.venv --exclude=./.git --exclude='*_cache' --exclude=__pycache__ --exclude='*.egg-info' . |
        tar --extract --directory="$fresh$place" --no-same-owner

    # The host's package settings. They may hold credentials; the folder is removed at the end.
    rm -rf "$fresh"/etc/apt/sources.list "$fresh"/etc/apt/sources.list.d/*
    for file in "${sources[@]}" /etc/apt/{apt.conf,apt.conf.d,auth.conf,auth.conf.d,keyrings,trusted.gpg.d} \
        /etc/{pip.conf,xdg/pip,resolv.conf,hosts}; do
        [[ ! -e $file ]] || cp --archive --dereference --parents "$file" "$fresh"
    done
    # The host's certificates, under a name that ca-certificates does not overwrite, for networks with a CA of their own.
    environment=("LANG=C.UTF-8" "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" "HOME=/root")
    if [[ -r /etc/ssl/certs/ca-certificates.crt ]]; then
        mkdir -p "$fresh/etc/ssl/certs"
        cp --dereference /etc/ssl/certs/ca-certificates.crt "$fresh/etc/ssl/certs/"
        cp --dereference /etc/ssl/certs/ca-certificates.crt "$fresh/etc/host-certificates.crt"
        environment+=("PIP_CERT=/etc/host-certificates.crt")
    fi
    for name in CI TERM X07_TEST_FULL http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY "${!PIP_@}"; do
        [[ $name != PIP_CERT && $name != PIP_FIND_LINKS ]] || continue # set above, or a folder of the host
        if [[ -n ${!name:-} ]]; then environment+=("$name=${!name}"); fi
    done
}

# inside PLACE COMMAND...: run in the folder PLACE of the new root, with the host's devices. pivot_root instead of chroot,
# because the kernel refuses user namespaces in a chroot, and bubblewrap and mmdebstrap need them.
inside() {
    # shellcheck disable=SC2016 # the inner shell expands
    unshare --mount --pid --fork --kill-child --propagation private -- bash -euc '
        fresh=$1 place=$2
        shift 2
        mount --bind "$fresh" "$fresh"
        cd "$fresh"
        mount -t proc proc proc
        mount --rbind /dev dev
        mount --rbind /sys sys
        pivot_root . mnt
        cd "$place"
        umount -l /mnt
        exec "$@" </dev/null
    ' inside "$fresh" "$@"
}
