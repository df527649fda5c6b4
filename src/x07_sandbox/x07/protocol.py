"""X07's protocol: its compiler reads policy and input as files, its programs read one frame and write one.

A frame is a length of four bytes, little-endian, then exactly so many bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from x07_sandbox.errors import UsageError
from x07_sandbox.programs.protocol import BuildExtras
from x07_sandbox.programs.toolchains import SOURCE_FOLDER, Toolchain
from x07_sandbox.x07.project import WORLD

if TYPE_CHECKING:
    from x07_sandbox.programs.protocol import Protocol

WORKSPACE: Final = "/usr/local/lib/x07"
INPUT_MAX_BYTES: Final = 64 << 20
HEAD_BYTES: Final = 4  # of a frame: its length
STDERR_MAX_BYTES: Final = 256 << 10  # whatever the limit on a program's output
USAGE_EXIT: Final = 2
_POLICY: Final = f"{SOURCE_FOLDER}/policy.json"
_INPUT: Final = f"{SOURCE_FOLDER}/input.bin"


class X07Protocol:
    """As a run needs to know it (programs/protocol)."""

    input_max_bytes: Final = INPUT_MAX_BYTES
    usage_exit: Final = USAGE_EXIT

    def require_policy(self, *, given: bool) -> None:
        """Raises UsageError: X07's programs run under no policy of ours that nobody asked for."""
        if not given:
            why = f"{WORLD} runs nothing of X07's without one"
            raise UsageError("no policy", why, "Name it with --policy, or in the project's profile")

    def build_extras(self, policy: bytes) -> BuildExtras:
        """Its compiler reads the policy, and an input that the artifact does not depend on."""
        env = {"X07_WORKSPACE_ROOT": WORKSPACE}
        return BuildExtras(files={_POLICY: policy, _INPUT: b""}, env=env, key=(policy,))

    def run_files(self, data: bytes) -> Mapping[str, bytes]:
        """The whole input, also as a file."""
        return {_INPUT: data}

    def frame_input(self, data: bytes) -> bytes:
        """One frame."""
        return struct.pack("<I", len(data)) + data

    def output_caps(self, most: int) -> tuple[int, int]:
        """A program's output comes in a frame; its standard error has a fixed limit."""
        return most + HEAD_BYTES, STDERR_MAX_BYTES


PROTOCOL: Final[Protocol] = X07Protocol()
# Chosen by the kind of program only, never by name: it takes projects and policies of X07's own.
X07: Final = Toolchain(
    name="x07",
    suffixes=(),
    build=lambda source: list(source.args),
    needs=("x07",),
    protocol=PROTOCOL,
    doc="X07, by the toolchain that the image carries.",
)
# What it made before: nothing is compiled, and it reads and writes frames all the same.
X07_ARTIFACT: Final = replace(X07, build=None, needs=(), doc="An executable that X07 compiled before.")
