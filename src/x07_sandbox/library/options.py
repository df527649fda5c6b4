"""The types of the keyword arguments of `run_program`, shared by all functions that accept them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from x07_sandbox.policy.model import Policy


class CommandOptions(TypedDict, total=False):
    """The keyword arguments that `run_program` and `exec_command` share, except args, input, read_only and check."""

    files: Mapping[str, str | bytes] | Mapping[Path, str | bytes] | None
    max_files_bytes: int
    policy: str | os.PathLike[str] | Policy | None
    env: Mapping[str, str] | None
    timeout_s: float | None
    memory: str | int | None
    cpu_s: float | None
    procs: int | None
    fds: int | None
    max_file_size: str | int | None
    build_timeout_s: float | None
    scale_limits: bool | None
    image: str | None
    ca: str | os.PathLike[str] | None
    max_output_bytes: int | None
    changes: Literal["apply", "all-or-nothing", "keep", "discard"]
    out: str | os.PathLike[str] | None
    allow_hosts: Sequence[str]
    deny_hosts: Sequence[str]
    read_roots: Sequence[str | os.PathLike[str]]
    write_roots: Sequence[str | os.PathLike[str]]
    allow_hidden: bool
    allow_symlinks: bool
    hide: Sequence[str]
    reveal: Sequence[str]
    guest_root: bool
    on_output: Callable[[Literal["stdout", "stderr"], bytes], object] | None


class RunOptions(CommandOptions, total=False):
    """All keyword arguments of `run_program` except program, args, input and check."""

    source: str | bytes | None
    toolchain: str | None
    command: Sequence[str | os.PathLike[str]]
    workdir: str | os.PathLike[str] | None
    read_only: bool
