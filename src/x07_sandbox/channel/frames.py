"""Frames between host and guest agent: the table and the encoding, without I/O.

A frame is an 8-byte header and a payload (docs/guest-channel.md):

    payload length  u32, big endian
    type            u8
    reserved        u8, always 0
    stream          u16, big endian; 0 for control frames

Control payloads have closed schemas (`BODIES`). They are JSON objects, except for the fixed binary records in `PACKED`:
a VM cloned from a saved one would run the JSON code for the first time, which is about ten times slower. Data payloads
are raw bytes. The guest is hostile, so every length, count, number and text is bounded.
"""

from __future__ import annotations

import enum
import json
import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from x07_sandbox.errors import PeerError

PROTOCOL: Final = 1
HEADER: Final = struct.Struct(">IBBH")
DATA_MAX: Final = 32 * 1024  # one write of the guest's console driver; more gains nothing (measured)
CONTROL_MAX: Final = 16 * 1024
START_MAX: Final = 16 * 1024 * 1024  # argv and environment, which JSON escapes may make six times larger
DENIED_MAX: Final = 64  # DENIED frames in a conversation
WINDOW: Final = 256 * 1024  # bytes of one stream in flight before the reader grants credit


class Role(enum.Enum):
    """The two ends of the channel."""

    HOST = "host"
    GUEST = "guest"


class Kind(enum.IntEnum):
    """The frame types. Their numbers are part of the protocol."""

    HELLO = 1
    SEED = 2
    SEEDED = 3
    START = 4
    STARTED = 5
    DATA = 6
    EOF = 7
    CREDIT = 8
    STOP = 9
    EXITED = 10
    FAILED = 11
    WARM = 12
    WARMED = 13
    DENIED = 14


class Stream(enum.IntEnum):
    """Stream numbers. Input files use FIRST_FILE and higher numbers, in the order in which START lists the files."""

    CONTROL = 0
    STDIN = 1
    STDOUT = 2
    STDERR = 3
    OUTPUT_FILE = 4
    CHANGES = 5
    LEFT_FILES = 6
    FIRST_FILE = 16


LAST_FILE: Final = 16 + 255


class Shape(NamedTuple):
    """The type and bounds of one field of a control body.

    kind: "int" (lo..hi), "text" (lo..hi characters, no lone surrogates), "bool", "bytes" (exactly lo; packed bodies
        only), or "any" (host to guest only; the code that uses the value validates it).
    """

    kind: str
    lo: int = 0
    hi: int = 2**63 - 1
    optional: bool = False  # null is allowed; the key is required all the same


_COUNT = Shape("int")
_TEXT = Shape("text", hi=2000)
_HOST_NAME = Shape("text", lo=1, hi=64)
_ANY = Shape("any")
_BOOL = Shape("bool")
_ID = Shape("bytes", lo=16, hi=16)

BODIES: Final[dict[Kind, dict[str, Shape]]] = {
    Kind.HELLO: {"protocol": Shape("int", 1, 2**31)},
    Kind.WARM: {
        **dict.fromkeys(("preload", "limits", "commands"), _ANY),
        "hostname": _HOST_NAME,
        **dict.fromkeys(("output", "network"), _BOOL),
    },
    Kind.WARMED: {},
    Kind.SEED: {"unix_ns": _COUNT, "entropy": Shape("bytes", lo=64, hi=64), "nonce": _ID, "machine_id": _ID},
    Kind.SEEDED: {"nonce": _ID},
    Kind.START: {
        "run_id": Shape("text", lo=1, hi=128),
        "hostname": _HOST_NAME,
        "phase": Shape("text", lo=1, hi=16),
        **dict.fromkeys(("argv", "env"), _ANY),
        "cwd": Shape("text", lo=1, hi=4096),
        **dict.fromkeys(("files", "mounts", "limits", "confine", "output", "network", "left", "room"), _ANY),
    },
    Kind.STARTED: {},
    Kind.STOP: {},
    Kind.DENIED: {
        "by": Shape("text", lo=1, hi=16),
        "call": Shape("text", lo=1, hi=64),
        "errno": Shape("int", 0, 4096),
        "path": _TEXT,
        "write": _BOOL,
        "count": Shape("int", 1),
    },
    Kind.EXITED: {
        "wait_status": Shape("int", 0, 0xFFFF),
        **dict.fromkeys(("cpu_us", "memory_peak_bytes", "oom_kills", "tasks_peak", "tasks_refused"), _COUNT),
        **dict.fromkeys(("cpu_exceeded", "stopped", "disk_full", "memory_full"), _BOOL),
        "denials_lost": _COUNT,
        **dict.fromkeys(("left_files", "left_bytes"), _COUNT),
        "output_bytes": Shape("int", 0, 2**40, optional=True),
        "output_problem": Shape("text", hi=2000, optional=True),
    },
    Kind.FAILED: {"stage": Shape("text", hi=64), "errno": Shape("int", 0, 4096), "message": _TEXT},
}

# Control bodies in binary form: the fields of BODIES, in that order.
PACKED: Final[dict[Kind, struct.Struct]] = {
    **dict.fromkeys((Kind.WARMED, Kind.STARTED, Kind.STOP), struct.Struct("")),
    Kind.SEED: struct.Struct(">Q64s16s16s"),
    Kind.SEEDED: struct.Struct("16s"),
}
_PAYLOAD_MAX: Final = {Kind.DATA: DATA_MAX, Kind.CREDIT: 4, Kind.EOF: 0, Kind.START: START_MAX} | {
    kind: layout.size for kind, layout in PACKED.items()
}
# DATA, EOF and CREDIT go both ways: see `frame_sender`.
SENDER: Final[dict[Kind, Role]] = {
    kind: Role.HOST if kind in {Kind.WARM, Kind.SEED, Kind.START, Kind.STOP} else Role.GUEST for kind in BODIES
}


def stream_sender(stream: int) -> Role | None:
    """Return the role that may send data on *stream*, or None if neither role may."""
    if stream == Stream.STDIN or Stream.FIRST_FILE <= stream <= LAST_FILE:
        return Role.HOST
    if Stream.STDOUT <= stream <= Stream.LEFT_FILES:
        return Role.GUEST
    return None


class Frame(NamedTuple):
    """One frame with a raw payload."""

    kind: Kind
    stream: int
    payload: bytes


def payload_max(kind: Kind) -> int:
    """Return the maximum payload size of frames of this kind, in bytes."""
    return _PAYLOAD_MAX.get(kind, CONTROL_MAX)


def encode(kind: Kind, stream: int = 0, payload: bytes = b"") -> bytes:
    """Encode one frame. Raises ValueError if the payload is too large."""
    if len(payload) > payload_max(kind):
        raise ValueError(f"{kind.name} of {len(payload)} bytes is over {payload_max(kind)}")
    return HEADER.pack(len(payload), kind, 0, stream) + payload


def frame_sender(kind: Kind, stream: int) -> Role | None:
    """Return the role that may send this frame, or None if neither role may. A stream's receiver sends CREDIT."""
    if kind in SENDER:
        return SENDER[kind] if stream == 0 else None
    sender = stream_sender(stream)
    if kind is Kind.CREDIT and sender is not None:
        return Role.GUEST if sender is Role.HOST else Role.HOST
    return sender


def take_frame(buf: bytearray, sender: Role) -> Frame | None:
    """Remove and return the first frame from *sender* in *buf*, or None if more bytes are needed.

    Raises PeerError as soon as a header is invalid; *buf* is then unchanged. So at most one payload is buffered.
    """
    if len(buf) < HEADER.size:
        return None
    length, number, reserved, stream = HEADER.unpack_from(buf)
    kind = _KINDS.get(number)
    if kind is None:
        raise PeerError("bad frame", f"type {number} does not exist")
    if reserved:
        raise PeerError("bad frame", f"reserved byte is {reserved}")
    if length > payload_max(kind):
        raise PeerError("bad frame", f"{kind.name} of {length} bytes is over {payload_max(kind)}")
    if frame_sender(kind, stream) is not sender:
        raise PeerError("bad frame", f"the {sender.value} may not send {kind.name} on stream {stream}")
    end = HEADER.size + length
    if len(buf) < end:
        return None
    payload = bytes(buf[HEADER.size : end])
    del buf[:end]
    return Frame(kind, stream, payload)


def encode_body(kind: Kind, body: Mapping[str, object]) -> bytes:
    """Encode a control body. Lone surrogates, which stand for undecodable bytes in arguments, become JSON escapes."""
    if kind in PACKED:
        return PACKED[kind].pack(*[body[name] for name in BODIES[kind]])
    return _ENCODER.encode(body).encode("ascii")


def decode_body(kind: Kind, payload: bytes) -> dict[str, Any]:
    """Decode and validate a control body. Raises PeerError."""
    shapes = BODIES[kind]
    body = _unpacked(kind, payload) if kind in PACKED else _parsed(kind, payload)
    if body.keys() != shapes.keys():
        raise PeerError(f"bad {kind.name} frame", "unexpected or missing keys")
    for key, shape in shapes.items():
        if problem := _problem(shape, body[key]):
            raise PeerError(f"bad {kind.name} frame", f"{key} {problem}")
    return body


def _unpacked(kind: Kind, payload: bytes) -> dict[str, Any]:
    layout = PACKED[kind]
    if len(payload) != layout.size:
        raise PeerError(f"bad {kind.name} frame", f"{len(payload)} bytes instead of {layout.size}")
    return dict(zip(BODIES[kind], layout.unpack(payload), strict=True))


def _parsed(kind: Kind, payload: bytes) -> dict[str, Any]:
    try:
        text = payload.decode("utf-8")
        body, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError) as exc:
        raise PeerError(f"bad {kind.name} frame", f"invalid JSON ({type(exc).__name__})") from None
    if not isinstance(body, dict) or end != len(text):
        raise PeerError(f"bad {kind.name} frame", "not one JSON object")
    return body


def _problem(shape: Shape, value: object) -> str | None:
    if shape.kind in {"any", "bytes"} or (value is None and shape.optional):
        return None
    if shape.kind == "bool":
        return None if isinstance(value, bool) else "is not a boolean"
    if shape.kind == "text":
        return _text_problem(shape, value)
    if not isinstance(value, int) or isinstance(value, bool):
        return "is not an integer"
    return None if shape.lo <= value <= shape.hi else "is out of range"


def _text_problem(shape: Shape, value: object) -> str | None:
    # A lone surrogate would fail wherever the text is written later.
    if not isinstance(value, str) or (not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value)):
        return "is not text"
    return None if shape.lo <= len(value) <= shape.hi else "has the wrong length"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("duplicate key")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(name)


# Created once: json.dumps and json.loads create them on each call, which costs a fresh clone milliseconds.
_KINDS: Final = {int(kind): kind for kind in Kind}
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER: Final = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
