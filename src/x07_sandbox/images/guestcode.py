"""The files of x07-sandbox that go into the guest. Their digest shows whether an image is current."""

import hashlib
from pathlib import Path

import msgspec

from x07_sandbox.policy.default import canonical_json

BOOT_RECIPE = 2  # bump when boot.py changes its output
INIT = "guest/boot/init.c"
PACK = "guest/boot/pack.py"
FILTERS = "guest/boot/filters.py"
PLACES = "guest/boot/places.py"


class GuestCode(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of the guest's files, by path below the package."""

    agent: dict[str, bytes]  # Python code that runs in the guest
    tools: dict[str, bytes]  # files that only the second stage of an image build needs

    @property
    def digest(self) -> str:
        """The value of `guest_code` in the manifest of an image with this code."""
        files = {name: hashlib.sha256(data).hexdigest() for name, data in (self.agent | self.tools).items()}
        return hashlib.sha256(canonical_json([BOOT_RECIPE, files])).hexdigest()

    def write(self, folder: Path) -> None:
        """Write the tools to *folder*, and the agent's package to the folder `agent` in it."""
        files = self.tools | {f"agent/x07_sandbox/{name}": data for name, data in self.agent.items()}
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def read_guest_code(root: Path | None = None) -> GuestCode:
    """Read the guest's files below *root*, by default this package. The guest gets an empty __init__ of the package."""
    root = root or Path(__file__).parents[1]
    alone = [root / f"{name}.py" for name in ("errors", "kernel", "libseccomp")]
    paths = [*alone, *root.glob("channel/**/*.py"), *root.glob("guest/**/*.py")]
    boot = root / "guest" / "boot"
    agent = {
        path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(paths) if not path.is_relative_to(boot)
    }
    return GuestCode(
        agent={"__init__.py": b""} | agent,
        tools={name: (root / name).read_bytes() for name in (INIT, PACK, FILTERS, PLACES)},
    )
