"""Saving VMs, and processes of VMs, for later runs: with an image, or in the background, so that no run waits for it.

    python -I -m x07_sandbox.sessions.saving BACKEND IMAGE RAM_BYTES RUNTIME NETWORK

A run that finds no saved VM or process of its kind starts this process, unless it is running already. It saves both,
at low priority, and ends by itself. Each VM that it starts is a job, whose run is that VM alone: `x07 ps` shows it,
`x07 kill` ends it, and if this process is killed, the VM ends as that of a killed run does. What was saved stays, and
the next run starts the process again for the rest.

Before a process is saved, it runs the warm-up programs: what most programs do, since an emulated processor takes about
ten times longer for code that it executes for the first time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from x07_sandbox.backends.base import MachineKind, greet
from x07_sandbox.backends.registry import BackendRequest, create, select, this_platform
from x07_sandbox.channel.messages import CWD, FILES, FREE, Exec, Left
from x07_sandbox.errors import BackendError, HostError
from x07_sandbox.host import settings
from x07_sandbox.host.linux import spare_bytes
from x07_sandbox.host.paths import cache_dir, open_private_file
from x07_sandbox.host.processes import Identity, identify, is_alive, reap_later, start_in_background
from x07_sandbox.host.verdicts import Verdict
from x07_sandbox.host.waiting import Caller, Cancel, Notice, cancelled_by_signals
from x07_sandbox.images.store import Image, find_image
from x07_sandbox.images.verify import open_image
from x07_sandbox.policy.controls import run_limits
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.policy.guest import build_limits, command_limits, confinement, ram_class_bytes
from x07_sandbox.policy.outcomes import classify
from x07_sandbox.programs.toolchains import ARTIFACT
from x07_sandbox.sessions.request import in_memory
from x07_sandbox.sessions.session import Session
from x07_sandbox.sessions.specs import SessionSpec, opening, run_environment
from x07_sandbox.sessions.transfers import CommandStreams, Receivers, Sink, memory_file

if TYPE_CHECKING:
    from x07_sandbox.backends.base import Cloning, Instance, Needs

LOG: Final = "saving.log"
SAVER: Final = "saver"  # the kind of verdict that names the process
_NICE: Final = 10  # a tenth of the processor time of a run; with less, a VM may not boot in time


_INPUT: Final = b'hello\n"world"\n'
_WALL_MS: Final = 30_000
_PYTHON: Final = b"""#!/usr/bin/python3
import json
import sys
import time

for line in sys.stdin:
    print("warm", json.loads(json.dumps([line.strip()]))[0], time.time())
print(sys.argv[1:], file=sys.stderr)
"""
_BUILD: Final = (
    "printf '#include <stdio.h>\\nint main(void) { printf(\"%d\", 1); return 0; }' > w.c && gcc -O2 -o w w.c -lm && ./w"
)
_COMMANDS: Final = {
    "run": (["/bin/sh", "-c", "sort | head -n 1; date; exit 0"], ["/usr/bin/sort", "-n"], [ARTIFACT, "one"]),
    "build": (["/bin/sh", "-c", _BUILD],),
}


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


def prepare_clones(image: Image, progress: Callable[[str], None], *, for_pools: bool = False) -> None:
    """Save the VMs for builds and ordinary runs, if the default backend can clone VMs. Raises SandboxError.

    These are three kinds of VM, of the sizes that builds and the default limits need. A run with more memory than such
    a VM has (policy/guest) is of another kind, which is saved in the background once there is such a run
    (`save_later`). Saved processes are also made again every 12 hours, after a reboot or an update of criu or a
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


def warm_up(instance: Instance, kind: MachineKind, cloning: Cloning, cancel: Cancel) -> None:
    """Run the warm-up programs in an instance that has answered, without a relay. Then it waits as a clone of *kind*.

    Raises BackendError.
    """
    # An imported image may lack these programs. The agent's file server ends at once, since it gets no request.
    commands = ([],) if kind.has_program_root else _COMMANDS[kind.runtime]
    plain = replace(kind, network=False)
    for number, argv in enumerate(commands, 1):
        _run(instance, plain, argv, cancel)
        if number < len(commands):
            cloning.renew(instance, plain)
            greet(instance, cancel_fd=cancel.fd)
    cloning.renew(instance, kind)


def needs_of_programs(kind: MachineKind) -> Needs:
    """Return what the warm-up programs need of an instance of this kind."""
    with contextlib.ExitStack() as stack:
        return _spec(kind, [], stack).needs


def _run(instance: Instance, kind: MachineKind, argv: list[str], cancel: Cancel) -> None:
    with contextlib.ExitStack() as stack:
        spec = _spec(kind, argv, stack)
        out, err = (
            Sink(name, keep_fd=memory_file(b"", stack), live_fd=None, max_bytes=settings.MIB)
            for name in ("stdout", "stderr")
        )
        streams = CommandStreams(stdin_fd=memory_file(_INPUT if argv else b"", stack), stdout=out, stderr=err)
        session = Session(instance, cancel, spec.opening, spec.files)
        ending = classify(session.run(spec.order, streams, spec.wall_ms, spec.receivers).evidence)
    if ending.outcome != "ok":
        raise BackendError("cannot warm up a VM", f"{''.join(argv[:1])}: {ending.reason}", "Run x07 doctor")


def _spec(kind: MachineKind, argv: list[str], stack: contextlib.ExitStack) -> SessionSpec:
    """Return the description of a session like those of users' programs, which runs *argv*."""
    policy, running = default_policy(), kind.runtime == "run"
    limits = run_limits(policy).for_guest() if running else command_limits(build_limits(), settings.BUILD_TASKS)
    confine = confinement(policy, CWD) if running else FREE
    files = [in_memory(_PYTHON, ARTIFACT, 0o755, stack)]
    return SessionSpec(
        name="run" if running else "build",
        opening=opening(confine, limits, files, out_writable=not running),
        order=Exec(1, argv, run_environment(policy, {}, {}), CWD, limits, "" if argv else FILES),
        files=tuple(files),
        receivers=Receivers(left_wanted=Left(0, 0) if running else None),
        wall_ms=_WALL_MS,
        ram_bytes=ram_class_bytes(limits.mem_bytes),
    )


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
        assert backend.cloning is not None  # as in the process that started this one
        kind = MachineKind(image=opened, ram_bytes=int(ram_bytes), runtime=runtime, network=network == "1")
        why_not = backend.cloning.save(kind, Caller(cancel=cancel, progress=log), warm_up)
        log(why_not or "done")
    return int(bool(why_not))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
