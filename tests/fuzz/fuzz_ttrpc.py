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
