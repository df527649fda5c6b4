"""A project's own policy and input, used if the request has none."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from msgspec.structs import replace

from x07_sandbox.policy.decode import MAX_BYTES
from x07_sandbox.runs.request import ProjectPolicy

if TYPE_CHECKING:
    import contextlib

    from x07_sandbox.host.project import ProjectFolder
    from x07_sandbox.runs.request import RunRequest


def with_project_files(
    request: RunRequest, folder: ProjectFolder, stack: contextlib.ExitStack, *, policy: str | None, stdin: str | None
) -> RunRequest:
    """Return the request with the project's policy and input added. Raises UsageError.

    policy, stdin: names of files, or None. Opening them checks that they are in *folder*. *stack* closes them.
    """
    if request.policy is None and policy is not None:
        data = folder.read(policy, f"its policy {policy}", MAX_BYTES)
        request = replace(request, policy=ProjectPolicy(folder.root / policy, data, folder.base))
    if request.stdin_default and request.input is None and stdin is not None:
        fd = folder.open(stdin, f"its input {stdin}")
        stack.callback(os.close, fd)
        request = replace(request, stdin_fd=fd)
    return request
