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
# shellcheck source=scripts/fresh_root.sh
source "$root/scripts/fresh_root.sh"

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
new_work_folder
place="/opt/a copy/x07-sandbox"
make_root "$include" "$place"

enter=(env -i "${environment[@]}")
if [[ $user != root ]]; then
    chroot "$fresh" useradd --create-home "$user"
    echo "$user ALL=(ALL) NOPASSWD: ALL" >"$fresh/etc/sudoers.d/$user"
    chown -R --reference="$fresh/home/$user" "$fresh$place"
    enter=(setpriv "--reuid=$user" "--regid=$user" --init-groups "${enter[@]}" "HOME=/home/$user")
fi

if [[ ${#command[@]} -gt 0 ]]; then
    step "In the bare root, as $user: ${command[*]}"
    inside "$place" "${enter[@]}" "${command[@]}"
else
    for time in first second; do
        step "In the bare root, as $user, the $time time: scripts/quickstart.sh"
        SECONDS=0
        inside "$place" "${enter[@]}" scripts/quickstart.sh || fail "the quick start failed in a bare root, as $user" "See its messages above."
        say "The $time time took $SECONDS s."
    done
fi
