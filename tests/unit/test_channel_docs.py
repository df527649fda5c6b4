"""Promises of docs/guest-channel.md: its tables and its diagram match the code.

Run `python -m tests.unit.test_channel_docs` to write them again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from x07_sandbox.channel import connection, frames
from x07_sandbox.channel.frames import BODIES, PACKED, SENDER, Kind, Role, Shape, Stream, payload_max, stream_sender
from x07_sandbox.channel.link import DATA_STATES, NEXT, State

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "guest-channel.md"

FRAME_MEANING: Final = {
    Kind.HELLO: "The agent is ready, and names its protocol.",
    Kind.WARM: "Prepare everything that does not depend on the job; the host takes the snapshot after the answer.",
    Kind.WARMED: "The preparation is done.",
    Kind.SEED: "Clock, entropy and ids that every clone needs fresh.",
    Kind.SEEDED: "Clock and entropy are set.",
    Kind.START: "The job. Its files and its input follow as data.",
    Kind.STARTED: "The program was executed; its wall time starts.",
    Kind.DATA: "Bytes of a stream, at least one.",
    Kind.EOF: "The end of a stream.",
    Kind.CREDIT: "How many more bytes of the stream are accepted: u32, big endian, at least 1.",
    Kind.STOP: "Kill the program.",
    Kind.DENIED: "One kind of denied operation; sent before EXITED, at most 64 times.",
    Kind.EXITED: "The program has ended; files may follow.",
    Kind.FAILED: "The job failed in the guest.",
}
FIELD_MEANING: Final = {
    "HELLO.protocol": "The agent's protocol version.",
    "WARM.preload": "List of texts: Python modules to import.",
    "WARM.hostname": "The likely host name of START; equal settings are not applied again.",
    "WARM.network": "Whether START will have `network`.",
    "WARM.output": "Whether START will likely have `output`.",
    "WARM.limits": "The likely limits of START.",
    "WARM.commands": "List of lists of texts: programs of the image to run once, so that they are in the page cache.",
    "SEED.unix_ns": "Time to set, in nanoseconds since 1970.",
    "SEED.entropy": "Random bytes for the kernel's pool.",
    "SEED.nonce": "Random bytes that the answer must repeat.",
    "SEED.machine_id": "Content of /etc/machine-id, which has it in hexadecimal.",
    "SEEDED.nonce": "The nonce of SEED.",
    "START.run_id": "Id of the job.",
    "START.hostname": "Host name that the program sees.",
    "START.phase": "`build` or `run`.",
    "START.argv": "List of texts: the program and its arguments.",
    "START.env": "Object of texts: the whole environment.",
    "START.cwd": "Working directory.",
    "START.files": "List of `{path, mode, kind, bytes}` with kind `file`, `archive` or `tree`; "
    "file N arrives on stream 16 + N.",
    "START.mounts": "List of `{tree, sub, at, write, changes}`: mount the part `sub` of a tree (its stream; null: the "
    "private working folder) at the path `at`, writable or not, and whether to send its changes.",
    "START.limits": "Object of integers: the limits that the agent enforces.",
    "START.confine": "`{threads, spawn, execute, programs, prefixes, alone}`: what is allowed. programs and prefixes: "
    "paths and path prefixes of executable programs; null and empty without a list. alone: whether the inputs contain "
    "nothing else that could be executed.",
    "START.network": "`{names, wildcards, tcp, udp}` for the relay, or null: addresses that stand for names, address "
    "blocks for names below a suffix, and allowed targets as `[first, last, ports]`.",
    "START.output": "`{path, max_bytes}` of the output file, or null.",
    "START.left": "`{files, bytes}`: how many of the files left in private folders to send, or null to ignore them. "
    "With 0 files, those of the working folder are only counted.",
    "DENIED.by": "`kernel` or `seccomp`.",
    "DENIED.call": "Name of the system call.",
    "DENIED.errno": "Its error number.",
    "DENIED.path": "Its path, or empty; with a trailing slash, the folder in which an entry was to be created.",
    "DENIED.write": "Whether it was a change.",
    "DENIED.count": "How often it was denied.",
    "EXITED.wait_status": "As returned by wait(2).",
    "EXITED.cpu_us": "CPU time of the program and its children, in microseconds.",
    "EXITED.memory_peak_bytes": "Their peak memory use.",
    "EXITED.oom_kills": "How many of them the kernel killed for lack of memory.",
    "EXITED.tasks_peak": "Peak number of processes and threads.",
    "EXITED.tasks_refused": "How often the task limit was hit.",
    "EXITED.cpu_exceeded": "The agent killed the program at its CPU time limit.",
    "EXITED.stopped": "The program was stopped by a signal when STOP arrived.",
    "EXITED.disk_full": "The scratch disk is full.",
    "EXITED.memory_full": "A folder in memory is full: /tmp or /dev/shm.",
    "EXITED.denials_lost": "Number of denials, or audit records of them, that were lost.",
    "EXITED.left_files": "Number of files left in private folders.",
    "EXITED.left_bytes": "Their size.",
    "EXITED.output_bytes": "Size of the output file; null if none follows.",
    "EXITED.output_problem": "Why none follows.",
    "FAILED.stage": "The failed stage.",
    "FAILED.errno": "Error number, 0 for none.",
    "FAILED.message": "Error message.",
}
STREAM_MEANING: Final = {
    Stream.STDIN: "The program's standard input.",
    Stream.STDOUT: "Its standard output.",
    Stream.STDERR: "Its standard error.",
    Stream.OUTPUT_FILE: "The output file, after EXITED.",
    Stream.CHANGES: "The changes in mounts, after EXITED.",
    Stream.LEFT_FILES: "Files left in private folders, after EXITED.",
    Stream.FIRST_FILE: "Input files, in the order of START.",
}
STATE_MEANING: Final = {
    State.WAITING: "The guest boots.",
    State.GREETED: "The agent is ready.",
    State.WARMING: "The agent prepares the environment.",
    State.WARM: "The agent waits. Every clone starts here.",
    State.SEEDING: "The agent sets clock and entropy.",
    State.READY: "The agent waits for a job.",
    State.PREPARING: "Files arrive; the program is confined and executed.",
    State.RUNNING: "The program runs.",
    State.COLLECTING: "The program has ended; files may follow.",
    State.FAILED: "The job failed in the guest.",
}
SENDS: Final = {Role.HOST: "host", Role.GUEST: "guest"}


def table(*rows: tuple[object, ...]) -> str:
    """A table in Markdown, its first row the head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def size(count: int) -> str:
    """A number of bytes, in KiB or MiB where it is a whole number of them."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit and count % unit == 0:
            return f"{count // unit} {name}"
    return f"{count} bytes"


def number(value: int) -> str:
    """A bound, as a power of two where it is one, or one less than one."""
    if value >= 1 << 16 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    if value >= 1 << 16 and value & (value + 1) == 0:
        return f"2^{value.bit_length()} - 1"
    return str(value)


def bounds(shape: Shape) -> str:
    """What a field may hold, in words."""
    text = {
        "int": f"integer, {number(shape.lo)} to {number(shape.hi)}",
        "text": f"text, {shape.lo} to {shape.hi} characters"
        if shape.lo != shape.hi
        else f"text, {shape.lo} characters",
        "bool": "true or false",
        "bytes": f"{shape.hi} bytes",
        "any": "see meaning",
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
    return table(("frame", "field", "type", "meaning"), *rows) + f"\n\nPacked: {packed}. Without fields: {empty}."


def streams_table() -> str:
    """Every stream."""
    rows = []
    for stream, text in STREAM_MEANING.items():
        sender = stream_sender(stream)
        assert sender is not None
        numbers = f"{int(stream)} to {frames.LAST_FILE}" if stream is Stream.FIRST_FILE else int(stream)
        states = ", ".join(state.value for state in State if state in DATA_STATES[stream])
        rows.append((numbers, SENDS[sender], states, text))
    return table(("stream", "sent by", "data allowed while", "content"), *rows)


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
        ("payload of DATA", size(frames.DATA_MAX), "`frames.DATA_MAX`"),
        ("payload of other control frames", size(frames.CONTROL_MAX), "`frames.CONTROL_MAX`"),
        ("payload of START", size(frames.START_MAX), "`frames.START_MAX`"),
        ("window of a stream", size(frames.WINDOW), "`frames.WINDOW`"),
        ("credit step", size(frames.WINDOW // 4), "a quarter of `frames.WINDOW`"),
        ("input files", frames.LAST_FILE - Stream.FIRST_FILE + 1, "`frames.LAST_FILE`"),
        ("largest frame from the guest", size(guest + frames.HEADER.size), "header and payload"),
        ("one read", size(connection.READ_SIZE), "`connection.READ_SIZE`"),
        ("one write", size(connection.WRITE_SIZE), "`connection.WRITE_SIZE`"),
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
    """The page with every part made anew."""
    return MARKED.sub(lambda match: match[1] + PARTS[match[2]]() + match[3], text)


def test_the_page_shows_the_tables_of_the_code() -> None:
    """Frames, fields, streams, states, diagram and numbers in docs/guest-channel.md are those of the code."""
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
def test_nothing_goes_without_a_word(described: dict[object, str], there: set[object]) -> None:
    """Each frame, field, stream and state has its sentence, and there is none for what is gone."""
    assert described.keys() == there
    assert all(text.endswith(".") for text in described.values())


def test_the_header_is_the_one_that_is_described() -> None:
    """Length, type, a zero and stream: the header's bytes are those of the page."""
    assert frames.encode(Kind.DATA, 0x1234, b"abc") == bytes.fromhex("00000003 06 00 1234") + b"abc"
    assert "00 00 00 03  06  00  12 34  61 62 63" in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
