"""Saving VMs for later runs, in a background process, so that no run waits for it.

    python -I -m x07_sandbox.sessions.saving BACKEND IMAGE RAM_BYTES RUNTIME NETWORK

A run that finds no saved VM or process of its kind starts this process, unless it is running already. It saves both,
at low priority, and ends by itself. Each VM that it starts is a job, whose run is that VM alone: `x07 ps` shows it,
`x07 kill` ends it, and if this process is killed, the VM ends as that of a killed run does. What was saved stays, and
the next run starts the process again for the rest.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Final

from x07_sandbox.backends.base import MachineKind
from x07_sandbox.backends.registry import create
from x07_sandbox.errors import HostError
from x07_sandbox.host import settings
from x07_sandbox.host.linux import spare_bytes
from x07_sandbox.host.paths import cache_dir, open_private_file
from x07_sandbox.host.processes import Identity, identify, is_alive, reap_later, start_in_background
from x07_sandbox.host.verdicts import Verdict
from x07_sandbox.host.waiting import Caller, Notice, cancelled_by_signals
from x07_sandbox.images.store import find_image
from x07_sandbox.images.verify import open_image
from x07_sandbox.sessions.warm_up import warm_up

LOG: Final = "saving.log"
SAVER: Final = "saver"  # the kind of verdict that names the process
_NICE: Final = 10  # a tenth of the processor time of a run; with less, a VM may not boot in time


def save_later(backend: str, kind: MachineKind, progress: Callable[[str], None]) -> str:
    """Have a VM and a process of this kind saved by a process in the background. Return a remark about it."""
    words = backend, kind.image_digest, str(kind.ram_bytes), kind.runtime, str(int(kind.network))
    try:
        verdict = Verdict(SAVER, *words)
        stored = verdict.read()
        if "pid" in stored and is_alive(Identity(pid=stored["pid"], start_ticks=stored["start_ticks"])):
            return f"process {stored['pid']} is saving one"
        if (spare := spare_bytes()) < settings.SAVING_BYTES:
            needed = settings.SAVING_BYTES >> 20
            return f"none is saved now, because only {spare >> 20} MiB of memory are free, and {needed} MiB are needed"
        log = open_private_file(cache_dir() / LOG, os.O_WRONLY | os.O_APPEND | os.O_TRUNC)
        with os.fdopen(log, "wb") as errors:
            child = start_in_background("x07_sandbox.sessions.saving", *words, errors=errors, cwd="/")
        reap_later(child)
        if (saver := identify(child.pid)) is not None:
            verdict.write({"pid": saver.pid, "start_ticks": saver.start_ticks})
    except (HostError, OSError) as exc:  # no reason for the run to fail
        return f"none can be saved in the background: {exc}"
    progress(Notice(f"process {child.pid} saves a VM for later runs in the background"))
    return f"process {child.pid} saves one in the background"


def main(words: list[str]) -> int:
    """Save what is missing, and return the exit status of the process."""
    name, image, ram_bytes, runtime, network = words
    log = partial(print, file=sys.stderr)
    os.nice(_NICE)
    with cancelled_by_signals() as cancel, contextlib.ExitStack() as stack:
        signal.signal(signal.SIGALRM, lambda number, _frame: cancel.interrupt(number))
        signal.alarm(settings.SAVING_S)
        opened = stack.enter_context(open_image(find_image(image)))
        backend = create(name)
        backend.probe(opened)
        assert backend.cloning is not None  # noqa: S101 - as in the process that started this one
        kind = MachineKind(image=opened, ram_bytes=int(ram_bytes), runtime=runtime, network=network == "1")
        why_not = backend.cloning.save(kind, Caller(cancel=cancel, progress=log), warm_up)
        log(why_not or "done")
    return int(bool(why_not))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
