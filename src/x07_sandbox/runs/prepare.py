"""Making beforehand what the first run would have to make: a saved machine for each phase."""

from __future__ import annotations

from typing import TYPE_CHECKING

from x07_sandbox.backends.base import MachineKind
from x07_sandbox.backends.qemu.backend import QemuBackend
from x07_sandbox.host import settings
from x07_sandbox.images.verify import open_image
from x07_sandbox.plan.sizes import ram_class_bytes
from x07_sandbox.policy import default_policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox.images.store import Image


def prepare_templates(image: Image, progress: Callable[[str], None]) -> None:
    """The VM templates for builds and for runs under the default policy. Raises SandboxError."""
    backend = QemuBackend(progress)
    sizes = {"build": settings.BUILD_MEM_BYTES, "run": default_policy().limits.mem_bytes}
    with open_image(image) as opened:
        backend.probe(opened)
        for runtime, mem_bytes in sizes.items():
            backend.prepare(MachineKind(image=opened, ram_bytes=ram_class_bytes(mem_bytes), runtime=runtime))
