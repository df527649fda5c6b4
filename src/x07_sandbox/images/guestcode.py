"""Which of our own files go into the guest, and the digest that says whether an image still has them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from x07_sandbox.images import manifest

BOOT_RECIPE = 2  # bump when boot.py makes something else of the same files
INIT = "guest/boot/init.c"
PACK = "guest/boot/pack.py"
FILTERS = "guest/boot/filters.py"
PLACES = "guest/boot/places.py"


class GuestCode(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of the files, so that digest and content belong together. Both by path below the package.

    agent: all Python code that the guest runs. tools: what the built root's compiler and interpreter work with.
    """

    agent: dict[str, bytes]
    tools: dict[str, bytes]

    @property
    def digest(self) -> str:
        """What manifest.guest_code says of an image with this code."""
        files = {name: hashlib.sha256(data).hexdigest() for name, data in (self.agent | self.tools).items()}
        return hashlib.sha256(manifest.canonical([BOOT_RECIPE, files])).hexdigest()


def read_guest_code(root: Path | None = None) -> GuestCode:
    """The files of this installation. root: the package's folder.

    The package's own __init__ is empty in the guest: the host's exports the library, which the guest has not.
    """
    root = root or Path(__file__).parents[1]
    paths = [root / "errors.py", *root.glob("channel/**/*.py"), *root.glob("guest/**/*.py")]
    boot = root / "guest" / "boot"
    agent = {
        path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(paths) if not path.is_relative_to(boot)
    }
    return GuestCode(
        agent={"__init__.py": b""} | agent,
        tools={name: (root / name).read_bytes() for name in (INIT, PACK, FILTERS, PLACES)},
    )
