"""Messages: every value survives the channel, and any other payload raises PeerError."""

from __future__ import annotations

import json
from typing import Any, Final, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.guest.lies import DENIED, EXITED
from tests.guest.messages import LIMITS, MESSAGES, OPEN
from x07_sandbox.channel.link import DATA_MAX
from x07_sandbox.channel.messages import (
    BOUNDS,
    COUNT_MAX,
    FORMS,
    ID_MAX,
    TEXT_MAX,
    Close,
    Closed,
    Denied,
    Exec,
    Exited,
    Failed,
    Hello,
    Left,
    Message,
    Open,
    Output,
    Resize,
    Seed,
    Shape,
    Started,
    Stop,
    Warm,
    decode,
    encode,
)
from x07_sandbox.channel.streams import Role
from x07_sandbox.errors import ChannelUsageError, PeerError

GUEST_JSON: Final = [kind for kind, form in FORMS.items() if form.shapes]
NUMBERS: Final = [form.number for form in FORMS.values()]
PACKED: Final = [kind for kind, form in FORMS.items() if form.layout is not None]
DEPTH: Final = 5000  # deeper than the decoder accepts, and small enough for a message
HOSTILE: Final = {
    "empty": b"",
    "no text": b"\xff\xfe",
    "byte order mark": b"\xef\xbb\xbf[]",
    "no JSON": b"[",
    "two values": b"[][]",
    "blanks behind": b"[] ",
    "object": b"{}",
    "null": b"null",
    "deep lists": b"[" * DEPTH + b"]" * DEPTH,
    "deep objects": b'[{"a":' * DEPTH,
    "deep in a field": b"[" + b"[" * DEPTH + b"]" * DEPTH + b",0,0,0]",
}
WORDS: Final = st.text(max_size=20)  # with lone surrogates, as Python passes on undecodable arguments
COUNTS: Final = st.integers(0, COUNT_MAX)


def round_trip(message: Message) -> Message:
    """The message after the channel."""
    return decode(*encode(message))


def same(one: Message, other: Message) -> bool:
    """Return whether two messages are equal, with the types of all parts: tuples of two types may be equal."""
    return repr(one) == repr(other)


def payload(message: Message, field: str, value: object) -> bytes:
    """The payload of a JSON message with another value in one field."""
    values = [value if name == field else old for name, old in zip(message._fields, message, strict=True)]
    return json.dumps(values).encode()


def values(shape: Shape) -> st.SearchStrategy[object]:
    """Every value that a shape accepts."""
    taken: dict[type, st.SearchStrategy[Any]] = {
        int: st.integers(shape.lo, shape.hi),
        bool: st.booleans(),
        str: st.text(st.characters(exclude_categories=["Cs"]), min_size=shape.lo, max_size=min(shape.hi, 64)),
    }
    return st.none() | taken[shape.type] if shape.optional else taken[shape.type]


def guest_messages() -> st.SearchStrategy[Message]:
    """Every message that the guest can send, and every packed one."""
    found: list[st.SearchStrategy[Message]] = []
    for kind, form in FORMS.items():
        if form.shapes:
            found.append(st.builds(kind, *map(values, form.shapes)))
        elif form.layout is not None:
            raw = st.binary(min_size=form.layout.size, max_size=form.layout.size).map(form.layout.unpack)
            found.append(raw.map(lambda fields, kind=kind: kind(*map(lowered, fields))))  # type: ignore[misc]
    return st.one_of(found)


def lowered(field: object) -> object:
    """Return a field of a packed message, within the range of a number."""
    return field & COUNT_MAX if type(field) is int else field


def any_of(kind: Any) -> st.SearchStrategy[Any]:  # noqa: ANN401 - an annotation
    """Every value of an annotation of a field, with arbitrary texts and numbers."""
    simple = {int: COUNTS, bool: st.booleans(), str: WORDS, type(None): st.none(), Any: WORDS | COUNTS}
    if kind in simple:
        return simple[kind]
    arguments = [any_of(argument) for argument in get_args(kind)]
    if get_origin(kind) is list:
        return st.lists(arguments[0], max_size=3)
    if get_origin(kind) is dict:
        return st.dictionaries(*arguments, max_size=3)
    return st.one_of(arguments) if arguments else st.builds(kind, *map(any_of, get_type_hints(kind).values()))


def host_messages() -> st.SearchStrategy[Message]:
    """Messages of the host in JSON, with arbitrary texts and numbers."""
    return st.one_of([any_of(kind) for kind, form in FORMS.items() if form.build is not None])


# what survives


@given(guest_messages() | host_messages())
def test_every_message_comes_back_as_it_was(message: Message) -> None:
    """Every valid message survives encoding and decoding, with the types of all its parts."""
    assert same(round_trip(message), message)


@pytest.mark.parametrize(
    "message",
    [
        *MESSAGES.values(),
        Seed(COUNT_MAX, b"\xff" * 64, bytes(16), b"\xff" * 16),
        Hello(ID_MAX),
        Started(ID_MAX),
        Stop(0, 255),
        Resize(ID_MAX, 2**16 - 1, 0),
        Exited._make([ID_MAX, 0xFFFF, *[COUNT_MAX] * 5, *[True] * 4, COUNT_MAX, COUNT_MAX]),
        Exited._make([0, 0, *[0] * 5, *[False] * 4, 0, 0]),
        Denied(ID_MAX, "x" * 16, "x" * 64, 4096, "x" * TEXT_MAX, write=True, times=COUNT_MAX),
        Denied(0, "", "", 0, "", write=False, times=1),
        Closed(None, None, 0, 0),
        Closed(2**40, "x" * TEXT_MAX, COUNT_MAX, COUNT_MAX),
        Failed(0, "", 0, ""),
        Exec(ID_MAX, ["\udcff\udc80", "\u00e9\N{PILE OF POO}", ""], {"\udcff": "\udcff"}, "/\udcff", LIMITS),
        Close(ID_MAX, None, None),
        Close(0, Output("\udcff", COUNT_MAX), Left(COUNT_MAX, COUNT_MAX)),
        OPEN._replace(network=None, files=[], mounts=[], confine=OPEN.confine._replace(programs=None)),
        Warm(None, LIMITS._replace(core_bytes=-1), 0, "", out_writable=False, network=True, commands=[[], ["a", "b"]]),
    ],
    ids=lambda message: type(message).__name__,
)
def test_extreme_values_come_back(message: Message) -> None:
    """A sample of each message, extreme numbers, absent options, and undecodable arguments and paths survive."""
    assert same(round_trip(message), message)


# what a guest may not send


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", [Failed, Closed, Open, Exec])
def test_malformed_json_is_rejected(kind: type[Any], name: str) -> None:
    """Malformed, deeply nested or non-array JSON is rejected with PeerError."""
    with pytest.raises(PeerError):
        decode(FORMS[kind].number, HOSTILE[name])


NOT_NUMBERS: Final = ["NaN", "Infinity", "-Infinity", "1e999", "1.0", "true", "null", '"0"', "[]", "{}", "-1"]
NOT_TEXTS: Final = ["1", "null", "[]", "{}", '"' + "x" * 65 + '"', r'"\ud800\ud800"', r'"x\udfff"', "true"]


@pytest.mark.parametrize(
    ("kind", "field", "texts"),
    [
        (Failed, "errno", [*NOT_NUMBERS, "4097", "9" * 4000, "9" * 9000]),
        (Denied, "times", ["0", "-1", str(COUNT_MAX + 1)]),
        (Failed, "stage", NOT_TEXTS),
        (Denied, "write", ["0", "1", '"true"', "null", "[]"]),
    ],
)
def test_a_field_is_of_its_type_and_in_its_range(kind: type[Any], field: str, texts: list[str]) -> None:
    """Only whole numbers in their range, valid text of its length, and booleans are accepted as such."""
    for text in texts:
        bad = payload(MESSAGES[kind], field, "here").replace(b'"here"', text.encode())
        with pytest.raises(PeerError):
            decode(FORMS[kind].number, bad)


@pytest.mark.parametrize("kind", PACKED)
def test_a_packed_number_is_in_its_range(kind: type[Any]) -> None:
    """A packed number above 2^63 - 1 is rejected, so that every number fits a signed one of 64 bits."""
    layout = FORMS[kind].layout
    assert layout is not None
    if "Q" in layout.format:
        with pytest.raises(PeerError, match="out of range"):
            decode(FORMS[kind].number, b"\xff" * layout.size)
    else:
        decode(FORMS[kind].number, b"\xff" * layout.size)


@pytest.mark.parametrize("kind", GUEST_JSON)
def test_fields_are_exactly_those_of_the_message(kind: type[Any]) -> None:
    """A guest's message with an extra or missing field, or a wrong type in any field, is rejected."""
    form, message = FORMS[kind], list(MESSAGES[kind])
    for wrong in (message[:-1], [*message, 0], [], [message]):
        with pytest.raises(PeerError):
            decode(form.number, json.dumps(wrong).encode())
    for at, shape in enumerate(form.shapes):
        others: list[object] = [[], {}, 1.5, None, "", 0, True]
        for value in others:
            if type(value) is shape.type or (value is None and shape.optional):
                continue
            with pytest.raises(PeerError, match=kind._fields[at]):
                decode(form.number, json.dumps([*message[:at], value, *message[at + 1 :]]).encode())


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Open, "files", 7),
        (Open, "files", [["/x07/in/a", 420, "file"]]),
        (Open, "mounts", [None]),
        (Open, "confine", [True]),
        (Open, "network", 7),
        (Open, "room", None),
        (Exec, "limits", [1, 2]),
        (Exec, "limits", None),
        (Exec, "terminal", [24]),
        (Exec, "id", "1"),
        (Exec, "id", 1.5),
        (Exec, "id", []),
        (Warm, "limits", {}),
        (Close, "output", [1]),
        (Close, "left", True),
    ],
)
def test_a_malformed_message_of_the_host_is_an_error_too(kind: type[Any], field: str, value: object) -> None:
    """A guest rejects a message of the host with wrong nested fields, or an id that is no number, with PeerError."""
    with pytest.raises(PeerError, match="another form"):
        decode(FORMS[kind].number, payload(MESSAGES[kind], field, value))
    for wrong in ([], list(MESSAGES[kind])[:-1], [*MESSAGES[kind], 0]):
        with pytest.raises(PeerError, match="another form"):
            decode(FORMS[kind].number, json.dumps(wrong).encode())


# bounds


def test_every_message_has_a_form() -> None:
    """Every type of message has a form with a number of its own, and every field of a guest's JSON message a shape."""
    assert set(FORMS) == set(Message.__args__) == set(MESSAGES)
    assert sorted(NUMBERS) == list(range(1, len(FORMS) + 1))
    assert BOUNDS.keys() == set(NUMBERS)
    for kind, form in FORMS.items():
        if form.sender is Role.GUEST and form.layout is None:
            assert len(form.shapes) == len(kind._fields)
        assert form.layout is not None or bool(form.shapes) != (form.build is not None)


def test_guest_messages_are_small() -> None:
    """No message from the guest is larger than a data frame; only OPEN and EXEC are."""
    large = [kind for kind, form in FORMS.items() if BOUNDS[form.number].most > DATA_MAX]
    assert large == [Open, Exec]
    assert all(FORMS[kind].sender is Role.HOST for kind in large)


def test_every_guest_field_is_bounded() -> None:
    """Every text of a guest's message has a bound."""
    texts = [shape for form in FORMS.values() for shape in form.shapes if shape.type is str]
    assert texts
    assert all(shape.hi <= TEXT_MAX for shape in texts)


@pytest.mark.parametrize("text", ["\u00e9", "\N{PILE OF POO}", "\0"])
def test_the_largest_honest_message_fits_its_frame(text: str) -> None:
    """The largest valid guest report fits into one frame, in any script."""
    for kind in GUEST_JSON:
        message = kind(*[largest(shape, text) for shape in FORMS[kind].shapes])
        number, encoded = encode(message)
        assert len(encoded) <= BOUNDS[number].most
        assert same(decode(number, encoded), message)


def largest(shape: Shape, text: str) -> object:
    """The largest value of a shape."""
    if shape.type is str:
        return text * shape.hi
    return False if shape.type is bool else shape.hi


def test_undecodable_text_in_a_report_becomes_question_marks() -> None:
    """A guest's report about an undecodable name arrives, with a question mark for each such byte."""
    failed = Failed(1, "exec", 2, "command not found: a\udcff\u00e9")
    assert round_trip(failed) == failed._replace(message="command not found: a?\u00e9")
    denied = DENIED._replace(path="/\ud800/\udcff")
    assert round_trip(denied) == denied._replace(path="/?/?")


@pytest.mark.parametrize(
    "message",
    [
        Hello(2**32),
        Started(-1),
        EXITED._replace(wait_status=2**16),
        EXITED._replace(cpu_us=-1),
        Seed(2**64, b"", b"", b""),
        OPEN._replace(hostname="x" * (16 << 20)),
        MESSAGES[Exec]._replace(argv=["\u00e9" * (3 << 20)]),  # type: ignore[call-arg]
        Close(0, Output("x" * (32 << 10), 0), None),
        Failed(0, "x" * (32 << 10), 0, ""),
        OPEN._replace(mem_bytes=float("nan")),  # type: ignore[arg-type]
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_that_does_not_fit_is_not_sent(message: Message) -> None:
    """Encoding a message that exceeds its size, or a number that exceeds its field, raises ChannelUsageError."""
    with pytest.raises(ChannelUsageError, match=type(message).__name__.upper()):
        encode(message)
