"""The tables and the diagrams of docs/guest-channel.md match the code.

Run as a program (python -m tests.unit.test_channel_docs) to regenerate them.
"""

from __future__ import annotations

import re
import struct
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.fuzz.fuzz_channel import frame
from x07_sandbox.channel import connection, egress, link, messages, streams
from x07_sandbox.channel.link import COMMAND_NEXT, NEXT, CommandState, State, Stream
from x07_sandbox.channel.messages import BOUNDS, FORMS, Form, Shape
from x07_sandbox.channel.streams import Role, Table

if TYPE_CHECKING:
    import enum
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
ID: Final = "The id of the command."
FIELD_MEANING: Final = {
    "HELLO.protocol": "Protocol number of the agent.",
    "WARM.preload": "Python modules to import; null if the waiting process is no interpreter.",
    "WARM.limits": "The limits that EXEC will probably have.",
    "WARM.tmp_bytes": "The size that OPEN will probably have.",
    "WARM.hostname": "The host name that OPEN will probably have, so that it need not be set again.",
    "WARM.out_writable": "As OPEN will probably have it.",
    "WARM.network": "Whether OPEN will configure a relay.",
    "WARM.commands": "Programs of the image to run once, so that the kernel has read them.",
    "SEED.unix_ns": "The time to set, in nanoseconds since 1970.",
    "SEED.entropy": "Random bytes for the kernel's entropy pool.",
    "SEED.nonce": "Random bytes, which the answer repeats.",
    "SEED.machine_id": "The id to write to /etc/machine-id, in hexadecimal.",
    "SEEDED.nonce": "The nonce of SEED.",
    "OPEN.hostname": "Host name that programs see.",
    "OPEN.mem_bytes": "Memory of all commands together.",
    "OPEN.tasks": "Processes and threads of all commands together.",
    "OPEN.tmp_bytes": "The size of /tmp and of /dev/shm.",
    "OPEN.files": "The files that the host sends; file N on a stream with the subject N.",
    "OPEN.mounts": "The folders that programs see.",
    "OPEN.confine": "What programs may do.",
    "OPEN.network": "Configuration of the egress relay; null without a relay.",
    "OPEN.out_writable": "Whether programs may write to /x07/out.",
    "OPEN.room": "Limits on the contents of changed files.",
    "OPEN.root": "Whether programs are root in a user namespace of their own, over a writable layer of the system.",
    "EXEC.id": "From 1, and higher than the id of any command before.",
    "EXEC.argv": "The program and its arguments.",
    "EXEC.env": "The complete environment.",
    "EXEC.cwd": "Working directory.",
    "EXEC.limits": "The limits of this command.",
    "EXEC.service": 'Empty for a program, else a service of the agent: `"files"` or `"connect"`.',
    "STARTED.id": ID,
    "EXEC.merge": "Whether standard error goes to STDOUT.",
    "EXEC.terminal": "Size of the terminal that the command gets; null for none. Its output goes to STDOUT.",
    "EXEC.detached": "Whether the command has no streams.",
    "STOP.id": ID,
    "STOP.signal": "The number of the signal.",
    "RESIZE.id": ID,
    "RESIZE.rows": "Rows of characters.",
    "RESIZE.columns": "Columns of characters.",
    "DENIED.id": ID,
    "DENIED.by": "`kernel` or `seccomp`; `network` for a connection or lookup in a session without connections.",
    "DENIED.call": "Name of the system call. By `network`: `connect` or `lookup`.",
    "DENIED.errno": "The error that the call returned.",
    "DENIED.path": "The path that the call named, or empty. With a final slash it is a folder for a new entry. "
    "For a call that raises a limit, it is `core`, `cpu` or `nofile`. "
    "By `network`: `ADDRESS:PORT`, or the name that was looked up.",
    "DENIED.write": "Whether the call would have changed something.",
    "DENIED.times": "How many times it was denied.",
    "EXITED.id": ID,
    "EXITED.wait_status": "The status, as wait(2) returns it.",
    "EXITED.cpu_us": "CPU time of the command's processes, in microseconds.",
    "EXITED.memory_peak_bytes": "Peak memory of these processes.",
    "EXITED.oom_kills": "Number of these processes that the kernel killed for lack of memory.",
    "EXITED.tasks_peak": "Peak number of processes and threads.",
    "EXITED.tasks_refused": "Number of processes and threads that were refused.",
    "EXITED.cpu_exceeded": "The agent killed the command at its CPU time limit.",
    "EXITED.stopped": "A signal had stopped the command when STOP came.",
    "EXITED.disk_full": "The scratch disk is full.",
    "EXITED.memory_full": "One of the folders in memory is full: /tmp or /dev/shm.",
    "EXITED.denials_lost": "Number of denials, or of records of denials, that are not listed.",
    "EXITED.wall_us": "Time since the agent let the command start, in microseconds, by the guest's clock.",
    "CLOSE.after": "The id of a command whose end to wait for; 0, or that of a command that has ended, to close now.",
    "CLOSE.output": "The one file of /x07/out to send, or folder to send as a tree, or null.",
    "CLOSE.left": "Limits on the files to send from the private folders, or null for none.",
    "CLOSED.output_bytes": "Size of the output file; null if it was not sent.",
    "CLOSED.output_problem": "Why the output file was not sent.",
    "CLOSED.left_files": "Number of files left in the private folders.",
    "CLOSED.left_bytes": "Their size in bytes.",
    "FAILED.id": "The id of the command, or 0 if the session failed.",
    "FAILED.stage": "What the agent was doing.",
    "FAILED.errno": "The number of the error, or 0.",
    "FAILED.message": "The error in words.",
}
RECORD_MEANING: Final = {
    "CommandLimits.mem_bytes": "Memory.",
    "CommandLimits.tasks": "Processes and threads.",
    "CommandLimits.cpu_ms": "CPU time, in milliseconds.",
    "CommandLimits.fds": "Open files of a process.",
    "CommandLimits.core_bytes": "Size of a core file, or -1 for no limit.",
    "InputFile.path": "Where the agent puts the file.",
    "InputFile.mode": "Its permission bits.",
    "InputFile.kind": "`file` or `tree`.",
    "InputFile.size": "Number of bytes on the stream.",
    "Mount.tree": "Number of the input file, a tree; null for the private working folder.",
    "Mount.sub": "The part of the tree to mount; empty for all of it.",
    "Mount.at": "The path for programs.",
    "Mount.write": "Whether it is writable.",
    "Mount.changes": "Whether its changes are sent at the end.",
    "Confine.threads": "Whether programs may start threads.",
    "Confine.spawn": "Whether programs may start processes.",
    "Confine.execute": "Whether programs may execute other programs.",
    "Confine.programs": "The only paths that may be executed; null if all may be.",
    "Confine.prefixes": "Prefixes of more such paths.",
    "Confine.alone": "Whether the inputs contain no other executable.",
    "Network.names": "The address that stands for each name.",
    "Network.wildcards": "Suffixes, each with the first of 256 addresses for the names below it.",
    "Network.tcp": "Allowed targets of TCP: first address, last address, ports.",
    "Network.udp": "Allowed targets of UDP.",
    "Room.file_bytes": "The largest content of one file.",
    "Room.total_bytes": "The contents of all files together.",
    "Terminal.rows": "Rows of characters.",
    "Terminal.columns": "Columns of characters.",
    "Output.path": "Path of the file or folder.",
    "Output.max_bytes": "The largest size that is sent.",
    "Output.is_tree": "Whether it is a folder.",
    "Left.files": "The most files to send. With 0, the files of the working folder are only counted.",
    "Left.bytes": "The most bytes to send.",
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
TYPE_TEXT: Final = {int: "whole number", str: "text", bool: "true or false", bytes: "bytes"}
PACKED_TEXT: Final = {"B": "u8", "H": "u16", "I": "u32", "Q": "u64, at most 2^63 - 1", "?": "true or false (u8)"}


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


def number(value: int) -> str:
    """A bound, written as a power of two where possible."""
    if value >= 1 << 16 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    if value >= 1 << 16 and value & (value + 1) == 0:
        return f"2^{value.bit_length()} - 1"
    return str(value)


def shape_text(shape: Shape) -> str:
    """The bounds of a field of a guest's message, in words."""
    text = {
        int: f"whole number, {number(shape.lo)} to {number(shape.hi)}",
        str: f"text, at most {shape.hi} characters",
        bool: "true or false",
    }[shape.type]
    return text + (", or null" if shape.optional else "")


def type_text(kind: Any) -> str:  # noqa: ANN401 - an annotation
    """An annotation, in words."""
    if kind in TYPE_TEXT:
        return TYPE_TEXT[kind]
    of = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return f"{type_text(of[0])}, or null"
    if typing.get_origin(kind) is list:
        inner = type_text(of[0]) if of[0] is not Any else "values"
        return f"list of {inner if inner.startswith(('`', 'values')) else plural(inner)}"
    if typing.get_origin(kind) is dict:
        return f"object of {plural(type_text(of[1]))}"
    return f"`{kind.__name__}`"


def plural(text: str) -> str:
    """The plural of a type's name."""
    return "lists" + text.removeprefix("list") if text.startswith("list") else f"{text}s"


def packed_text(layout: struct.Struct) -> list[str]:
    """The fields of a packed message, in words."""
    codes = re.findall(r"\d+s|\w|\?", layout.format)
    return [PACKED_TEXT.get(code) or f"{code[:-1]} bytes" for code in codes]


def holds(kind: type[Any], form: Form) -> list[str]:
    """What each field of a message holds."""
    if form.layout is not None:
        return packed_text(form.layout)
    if form.shapes:
        return [shape_text(shape) for shape in form.shapes]
    return [type_text(annotation) for annotation in typing.get_type_hints(kind).values()]


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


def fields_table() -> str:
    """Every field of every message."""
    rows = [
        (f"`{name_of(kind)}`", f"`{field}`", text, FIELD_MEANING[f"{name_of(kind)}.{field}"])
        for kind, form in FORMS.items()
        for field, text in zip(kind._fields, holds(kind, form), strict=True)
    ]
    return table(("message", "field", "holds", "meaning"), *rows)


def records_table() -> str:
    """Every field of the records in messages."""
    rows = [
        (f"`{kind.__name__}`", f"`{field}`", type_text(annotation), RECORD_MEANING[f"{kind.__name__}.{field}"])
        for kind in RECORDS
        for field, annotation in typing.get_type_hints(kind).items()
    ]
    return table(("record", "field", "holds", "meaning"), *rows)


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


def codes_table() -> str:
    """The codes of ANSWER and RESET on the relay's stream."""
    names = [name for name, value in vars(egress).items() if name.isupper() and not name.startswith("_")]
    first = names.index("OK")
    codes = {getattr(egress, name): name for name in names[first : first + egress.STREAMS.code_max + 1]}
    return table(("code", "name in `channel/egress`"), *[(code, f"`{name}`") for code, name in codes.items()])


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


def diagram(following: Mapping[tuple[Any, type[Any]], Any], start: str) -> str:
    """The transitions, as a diagram; those from a state to itself are left to the table."""
    changes: dict[tuple[enum.Enum, enum.Enum], list[str]] = {}
    for (begin, kind), end in following.items():
        if begin is not end:
            changes.setdefault((begin, end), []).append(f"{SENDS[FORMS[kind].sender]} {name_of(kind)}")
    lines = [f"    {begin.value} --> {end.value}: {', '.join(texts)}" for (begin, end), texts in changes.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", f"    [*] --> {start}", *lines, "```"])


def bounds_table() -> str:
    """Every number."""
    guest = max(link.DATA_MAX, *[bounds.most for bounds in BOUNDS.values() if bounds.sender is Role.GUEST])
    large = max(bounds.most for bounds in BOUNDS.values())
    return table(
        ("what", "bound", "name in the code"),
        ("header", size(streams.HEADER.size), "`streams.HEADER`"),
        ("payload of DATA", size(link.DATA_MAX), "`link.DATA_MAX`"),
        ("payload of DATA on the relay's stream", size(egress.DATA_MAX), "`egress.DATA_MAX`"),
        ("payload of a message of the guest", size(guest), "`messages.BOUNDS`"),
        ("payload of the messages OPEN and EXEC", size(large), "`messages.BOUNDS`"),
        ("a text of the guest", f"{messages.TEXT_MAX} characters", "`messages.TEXT_MAX`"),
        ("window of a stream", size(link.WINDOW), "`link.WINDOW`"),
        ("window of a stream of the relay", size(egress.WINDOW), "`egress.WINDOW`"),
        ("CREDIT is sent after", "a quarter of the window", "`Streams.consumed`"),
        ("commands at once", link.COMMANDS_MAX, "`link.COMMANDS_MAX`"),
        ("files that go in", link.FILES_MAX, "`link.FILES_MAX`"),
        ("flows of each transport at once", egress.FLOWS_MAX, "`egress.FLOWS_MAX`"),
        ("bytes of a guest's frame that the host holds", size(guest + streams.HEADER.size), "header and payload"),
        ("bytes in one read", size(connection.READ_SIZE), "`connection.READ_SIZE`"),
        ("small frames that are written together", size(streams._WRITE), "`Streams.data_to_send`"),  # noqa: SLF001
    )


PARTS: Final[dict[str, Callable[[], str]]] = {
    "frames": frames_table,
    "messages": messages_table,
    "fields": fields_table,
    "records": records_table,
    "streams": streams_table,
    "states": lambda: states_table(STATE_MEANING, NEXT),
    "diagram": lambda: diagram(NEXT, State.WAITING.value),
    "commands": lambda: states_table(COMMAND_MEANING, COMMAND_NEXT),
    "lives": lambda: diagram(COMMAND_NEXT, f"{CommandState.STARTING.value}: host EXEC"),
    "relay": relay_table,
    "codes": codes_table,
    "bounds": bounds_table,
}
MARKED: Final = re.compile(r"(?s)(<!-- ([a-z]+): made from the code -->\n).*?(\n<!-- end -->)")


def renewed(text: str) -> str:
    """The page with every part regenerated."""
    return MARKED.sub(lambda match: match[1] + PARTS[match[2]]() + match[3], text)


def test_the_page_shows_the_tables_of_the_code() -> None:
    """The tables and the diagrams of docs/guest-channel.md match the code."""
    text = PAGE.read_text(encoding="utf-8")
    assert [match[2] for match in MARKED.finditer(text)] == list(PARTS)
    assert text == renewed(text), "run: python -m tests.unit.test_channel_docs"


@pytest.mark.parametrize(
    ("described", "there"),
    [
        (FRAME_MEANING, set(frame_types())),
        (MESSAGE_MEANING, {name_of(kind) for kind in FORMS}),
        (FIELD_MEANING, {f"{name_of(kind)}.{field}" for kind in FORMS for field in kind._fields}),
        (RECORD_MEANING, {f"{kind.__name__}.{field}" for kind in RECORDS for field in kind._fields}),
        ({stream: texts[-1] for stream, texts in STREAM_MEANING.items()}, set(link.STREAMS.streams)),
        (RELAY_MEANING, set(egress.STREAMS.streams)),
        (STATE_MEANING, set(State)),
        (COMMAND_MEANING, set(CommandState)),
    ],
    ids=["frames", "messages", "fields", "records", "streams", "relay", "states", "commands"],
)
def test_every_item_is_described(described: dict[object, str], there: set[object]) -> None:
    """Each frame, message, field, stream and state has a description, and none is left over."""
    assert described.keys() == there
    assert all(text.endswith(".") for text in described.values())


def test_every_record_in_a_message_is_described() -> None:
    """Each record that a message contains has a table of its fields."""
    text = fields_table()
    assert set(re.findall(r"`([A-Z][a-z]\w+)`", text)) == {kind.__name__ for kind in RECORDS}


def test_the_header_is_the_one_that_is_described() -> None:
    """The bytes of the example on the page are those of the code."""
    wire = frame(streams.DATA, 0x1234, b"abc")
    assert wire == bytes.fromhex("04 00 0000 00001234 00000003") + b"abc"
    assert "04  00  00 00  00 00 12 34  00 00 00 03  61 62 63" in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
