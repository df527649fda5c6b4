"""The hooks of a toolchain whose programs need more than bytes and arguments."""

from __future__ import annotations

import typing
from collections.abc import Mapping

import msgspec


class BuildExtras(msgspec.Struct, frozen=True, kw_only=True):
    """What the compiler gets besides the source.

    files: contents by path in the build VM. env: more variables. key: the parts that make a different artifact.
    """

    files: Mapping[str, bytes]
    env: Mapping[str, str]
    key: tuple[bytes, ...]


class Protocol(typing.Protocol):
    """The conventions between a run, a compiler and its programs."""

    @property
    def input_max_bytes(self) -> int:
        """The limit for the input, which is read whole before the run."""

    @property
    def usage_exit(self) -> int:
        """The exit code of a command for a usage error."""

    def require_policy(self, *, given: bool) -> None:
        """Raise UsageError if such a program needs an explicit policy. given: whether there is one."""

    def build_extras(self, policy: bytes) -> BuildExtras:
        """Return what goes into the build VM. policy: the document of the run."""

    def run_files(self, data: bytes) -> Mapping[str, bytes]:
        """Return contents by path in the run VM. data: the whole input."""

    def frame_input(self, data: bytes) -> bytes:
        """Return the input in the form for standard input."""

    def output_caps(self, most: int) -> tuple[int, int]:
        """Return limits for standard output, if the program's output is limited to *most*, and for standard error."""
