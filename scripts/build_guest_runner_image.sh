#!/bin/bash -p
# Build the guest runner image and load it into the container engines of this host (podman, docker).
#   scripts/build_guest_runner_image.sh [--image NAME] [--tag TAG] [--x07-toolchain DIR] [--archive FILE]
# By default, name and tag are those that the backends use. X07_VM_GUEST_IMAGE=NAME:TAG selects another image.
# --x07-toolchain: a folder with X07's Linux build (bin/x07-os-runner and what it needs), for X07 programs.
# --archive: also write FILE, for `ctr images import`. The last line of the output is: ok: built NAME:TAG
set -euo pipefail
unset CDPATH

root=$(cd -- "$(/usr/bin/dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"

image=ghcr.io/x07lang/x07-guest-runner tag='' x07_toolchain='' archive='' build=() load=()
read_options '[--image NAME] [--tag TAG] [--x07-toolchain DIR] [--archive FILE]' image tag x07_toolchain archive -- "$@"
if [[ -n $x07_toolchain ]]; then build=(--name x07 --x07-toolchain "$x07_toolchain") load=(--image x07); fi
if [[ -n $archive ]]; then load+=(--archive "$archive"); fi

set_up runtime
tag=${tag:-$(.venv/bin/python -I -c 'import x07_sandbox; print(x07_sandbox.__version__)')}
.venv/bin/x07 image build "${build[@]}"
.venv/bin/x07 image load --tag "$image:$tag" "${load[@]}"
printf 'ok: built %s\n' "$image:$tag"
