"""Types that data is decoded to, made ready so that any number of threads may use them."""

from __future__ import annotations

import threading
from typing import Final, TypeVar

import msgspec

_Model = TypeVar("_Model")
_lock: Final = threading.Lock()
_known: Final[set[object]] = set()


def known(model: type[_Model]) -> type[_Model]:
    """*model*, when msgspec knows all of it: what every decoding by a type of ours is given.

    msgspec 0.22 learns what is in a type when it is first used, and keeps what it knows before it knows all: a thread
    that uses the type meanwhile ends the whole process by a segmentation fault. So one thread at a time has it learn.
    """
    if model not in _known:
        with _lock:
            msgspec.json.Decoder(model)
            _known.add(model)
    return model
