"""Save VMs in advance, so that the first runs need not save them."""

import contextlib
from collections.abc import Callable

from x07_sandbox.backends.base import MachineKind
from x07_sandbox.backends.registry import BackendRequest, create, select, this_platform
from x07_sandbox.host import settings
from x07_sandbox.host.waiting import Caller, Cancel
from x07_sandbox.images.store import Image
from x07_sandbox.images.verify import open_image
from x07_sandbox.policy.default import default_policy
from x07_sandbox.policy.guest import ram_class_bytes
from x07_sandbox.sessions.warm_up import warm_up


def prepare_clones(image: Image, progress: Callable[[str], None], *, for_pools: bool = False) -> None:
    """Save the VMs for builds and ordinary runs, if the default backend can clone VMs. Raises SandboxError.

    These are three kinds of VM, of the sizes that builds and the default limits need. A run with more memory than such
    a VM has (policy/guest) is of another kind, which is saved in the background once there is such a run
    (sessions/saving). Saved processes are also made again every 12 hours, after a reboot or an update of criu or a
    library, and for each user and set of resource limits (`hot_template`).
    for_pools: save only the kind that pools keep ready. A failure is then no error, since pools boot VMs instead.
    """
    backend = create(select(this_platform(), BackendRequest()).backend)
    if (cloning := backend.cloning) is None:
        return
    build_ram = ram_class_bytes(settings.BUILD_MEM_BYTES)
    run_ram = ram_class_bytes(default_policy().limits.mem_bytes)
    with open_image(image) as opened, contextlib.closing(Cancel()) as cancel:
        caller = Caller(cancel=cancel, progress=progress)
        backend.probe(opened)
        ordinary = MachineKind(image=opened, ram_bytes=run_ram)
        if for_pools:
            if why_not := cloning.save(ordinary, caller, warm_up):
                progress(f"programs start more slowly, since no VM was saved: {why_not}")
            return
        build = MachineKind(image=opened, ram_bytes=build_ram, runtime="build")
        for kind in (build, ordinary, MachineKind(image=opened, ram_bytes=run_ram, network=True)):
            cloning.prepare(kind, caller, warm_up)
