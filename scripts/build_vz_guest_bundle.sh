#!/bin/bash -p
# Make a guest bundle for the vz backend from an image that `x07 image build` has made (docs/backends/vz.md).
#   scripts/build_vz_guest_bundle.sh --image NAME|DIGEST|NAME:TAG --out DIR [--kernel FILE]
# NAME:TAG: an image that build_guest_runner_image.sh has loaded into podman or docker.
# --kernel: the kernel to start, from Debian's package. Images for x86_64 need it. The last line of the output is:
# ok: built DIR. On the Mac, set X07_VM_VZ_GUEST_BUNDLE=DIR.
set -euo pipefail
unset CDPATH

root=$(cd -- "$(/usr/bin/dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"

usage='--image NAME|DIGEST|NAME:TAG --out DIR [--kernel FILE]' image='' out='' kernel=''
read_options "$usage" image out kernel -- "$@"
[[ -n $image && -n $out ]] || usage_error "$usage"
[[ -x $root/.venv/bin/python ]] || fail "x07-sandbox is not installed in $root/.venv" "Run: scripts/setup.sh"

"$root/.venv/bin/python" -I -c '
import sys
from contextlib import suppress
from pathlib import Path

from x07_sandbox.backends.engines import CLIENTS, engine
from x07_sandbox.errors import SandboxError
from x07_sandbox.images.store import decode_manifest, find_image, manifest_in
from x07_sandbox.images.vz_bundle import make_bundle

def of_engine(reference):  # the digest of the guest image in an image of an engine, else the reference itself
    for name in CLIENTS:
        with suppress(SandboxError):
            client = engine(name)
            for found in client.objects(client.call("image", "inspect", "--", reference)):
                if data := manifest_in((found.get("Config") or {}).get("Labels")):
                    return decode_manifest(data, reference).digest
    return reference

image, out, kernel = sys.argv[1:]
if ("/" in image or ":" in image) and not image.startswith("sha256:"):
    image = of_engine(image)
try:
    bundle = make_bundle(find_image(image), Path(out).absolute(), Path(kernel) if kernel else None)
except (SandboxError, OSError) as exc:
    sys.exit(f"build_vz_guest_bundle.sh: {exc}")
print(f"{bundle.image}, kernel {bundle.kernel_release}, for Macs with {bundle.arch}")
' "$image" "$out" "$kernel"
printf 'ok: built %s\n' "$out"
