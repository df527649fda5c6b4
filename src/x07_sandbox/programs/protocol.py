"""The hooks of a toolchain whose programs need more than bytes and arguments."""

import typing
from collections.abc import Mapping

import msgspec


class BuildExtras(msgspec.Struct, frozen=True, kw_only=True):
    """Data that the compiler gets in addition to the source."""

    files: Mapping[str, bytes]  # contents by path in the build VM
    env: Mapping[str, str]  # additional environment variables
    key: tuple[bytes, ...]  # data that changes the artifact, for its cache key


class Protocol(typing.Protocol):
    """The conventions between a run, a compiler and its programs."""

    @property
    def input_max_bytes(self) -> int:
        """The size limit for the input. The whole input is read before the run."""

    @property
    def usage_exit(self) -> int:
        """The exit code of a command after a usage error."""

    def require_policy(self, *, given: bool) -> None:
        """Raise UsageError if programs of this protocol need an explicit policy and *given* is false."""

    def build_extras(self, policy: bytes) -> BuildExtras:
        """Return the data that the compiler gets. policy: the policy document of the run."""

    def run_files(self, data: bytes) -> Mapping[str, bytes]:
        """Return the files for the run VM: contents by path. data: the whole input."""

    def frame_input(self, data: bytes) -> bytes:
        """Return the input in the form that the program reads from standard input."""

    def output_caps(self, most: int) -> tuple[int, int]:
        """Return the limits for standard output and standard error. most: limit for the program's output in bytes."""
