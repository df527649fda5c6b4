"""What programs with a protocol of their own need before they run: a policy, and the whole input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from x07_sandbox.errors import UsageError
from x07_sandbox.runs.streams import memory_file, read_all

if TYPE_CHECKING:
    import contextlib

    from x07_sandbox.programs.protocol import Protocol
    from x07_sandbox.runs.request import RunRequest


def need_policy(request: RunRequest, protocol: Protocol) -> None:
    """Raise UsageError if there is no policy and *protocol* needs one. Overrides go on from the built-in one."""
    protocol.require_policy(given=request.policy is not None or request.overrides is not None)


def with_framed_input(request: RunRequest, protocol: Protocol, stack: contextlib.ExitStack) -> RunRequest:
    """The request with its input as one frame, as such a program reads it. Raises UsageError."""
    with request.cancel.waiting():
        data = read_whole(request.stdin_fd, protocol.input_max_bytes)
    return replace(request, whole_input=data, stdin_fd=memory_file(protocol.frame_input(data), stack))


def read_whole(fd: int | None, most: int) -> bytes:
    """All of an input whose length has to be known. Raises UsageError."""
    try:
        data = b"" if fd is None else read_all(fd, most)
    except OSError as exc:
        raise UsageError("cannot read the input", exc.strerror or str(exc), "Name a file with --input") from exc
    if len(data) > most:
        raise UsageError("cannot read the input", f"it has more than {most} bytes", "Give less")
    return data
