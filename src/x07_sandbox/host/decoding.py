"""Types that data is decoded to, made ready so that any number of threads may use them."""

from __future__ import annotations

import threading
from typing import Final, TypeVar

import msgspec

_Model = TypeVar("_Model")
_lock: Final = threading.Lock()
_known: Final[set[object]] = set()


def prepared(model: type[_Model]) -> type[_Model]:
    """*model*, once msgspec knows all of it; given to every decoding.

    msgspec 0.22 learns a type when it is first used; a second thread that uses the half-known type dies of SIGSEGV.
    """
    if model not in _known:
        with _lock:
            msgspec.json.Decoder(model)
            _known.add(model)
    return model
