"""What a run is asked to do, and reading what it names: each once, so that what is digested is what is used."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from x07_sandbox.backends.base import Machines
from x07_sandbox.errors import UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.paths import read_bounded
from x07_sandbox.policy import decode_policy, default_policy, render_policy
from x07_sandbox.policy.decode import MAX_BYTES
from x07_sandbox.programs.toolchains import SOURCE_FOLDER, source_name
from x07_sandbox.runs.streams import Cancel, InFile, OutFile, memory_file

if TYPE_CHECKING:
    import contextlib

    from x07_sandbox.policy import Policy

# Linux refuses one longer argument (MAX_ARG_STRLEN: 32 pages, NUL included); all of them share a quarter of the stack's
# 8 MiB with the environment, which may take some hundred KiB.
_ARGUMENT_MAX_BYTES = 131_072
_ARGUMENTS_MAX_BYTES = 1 << 20


class RunRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for.

    policy: path of a policy document; None for the built-in default.
    stdin_fd: the program's input, lent; None for none. live_*: where output is streamed as it comes, or None.
    artifact: where the built program goes, lent; one that is complete was built before, and is run without a build.
    cold: boot machines anew instead of cloning saved ones. cache: use and keep what was built from the same source.
    queue_s: how long each machine may wait for others to end. machines: warm ones that wait, or None.
    progress: told of what takes seconds besides the program; of nothing, "", when that is over.
    """

    program: Path
    args: tuple[str, ...] = ()
    policy: Path | None = None
    image: str | None = None
    stdin_fd: int | None = None
    live_stdout: int | None = None
    live_stderr: int | None = None
    max_output_bytes: int = settings.OUTPUT_MAX_BYTES
    artifact: OutFile | None = None
    cold: bool = False
    cache: bool = True
    queue_s: float = settings.QUEUE_S
    machines: Machines | None = None
    progress: Callable[[str], None] = lambda _text: None
    cancel: Cancel


def check_arguments(request: RunRequest) -> None:
    """Refuse what no program could be started with (execve(2)), before anything is built. Raises UsageError."""
    what = f"cannot run {request.program} with these arguments"
    total = 0
    for number, arg in enumerate(request.args, start=1):
        if not isinstance(arg, str):
            raise UsageError(what, f"number {number} is no text", "Give texts")
        size = len(os.fsencode(arg)) + 1
        total += size
        if "\0" in arg:
            raise UsageError(what, f"number {number} holds a zero byte", "Pass such data by standard input")
        if size > _ARGUMENT_MAX_BYTES or total > _ARGUMENTS_MAX_BYTES:
            why = f"one has more than {_ARGUMENT_MAX_BYTES} bytes, or all together more than {_ARGUMENTS_MAX_BYTES}"
            raise UsageError(what, why, "Pass long data by standard input")
    if request.max_output_bytes < 0:
        raise UsageError(what, f"the output limit of {request.max_output_bytes} bytes is negative", "Give 0 or more")


def read_policy(path: Path | None) -> tuple[Policy, bytes]:
    """The policy and its bytes; the built-in default if None. Raises UsageError, PolicyError."""
    if path is None:
        policy = default_policy()
        return policy, render_policy(policy)
    data = read_bounded(path, "policy", MAX_BYTES)
    return decode_policy(data, source=str(path)), data


def read_source(path: Path, stack: contextlib.ExitStack) -> tuple[InFile, str]:
    """The program's source as it is now, and its digest. Raises UsageError."""
    name = source_name(str(path))
    data = read_bounded(path, "program", settings.SOURCE_MAX_BYTES)
    return in_memory(data, f"{SOURCE_FOLDER}/{name}", 0o644, stack), sha256_text(data)


def in_memory(data: bytes, path: str, mode: int, stack: contextlib.ExitStack) -> InFile:
    """A file for the guest that holds *data*; *stack* closes it."""
    return InFile(path=path, mode=mode, kind="file", fd=memory_file(data, stack), size=len(data))


def sha256_text(data: bytes) -> str:
    """A digest as results show it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
