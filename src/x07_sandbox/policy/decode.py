"""Decoder from bytes to a valid Policy. On failure, it raises one error that lists every problem.

`accept` decides: one msgspec conversion, then the rules. The schema (schema.py) only describes what is wrong with a
document that was not accepted.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import NoReturn

import msgspec

from x07_sandbox.host.decoding import prepared
from x07_sandbox.policy.model import Policy
from x07_sandbox.policy.problems import ADVICE, HUGE, PolicyError, Problem, json_path, rule_problems

MAX_BYTES = 1 << 20
MAX_PROBLEMS = 100
_MAX_DEPTH = 32  # the model itself is five levels deep
_INT_CHARS = len(str(HUGE)) - 1  # Python refuses to convert very long ones
_TOO_DEEP = f"is nested too deeply: the maximum is {_MAX_DEPTH} levels"
_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANKS = " \t\r\n"


class _Repeated(dict[str, object]):
    """An object in which a key is repeated: the last value of each key, and the names of the repeated keys."""

    names: tuple[str, ...] = ()


def decode_policy(data: bytes, *, source: str) -> Policy:
    """Return the policy in *data*, checked against the schema and every rule. source: the document's name in errors.

    Raises PolicyError with all problems (at most MAX_PROBLEMS) if the document is invalid.
    """
    document = parse(data, source=source)
    policy = accept(document)
    if policy is None:
        raise _invalid(document, source)
    return policy


def check_policy(policy: Policy, *, source: str) -> None:
    """Raise PolicyError with all problems of a policy that was changed. source: its name in errors."""
    document = msgspec.json.decode(msgspec.json.encode(policy))
    if accept(document) is None:
        raise _invalid(document, source)


def parse(data: bytes, *, source: str) -> object:
    """Return the JSON value in *data*. Raises PolicyError if the data is not JSON.

    Whitespace around schema_version is stripped, because X07's own runner strips it too.
    """
    if len(data) > MAX_BYTES:
        _unreadable(source, f"is too large: it has {len(data)} bytes, and the maximum is {MAX_BYTES}")
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_make_object, parse_int=_bounded_int, parse_constant=_no_constant)
    except UnicodeDecodeError as exc:
        _unreadable(source, f"is not UTF-8 text: byte {exc.start} is invalid")
    except json.JSONDecodeError as exc:
        _unreadable(source, f"is not valid JSON: {exc.msg} (line {exc.lineno}, column {exc.colno})")
    except ValueError as exc:
        _unreadable(source, f"is not valid JSON: {exc}")
    except RecursionError:
        _unreadable(source, _TOO_DEEP)
    if isinstance(value, dict) and isinstance(version := value.get("schema_version"), str):
        value["schema_version"] = version.strip(_BLANKS)
    return value


def accept(document: object) -> Policy | None:
    """Return the policy in *document* or None if the document is invalid."""
    if any(_text_problems(document)):
        return None
    try:
        policy = msgspec.convert(document, prepared(Policy))
    except msgspec.ValidationError:
        return None
    return None if any(rule_problems(document)) else policy


def _invalid(document: object, source: str) -> PolicyError:
    """Return the error with the problems of an invalid document: at most one for each place and kind of check."""
    from x07_sandbox.policy.schema import schema_problems

    found = list(islice(_text_problems(document), MAX_PROBLEMS + 1))
    too_deep = any(problem.message == _TOO_DEEP for problem in found)
    found += islice(() if too_deep else schema_problems(document), MAX_PROBLEMS + 1)
    in_schema, reported = not found, {problem.json_path for problem in found}
    rules = (problem for problem in rule_problems(document) if problem.json_path not in reported)
    found += islice(() if too_deep else rules, MAX_PROBLEMS + 1)
    if len(found) > MAX_PROBLEMS:
        found[MAX_PROBLEMS:] = [Problem("$", f"has more problems than these {MAX_PROBLEMS}")]
    return PolicyError.of(source, found or [Problem("$", "is not valid")], in_schema=in_schema)


def _unreadable(source: str, message: str) -> NoReturn:
    # The message says where; a chained RecursionError would only add a huge traceback.
    problem = Problem("$", message)
    fault, _, why = message.partition(": ")
    raise PolicyError(f"policy {source} {fault}", why, ADVICE, (problem,)) from None


def _make_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = _Repeated(found)
    repeated.names = tuple(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    return repeated


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")  # NaN and Infinity, which Python's parser accepts


def _bounded_int(digits: str) -> int:
    if len(digits) <= _INT_CHARS:
        return int(digits)
    return -HUGE if digits.startswith("-") else HUGE


def _text_problems(document: object) -> Iterator[Problem]:
    """Yield repeated keys, strings that are not valid Unicode, and nesting that is too deep. Not recursive."""
    waiting: list[tuple[tuple[str | int, ...], object]] = [((), document)]
    while waiting:
        place, value = waiting.pop()
        if len(place) > _MAX_DEPTH:
            yield Problem("$", _TOO_DEEP)
            return
        if isinstance(value, str):
            if _SURROGATE.search(value):
                yield Problem(json_path(place), "is not valid Unicode (an unpaired \\u surrogate)")
        elif isinstance(value, dict):
            if isinstance(value, _Repeated):
                yield from (Problem(json_path((*place, name)), "appears more than once") for name in value.names)
            waiting.extend(((*place, name), inner) for name, inner in reversed(value.items()))
        elif isinstance(value, list):
            waiting.extend(((*place, index), inner) for index, inner in reversed(list(enumerate(value))))
