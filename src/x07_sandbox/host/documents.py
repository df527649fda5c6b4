"""Documents as JSON text."""

import json
import re
from typing import Any, Final

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
