"""The policy decoder: a valid policy, or one error with all problems, for any bytes."""

import copy
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from x07_sandbox.errors import UsageError
from x07_sandbox.policy.decode import (
    MAX_BYTES,
    MAX_PROBLEMS,
    accept,
    decode_policy,
    default_policy,
    parse,
    render_policy,
)
from x07_sandbox.policy.model import PolicyError, Problem
from x07_sandbox.policy.schema import schema_problems

DEFAULT = render_policy(default_policy())
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["a;b", "*", "\\", "", " ", "\0", "x" * 300, "\ud800", "é" * 200]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def document() -> dict[str, Any]:
    """The default policy as JSON, with every optional section."""
    plain: dict[str, Any] = json.loads(DEFAULT)
    plain["db"] = {
        "enabled": False,
        "drivers": {"sqlite": True, "postgres": False, "mysql": False},
        "sqlite": {"allow_paths": ["a.sqlite"]},
        "net": {"allow_dns": ["db.example"], "allow_ports": [5432]},
    }
    plain["net"]["allow_hosts"] = [{"host": "example.org", "ports": [443]}]
    return plain


def encode(value: object) -> bytes:
    """JSON bytes of any value."""
    return json.dumps(value).encode()


def problems_of(data: bytes) -> tuple[Problem, ...]:
    """The problems of an invalid document."""
    with pytest.raises(PolicyError) as caught:
        decode_policy(data, source="p.json")
    return caught.value.problems


def places(value: object, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path of every value in a document."""
    inner: list[tuple[str | int, object]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [at, *(place for key, child in inner for place in places(child, (*at, key)))]


def changed(value: object, place: tuple[str | int, ...], new: object, *, how: str) -> object:
    """A copy of a document with one value replaced, removed or added."""
    if not place:
        return new
    made = copy.deepcopy(value)
    holder: Any = made
    for key in place[:-1]:
        holder = holder[key]
    if how == "remove":
        del holder[place[-1]]
    elif how == "add" and isinstance(holder, dict):
        holder[f"{place[-1]}_"] = new
    else:
        holder[place[-1]] = new
    return made


@st.composite
def nearly_valid(draw: st.DrawFn) -> object:
    """A valid document with up to three changes."""
    made: object = document()
    for _ in range(draw(st.integers(0, 3))):
        found = places(made)
        place = draw(st.sampled_from(found))
        made = changed(made, place, draw(JSON), how=draw(st.sampled_from(["replace", "remove", "add"])))
        if not isinstance(made, (dict, list)):
            break
    return made


def test_a_valid_document_becomes_the_policy_that_it_describes() -> None:
    """A valid document decodes to the policy that it describes."""
    policy = decode_policy(DEFAULT, source="default")
    assert policy == default_policy()
    assert policy.limits.wall_ms == 60_000
    assert policy.process.allow_exec_prefixes == ("/",)


@settings(deadline=None)
@given(nearly_valid())
@example(document())
def test_what_is_wrong_is_said(value: object) -> None:
    """The error for a document says what is wrong with it, and the schema finds nothing wrong with a valid one."""
    parsed = parse(encode(value), source="p")
    if accept(parsed) is not None:
        assert list(schema_problems(parsed)) == []
        return
    with pytest.raises(PolicyError) as caught:
        decode_policy(encode(value), source="p")
    assert caught.value.problems != (Problem("$", "is not valid"),)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": NaN}', "is not valid JSON: NaN is not a JSON number"),
        (b'{"a": -Infinity}', "is not valid JSON: -Infinity is not a JSON number"),
        (b'{"a": "\xff"}', "is not UTF-8 text: byte 7 is invalid"),
        (b'{"a": }', "is not valid JSON: Expecting value (line 1, column 7)"),
        (b" " * (MAX_BYTES + 1), f"is too large: it has {MAX_BYTES + 1} bytes, and the maximum is {MAX_BYTES}"),
        (b"[" * 500_000, "is nested too deeply: the maximum is 32 levels"),
        (b"[" * 40 + b"]" * 40, "is nested too deeply: the maximum is 32 levels"),
    ],
)
def test_unreadable_documents_are_refused(data: bytes, message: str) -> None:
    """A document that is not JSON, too large or too deep is refused as a whole."""
    assert problems_of(data) == (Problem("$", message),)


def test_a_repeated_key_is_refused_with_its_place() -> None:
    """A duplicate key is refused with its path."""
    data = DEFAULT.replace(b'"cpu_ms": 60000,', b'"cpu_ms": 60000, "cpu_ms": 60000, "cpu_ms": 1,').replace(
        b'"procs": 64', b'"procs": -1'
    )
    assert [str(problem) for problem in problems_of(data)] == [
        "$.limits.cpu_ms: appears more than once",
        "$.limits.procs: must be from 0 to 1024, not -1",
    ]


def test_half_a_unicode_pair_is_refused() -> None:
    """A lone surrogate is refused."""
    data = DEFAULT.replace(b'"read_roots": []', b'"read_roots": ["a\\ud800"]')
    assert problems_of(data) == (Problem("$.fs.read_roots[0]", "is not valid Unicode (an unpaired \\u surrogate)"),)


@pytest.mark.parametrize("value", [True, False, 60000.0, 1e3, "60000", None, [], {}])
def test_a_number_is_a_whole_number_and_nothing_else(value: object) -> None:
    """A limit must be an integer, not a boolean, float or text."""
    made = changed(document(), ("limits", "cpu_ms"), value, how="replace")
    (problem,) = problems_of(encode(made))
    assert problem.json_path == "$.limits.cpu_ms"
    assert problem.message.startswith("must be an integer, not ")


@pytest.mark.parametrize("digits", ["0", "-1", "600001", "1" + "0" * 25, "-" + "9" * 100_000])
def test_a_number_out_of_range_is_refused_however_long_it_is(digits: str) -> None:
    """A number out of range is refused, however long it is."""
    data = DEFAULT.replace(b'"cpu_ms": 60000', f'"cpu_ms": {digits}'.encode())
    (problem,) = problems_of(data)
    assert problem.json_path == "$.limits.cpu_ms"
    shown = digits if len(digits) < 20 else "a number with that many digits"
    assert problem.message == f"must be from 1 to 600000, not {shown}"


@pytest.mark.parametrize("section", ["db", "language", "threads", "notes"])
def test_an_optional_part_is_absent_but_never_null(section: str) -> None:
    """An optional section may be absent but not null."""
    (problem,) = problems_of(encode({**document(), section: None}))
    assert problem.json_path == f"$.{section}"


def test_all_errors_come_at_once_each_with_its_path() -> None:
    """All errors of a policy are reported at once, each with its path."""
    made = document()
    del made["env"]
    made["limits"]["cpu_m"] = made["limits"].pop("cpu_ms")
    made["limits"]["fds"] = True
    made["fs"]["read_roots"] = ["", "a;b"]
    made["net"]["allow_hosts"] = ["example.org:443", {"host": "a b", "ports": [0]}]
    made["process"]["max_live"] = 0
    made["process"]["allow_args_regex_lite"] = ["*"]
    made["wall_ms"] = 5
    assert {problem.json_path for problem in problems_of(encode(made))} == {
        "$.env",
        "$.limits.cpu_ms",
        "$.limits.cpu_m",
        "$.limits.fds",
        "$.fs.read_roots[0]",
        "$.fs.read_roots[1]",
        "$.net.allow_hosts[0]",
        "$.net.allow_hosts[1].host",
        "$.net.allow_hosts[1].ports[0]",
        "$.process.max_live",
        "$.process.allow_args_regex_lite[0]",
        "$.wall_ms",
    }


@pytest.mark.parametrize(
    ("place", "key", "meant"),
    [
        (("limits",), "wall_msec", "wall_ms"),
        (("limits",), "MEM_BYTES_", "mem_bytes"),
        (("fs",), "allow_symlink", "allow_symlinks"),
        ((), "procces", "process"),
        ((), "cpu_ms", "limits.cpu_ms"),
        (("net", "allow_hosts", 0), "port", "ports"),
        (("process",), "nothing_like_it_at_all", None),
    ],
)
def test_a_misspelt_key_gets_a_suggestion(place: tuple[str | int, ...], key: str, meant: str | None) -> None:
    """A misspelt key is refused with the nearest valid one."""
    made: Any = document()
    holder = made
    for step in place:
        holder = holder[step]
    value = holder.pop(meant) if meant in holder else 1
    holder[key] = value
    (problem,) = [problem for problem in problems_of(encode(made)) if "is not a field" in problem.message]
    assert problem.suggestion == meant


def test_a_strange_key_cannot_disturb_a_terminal() -> None:
    """Keys in errors are escaped and shortened."""
    made = {**document(), "\x1b[2J" + "k" * 500: 1}
    (problem,) = problems_of(encode(made))
    assert problem.json_path.isascii()
    assert problem.json_path.isprintable()
    assert len(problem.json_path) < 120


def test_the_format_is_exactly_one() -> None:
    """Only schema_version x07.run-os-policy@0.1.0 is accepted."""
    padded = decode_policy(encode({**document(), "schema_version": " x07.run-os-policy@0.1.0\n"}), source="p")
    assert padded.schema_version == "x07.run-os-policy@0.1.0"
    for other in ("x07.run-os-policy@0.2.0", "x07.arch.rr.policy@0.1.0", "", 1):
        (problem,) = problems_of(encode({**document(), "schema_version": other}))
        assert problem.json_path == "$.schema_version"
        assert '"x07.run-os-policy@0.1.0"' in problem.message


def test_the_list_of_problems_is_bounded() -> None:
    """The number of reported problems is bounded."""
    made = document()
    made["process"]["allow_execs"] = [7] * 50_000
    found = problems_of(encode(made))
    assert len(found) == MAX_PROBLEMS + 1
    assert found[-1].message == f"has more problems than these {MAX_PROBLEMS}"


def test_the_error_is_a_usage_error_and_survives_pickling() -> None:
    """A policy error survives pickling with all its problems."""
    with pytest.raises(PolicyError) as caught:
        decode_policy(b"{}", source="p.json")
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own bytes
    assert isinstance(again, PolicyError)
    assert isinstance(again, UsageError)
    assert again.problems == caught.value.problems
    assert str(again) == str(caught.value)


@pytest.mark.parametrize("value", [None, True, 1, "x", [], [[]]])
def test_a_document_that_is_no_object_is_refused(value: object) -> None:
    """Only a JSON object is a policy."""
    (problem,) = problems_of(encode(value))
    assert problem.json_path == "$"
    assert problem.message.startswith("must be an object, not ")


def test_a_good_policy_costs_no_slow_import() -> None:
    """Decoding a valid policy imports neither jsonschema nor difflib."""
    code = (
        "import sys; from x07_sandbox.policy.decode import decode_policy; "
        "from x07_sandbox.policy.decode import default_policy, render_policy; "
        "decode_policy(render_policy(default_policy()), source='p'); "
        "print(sorted({'jsonschema', 'difflib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"
