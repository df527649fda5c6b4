# shellcheck shell=bash
# Shared by setup.sh, quickstart.sh, test.sh and fresh_root_check.sh; to be sourced, in the project's
# folder. Everything comes from apt and pip, by name; nothing is assumed about git or about the current folder.

say() { printf '%s\n' "$*"; }
step() { printf '\n== %s\n' "$*"; }

# fail WHAT FIX...: every further argument is a line of advice of its own.
fail() {
    printf '\n%s: %s\n' "${0##*/}" "$1" >&2
    shift
    printf '    %s\n' "$@" >&2
    exit 1
}

# ------------------------------------------------------------------------------------------------ Debian packages

qemu_package() {
    case $(uname -m) in
        x86_64) echo qemu-system-x86 ;;
        aarch64) echo qemu-system-arm ;;
        *) fail "there is no QEMU backend for $(uname -m) yet" "Use an x86_64 or aarch64 machine." ;;
    esac
}

# Why each one: docs/dependencies.md.
runtime_packages() {
    local qemu
    qemu=$(qemu_package) || return
    printf '%s\n' "$qemu" bubblewrap mmdebstrap erofs-utils e2fsprogs uidmap zstd util-linux perl-base \
        python3-venv ca-certificates
}

# Only the tests need these: an ordinary user to become, a compiler for the hostile stand-in for QEMU, a linter, a file
# system that keeps no modes, container engines.
test_packages() { printf '%s\n' sudo passwd git gcc libc6-dev shellcheck bindfs iproute2 nftables redis-tools \
    podman crun runc conmon docker.io docker-cli; }

# missing_packages NAME...: those that dpkg does not know as installed.
missing_packages() {
    local name
    for name; do
        [[ $(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null) == installed ]] || printf '%s\n' "$name"
    done
}

# as_root COMMAND...: directly, or by sudo, which may ask for a password where there is a terminal to ask on.
as_root() {
    if [[ $EUID -eq 0 ]]; then
        "$@"
    elif [[ -t 0 ]]; then
        sudo -- "$@"
    else
        sudo -n -- "$@"
    fi
}

# can_be_root: whether as_root can work at all; asks for the password, if one is needed, before any long work.
can_be_root() {
    [[ $EUID -eq 0 ]] && return
    command -v sudo >/dev/null || return
    if [[ -t 0 ]]; then sudo -v; else sudo -n true 2>/dev/null; fi
}

# this_user: a name, or a number where the passwd file has none for it, as in some containers.
this_user() {
    local name
    if name=$(id -un 2>/dev/null); then printf '%s\n' "$name"; else printf 'uid %s\n' "$EUID"; fi
}

install_packages() {
    local line="apt-get install --yes --no-install-recommends $*"
    can_be_root ||
        fail "these Debian packages are missing, and this user ($(this_user)) cannot install them: $*" \
            "Have root run this, then start ${0##*/} again:" "    apt-get update && $line"
    step "Installing Debian packages: $*"
    # One dead source among several does not matter as long as the packages can be had: the next step tells.
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update --quiet </dev/null ||
        say "apt-get update met errors (above); going on with what it got."
    # shellcheck disable=SC2086 # one word an argument is meant
    as_root env DEBIAN_FRONTEND=noninteractive $line --quiet -o Dpkg::Use-Pty=0 </dev/null ||
        fail "apt-get could not install them" "See its messages above; check the package sources and the network." \
            "The line was:" "    $line"
}

# --------------------------------------------------------------------------------- sub-ids of an ordinary user

# has_subids FILE: whether this user owns a range of 65536 in it, by name or by number.
has_subids() {
    [[ -r $1 ]] && awk -F: -v name="$(this_user)" -v uid="$EUID" \
        '($1 == name || $1 == uid) && $3 >= 65536 { found = 1 } END { exit !found }' "$1"
}

# The image is made in a user namespace when root does not make it; the kernel takes only ids granted here.
ensure_subids() {
    [[ $EUID -eq 0 ]] && return
    has_subids /etc/subuid && has_subids /etc/subgid && return
    id -un &>/dev/null ||
        fail "$(this_user) has no entry in the passwd file, and so no sub-ids" \
            "Building the guest image needs some: start ${0##*/} as a user who has a name, or as root."
    local first line
    first=$(awk -F: 'BEGIN { free = 100000 } $2 + $3 > free { free = $2 + $3 } END { print free }' \
        /etc/subuid /etc/subgid 2>/dev/null || echo 100000)
    line="usermod --add-subuids $first-$((first + 65535)) --add-subgids $first-$((first + 65535)) $(id -un)"
    can_be_root ||
        fail "this user ($(this_user)) has no range of 65536 in /etc/subuid and /etc/subgid" \
            "Building the guest image needs one. Have root run this, then start ${0##*/} again:" "    $line"
    step "Granting this user a range of sub-ids: $line"
    # shellcheck disable=SC2086 # one word an argument is meant
    as_root env PATH="/usr/sbin:/sbin:$PATH" $line ||
        fail "usermod failed" "See its message above."
}

# -------------------------------------------------------------------------------------------------------- Python

# python_works COMMAND: Python 3.11 or newer that can make an environment with pip in it (Debian ships venv apart).
# Prints major.minor.
python_works() {
    "$1" -I -c 'import ensurepip, sys, venv; assert sys.version_info >= (3, 11); print("%d.%d" % sys.version_info[:2])' \
        </dev/null 2>/dev/null
}

# choose_python: prints the command to make .venv with, the newest first; nothing if there is none.
choose_python() {
    local name found
    if [[ -n ${X07_PYTHON:-} ]]; then
        if ! { found=$(command -v -- "$X07_PYTHON") && python_works "$found" >/dev/null; }; then
            fail "X07_PYTHON=$X07_PYTHON is no Python 3.11 or newer with venv and ensurepip" \
                "Name another one, or unset X07_PYTHON to have one chosen."
        fi
        printf '%s\n' "$found"
        return
    fi
    for name in python3.13 python3.12 python3.11; do
        # Every one on PATH: a version manager's stand-in may come first and not work.
        while IFS= read -r found; do
            if [[ $(python_works "$found") == "${name#python}" ]]; then
                printf '%s\n' "$found"
                return
            fi
        done < <(type -aP "$name")
    done
}

# wanted_stamp KIND PYTHON: what .venv/.x07-stamp holds when all is as the files and this place say. An editable
# install knows its folder by path, so a moved tree is installed again.
wanted_stamp() {
    local kind=$1 python=$2
    printf '%s %s\n' "$kind" "$(
        {
            "$python" -I -c 'import sys; print(sys.version)' &&
                pwd -P && cat "requirements/$kind.txt" pyproject.toml
        } | sha256sum | cut -d ' ' -f 1
    )"
}

# venv_current KIND: whether .venv needs nothing; what the tests have installed serves a user as well.
venv_current() {
    local stamp=.venv/.x07-stamp version python=.venv/bin/python kind
    [[ -r $stamp && -x $python ]] && version=$(python_works "$python") || return
    if [[ -n ${X07_PYTHON:-} && $(python_works "$X07_PYTHON") != "$version" ]]; then return 1; fi
    for kind in "$1" dev; do
        [[ $(<"$stamp") == "$(wanted_stamp "$kind" "$python")" ]] && return
    done
    return 1
}

# make_venv KIND PYTHON: .venv with requirements/KIND.txt and this project, from PYTHON.
make_venv() {
    local kind=$1 python=$2 pip=(.venv/bin/python -m pip --disable-pip-version-check --no-input)
    rm -f .venv/.x07-stamp
    if [[ $(python_works .venv/bin/python) != "$(python_works "$python")" ]] || ! "${pip[@]}" --version &>/dev/null; then
        step "Making .venv with $python"
        "$python" -m venv --clear .venv </dev/null ||
            fail "$python could not make .venv" "See its message above; X07_PYTHON=... names another Python."
    fi
    step "Installing Python packages: requirements/$kind.txt"
    "${pip[@]}" install --quiet --require-hashes --only-binary :all: -r "requirements/$kind.txt" </dev/null ||
        fail "pip could not install requirements/$kind.txt" \
            "See its messages above; check the network and pip's settings, then start ${0##*/} again."
    # The build backend is among the packages above, so that nothing more is fetched.
    "${pip[@]}" install --quiet --no-index --no-deps --no-build-isolation --editable . </dev/null ||
        fail "pip could not install this project into .venv" "See its messages above."
    wanted_stamp "$kind" .venv/bin/python >.venv/.x07-stamp
}

# compile_modules PYTHON: where PYTHONDONTWRITEBYTECODE is set, every command would compile this project's modules anew.
compile_modules() {
    "$1" -m compileall -q src </dev/null || say "Some modules could not be compiled: every start compiles them anew."
}

# --------------------------------------------------------------------------------------------------------- set-up

# set_up KIND: runtime for a user, dev for the tests. Says first what it will do; takes a moment when all is there.
set_up() {
    local kind=$1 python='' names packages missing
    [[ -x /usr/bin/apt-get && -x /usr/bin/dpkg-query ]] ||
        fail "this is not a Debian-like system: there is no apt-get" "Use Debian 13, or a container or VM of it."
    # venv refuses the first, setuptools fails with the next three, and in the commands that pip writes a shell reads the
    # rest. What pip leaves then looks ready, and is not.
    if [[ $PWD == *[:\$\{\}\`\"$'\n']* ]]; then
        fail "Python's tools cannot work in a folder whose name has one of : \$ { } \` \" or a line end: $PWD" \
            "Move it to a folder without."
    fi
    names=$(runtime_packages)
    if [[ $kind == dev ]]; then names+=$'\n'$(test_packages); fi
    mapfile -t packages <<<"$names"
    mapfile -t missing < <(missing_packages "${packages[@]}")
    exec 9>.setup.lock || fail "cannot write in $PWD" "Work in a copy that belongs to this user."
    flock -n 9 || { say "Waiting for another set-up of this folder." && flock 9; }

    if [[ ${#missing[@]} -eq 0 ]]; then
        say "Debian packages: all ${#packages[@]} are there."
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
    ensure_subids
    if [[ -n $kind ]]; then
        python=$(choose_python)
        [[ -n $python ]] ||
            fail "there is no Python 3.11, 3.12 or 3.13 with venv and ensurepip on PATH" \
                "Install one (Debian: python3-venv), or name it: X07_PYTHON=/path/to/python3 ${0##*/}"
        make_venv "$kind" "$python"
    fi
    compile_modules .venv/bin/python
    exec 9>&-
}
