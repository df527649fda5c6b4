"""Files of the image for confinement: seccomp filters (`guest/boot/filters`), and paths that are always readable."""

from __future__ import annotations

import itertools
import json
import struct
import sys
from typing import Any, Final

BASE: Final = "base"
QUIET: Final = "quiet"  # its refusals are not audited
ONCE: Final = "-once"  # suffix of a filter that allows one execve
_LINE: Final = struct.Struct("=HBBI")
_WORD: Final = 4
_MARKERS: Final = (0x5AFE7012, 0x5AFE7011, 0x5AFE7014, 0x5AFE7013, 0x5AFE7016, 0x5AFE7015)  # in the token's byte order


def filter_name(*, threads: bool, spawn: bool, execute: bool) -> str:
    """Return the name of the filter that forbids every argument that is False, or "" if all are True."""
    words = (not threads and "no-threads", not spawn and "no-spawn", not execute and "no-exec")
    return "-".join(word for word in words if word)


def all_filters() -> dict[str, bytes]:
    """Return every filter's BPF code by name. Raises OSError."""
    names = [BASE, QUIET]
    for threads, spawn, execute in itertools.product((False, True), repeat=3):
        if name := filter_name(threads=threads, spawn=spawn, execute=execute):
            names += [name] if execute else [name, f"{name}{ONCE}"]
    return {name: _data(f"{name}.bpf") for name in names}


def readable_places() -> list[str]:
    """Return the folders and files in the image that contain no program."""
    places: list[str] = json.loads(_data("places.json"))
    return places


def call_numbers() -> tuple[dict[str, int], dict[str, int]]:
    """Return system call numbers by name: first those of audited calls, then those of calls that filters refuse."""
    numbers = json.loads(_data("calls.json"))
    return numbers["audited"], numbers["refused"]


def split_at_token(code: bytes) -> tuple[list[bytes], list[int]]:
    """Split a filter at its markers. Return the pieces, and each marker's index in them. Raises ValueError."""
    values = [value for *_, value in _LINE.iter_unpack(code)]
    found = sorted((values.index(marker), number) for number, marker in enumerate(_MARKERS) if marker in values)
    if len(found) != len(_MARKERS) or sum(value in _MARKERS for value in values) != len(_MARKERS):
        raise ValueError("the filter does not contain each marker exactly once")
    pieces: list[bytes] = []
    done = 0
    places = [0] * len(_MARKERS)
    for line, number in found:
        end = (line + 1) * _LINE.size
        places[number] = len(pieces) + 1
        pieces += [code[done : end - _WORD], code[end - _WORD : end]]
        done = end
    return [*pieces, code[done:]], places


def with_token(pieces: list[bytes], places: list[int], token: bytes) -> bytes:
    """Join the pieces of a filter, with the words of *token* in place of its markers."""
    made = list(pieces)
    for number, place in enumerate(places):
        made[place] = token[number * _WORD : (number + 1) * _WORD]
    return b"".join(made)


def _data(name: str) -> bytes:
    loader: Any = sys.modules["x07_sandbox"].__spec__.loader  # type: ignore[union-attr] # the agent's zip
    data: bytes = loader.get_data(f"{loader.archive}/data/{name}")
    return data
