"""Warm-up programs: what most programs do, so that an emulated processor has met it.

An emulator takes about ten times longer for code that it executes for the first time.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from x07_sandbox.backends.handshake import greet
from x07_sandbox.channel.messages import Exec, Left
from x07_sandbox.errors import BackendError
from x07_sandbox.host import settings
from x07_sandbox.policy.controls import run_limits
from x07_sandbox.policy.default import default_policy
from x07_sandbox.policy.guest import UNCONFINED, build_limits, command_limits, confinement, ram_class_bytes
from x07_sandbox.policy.outcomes import classify
from x07_sandbox.programs.toolchains import ARTIFACT
from x07_sandbox.sessions.execution import FILES
from x07_sandbox.sessions.request import in_memory
from x07_sandbox.sessions.session import Session
from x07_sandbox.sessions.specs import CWD, SessionSpec, opening, run_environment
from x07_sandbox.sessions.transfers import CommandStreams, Receivers, Sink, memory_file

if TYPE_CHECKING:
    from x07_sandbox.backends.base import Cloning, Instance, MachineKind, Needs
    from x07_sandbox.host.waiting import Cancel

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
    confine = confinement(policy, CWD) if running else UNCONFINED
    files = [in_memory(_PYTHON, ARTIFACT, 0o755, stack)]
    return SessionSpec(
        name="run" if running else "build",
        opening=opening(confine, limits, files, out_writable=not running),
        order=Exec(1, argv, run_environment(policy, {}, {}), CWD, limits, "" if argv else FILES),
        files=tuple(files),
        receivers=Receivers(left_wanted=Left(0, 0) if running else None),
        wall_ms=_WALL_MS,
        ram_bytes=ram_class_bytes(limits.mem_bytes),
        filters=confine.filters,
    )
