"""The protocol of X07 programs. Their compiler reads the policy and the input from files.

A program reads one frame and writes one. A frame is a length of four bytes, little-endian, then the data.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from x07_sandbox.errors import Flag, UsageError
from x07_sandbox.programs.protocol import BuildExtras
from x07_sandbox.programs.toolchains import SOURCE_FOLDER, Toolchain
from x07_sandbox.x07.project import WORLD

if TYPE_CHECKING:
    from x07_sandbox.programs.protocol import Protocol

WORKSPACE: Final = "/usr/local/lib/x07"
INPUT_MAX_BYTES: Final = 64 << 20
HEAD_BYTES: Final = 4  # of a frame: its length
STDERR_MAX_BYTES: Final = 256 << 10  # independent of the output limit
USAGE_EXIT: Final = 2
_POLICY: Final = f"{SOURCE_FOLDER}/policy.json"
_INPUT: Final = f"{SOURCE_FOLDER}/input.bin"


class X07Protocol:
    """The protocol of X07 programs, as an implementation of `Protocol` in programs/protocol."""

    input_max_bytes: Final = INPUT_MAX_BYTES
    usage_exit: Final = USAGE_EXIT

    def require_policy(self, *, given: bool) -> None:
        """Raise UsageError unless a policy is given: X07 programs have no default policy."""
        if not given:
            why = f"X07 programs in {WORLD} require a policy"
            fix = ("Add ", Flag("--policy"), ", or set it in the project's profile")
            raise UsageError("no policy given", why, fix)

    def build_extras(self, policy: bytes) -> BuildExtras:
        """Return the files that the compiler reads: the policy, and an input that does not affect the artifact."""
        env = {"X07_WORKSPACE_ROOT": WORKSPACE}
        return BuildExtras(files={_POLICY: policy, _INPUT: b""}, env=env, key=(policy,))

    def run_files(self, data: bytes) -> Mapping[str, bytes]:
        """Return the files, by path, that a program reads in the run VM: one file with the whole input *data*."""
        return {_INPUT: data}

    def frame_input(self, data: bytes) -> bytes:
        """Return the data as one frame."""
        return struct.pack("<I", len(data)) + data

    def output_caps(self, most: int) -> tuple[int, int]:
        """Return the limits for standard output (*most* bytes after the frame's header) and for standard error."""
        return most + HEAD_BYTES, STDERR_MAX_BYTES


PROTOCOL: Final[Protocol] = X07Protocol()
# Selected only by the kind of program, not by --toolchain.
X07: Final = Toolchain(
    name="x07",
    suffixes=(),
    build=lambda source: list(source.args),
    needs=("x07",),
    protocol=PROTOCOL,
    doc="The X07 language, compiled by the X07 toolchain in the image.",
)
# An executable that X07's compiler made earlier. There is nothing to build, but the program reads and writes frames.
X07_ARTIFACT: Final = replace(X07, build=None, needs=(), doc="An executable that X07's compiler made earlier.")
