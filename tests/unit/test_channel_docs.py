"""The tables of docs/guest-channel.md match the code, and docstrings explain the fields of messages.

Run as a program (python -m tests.unit.test_channel_docs) to regenerate them. The texts of a table, such as the meaning
of a message, are the page's own; of a new row they are to be written in place of "?".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.guest.messages import frame
from x07_sandbox.channel import egress, link, messages, streams
from x07_sandbox.channel.link import COMMAND_NEXT, NEXT, CommandState, State, Stream
from x07_sandbox.channel.messages import BOUNDS, FORMS, Form
from x07_sandbox.channel.streams import Role, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "guest-channel.md"
TEXT: Final = object()
"""A cell whose text is the page's own."""
SENDS: Final = {Role.HOST: "host", Role.GUEST: "guest"}
RECORDS: Final = (
    messages.CommandLimits,
    messages.InputFile,
    messages.Mount,
    messages.Confine,
    messages.Network,
    messages.Room,
    messages.Terminal,
    messages.Output,
    messages.Left,
)
Row = tuple[object, ...]


def name_of(kind: type[Any]) -> str:
    """The name of a message."""
    return kind.__name__.upper()


def size(count: int) -> str:
    """A number of bytes, in KiB or MiB where it is a whole number of them."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit and count % unit == 0:
            return f"{count // unit} {name}"
    return f"{count} bytes"


def sizes(least: int, most: int) -> str:
    """The bounds of a payload."""
    if least == most:
        return size(least) if most else "empty"
    return f"at most {size(most)}" if least <= 2 else f"{least} to {size(most)}"


def frames() -> Iterable[Row]:
    """Every type of frame."""
    found = {name: value for name, value in vars(streams).items() if name[0].isupper() and type(value) is int}
    payload = {
        "DATA": f"at least 1 byte; at most {size(link.DATA_MAX)}, on the relay's stream {size(egress.DATA_MAX)}",
        "DATAGRAM": f"at most {egress.DATAGRAM_MAX} bytes",
    }
    for name, value in found.items():
        if value < 256:
            yield value, f"`{name}`", TEXT, payload.get(name, TEXT), TEXT


def payload(form: Form) -> str:
    """The encoding and the size of a message."""
    bounds = BOUNDS[form.number]
    return ("JSON, " if form.layout is None else "packed, " if bounds.most else "") + sizes(bounds.least, bounds.most)


def kind_columns(source: Table, code: int) -> tuple[str, str, int]:
    """Who opens a kind of stream, who sends on it, and how many are open at once."""
    kind = source.streams[code]
    return SENDS[kind.opener], "both" if kind.sender is None else SENDS[kind.sender], kind.at_once


def kinds() -> Iterable[Row]:
    """Every kind of stream of the channel."""
    for stream in Stream:
        opener, sender, at_once = kind_columns(link.STREAMS, stream)
        assert sender == ("both" if stream is Stream.RELAY else opener)
        yield int(stream), f"`{stream.name}`", opener, TEXT, TEXT, at_once, TEXT


def relay() -> Iterable[Row]:
    """Every kind of stream, and the message, of the relay's stream."""
    for code, name in {egress.TCP: "TCP", egress.UDP: "UDP"}.items():
        kind = egress.STREAMS.streams[code]
        opener, sender, at_once = kind_columns(egress.STREAMS, code)
        carried = "datagrams" if kind.datagrams else "bytes"
        assert kind.answered
        yield code, f"`{name}`", opener, sender, carried, sizes(kind.least, kind.most), at_once, TEXT


def states(of: type[State | CommandState], following: Mapping[tuple[Any, type[Any]], Any]) -> Iterable[Row]:
    """Every state, and who may send which message in it."""
    for state in of:
        kinds = [kind for begin, kind in following if begin is state]
        sent = [
            ", ".join(f"`{name_of(kind)}`" for kind in kinds if FORMS[kind].sender is role) or "-"
            for role in (Role.GUEST, Role.HOST)
        ]
        yield state.value, TEXT, *sent


def bounds() -> Iterable[Row]:
    """Every number."""
    guest = max(link.DATA_MAX, *[bounds.most for bounds in BOUNDS.values() if bounds.sender is Role.GUEST])
    return [
        ("payload of DATA", size(link.DATA_MAX), TEXT),
        ("payload of DATA on the relay's stream", size(egress.DATA_MAX), TEXT),
        ("payload of a message of the guest", size(guest), TEXT),
        ("payload of the messages OPEN and EXEC", size(max(one.most for one in BOUNDS.values())), TEXT),
        ("a text of the guest", f"{messages.TEXT_MAX} characters", TEXT),
        ("window of a stream", size(link.WINDOW), TEXT),
        ("window of a stream of the relay", size(egress.WINDOW), TEXT),
        ("commands at once", link.COMMANDS_MAX, TEXT),
        ("files that go in", link.FILES_MAX, TEXT),
        ("flows of each transport at once", egress.FLOWS_MAX, TEXT),
        ("bytes of a guest's frame that the host holds", size(guest + streams.HEADER.size), TEXT),
    ]


PARTS: Final[dict[str, Callable[[], Iterable[Row]]]] = {
    "frames": frames,
    "messages": lambda: [
        (form.number, f"`{name_of(kind)}`", SENDS[form.sender], payload(form), TEXT) for kind, form in FORMS.items()
    ],
    "streams": kinds,
    "states": lambda: states(State, NEXT),
    "commands": lambda: states(CommandState, COMMAND_NEXT),
    "relay": relay,
    "bounds": bounds,
}
MARKED: Final = re.compile(r"(?s)(<!-- ([a-z]+): made from the code -->\n)(.*?)(\n<!-- end -->)")


def renewed(text: str) -> str:
    """The page with every part regenerated. Rows are found again by their first cell."""

    def part(match: re.Match[str]) -> str:
        head, line, *rows = match[3].split("\n")
        old = {cells[0]: cells for cells in (row.strip("| ").split(" | ") for row in rows)}
        made = []
        for row in PARTS[match[2]]():
            texts = old.get(str(row[0]), ["?"] * len(row))
            cells = [text if cell is TEXT else str(cell) for cell, text in zip(row, texts, strict=True)]
            made.append("| " + " | ".join(cells) + " |")
        return "\n".join([match[1] + head, line, *made]) + match[4]

    return MARKED.sub(part, text)


def test_the_page_shows_the_tables_of_the_code() -> None:
    """The tables of docs/guest-channel.md match the code, and each row is described."""
    text = PAGE.read_text(encoding="utf-8")
    assert [match[2] for match in MARKED.finditer(text)] == list(PARTS)
    assert text == renewed(text), "run: python -m tests.unit.test_channel_docs"
    assert "| ? |" not in text
    assert f"At most {messages.DENIED_MAX} are sent for a command" in text


@pytest.mark.parametrize("kind", [*FORMS, *RECORDS], ids=name_of)
def test_docstrings_explain_every_field(kind: type[Any]) -> None:
    """The docstring of each message, and of each record in one, says what each field holds."""
    text = " ".join(str(kind.__doc__).split())
    explained = {name for names in re.findall(r"(\w+(?:, \w+)*): ", text) for name in names.split(", ")}
    assert {*kind.__annotations__} - explained <= {"id"}


def test_the_header_is_the_one_that_is_described() -> None:
    """The bytes of the example on the page are those of the code."""
    wire = frame(streams.DATA, 0x1234, b"abc")
    assert wire == bytes.fromhex("04 00 0000 00001234 00000003") + b"abc"
    assert "04  00  00 00  00 00 12 34  00 00 00 03  61 62 63" in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
