#!/bin/bash -p
# Test the installation on a fresh system: make a minimal Debian root (essential packages and apt), and run the quick
# start in it twice, from a copy of this tree in a folder with a space in its name.
#   scripts/fresh_root_check.sh [--user] [-- COMMAND...]
# --user: run as an ordinary user with sudo, instead of root. COMMAND: run this command once instead of the quick start,
# such as scripts/test.sh; it starts in the project's folder. Needs root, and about 3 GB in ${TMPDIR:-/var/tmp}.
set -euo pipefail
unset CDPATH # cd would print where it went

root=$(cd -- "$(/usr/bin/dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"

user=root
include=mount # every Debian system has it, but it is not an essential package
command=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --user) user=tester include+=,sudo,passwd ;;
        --) shift && command=("$@") && break ;;
        *) fail "unknown argument: $1" "Usage: scripts/fresh_root_check.sh [--user] [-- COMMAND...]" ;;
    esac
    shift
done
[[ $EUID -eq 0 ]] || fail "entering another root needs root" "Run: sudo $0"
command -v mmdebstrap >/dev/null || fail "mmdebstrap is missing" "Run: scripts/setup.sh"

work=$(mktemp -d "${TMPDIR:-/var/tmp}/x07-fresh-root.XXXXXXXX")
# The mounts are in their own namespace and end with it. --one-file-system protects a mount that remains.
trap 'rm -rf --one-file-system -- "$work"' EXIT
chmod 0711 "$work"
fresh=$work/root
place="/opt/a copy/x07-sandbox"

# The host's package sources, except local folders, which do not exist in the new root.
shopt -s nullglob
sources=()
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources}; do
    if grep -qs 'https\?://' "$file" && ! grep -qs '\(file\|copy\):' "$file"; then sources+=("$file"); fi
done
mapfile -t settings < <(apt-config dump | grep '^Acquire::\(http\|https\|Retries\|Check-\)' | sed 's/^/--aptopt=/')
suite=$(. /etc/os-release && printf '%s' "$VERSION_CODENAME")

step "Making a bare Debian root ($suite)"
mmdebstrap --quiet --mode=root --variant=apt --include="$include" "${settings[@]}" "$suite" "$fresh" "${sources[@]}"

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

enter=(env -i "${environment[@]}")
if [[ $user != root ]]; then
    chroot "$fresh" useradd --create-home "$user"
    echo "$user ALL=(ALL) NOPASSWD: ALL" >"$fresh/etc/sudoers.d/$user"
    chown -R --reference="$fresh/home/$user" "$fresh$place"
    enter=(setpriv "--reuid=$user" "--regid=$user" --init-groups "${enter[@]}" "HOME=/home/$user")
fi

# inside COMMAND...: run in the new root with the host's devices. pivot_root instead of chroot, because the kernel
# refuses user namespaces in a chroot, and bubblewrap and mmdebstrap need them.
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
    ' inside "$fresh" "$place" "${enter[@]}" "$@"
}

if [[ ${#command[@]} -gt 0 ]]; then
    step "In the bare root, as $user: ${command[*]}"
    inside "${command[@]}"
else
    for time in first second; do
        step "In the bare root, as $user, the $time time: scripts/quickstart.sh"
        SECONDS=0
        inside scripts/quickstart.sh || fail "the quick start failed in a bare root, as $user" "See its messages above."
        say "The $time time took $SECONDS s."
    done
fi
