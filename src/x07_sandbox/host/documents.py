"""Documents as JSON text."""

import json
import re
import threading
from typing import Any, Final, TypeVar

import msgspec

from x07_sandbox.errors import escaped

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def render_json(document: msgspec.Struct | dict[str, Any]) -> bytes:
    """Return a document as JSON on several lines, with a line feed at the end."""
    # The output is ASCII, so that control characters in a guest's text are escaped.
    return json.dumps(plain(document), indent=2).encode("ascii") + b"\n"


def plain(document: msgspec.Struct | dict[str, Any]) -> Any:  # noqa: ANN401 - what json takes
    """Return a document as dicts, lists and values. Bytes that are not UTF-8 are escaped, for strict JSON readers."""
    return _escaped(msgspec.to_builtins(document))


def _escaped(value: object) -> object:
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(inner) for inner in value]
    return encodable(value) if isinstance(value, str) else value


def encodable(text: str) -> str:
    r"""Return text with lone surrogates escaped, which cannot be encoded: \xff for a byte that is not UTF-8."""
    return _SURROGATE.sub(lambda found: escaped(found[0]), text)


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
