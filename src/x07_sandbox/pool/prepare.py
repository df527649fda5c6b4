"""Save VMs in advance, so that the first runs need not save them."""

import contextlib
from collections.abc import Callable

from x07_sandbox.backends.base import MachineKind
from x07_sandbox.backends.registry import create
from x07_sandbox.backends.selection import BackendRequest, select, this_platform
from x07_sandbox.host import settings
from x07_sandbox.host.cancel import Caller, Cancel
from x07_sandbox.images.store import Image
from x07_sandbox.images.verify import open_image
from x07_sandbox.plan.sizes import ram_class_bytes
from x07_sandbox.policy import default_policy
from x07_sandbox.runs.warm_up import warm_up


def prepare_clones(image: Image, progress: Callable[[str], None]) -> None:
    """Save the VMs for builds and ordinary runs, if the default backend can clone VMs. Raises SandboxError."""
    backend = create(select(this_platform(), BackendRequest()).backend)
    if backend.cloning is None:
        return
    build_ram = ram_class_bytes(settings.BUILD_MEM_BYTES)
    run_ram = ram_class_bytes(default_policy().limits.mem_bytes)
    with open_image(image) as opened, contextlib.closing(Cancel()) as cancel:
        backend.probe(opened)
        for kind in (
            MachineKind(image=opened, ram_bytes=build_ram, runtime="build"),
            MachineKind(image=opened, ram_bytes=run_ram),
            MachineKind(image=opened, ram_bytes=run_ram, network=True),
        ):
            backend.cloning.prepare(kind, Caller(cancel=cancel, progress=progress), warm_up)
