"""Fuzz target: the answer of a containerd daemon to a call over ttrpc.

An input is what the daemon sends. Invariants:

* only the answer's bytes, BackendError or ValueError come out;
* no message over ANSWER_MAX is read;
* a returned answer is part of the input;
* an error has a status, and a printable text of limited length;
* a message has at most FIELDS_MAX fields, which are the same after encoding and decoding.
"""

from __future__ import annotations

import contextlib
import struct

from x07_sandbox.backends.firecracker import ANSWER_MAX, HEADER_SIZE, message_size, payload_of
from x07_sandbox.backends.protobuf import FIELDS_MAX, Message
from x07_sandbox.errors import BackendError

TEXT_MAX = 600


def varint(number: int) -> bytes:
    """Return an integer as the format has it: groups of seven bits, lowest first; a negative one as 64 bits."""
    groups = [number % (1 << 64) >> shift & 0x7F for shift in range(0, 64, 7)]
    while len(groups) > 1 and not groups[-1]:
        groups.pop()
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def field(number: int, value: int | bytes) -> bytes:
    """Return one field of a message."""
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    return varint(number * 8 + 2) + varint(len(value)) + value


def frame(message: bytes, stream: int = 1, kind: int = 2, flags: int = 0) -> bytes:
    """Return a message with its header; by default a response to the first request."""
    return struct.pack(">IIBB", len(message), stream, kind, flags) + message


def failed(status: int, text: bytes) -> bytes:
    """Return the response of a call that failed."""
    return frame(field(1, field(1, status) + field(2, text)))


def seeds() -> dict[str, bytes]:
    """Return answers of a daemon, valid and hostile."""
    made = field(1, b"vm-1") + field(2, b"/run/x.sock")
    return {
        "empty": frame(b""),
        "made": frame(field(2, made)),
        "ok-status": frame(field(1, field(1, 0)) + field(2, made)),
        "unimplemented": failed(12, b"service Firecracker"),
        "negative-status": failed(-1, b""),
        "odd-text": failed(2, b"\x1b[2J\xff\n  x07: ok " + "\u202e".encode() * 200),
        "details": frame(field(1, field(1, 5) + field(3, b"\x0a\x01x")) + field(9, 1)),
        "fixed": frame(b"\x4d1234\x511234567" + b"8" + field(2, made)),
        "two-answers": frame(field(2, b"a") + field(2, b"b")),
        "number-as-status": frame(field(1, 12)),
        "cut-off": frame(field(2, made)[:-1]),
        "long-integer": frame(b"\x10" + b"\xff" * 10 + b"\x01"),
        "group": frame(b"\x0b\x0c"),
        "other-stream": frame(b"", stream=3),
        "data": frame(b"", kind=3, flags=1),
        "too-large": (b"\xff" * 4) + frame(b"")[4:],
    }


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    header, message = data[:HEADER_SIZE], data[HEADER_SIZE:]
    if len(header) == HEADER_SIZE:
        with contextlib.suppress(ValueError):
            assert message_size(header) <= ANSWER_MAX
    with contextlib.suppress(ValueError):
        again = Message(message)
        assert len(again.fields) <= FIELDS_MAX
        assert Message(again.encode()).fields == again.fields
    error: BackendError | None = None
    try:
        assert payload_of(message, "StopVM") in message
    except ValueError:
        pass
    except BackendError as exc:
        error = exc
    if error is not None:
        assert error.why.isprintable()
        assert len(error.why) <= TEXT_MAX
