"""Running a program from Python: one call, one result."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from x07_sandbox.host import settings
from x07_sandbox.runs.lease import PoolMachines
from x07_sandbox.runs.request import RunRequest
from x07_sandbox.runs.run import run
from x07_sandbox.runs.streams import Cancel, memory_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from x07_sandbox.runs.result import Result


def run_program(
    program: str | os.PathLike[str],
    args: Sequence[str] = (),
    *,
    stdin: bytes = b"",
    policy: str | os.PathLike[str] | None = None,
    image: str | None = None,
    max_output_bytes: int = settings.OUTPUT_MAX_BYTES,
) -> Result:
    """Build and run *program* in throw-away virtual machines, and return how it ended.

    program: path of a source file. args: its arguments. stdin: its whole input.
    policy: path of a policy document; None for the built-in `default`. image: name or digest of a guest image.
    A warm machine is taken where `x07 pool` keeps some.
    Every ending is a result, refusals and wrong usage included: look at `outcome` and `reason`.
    """
    with contextlib.ExitStack() as stack:
        cancel = Cancel()
        stack.callback(cancel.close)
        return run(
            RunRequest(
                program=Path(program),
                args=tuple(args),
                policy=None if policy is None else Path(policy),
                image=image,
                stdin_fd=memory_file(stdin, stack),
                max_output_bytes=max_output_bytes,
                machines=PoolMachines(),
                cancel=cancel,
            )
        )
