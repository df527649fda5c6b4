"""Messages between the holder of a sandbox and its clients."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from x07_sandbox.channel.messages import encode
from x07_sandbox.errors import BackendError, Command, Flag, PeerError, SandboxError, UsageError
from x07_sandbox.host.sockets import Message
from x07_sandbox.library.held_messages import (
    Answer,
    ClientMessage,
    End,
    Input,
    Output,
    Signal,
    Start,
    Started,
)
from x07_sandbox.library.resident import Problem, Reader, packed
from x07_sandbox.sessions.command import Ended
from x07_sandbox.sessions.execution import order


def through(message: Message) -> object:
    """What arrives of an answer."""
    reader: Reader[Answer] = Reader(Answer)
    (found,) = reader.take(packed(message))
    return found


@given(st.lists(st.binary(max_size=300), max_size=5), st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_messages_arrive_whole_however_they_are_split(contents: list[bytes], cuts: list[int]) -> None:
    """However the bytes of a connection are split, the same messages arrive in the same order."""
    messages = [Output(stream="stdout", data=data) for data in contents]
    data = b"".join(map(packed, messages))
    reader: Reader[Answer] = Reader(Answer)
    found, at, turn = [], 0, 0
    while at < len(data):
        size = cuts[turn % len(cuts)]
        found += reader.take(data[at : at + size])
        at, turn = at + size, turn + 1
    assert found == messages


@given(st.lists(st.text(), min_size=1), st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3))
def test_the_words_of_a_command_keep_their_bytes(argv: list[str], env: dict[str, str]) -> None:
    """Arguments and variables arrive as they were, also if they are not UTF-8."""
    words = [word.encode("utf-8", "replace").decode() for word in argv]
    values = {name: value.encode("utf-8", "replace").decode() for name, value in env.items()}
    values = {name.encode("utf-8", "replace").decode(): value for name, value in values.items()}
    words.append("\udcff")
    asked = order(words, values, "a\udcff", merge=True)
    message = Start(encode(asked)[1], None, "", flags=False)
    reader: Reader[ClientMessage] = Reader(ClientMessage)
    (found,) = reader.take(packed(message))
    assert found == message
    assert isinstance(found, Start)
    assert found.asked() == asked


MALFORMED = [
    encode(order(["true"])._replace(**{name: value}))[1]  # type: ignore[arg-type]
    for name, value in (
        ("argv", [1]),
        ("env", {"A": None}),
        ("terminal", "a\0"),
        ("terminal", [1]),
        ("limits", "abcde"),
    )
]


@pytest.mark.parametrize("wrong", [b"", b"[]", b"{}", *MALFORMED])
def test_a_malformed_command_is_rejected(wrong: bytes) -> None:
    """A command whose fields have other types raises an error that the holder handles."""
    with pytest.raises((UsageError, PeerError)):
        Start(wrong, None, "", flags=False).asked()


@pytest.mark.parametrize(
    "error",
    [
        UsageError("cannot \udcff", ("see ", Flag("--env A")), ("To run: ", Command("x07 doctor"))),
        BackendError("a", "b", "c", code="sandbox-lost"),
    ],
)
def test_errors_arrive_with_their_kind_and_marks(error: SandboxError) -> None:
    """An error keeps its class, code, texts and marks, so that a reader gets flags or keywords."""
    found = through(Problem.of(error))
    assert isinstance(found, Problem)
    other = found.error()
    assert (type(other), other.code, str(other)) == (type(error), error.code, str(error).replace("\udcff", "\\udcff"))
    other.word_for(lambda flag: flag.upper())
    assert ("--ENV A" in str(other)) == ("--env A" in str(error))


def test_an_unknown_kind_of_error_is_an_error() -> None:
    """A class that is no error of ours, such as a module's other names, becomes the base of all errors."""
    for kind in ("Flag", "annotations", "Exception"):
        found = Problem(kind=kind, texts=([("", "a")], [("", "b")], [("", "c")]), code="x").error()
        assert type(found) is SandboxError


def test_the_end_of_a_command_arrives() -> None:
    """The end of a command arrives as it was; in its reason, what is not text is escaped."""
    ended = Ended(
        id=1,
        outcome="timeout",
        reason_code="wall-time",
        reason="cannot run \udcff",
        x07_exit_code=124,
        exit_code=None,
        signal=None,
        wall_ms=1.5,
        cpu_ms=2.5,
        memory_peak_bytes=5,
        denials=(),
    )
    found = through(End.of(ended))
    assert found == End(replace(ended, reason="cannot run \\xff"))


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
        b"\0\0\0\1\xc1",
        packed(Started(id=1)),
        packed(Signal(id=1, number=2)).replace(b"Signal", b"Singal"),
    ],
)
def test_malformed_requests_are_rejected(data: bytes) -> None:
    """Bytes that are no request of the protocol raise an error."""
    reader: Reader[ClientMessage] = Reader(ClientMessage)
    with pytest.raises((msgspec.MsgspecError, ValueError)):
        reader.take(data + bytes(10))


def test_a_message_that_is_not_complete_waits() -> None:
    """Nothing is decoded before all bytes have arrived."""
    reader: Reader[ClientMessage] = Reader(ClientMessage)
    data = packed(Input(data=b"abc"))
    assert reader.take(data[:-1]) == []
    assert reader.take(data[-1:]) == [Input(data=b"abc")]
