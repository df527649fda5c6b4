"""From bytes to a valid Policy, or one error that names everything that is wrong.

A good document takes the fast way: one parse, one msgspec conversion, the rules. Only when that fails does the slow way
(explain.py, with jsonschema) gather all problems. Should the two disagree, the fast one decides.
"""

import json
from collections.abc import Iterator
from itertools import islice
from typing import NoReturn

import msgspec

from x07_sandbox.host.decoding import prepared
from x07_sandbox.policy.model import Policy
from x07_sandbox.policy.problems import HUGE, PolicyError, Problem, json_path
from x07_sandbox.policy.rules import rule_problems

MAX_BYTES = 1 << 20
MAX_PROBLEMS = 100
_MAX_DEPTH = 32  # the model itself is five levels deep
_INT_CHARS = len(str(HUGE)) - 1  # Python refuses to convert very long ones
_TOO_DEEP = f"is nested deeper than {_MAX_DEPTH} levels"
_BLANKS = " \t\r\n"


class _Repeated(dict[str, object]):
    """An object in which a key stood more than once; the last value is kept for the other checks."""

    names: tuple[str, ...] = ()


class Parsed(msgspec.Struct, frozen=True):
    r"""A document as JSON gives it. odd: it has repeated keys or \u escapes, so its texts need a closer look."""

    value: object
    odd: bool


def decode_policy(data: bytes, *, source: str) -> Policy:
    """The policy in *data*, checked against the schema and every rule. source: names it in errors, as its path does.

    Raises PolicyError, with all problems at once (at most MAX_PROBLEMS).
    """
    parsed = parse(data, source=source)
    policy = accept(parsed)
    if policy is None:
        problems = find_problems(parsed) or (Problem("$", "is not valid"),)
        raise PolicyError.of(source, problems, in_schema=_keeps_to_the_schema(parsed))
    return policy


def parse(data: bytes, *, source: str) -> Parsed:
    """The JSON value in *data*; raises PolicyError if there is none to look at.

    Blanks around schema_version are dropped here, as upstream's runner does.
    """
    if len(data) > MAX_BYTES:
        _unreadable(source, f"has {len(data)} bytes, and at most {MAX_BYTES} are read")
    repeated = False

    def make_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal repeated
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        repeated = True
        return _mark_repeated(pairs)

    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=make_object, parse_int=_bounded_int, parse_constant=_refuse_constant)
    except UnicodeDecodeError as exc:
        _unreadable(source, f"is not UTF-8 text (byte {exc.start})")
    except json.JSONDecodeError as exc:
        _unreadable(source, f"is not JSON: {exc.msg} (line {exc.lineno}, column {exc.colno})")
    except _ConstantError as exc:
        _unreadable(source, f"is not JSON: {exc} is no number there")
    except RecursionError:
        _unreadable(source, _TOO_DEEP)
    if isinstance(value, dict) and isinstance(version := value.get("schema_version"), str):
        value["schema_version"] = version.strip(_BLANKS)
    return Parsed(value, odd=repeated or "\\u" in text)


def accept(parsed: Parsed) -> Policy | None:
    """The fast way: the policy, or None when anything at all is wrong."""
    if parsed.odd and any(_text_problems(parsed.value)):
        return None
    try:
        policy = msgspec.convert(parsed.value, prepared(Policy))
    except (msgspec.ValidationError, RecursionError):
        return None
    return None if any(rule_problems(parsed.value)) else policy


def find_problems(parsed: Parsed) -> tuple[Problem, ...]:
    """The slow way: everything that is wrong, each place once per kind of check; empty when nothing is."""
    # Imported here because jsonschema costs more than a whole good decode, and only a bad document needs it.
    from x07_sandbox.policy.explain import schema_problems

    found = list(islice(_text_problems(parsed.value), MAX_PROBLEMS + 1))
    if any(problem.message == _TOO_DEEP for problem in found):
        return tuple(found)
    found += islice(schema_problems(parsed.value), MAX_PROBLEMS + 1)
    told = {problem.json_path for problem in found}
    rules = (problem for problem in rule_problems(parsed.value) if problem.json_path not in told)
    found += islice(rules, MAX_PROBLEMS + 1)
    if len(found) > MAX_PROBLEMS:
        found[MAX_PROBLEMS:] = [Problem("$", f"has more problems than these {MAX_PROBLEMS}")]
    return tuple(found)


def _keeps_to_the_schema(parsed: Parsed) -> bool:
    from x07_sandbox.policy.explain import schema_problems

    return not any(_text_problems(parsed.value)) and not any(schema_problems(parsed.value))


def _unreadable(source: str, message: str) -> NoReturn:
    # The cause adds nothing: the message says where, and a RecursionError must not be carried along.
    raise PolicyError.of(source, (Problem("$", message),)) from None


class _ConstantError(Exception):
    """NaN, Infinity or -Infinity, which Python's parser takes and JSON does not know."""


def _refuse_constant(name: str) -> NoReturn:
    raise _ConstantError(name)


def _bounded_int(digits: str) -> int:
    if len(digits) <= _INT_CHARS:
        return int(digits)
    return -HUGE if digits.startswith("-") else HUGE


def _mark_repeated(pairs: list[tuple[str, object]]) -> _Repeated:
    found = _Repeated(pairs)
    seen: set[str] = set()
    names = {name: None for name, _ in pairs if name in seen or seen.add(name)}  # type: ignore[func-returns-value]
    found.names = tuple(names)
    return found


def _text_problems(document: object) -> Iterator[Problem]:
    """Repeated keys, texts that are no Unicode, and nesting beyond all reason; never recursive."""
    waiting: list[tuple[tuple[str | int, ...], object]] = [((), document)]
    while waiting:
        place, value = waiting.pop()
        if len(place) > _MAX_DEPTH:
            yield Problem("$", _TOO_DEEP)
            return
        if isinstance(value, str):
            if not _is_unicode(value):
                yield Problem(json_path(place), "is no valid Unicode (half of a \\u pair)")
        elif isinstance(value, dict):
            if isinstance(value, _Repeated):
                yield from (Problem(json_path((*place, name)), "stands here more than once") for name in value.names)
            waiting.extend(((*place, name), inner) for name, inner in reversed(value.items()))
        elif isinstance(value, list):
            waiting.extend(((*place, index), inner) for index, inner in reversed(list(enumerate(value))))


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
