"""Preparation of msgspec types for use by several threads."""

import threading
from typing import Final, TypeVar

import msgspec

_Model = TypeVar("_Model")
_lock: Final = threading.Lock()
_prepared: Final[set[object]] = set()


def why_invalid(exc: Exception) -> str:
    """Return msgspec's message about an invalid document, in words that suit any format."""
    return str(exc).replace("Object missing required field", "there is no key")


def prepared(model: type[_Model]) -> type[_Model]:
    """Return *model* after msgspec has analyzed it.

    msgspec 0.22 analyzes a type on first use. If a second thread uses the type during the analysis, the process crashes
    with SIGSEGV.
    """
    if model not in _prepared:
        with _lock:
            msgspec.json.Decoder(model)
            _prepared.add(model)
    return model
