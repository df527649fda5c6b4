"""The tables and the diagram of docs/guest-channel.md match the code.

Run as a program (python -m tests.unit.test_channel_docs) to regenerate them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from x07_sandbox.channel.frames import BODIES, PACKED, SENDER, Kind, Role, Shape, Stream, payload_max, stream_sender

from x07_sandbox.channel import connection, frames
from x07_sandbox.channel.link import DATA_STATES, NEXT, State

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "guest-channel.md"

FRAME_MEANING: Final = {
    Kind.HELLO: "The agent is up, and speaks this protocol.",
    Kind.WARM: "Prepare everything that does not depend on a job. Then the VM is saved, or waits for a job.",
    Kind.WARMED: "Everything is prepared.",
    Kind.SEED: "Clock, entropy and names for a resumed VM.",
    Kind.SEEDED: "Clock and entropy are set.",
    Kind.START: "The job. Its files and input follow as data.",
    Kind.STARTED: "The program was executed. Its time counts from this frame.",
    Kind.DATA: "At least one byte of a stream.",
    Kind.EOF: "The stream has ended.",
    Kind.CREDIT: "The receiver accepts this many more bytes of the stream (u32, big endian, at least 1).",
    Kind.STOP: "End the program.",
    Kind.DENIED: "Something that the program was denied. At most 64 are sent, before EXITED.",
    Kind.EXITED: "The program has ended. The output file follows if START requests one and it exists.",
    Kind.FAILED: "The agent cannot continue.",
}
FIELD_MEANING: Final = {
    "HELLO.protocol": "Protocol number of the agent.",
    "WARM.preload": "List of texts: Python modules to import.",
    "WARM.hostname": "The host name that START will probably have, so that it need not be set again.",
    "WARM.network": "Whether START will list hosts.",
    "WARM.output": "Whether START will probably request a file.",
    "WARM.limits": "The limits that START will probably have.",
    "WARM.commands": "List of lists of texts: programs of the image to run once, so that the kernel has read them.",
    "SEED.unix_ns": "The time to set, in nanoseconds since 1970.",
    "SEED.entropy": "Random bytes for the kernel's entropy pool.",
    "SEED.nonce": "Random bytes, which the answer repeats.",
    "SEED.machine_id": "The id to write to /etc/machine-id, in hexadecimal.",
    "SEEDED.nonce": "The nonce of SEED.",
    "START.run_id": "Job id.",
    "START.hostname": "Host name that the program sees.",
    "START.phase": "`build` or `run`.",
    "START.argv": "List of texts: the program and its arguments.",
    "START.env": "Object of texts: the complete environment.",
    "START.cwd": "Working directory.",
    "START.files": "List of `{path, mode, kind, bytes}`. The kind is `file`, `archive` or `tree`. "
    "N is sent on stream 16 + N.",
    "START.mounts": "List of `{tree, sub, at, write, changes}`: the stream of a tree (or null for a private folder), "
    "the part of the tree, its path for the program, whether it is writable, and whether changes are returned.",
    "START.limits": "Object of whole numbers: the limits that the agent enforces.",
    "START.confine": "`{threads, spawn, execute, programs, prefixes, alone}`: what is allowed. `programs` and "
    "`prefixes` list what may be executed; without a list they are null and empty. `alone`: the inputs hold no other "
    "executable.",
    "START.network": (
        "Configuration of the egress relay, or null: `{names, wildcards, tcp, udp}`. It has the address that stands "
        "for each name, the address blocks for names below a suffix, and the allowed destinations as "
        "`[first, last, ports]`."
    ),
    "START.output": "`{path, max_bytes}` of the one file to return, or null.",
    "START.room": "Limits `{file_bytes, total_bytes}` on the contents of changed files, or null without granted "
    "folders.",
    "START.left": (
        "Limits `{files, bytes}` on the files to return from the program's private folders, or null for none. "
        "If `files` is 0, the files of the working folder are only counted."
    ),
    "DENIED.by": "`kernel` or `seccomp`.",
    "DENIED.call": "Name of the system call.",
    "DENIED.errno": "The error that the call returned.",
    "DENIED.path": "The path that the call named, or empty. With a final slash it is a folder for a new entry.",
    "DENIED.write": "Whether the call would have changed something.",
    "DENIED.count": "How many times it was denied.",
    "EXITED.wait_status": "The status, as wait(2) returns it.",
    "EXITED.cpu_us": "CPU time of the program and its children, in microseconds.",
    "EXITED.memory_peak_bytes": "Peak memory of these processes.",
    "EXITED.oom_kills": "Number of these processes that the kernel killed for lack of memory.",
    "EXITED.tasks_peak": "Peak number of processes and threads.",
    "EXITED.tasks_refused": "Number of processes and threads that were refused.",
    "EXITED.cpu_exceeded": "The agent killed the program at its CPU time limit.",
    "EXITED.stopped": "A signal had stopped the program when STOP came.",
    "EXITED.disk_full": "The scratch disk is full.",
    "EXITED.memory_full": "One of the program's folders in memory is full: /tmp or /dev/shm.",
    "EXITED.denials_lost": "Number of denials, or of records of denials, that are not listed.",
    "EXITED.left_files": "Number of files left in the folders that START selects.",
    "EXITED.left_bytes": "Their size in bytes.",
    "EXITED.output_bytes": "Size of the output file; null if none follows.",
    "EXITED.output_problem": "Why no output file follows.",
    "FAILED.stage": "What the agent was doing.",
    "FAILED.errno": "The number of the error, or 0.",
    "FAILED.message": "The error in words.",
}
STREAM_MEANING: Final = {
    Stream.STDIN: "The program's standard input.",
    Stream.STDOUT: "Its standard output.",
    Stream.STDERR: "Its standard error.",
    Stream.OUTPUT_FILE: "The file that START requests, after EXITED.",
    Stream.CHANGES: "The program's changes in the mounts that START selects, after EXITED.",
    Stream.LEFT_FILES: "Files left in the program's private folders, if START requests any, after EXITED.",
    Stream.FIRST_FILE: "Files to copy in, in the order of START.",
}
STATE_MEANING: Final = {
    State.WAITING: "The guest boots.",
    State.GREETED: "The agent has sent HELLO.",
    State.WARMING: "The agent prepares the program's environment.",
    State.WARM: "The agent waits. A clone of a saved VM starts here.",
    State.SEEDING: "The agent sets clock and entropy.",
    State.READY: "The agent waits for a job.",
    State.PREPARING: "Files are copied in. Then the program is confined and executed.",
    State.RUNNING: "The program runs.",
    State.COLLECTING: "The program has ended. Its output file, changes and files may follow.",
    State.FAILED: "The agent has given up.",
}
SENDS: Final = {Role.HOST: "host", Role.GUEST: "guest"}


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


def number(value: int) -> str:
    """A bound, written as a power of two where possible."""
    if value >= 1 << 16 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    if value >= 1 << 16 and value & (value + 1) == 0:
        return f"2^{value.bit_length()} - 1"
    return str(value)


def bounds(shape: Shape) -> str:
    """The bounds of a field, in words."""
    text = {
        "int": f"whole number, {number(shape.lo)} to {number(shape.hi)}",
        "text": f"text, {shape.lo} to {shape.hi} characters"
        if shape.lo != shape.hi
        else f"text, {shape.lo} characters",
        "bool": "true or false",
        "bytes": f"{shape.hi} bytes",
        "any": "see right",
    }[shape.kind]
    return text + (", or null" if shape.optional else "")


def frames_table() -> str:
    """Every frame."""
    both = {Kind.DATA: "the stream's sender", Kind.EOF: "the stream's sender", Kind.CREDIT: "the stream's receiver"}
    rows = [
        (
            int(kind),
            f"`{kind.name}`",
            SENDS[SENDER[kind]] if kind in SENDER else both[kind],
            size(payload_max(kind)),
            text,
        )
        for kind, text in ((kind, FRAME_MEANING[kind]) for kind in Kind)
    ]
    return table(("type", "frame", "sent by", "largest payload", "meaning"), *rows)


def bodies_table() -> str:
    """Every field of every control frame."""
    rows = [
        (f"`{kind.name}`", f"`{name}`", bounds(shape), FIELD_MEANING[f"{kind.name}.{name}"])
        for kind, fields in BODIES.items()
        for name, shape in fields.items()
    ]
    packed = ", ".join(f"`{kind.name}`" for kind in PACKED if BODIES[kind])
    empty = ", ".join(f"`{kind.name}`" for kind, fields in BODIES.items() if not fields)
    return table(("frame", "field", "holds", "meaning"), *rows) + f"\n\nPacked: {packed}. Without fields: {empty}."


def streams_table() -> str:
    """Every stream."""
    rows = []
    for stream, text in STREAM_MEANING.items():
        sender = stream_sender(stream)
        assert sender is not None
        numbers = f"{int(stream)} to {frames.LAST_FILE}" if stream is Stream.FIRST_FILE else int(stream)
        states = ", ".join(state.value for state in State if state in DATA_STATES[stream])
        rows.append((numbers, SENDS[sender], states, text))
    return table(("stream", "sent by", "data allowed while", "meaning"), *rows)


def states_table() -> str:
    """Every state, and who may send which control frame in it."""
    rows = []
    for state, text in STATE_MEANING.items():
        sends = {
            role: ", ".join(f"`{kind.name}`" for begin, kind in NEXT if begin is state and SENDER[kind] is role) or "-"
            for role in Role
        }
        rows.append((state.value, text, sends[Role.GUEST], sends[Role.HOST]))
    return table(("state", "meaning", "guest may send", "host may send"), *rows)


def diagram() -> str:
    """The states, as a diagram."""
    lines = [
        f"    {begin.value} --> {end.value}: {SENDS[SENDER[kind]]} {kind.name}" for (begin, kind), end in NEXT.items()
    ]
    return "\n".join(["```mermaid", "stateDiagram-v2", f"    [*] --> {State.WAITING.value}", *lines, "```"])


def bounds_table() -> str:
    """Every number."""
    guest = max(payload_max(kind) for kind in Kind if SENDER.get(kind) is not Role.HOST)
    return table(
        ("what", "bound", "name in the code"),
        ("header", size(frames.HEADER.size), "`frames.HEADER`"),
        ("payload of data", size(frames.DATA_MAX), "`frames.DATA_MAX`"),
        ("payload of control frames", size(frames.CONTROL_MAX), "`frames.CONTROL_MAX`"),
        ("payload of START", size(frames.START_MAX), "`frames.START_MAX`"),
        ("bytes of one stream without credit", size(frames.WINDOW), "`frames.WINDOW`"),
        ("credit is sent after", size(frames.WINDOW // 4), "a quarter of `frames.WINDOW`"),
        ("files that go in", frames.LAST_FILE - Stream.FIRST_FILE + 1, "`frames.LAST_FILE`"),
        ("bytes of a frame of the guest's that the host holds", size(guest + frames.HEADER.size), "header and data"),
        ("bytes in one read", size(connection.READ_SIZE), "`connection.READ_SIZE`"),
        ("bytes in one write", size(connection.WRITE_SIZE), "`connection.WRITE_SIZE`"),
    )


PARTS: Final[dict[str, Callable[[], str]]] = {
    "frames": frames_table,
    "bodies": bodies_table,
    "streams": streams_table,
    "states": states_table,
    "diagram": diagram,
    "bounds": bounds_table,
}
MARKED: Final = re.compile(r"(?s)(<!-- ([a-z]+): made from the code -->\n).*?(\n<!-- end -->)")


def renewed(text: str) -> str:
    """The page with every part regenerated."""
    return MARKED.sub(lambda match: match[1] + PARTS[match[2]]() + match[3], text)


def test_the_page_shows_the_tables_of_the_code() -> None:
    """The tables and the diagram of docs/guest-channel.md match the code."""
    text = PAGE.read_text(encoding="utf-8")
    assert [match[2] for match in MARKED.finditer(text)] == list(PARTS)
    assert text == renewed(text), "run: python -m tests.unit.test_channel_docs"


@pytest.mark.parametrize(
    ("described", "there"),
    [
        (FRAME_MEANING, set(Kind)),
        (FIELD_MEANING, {f"{kind.name}.{name}" for kind, fields in BODIES.items() for name in fields}),
        (STREAM_MEANING, set(DATA_STATES)),
        (STATE_MEANING, set(State)),
    ],
    ids=["frames", "fields", "streams", "states"],
)
def test_every_item_is_described(described: dict[object, str], there: set[object]) -> None:
    """Each frame, field, stream and state has a description, and none is left over."""
    assert described.keys() == there
    assert all(text.endswith(".") for text in described.values())


def test_the_header_is_the_one_that_is_described() -> None:
    """The header bytes of the example on the page are those of the code."""
    assert frames.encode(Kind.DATA, 0x1234, b"abc") == bytes.fromhex("00000003 06 00 1234") + b"abc"
    assert "00 00 00 03  06  00  12 34  61 62 63" in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
