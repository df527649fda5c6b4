"""What the image brings for the confinement: seccomp filters as bytes, and what of it may always be read.

Both were made when it was built, by `guest/boot/filters.py` and `guest/boot/places.py`.
"""

from __future__ import annotations

import itertools
import json
import struct
import sys
from typing import Any, Final

BASE: Final = "base"
NO_EXEC: Final = "no-exec"
ONCE: Final = "-once"  # ends the name of a filter that lets one call pass
_LINE: Final = struct.Struct("=HBBI")
_MARKERS: Final = (0x5AFE7012, 0x5AFE7011, 0x5AFE7014, 0x5AFE7013, 0x5AFE7016, 0x5AFE7015)  # as the token's bytes come


def filter_name(*, threads: bool, spawn: bool, execute: bool) -> str:
    """The filter that forbids what is false; empty where nothing is forbidden."""
    words = (not threads and "no-threads", not spawn and "no-spawn", not execute and NO_EXEC)
    return "-".join(word for word in words if word)


def all_filters() -> dict[str, bytes]:
    """Every filter's bytes by its name: read beforehand, since a fresh clone would pay for it. Raises OSError."""
    names = [BASE]
    for threads, spawn, execute in itertools.product((False, True), repeat=3):
        if name := filter_name(threads=threads, spawn=spawn, execute=execute):
            names += [name] if execute else [name, f"{name}{ONCE}"]
    return {name: _data(f"{name}.bpf") for name in names}


def readable_places() -> list[str]:
    """Folders and files of the image without a program in them."""
    places: list[str] = json.loads(_data("places.json"))
    return places


def with_token(code: bytes, token: bytes) -> bytes:
    """The filter with the secret in place of its markers. Raises ValueError if that is not all of them, each once."""
    words = dict(zip(_MARKERS, struct.unpack("=6I", token), strict=True))
    lines = list(_LINE.iter_unpack(code))
    if sorted(value for *_, value in lines if value in words) != sorted(words):
        raise ValueError("the filter has not the markers that it should have")
    return b"".join(_LINE.pack(*line, words.get(value, value)) for *line, value in lines)


def _data(name: str) -> bytes:
    loader: Any = sys.modules["x07_sandbox"].__spec__.loader  # type: ignore[union-attr] # the agent's zip
    data: bytes = loader.get_data(f"{loader.archive}/data/{name}")
    return data
