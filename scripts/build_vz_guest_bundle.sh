#!/bin/bash -p
# Make a guest bundle for the vz backend from an image that `x07 image build` has made (docs/backends/vz.md).
#   scripts/build_vz_guest_bundle.sh --image NAME|DIGEST --out DIR [--kernel FILE]
# --kernel: the kernel to start, from Debian's package. Images for x86_64 need it. The last line of the output is:
# ok: built DIR. On the Mac, set X07_VM_VZ_GUEST_BUNDLE=DIR.
set -euo pipefail
unset CDPATH

root=$(cd -- "$(/usr/bin/dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"

usage() {
    printf 'usage: %s --image NAME|DIGEST --out DIR [--kernel FILE]\n' "${0##*/}" >&2
    exit 2
}

image='' out='' kernel=''
while [[ $# -gt 0 ]]; do
    [[ $# -ge 2 ]] || usage
    case $1 in
        --image) image=$2 ;;
        --out) out=$2 ;;
        --kernel) kernel=$2 ;;
        *) usage ;;
    esac
    shift 2
done
[[ -n $image && -n $out ]] || usage
[[ -x $root/.venv/bin/python ]] || fail "x07-sandbox is not installed in $root/.venv" "Run: scripts/setup.sh"

"$root/.venv/bin/python" -I -c '
import sys
from pathlib import Path

from x07_sandbox.errors import SandboxError
from x07_sandbox.images.store import find_image
from x07_sandbox.images.vz_bundle import make_bundle

image, out, kernel = sys.argv[1:]
try:
    bundle = make_bundle(find_image(image), Path(out).absolute(), Path(kernel) if kernel else None)
except (SandboxError, OSError) as exc:
    sys.exit(f"build_vz_guest_bundle.sh: {exc}")
print(f"{bundle.image}, kernel {bundle.kernel_release}, for Macs with {bundle.arch}")
' "$image" "$out" "$kernel"
printf 'ok: built %s\n' "$out"
