"""DNS server for programs in the guest: bytes in, bytes out, no I/O. No query leaves the guest.

The only names it knows are those that the policy lists, and each has a synthetic IPv4 address. The agent translates
the destination of a connection back to the name (`Names.host_at`); the host decides whether that name may be reached.
"""

from __future__ import annotations

import struct
from socket import AF_INET, inet_ntop, inet_pton
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

TTL_S: Final = 30
UDP_MAX: Final = 4096  # size of a UDP message that the server offers with EDNS (RFC 6891)
ANSWER_MAX: Final = 512  # the longest answer is shorter: a question of 259 bytes, one record, one OPT

_HEADER: Final = struct.Struct(">HHHHHH")  # id, flags, then the counts: question, answer, authority, additional
_QUESTION: Final = struct.Struct(">HH")  # type, class
_RECORD: Final = struct.Struct(">HHIH")  # type, class, TTL, length of the data
_LENGTH: Final = struct.Struct(">H")

_QR, _OPCODE, _TC, _RD, _RA = 0x8000, 0x7800, 0x0200, 0x0100, 0x0080
_NOERROR, _FORMERR, _NXDOMAIN, _NOTIMP, _REFUSED, _BADVERS = 0, 1, 3, 4, 5, 16
_A, _SOA, _PTR, _AAAA, _OPT = 1, 6, 12, 28, 41
_IN: Final = 1

_WIRE_NAME_MAX: Final = 255  # bytes, with length bytes and the root: 253 characters
_LABEL_MAX: Final = 63
_POINTER: Final = 0xC0
_LABEL_BYTES: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_RECORDS_MAX: Final = 8  # a query needs two at most, OPT and TSIG: bounds the time that one message takes
_NAME_OF_QUESTION: Final = b"\xc0\x0c"  # a pointer to offset 12

# The root owns it, since clients accept only an SOA that is above the name. Server, mailbox, serial, three timers, and
# the time for which a client may keep the negative answer.
_SOA_DATA: Final = b"\0\0" + struct.pack(">5I", 1, TTL_S, TTL_S, TTL_S, TTL_S)
_SOA_RECORD: Final = b"\0" + _RECORD.pack(_SOA, _IN, TTL_S, len(_SOA_DATA)) + _SOA_DATA
_BLOCKED: Final = struct.pack(">HHH", 15, 2, 15)  # EDNS option 15, Extended DNS Error: 15, Blocked (RFC 8914)

_LOCALHOST: Final = {_A: inet_pton(AF_INET, "127.0.0.1"), _AAAA: bytes(15) + b"\x01"}
_REVERSE_LABELS: Final = 6  # 4.3.2.1.in-addr.arpa


class Names:
    """Synthetic IPv4 addresses of the names that a policy lists.

    exact: address by name. wildcards: a suffix, and the first of 256 addresses for names below it; the first and the
    last of them stay unused. Names are lower case, without a final dot; addresses are dotted.
    on_unlisted: called with a name whose IPv4 address was asked for and that is not listed.
    Raises OSError for an address that is none.
    """

    def __init__(self, exact: dict[str, str], wildcards: list[tuple[str, str]]) -> None:
        for address in exact.values():
            inet_pton(AF_INET, address)
        self._addresses = dict(exact)
        self._hosts = {address: name for name, address in exact.items()}
        self._looked_up: set[str] = set()
        firsts = {suffix: int.from_bytes(inet_pton(AF_INET, first), "big") for suffix, first in wildcards}
        self._unused = {suffix: iter(range(first + 1, first + 255)) for suffix, first in firsts.items()}
        self.on_unlisted: Callable[[str], object] = lambda _name: None

    def address_of(self, name: str) -> str | None:
        """Look up a name: its address, or None if it is not listed or the block of its wildcard is full."""
        address = self._addresses.get(name) or self._assign(name)
        if address is not None:
            self._looked_up.add(address)
        return address

    def name_of(self, address: str) -> str | None:
        """Return the name of an address that a lookup has returned. Any other address is None."""
        return self._hosts.get(address) if address in self._looked_up else None

    def host_at(self, address: str) -> str | None:
        """Return the name that an address is assigned to, whether or not it has been looked up."""
        return self._hosts.get(address)

    def _assign(self, name: str) -> str | None:
        if not _is_valid(name):
            return None
        suffix = name
        while suffix := suffix.partition(".")[2]:  # the longest suffix comes first
            if (unused := self._unused.get(suffix)) is None:
                continue
            if (number := next(unused, None)) is None:
                return None
            address = inet_ntop(AF_INET, number.to_bytes(4, "big"))
            self._addresses[name] = address
            self._hosts[address] = name
            return address
        return None


def answer(query: bytes, names: Names, limit: int) -> bytes | None:
    """Return the answer to one DNS message, or None if the message must be dropped.

    limit: largest answer in bytes that the transport takes, at least 12. An answer that does not fit has the TC flag
    and no records. All fit into ANSWER_MAX, which every client takes, so the size in a client's OPT changes nothing.
    """
    if len(query) < _HEADER.size:
        return None
    ident, flags, *counts = _HEADER.unpack_from(query)
    if flags & _QR:
        return None
    reply = _Reply()
    reply.rcode = _fill(reply, query, counts, names) if not flags & _OPCODE else _NOTIMP
    return reply.encode(ident, flags & (_OPCODE | _RD) | _QR | _RA, limit)


def split_stream(buffer: bytearray) -> bytes | None:
    """Remove the first whole message from the bytes of a TCP connection. None means more bytes are needed.

    A message is a 2-byte length, then that many bytes (RFC 1035, 4.2.2).
    """
    if len(buffer) < _LENGTH.size:
        return None
    end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
    if len(buffer) < end:
        return None
    message = bytes(buffer[_LENGTH.size : end])
    del buffer[:end]
    return message


class _MalformedError(Exception):
    """The query breaks the format of DNS messages."""


class _Reply:
    """An answer in the making.

    question: as the client wrote it, since a client may check its random upper and lower case (0x20).
    record: the answer's only record. negative: whether an SOA marks the answer as a negative one.
    edns: whether the query had an OPT. blocked: whether the policy is the reason.
    """

    __slots__ = ("blocked", "edns", "negative", "question", "rcode", "record")

    def __init__(self) -> None:
        self.rcode = _NOERROR
        self.question = b""
        self.record = b""
        self.negative = False
        self.edns = False
        self.blocked = False

    def add(self, kind: int, data: bytes) -> None:
        """Make it an answer with this record."""
        self.record = _NAME_OF_QUESTION + _RECORD.pack(kind, _IN, TTL_S, len(data)) + data

    def encode(self, ident: int, flags: int, limit: int) -> bytes:
        """Return the message."""
        flags |= self.rcode & 0xF
        opt = b""
        if self.edns:
            data = _BLOCKED if self.blocked else b""
            opt = b"\0" + _RECORD.pack(_OPT, UDP_MAX, self.rcode >> 4 << 24, len(data)) + data
        counts = bool(self.question), bool(self.record), self.negative, self.edns
        soa = _SOA_RECORD if self.negative else b""
        message = _HEADER.pack(ident, flags, *counts) + self.question + self.record + soa + opt
        if len(message) <= limit:
            return message
        question = self.question if _HEADER.size + len(self.question) <= limit else b""
        return _HEADER.pack(ident, flags | _TC, bool(question), 0, 0, 0) + question


def _fill(reply: _Reply, query: bytes, counts: list[int], names: Names) -> int:
    """Write into *reply* what answers the query. Return the response code."""
    try:
        end = _question_end(query, counts[0])
        reply.question = query[_HEADER.size : end]
        version = _edns_version(query, end, counts)
    except _MalformedError:
        return _FORMERR
    reply.edns = version is not None
    if version:
        return _BADVERS
    name_end = end - _QUESTION.size
    kind, in_class = _QUESTION.unpack_from(query, name_end)
    labels = _labels(query[_HEADER.size : name_end - 1])
    if any(label.translate(None, _LABEL_BYTES) for label in labels):
        return _FORMERR
    if in_class != _IN:
        return _REFUSED
    return _look_up(reply, [label.decode("ascii").lower() for label in labels], kind, names)


def _look_up(reply: _Reply, labels: list[str], kind: int, names: Names) -> int:
    """Write into *reply* the record of this type that a name has. Return the response code."""
    data: bytes | None = None
    if labels[-1:] == ["localhost"]:
        listed, data = True, _LOCALHOST.get(kind)
    elif kind == _PTR and labels[-2:] == ["in-addr", "arpa"]:
        name = names.name_of(".".join(labels[3::-1])) if len(labels) == _REVERSE_LABELS else None
        listed = name is not None
        data = _encode_name(name) if name is not None else None
    else:
        # Every type assigns the address of a wildcard's name: a name that exists for one type exists for all.
        address = names.address_of(".".join(labels))
        listed = address is not None
        if not listed and kind == _A:
            names.on_unlisted(".".join(labels))
        data = inet_pton(AF_INET, address) if address is not None and kind == _A else None
    if data is not None:
        reply.add(kind, data)
        return _NOERROR
    reply.negative = True
    reply.blocked = not listed
    return _NOERROR if listed else _NXDOMAIN


def _question_end(query: bytes, count: int) -> int:
    """Return the offset after the only question. Raises _MalformedError."""
    end = _name_end(query, _HEADER.size, may_point=False) + _QUESTION.size
    if count != 1 or end > len(query):
        raise _MalformedError
    return end


def _edns_version(query: bytes, at: int, counts: list[int]) -> int | None:
    """Return the EDNS version in the records from *at* on, None if there is no OPT. Raises _MalformedError."""
    _, *sections = counts
    total = sum(sections)
    if total > _RECORDS_MAX:
        raise _MalformedError
    version = None
    for index in range(total):
        start, at = at, _name_end(query, at, may_point=True)
        if at + _RECORD.size > len(query):
            raise _MalformedError
        kind, _, ttl, size = _RECORD.unpack_from(query, at)
        if kind == _OPT:
            # RFC 6891: at most one, in the additional section, owned by the root.
            if version is not None or index < total - sections[-1] or query[start]:
                raise _MalformedError
            version = ttl >> 16 & 0xFF
        at += _RECORD.size + size
    if at != len(query):
        raise _MalformedError
    return version


def _name_end(query: bytes, at: int, *, may_point: bool) -> int:
    """Return the offset after the name at *at*, which may end with a compression pointer. Raises _MalformedError.

    Pointers are not followed, so they cannot make a loop.
    """
    stop = min(len(query), at + _WIRE_NAME_MAX)
    while at < stop:
        size = query[at]
        if size >= _POINTER and may_point:
            return at + 2
        if size > _LABEL_MAX:
            raise _MalformedError
        at += 1 + size
        if not size:
            return at
    raise _MalformedError


def _labels(wire: bytes) -> list[bytes]:
    """Split a well-formed name, without the root's length byte."""
    labels = []
    at = 0
    while at < len(wire):
        end = at + 1 + wire[at]
        labels.append(wire[at + 1 : end])
        at = end
    return labels


def _encode_name(name: str) -> bytes:
    labels = name.encode("ascii").split(b".")
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def _is_valid(name: str) -> bool:
    """Whether a DNS message could carry this name."""
    labels = name.split(".")
    return (
        name.isascii()
        and len(name) + 2 <= _WIRE_NAME_MAX
        and all(0 < len(label) <= _LABEL_MAX for label in labels)
        and not name.encode("ascii").translate(None, _LABEL_BYTES + b".")
    )
