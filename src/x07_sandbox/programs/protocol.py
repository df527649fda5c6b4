"""What a run has to know of programs that are not simply given bytes and arguments: the hooks of a toolchain."""

from __future__ import annotations

import typing
from collections.abc import Mapping

import msgspec


class BuildExtras(msgspec.Struct, frozen=True, kw_only=True):
    """What the compiler gets besides the source.

    files: contents by path in the build VM. env: more variables. key: what of it makes another artifact.
    """

    files: Mapping[str, bytes]
    env: Mapping[str, str]
    key: tuple[bytes, ...]


class Protocol(typing.Protocol):
    """The conventions between a run, a compiler and the programs that it makes."""

    @property
    def input_max_bytes(self) -> int:
        """The longest input, which is read whole before the run."""

    @property
    def usage_exit(self) -> int:
        """The exit code of a command that cannot do what it was told for such a program."""

    def require_policy(self, *, given: bool) -> None:
        """Raise UsageError if such a program needs a policy that somebody named. given: whether somebody did."""

    def build_extras(self, policy: bytes) -> BuildExtras:
        """What goes into the build VM; *policy*: the document of the run."""

    def run_files(self, data: bytes) -> Mapping[str, bytes]:
        """Contents by path in the run VM; *data*: the whole input."""

    def frame_input(self, data: bytes) -> bytes:
        """The input as it goes to standard input."""

    def output_caps(self, most: int) -> tuple[int, int]:
        """The most bytes of standard output, where the program's output may have *most*, and of standard error."""
