# shellcheck shell=bash
# Functions shared by setup.sh, quickstart.sh, test.sh and others, which source this file from the project's folder.
# Everything is installed by name, with apt and pip. git is not needed.

# Nothing of the current folder is executed, wherever a script is called: bash -p ignores BASH_ENV and exported functions,
# Python gets -I, and PATH loses its empty and relative entries.
kept=''
IFS=: read -ra entries <<<"$PATH"
for entry in "${entries[@]}"; do if [[ $entry == /* ]]; then kept+=${kept:+:}$entry; fi; done
export PATH=$kept
unset kept entries entry

say() { printf '%s\n' "$*"; }
step() { printf '\n== %s\n' "$*"; }

# fail ERROR FIX...: print the error and the fixes, one per line, and exit.
fail() {
    printf '\n%s: %s\n' "${0##*/}" "$1" >&2
    shift
    printf '    %s\n' "$@" >&2
    exit 1
}

# usage_error OPTIONS: print the options of this script, and exit.
usage_error() {
    printf 'usage: %s %s\n' "${0##*/}" "$1" >&2
    exit 2
}

# read_options OPTIONS NAME... -- ARGUMENT...: set the variable NAME_A for each argument --name-a VALUE. Anything else is a
# usage error; OPTIONS is what it prints.
read_options() {
    local options=$1 names=' ' name
    shift
    while [[ $1 != -- ]]; do names+="$1 " && shift; done
    shift
    while [[ $# -gt 0 ]]; do
        name=${1#--} && name=${name//-/_}
        [[ $# -ge 2 && $1 == --* && $names == *" $name "* ]] || usage_error "$options"
        printf -v "$name" '%s' "$2"
        shift 2
    done
}

# ------------------------------------------------------------------------------------------------ Debian packages

qemu_package() {
    case $(uname -m) in
        x86_64) echo qemu-system-x86 ;;
        aarch64) echo qemu-system-arm ;;
        *) fail "the QEMU backend does not support $(uname -m)" "Use an x86_64 or aarch64 machine." ;;
    esac
}

# CONTRIBUTING.md says why each package is needed.
runtime_packages() {
    local qemu
    qemu=$(qemu_package) || return
    printf '%s\n' "$qemu" bubblewrap mmdebstrap erofs-utils e2fsprogs uidmap zstd util-linux perl-base \
        python3-venv ca-certificates
}

# Without them x07 works, but more slowly. Not every Debian-like system has them.
optional_packages() { [[ $(uname -m) != x86_64 ]] || echo criu; }

# For the tests only: tools to switch users, a compiler for the hostile QEMU stand-in, a linter, a file system without
# modes, network tools, container engines, and servers and proxies.
test_packages() { printf '%s\n' sudo passwd git gcc libc6-dev shellcheck bindfs iproute2 nftables redis-tools \
    podman crun runc conmon docker.io docker-cli runsc nginx apache2-bin squid tinyproxy-bin haproxy nodejs; }

# missing_packages NAME...: print those that are not installed.
missing_packages() {
    local name
    for name; do
        [[ $(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null) == installed ]] || printf '%s\n' "$name"
    done
}

# as_root COMMAND...: run as root, directly or with sudo, which may ask for a password if there is a terminal.
as_root() {
    if [[ $EUID -eq 0 ]]; then
        "$@"
    elif [[ -t 0 ]]; then
        sudo -- "$@"
    else
        sudo -n -- "$@"
    fi
}

# can_be_root: succeed if as_root can work. Asks for the password now, before any long work.
can_be_root() {
    [[ $EUID -eq 0 ]] && return
    command -v sudo >/dev/null || return
    if [[ -t 0 ]]; then sudo -v; else sudo -n true 2>/dev/null; fi
}

# this_user: print the user's name, or the uid if the passwd file has no entry, as in some containers.
this_user() {
    local name
    if name=$(id -un 2>/dev/null); then printf '%s\n' "$name"; else printf 'uid %s\n' "$EUID"; fi
}

install_packages() {
    local line="apt-get install --yes --no-install-recommends $*"
    can_be_root ||
        fail "Debian packages are missing and $(this_user) cannot install them: $*" \
            "Run this as root, then start ${0##*/} again:" "    apt-get update && $line"
    step "Installing Debian packages: $*"
    # If one of several sources fails, the installation below can still succeed.
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update --quiet </dev/null ||
        say "apt-get update failed in part (see above); continuing."
    # shellcheck disable=SC2086 # each word is an argument
    as_root env DEBIAN_FRONTEND=noninteractive $line --quiet -o Dpkg::Use-Pty=0 </dev/null ||
        fail "apt-get could not install the packages" "See its messages above; check the package sources and the network." \
            "The command was:" "    $line"
}

# install_optional NAME...: install those that are missing and can be installed.
install_optional() {
    local name
    if [[ -n $(missing_packages "$@") && -z $(compgen -G '/var/lib/apt/lists/*_Packages*') ]] && can_be_root; then
        as_root env DEBIAN_FRONTEND=noninteractive apt-get update --quiet </dev/null || true # it knows no package yet
    fi
    for name in $(missing_packages "$@"); do
        if apt-cache show "$name" >/dev/null 2>&1 && can_be_root; then
            step "Installing an optional Debian package: $name"
            as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$name" --quiet \
                -o Dpkg::Use-Pty=0 </dev/null && continue
        fi
        say "The optional Debian package $name is missing: without KVM, VMs start more slowly."
    done
}

# --------------------------------------------------------------------------------- sub-ids of an ordinary user

# has_subids FILE: succeed if FILE grants this user a range of 65536 ids, by name or by uid.
has_subids() {
    [[ -r $1 ]] && awk -F: -v name="$(this_user)" -v uid="$EUID" \
        '($1 == name || $1 == uid) && $3 >= 65536 { found = 1 } END { exit !found }' "$1"
}

# An ordinary user builds the image in a user namespace, which needs ids granted in /etc/subuid and /etc/subgid.
ensure_subids() {
    [[ $EUID -eq 0 ]] && return
    has_subids /etc/subuid && has_subids /etc/subgid && return
    id -un &>/dev/null ||
        fail "$(this_user) has no entry in the passwd file and therefore no sub-ids" \
            "Building the guest image needs them: run ${0##*/} as a named user or as root."
    local first line
    first=$(awk -F: 'BEGIN { free = 100000 } $2 + $3 > free { free = $2 + $3 } END { print free }' \
        /etc/subuid /etc/subgid 2>/dev/null || echo 100000)
    line="usermod --add-subuids $first-$((first + 65535)) --add-subgids $first-$((first + 65535)) $(id -un)"
    can_be_root ||
        fail "$(this_user) has no range of 65536 ids in /etc/subuid and /etc/subgid" \
            "Building the guest image needs one. Run this as root, then start ${0##*/} again:" "    $line"
    step "Granting sub-ids to $(this_user): $line"
    # shellcheck disable=SC2086 # each word is an argument
    as_root env PATH="/usr/sbin:/sbin:$PATH" $line ||
        fail "usermod failed" "See its message above."
}

# -------------------------------------------------------------------------------------------------------- Python

# python_works COMMAND: print major.minor if it is Python 3.11 or newer with venv and pip, which Debian packages
# separately.
python_works() {
    "$1" -I -c 'import ensurepip, sys, venv; assert sys.version_info >= (3, 11); print("%d.%d" % sys.version_info[:2])' \
        </dev/null 2>/dev/null
}

# choose_python: print the newest usable Python, or nothing.
choose_python() {
    local name found
    if [[ -n ${X07_PYTHON:-} ]]; then
        if ! { found=$(command -v -- "$X07_PYTHON") && python_works "$found" >/dev/null; }; then
            fail "X07_PYTHON=$X07_PYTHON is not Python 3.11 or newer with venv and ensurepip" \
                "Name another, or unset X07_PYTHON."
        fi
        printf '%s\n' "$found"
        return
    fi
    for name in python3.13 python3.12 python3.11; do
        # Try all on PATH: a version manager's shim may come first and not work.
        while IFS= read -r found; do
            if [[ $(python_works "$found") == "${name#python}" ]]; then
                printf '%s\n' "$found"
                return
            fi
        done < <(type -aP "$name")
    done
}

# wanted_stamp KIND PYTHON: print the stamp of an up-to-date .venv. It includes the path, because an editable install
# does not survive a move.
wanted_stamp() {
    local kind=$1 python=$2
    printf '%s %s\n' "$kind" "$(
        {
            "$python" -I -c 'import sys; print(sys.version)' &&
                pwd -P && cat "requirements/$kind.txt" pyproject.toml launchers/* \
                src/x07_sandbox/cli/x07_front_client.py
        } | sha256sum | cut -d ' ' -f 1
    )"
}

# venv_current KIND: succeed if .venv is up to date. A dev environment also serves as runtime.
venv_current() {
    local stamp=.venv/.x07-stamp version python=.venv/bin/python kind
    [[ -r $stamp && -x $python ]] && version=$(python_works "$python") || return
    if [[ -n ${X07_PYTHON:-} && $(python_works "$X07_PYTHON") != "$version" ]]; then return 1; fi
    for kind in "$1" dev; do
        [[ $(<"$stamp") == "$(wanted_stamp "$kind" "$python")" ]] && return
    done
    return 1
}

# make_venv KIND PYTHON: install requirements/KIND.txt and this project into .venv.
make_venv() {
    local kind=$1 python=$2 pip=(.venv/bin/python -I -m pip --disable-pip-version-check --no-input)
    rm -f .venv/.x07-stamp
    if [[ $(python_works .venv/bin/python) != "$(python_works "$python")" ]] || ! "${pip[@]}" --version &>/dev/null; then
        step "Making .venv with $python"
        "$python" -I -m venv --clear .venv </dev/null ||
            fail "$python could not make .venv" "See its message above, or set X07_PYTHON to another Python."
    fi
    step "Installing Python packages: requirements/$kind.txt"
    "${pip[@]}" install --quiet --require-hashes --only-binary :all: -r "requirements/$kind.txt" </dev/null ||
        fail "pip could not install requirements/$kind.txt" \
            "See its messages above; check the network and pip's settings, then start ${0##*/} again."
    # The build backend is among the packages above, so nothing more is downloaded.
    "${pip[@]}" install --quiet --no-index --no-deps --no-build-isolation --editable . </dev/null ||
        fail "pip could not install this project into .venv" "See its messages above."
    wanted_stamp "$kind" .venv/bin/python >.venv/.x07-stamp
}

# compile_modules PYTHON: compile all modules once. Users who may not write here would compile them with every command.
compile_modules() {
    "$1" -I -m compileall -q src </dev/null || say "Some modules could not be compiled; commands start more slowly."
}

# --------------------------------------------------------------------------------------------------------- set-up

# set_up KIND: install everything; KIND is runtime, or dev for the tests. Quick if everything is installed.
set_up() {
    local kind=$1 python='' names packages missing
    [[ -x /usr/bin/apt-get && -x /usr/bin/dpkg-query ]] ||
        fail "apt-get was not found: this is not a Debian-like system" "Use Debian 13, or a container or VM with it."
    # venv rejects ":", setuptools fails on "$", "{" and "}", and pip's generated commands break on the rest: the
    # environment would look ready but not work.
    if [[ $PWD == *[:\$\{\}\`\"$'\n']* ]]; then
        fail "the folder's path contains one of : \$ { } \` \" or a newline, which Python's tools do not support: $PWD" \
            "Move the project to another folder."
    fi
    names=$(runtime_packages)
    if [[ $kind == dev ]]; then names+=$'\n'$(test_packages); fi
    mapfile -t packages <<<"$names"
    mapfile -t missing < <(missing_packages "${packages[@]}")
    exec 9>.setup.lock || fail "cannot write in $PWD" "Work in a copy that belongs to this user."
    flock -n 9 || { say "Waiting for another set-up in this folder." && flock 9; }

    if [[ ${#missing[@]} -eq 0 ]]; then
        say "Debian packages: all ${#packages[@]} are installed."
    else
        say "Debian packages to install with apt: ${missing[*]}"
    fi
    if venv_current "$kind"; then
        say "Python packages: .venv is up to date ($(.venv/bin/python -V))."
        kind=''
    else
        say "Python packages to install with pip, into .venv only: requirements/$kind.txt" \
            "($(grep -c '^[a-z].*==' "requirements/$kind.txt") pinned by hash)"
    fi

    [[ ${#missing[@]} -eq 0 ]] || install_packages "${missing[@]}"
    # shellcheck disable=SC2046 # each word is a package
    install_optional $(optional_packages)
    ensure_subids
    if [[ -n $kind ]]; then
        python=$(choose_python)
        [[ -n $python ]] ||
            fail "no Python 3.11, 3.12 or 3.13 with venv and ensurepip was found on PATH" \
                "Install one (Debian: python3-venv), or set X07_PYTHON=/path/to/python3"
        make_venv "$kind" "$python"
    fi
    compile_modules .venv/bin/python
    exec 9>&-
}
