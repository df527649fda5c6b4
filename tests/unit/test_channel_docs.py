"""The tables of docs/guest-channel.md match the code, and docstrings explain the fields of messages.

Run as a program (python -m tests.unit.test_channel_docs) to regenerate them.
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
    from collections.abc import Callable, Mapping

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "guest-channel.md"

FRAME_MEANING: Final = {
    "MESSAGE": "A message. The code is its number, and the stream is 0.",
    "OPEN": "Opens a stream. The code is its kind.",
    "ANSWER": "Answers OPEN, for kinds that need an answer. Any code other than 0 refuses the stream and ends it.",
    "DATA": "Bytes of a stream.",
    "CREDIT": "The receiver accepts this many more bytes of the stream (u32, at least 1).",
    "FIN": "This side sends no more data on the stream.",
    "RESET": "Ends the stream at once. The code is the reason.",
    "DATAGRAM": "One datagram.",
}
MESSAGE_MEANING: Final = {
    "HELLO": "The agent is up, and speaks this protocol.",
    "WARM": "Prepare everything that does not depend on a job. Then the VM is saved, or waits for a job.",
    "WARMED": "Everything is prepared.",
    "SEED": "Clock, entropy and names for a resumed VM.",
    "SEEDED": "Clock and entropy are set.",
    "OPEN": "Open the session. Its files follow on streams.",
    "EXEC": "Start a command, once all files have arrived.",
    "STARTED": "The command was executed. Its time counts from this message.",
    "STOP": "Send a signal to a command. SIGKILL goes to all its processes. If it has not started, it fails.",
    "RESIZE": "Change the size of a command's terminal.",
    "CHANGES": "Send the changes so far on a stream CHANGES.",
    "DENIED": f"Something that a command was denied. At most {messages.DENIED_MAX} are sent for a command.",
    "EXITED": "A command and its output have ended.",
    "CLOSE": "End the session and everything that still runs in it. Send what is asked for, then CLOSED.",
    "CLOSED": "Everything has been sent.",
    "FAILED": "A command could not be started, or the agent cannot continue.",
}
# The subject, when it may be opened, and what it carries.
STREAM_MEANING: Final = {
    Stream.INPUT: ("number of the file", "the session is open or later", "A file to copy in."),
    Stream.STDIN: ("command", "the command exists", "Standard input of the command."),
    Stream.STDOUT: ("command", "the command runs", "Its standard output."),
    Stream.STDERR: ("command", "the command runs", "Its standard error."),
    Stream.OUTPUT: ("0", "the session is closing", "The file that CLOSE asks for."),
    Stream.CHANGES: (
        "0",
        "the session is closing, and once for each CHANGES",
        "The changes in the mounts that OPEN marks.",
    ),
    Stream.LEFT: ("0", "the session is closing", "Files left in the private folders, if CLOSE asks for any."),
    Stream.RELAY: (
        "0",
        "the session is open or closing",
        "The bytes of the egress relay, where it shares the channel.",
    ),
}
RELAY_MEANING: Final = {
    egress.TCP: "A TCP connection.",
    egress.UDP: "The datagrams between two endpoints.",
}
STATE_MEANING: Final = {
    State.WAITING: "The guest boots.",
    State.GREETED: "The agent has sent HELLO.",
    State.WARMING: "The agent prepares the environment of the first command.",
    State.WARM: "The agent waits. A clone of a saved VM starts here.",
    State.SEEDING: "The agent sets clock and entropy.",
    State.READY: "The agent waits for a session.",
    State.OPEN: "Files are copied in, and commands run.",
    State.CLOSING: "Commands end, or the agent ends them. Then the agent sends what CLOSE asks for.",
    State.CLOSED: "Everything has been sent.",
    State.FAILED: "The agent has given up.",
}
COMMAND_MEANING: Final = {
    CommandState.STARTING: "The command waits for the files, or is being confined and executed.",
    CommandState.RUNNING: "The command runs.",
    CommandState.ENDED: "The command and its output have ended, or it was not executed.",
}
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


def name_of(kind: type[Any]) -> str:
    """The name of a message."""
    return kind.__name__.upper()


def frame_types() -> dict[str, int]:
    """The types of frames, by name."""
    found = {name: value for name, value in vars(streams).items() if name[0].isupper() and type(value) is int}
    return {name: value for name, value in found.items() if value < 256}


def table(*rows: tuple[object, ...]) -> str:
    """A table in Markdown whose first row is the head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


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


def frames_table() -> str:
    """Every type of frame."""
    host, guest = f"{size(link.DATA_MAX)}", f"{size(egress.DATA_MAX)}"
    payload = {
        "MESSAGE": "of the message",
        "OPEN": "of the kind",
        "DATA": f"at least 1 byte; at most {host}, on the relay's stream {guest}",
        "CREDIT": "4 bytes",
        "DATAGRAM": f"at most {egress.DATAGRAM_MAX} bytes",
    }
    by = {
        "MESSAGE": "see below",
        "OPEN": "the opener of the kind",
        "ANSWER": "the other side",
        "DATA": "a sender of the kind",
        "CREDIT": "a receiver of the kind",
        "FIN": "a sender of the kind",
        "RESET": "both",
        "DATAGRAM": "both",
    }
    rows = [
        (value, f"`{name}`", by[name], payload.get(name, "empty"), FRAME_MEANING[name])
        for name, value in frame_types().items()
    ]
    return table(("type", "frame", "sent by", "payload", "meaning"), *rows)


def messages_table() -> str:
    """Every message."""
    rows = [
        (form.number, f"`{name_of(kind)}`", SENDS[form.sender], payload(form), MESSAGE_MEANING[name_of(kind)])
        for kind, form in FORMS.items()
    ]
    return table(("number", "message", "sent by", "payload", "meaning"), *rows)


def payload(form: Form) -> str:
    """The encoding and the size of a message."""
    bounds = BOUNDS[form.number]
    return ("JSON, " if form.layout is None else "packed, " if bounds.most else "") + sizes(bounds.least, bounds.most)


def kind_columns(source: Table, code: int) -> tuple[str, str, int]:
    """Who opens a kind of stream, who sends on it, and how many are open at once."""
    kind = source.streams[code]
    return SENDS[kind.opener], "both" if kind.sender is None else SENDS[kind.sender], kind.at_once


def streams_table() -> str:
    """Every kind of stream of the channel."""
    rows = []
    for stream, (subject, when, text) in STREAM_MEANING.items():
        opener, sender, at_once = kind_columns(link.STREAMS, stream)
        assert sender == ("both" if stream is Stream.RELAY else opener)
        rows.append((int(stream), f"`{stream.name}`", opener, subject, when, at_once, text))
    return table(("kind", "stream", "opened by", "subject", "may be opened while", "at once", "carries"), *rows)


def relay_table() -> str:
    """Every kind of stream, and the message, of the relay's stream."""
    rows: list[tuple[object, ...]] = []
    for code, text in RELAY_MEANING.items():
        kind = egress.STREAMS.streams[code]
        opener, sender, at_once = kind_columns(egress.STREAMS, code)
        carried = "datagrams" if kind.datagrams else "bytes"
        assert kind.answered
        name = {egress.TCP: "TCP", egress.UDP: "UDP"}[code]
        rows.append((code, f"`{name}`", opener, sender, carried, sizes(kind.least, kind.most), at_once, text))
    head = ("kind", "stream", "opened by", "data from", "carries", "payload of OPEN", "at once", "meaning")
    return table(head, *rows)


def states_table(meaning: Mapping[Any, str], following: Mapping[tuple[Any, type[Any]], Any]) -> str:
    """Every state, and who may send which message in it."""
    rows = []
    for state, text in meaning.items():
        sends = {
            role: ", ".join(
                f"`{name_of(kind)}`" for begin, kind in following if begin is state and FORMS[kind].sender is role
            )
            or "-"
            for role in Role
        }
        rows.append((state.value, text, sends[Role.GUEST], sends[Role.HOST]))
    return table(("state", "meaning", "guest may send", "host may send"), *rows)


def bounds_table() -> str:
    """Every number."""
    guest = max(link.DATA_MAX, *[bounds.most for bounds in BOUNDS.values() if bounds.sender is Role.GUEST])
    large = max(bounds.most for bounds in BOUNDS.values())
    return table(
        ("what", "bound", "name in the code"),
        ("payload of DATA", size(link.DATA_MAX), "`link.DATA_MAX`"),
        ("payload of DATA on the relay's stream", size(egress.DATA_MAX), "`egress.DATA_MAX`"),
        ("payload of a message of the guest", size(guest), "`messages.BOUNDS`"),
        ("payload of the messages OPEN and EXEC", size(large), "`messages.BOUNDS`"),
        ("a text of the guest", f"{messages.TEXT_MAX} characters", "`messages.TEXT_MAX`"),
        ("window of a stream", size(link.WINDOW), "`link.WINDOW`"),
        ("window of a stream of the relay", size(egress.WINDOW), "`egress.WINDOW`"),
        ("commands at once", link.COMMANDS_MAX, "`link.COMMANDS_MAX`"),
        ("files that go in", link.FILES_MAX, "`link.FILES_MAX`"),
        ("flows of each transport at once", egress.FLOWS_MAX, "`egress.FLOWS_MAX`"),
        ("bytes of a guest's frame that the host holds", size(guest + streams.HEADER.size), "header and payload"),
    )


PARTS: Final[dict[str, Callable[[], str]]] = {
    "frames": frames_table,
    "messages": messages_table,
    "streams": streams_table,
    "states": lambda: states_table(STATE_MEANING, NEXT),
    "commands": lambda: states_table(COMMAND_MEANING, COMMAND_NEXT),
    "relay": relay_table,
    "bounds": bounds_table,
}
MARKED: Final = re.compile(r"(?s)(<!-- ([a-z]+): made from the code -->\n).*?(\n<!-- end -->)")


def renewed(text: str) -> str:
    """The page with every part regenerated."""
    return MARKED.sub(lambda match: match[1] + PARTS[match[2]]() + match[3], text)


def test_the_page_shows_the_tables_of_the_code() -> None:
    """The tables of docs/guest-channel.md match the code."""
    text = PAGE.read_text(encoding="utf-8")
    assert [match[2] for match in MARKED.finditer(text)] == list(PARTS)
    assert text == renewed(text), "run: python -m tests.unit.test_channel_docs"


@pytest.mark.parametrize(
    ("described", "there"),
    [
        (FRAME_MEANING, set(frame_types())),
        (MESSAGE_MEANING, {name_of(kind) for kind in FORMS}),
        ({stream: texts[-1] for stream, texts in STREAM_MEANING.items()}, set(link.STREAMS.streams)),
        (RELAY_MEANING, set(egress.STREAMS.streams)),
        (STATE_MEANING, set(State)),
        (COMMAND_MEANING, set(CommandState)),
    ],
    ids=["frames", "messages", "streams", "relay", "states", "commands"],
)
def test_every_item_is_described(described: dict[object, str], there: set[object]) -> None:
    """Each frame, message, stream and state has a description, and none is left over."""
    assert described.keys() == there
    assert all(text.endswith(".") for text in described.values())


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
