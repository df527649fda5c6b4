"""The streams between the relay in the guest and the egress gate: their table, codes and payloads.

A stream carries one flow: a connection, or the datagrams between two endpoints. The guest opens it with the target,
and the gate answers with one of the codes below. With the message REFUSAL the guest reports a connection that it
refused itself; port 0 stands for a name lookup.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from x07_sandbox.channel.streams import Kind, Message, Role, Table
from x07_sandbox.errors import PeerError

DATA_MAX: Final = 128 * 1024
DATAGRAM_MAX: Final = 65_507  # of UDP over IPv4
WINDOW: Final = 512 * 1024
HOST_MAX: Final = 255
NONCE_BYTES: Final = 16  # before the first frame in both directions, in a copy of a VM
FLOWS_MAX: Final = 4096  # of each transport; the gate's own limits are lower
DNS: Final = "127.0.0.53"  # of the relay in the guest
RESOLV_CONF: Final = f"nameserver {DNS}\noptions timeout:5 attempts:2\n"
CA_FILE: Final = "/x07/in/ca-certificates.crt"  # the user's certificates, followed by those of the image

REFUSAL: Final = 1  # the message
# The kinds of streams, which have the numbers of the transport protocols.
TCP: Final = 6
UDP: Final = 17

# Codes of ANSWER and RESET.
OK: Final = 0
REFUSED: Final = 1
HOST_UNREACHABLE: Final = 2
NET_UNREACHABLE: Final = 3
TIMED_OUT: Final = 4
POLICY: Final = 5
LIMIT: Final = 6
NO_NAME: Final = 7

_PORT: Final = struct.Struct(">H")  # then the host
_MOST: Final = _PORT.size + HOST_MAX
_TRANSPORT: Final = struct.Struct(">B")  # first in REFUSAL

STREAMS: Final = Table(
    {REFUSAL: Message(Role.GUEST, _TRANSPORT.size + _PORT.size + 1, _TRANSPORT.size + _MOST)},
    {
        TCP: Kind(Role.GUEST, None, _PORT.size + 1, _MOST, FLOWS_MAX, answered=True),
        UDP: Kind(Role.GUEST, None, _PORT.size + 1, _MOST, FLOWS_MAX, answered=True, datagrams=True),
    },
    DATA_MAX,
    WINDOW,
    DATAGRAM_MAX,
    NO_NAME,
)


class Target(NamedTuple):
    """The target of a flow. host: as the guest names it, not verified."""

    transport: int
    host: bytes
    port: int

    def opening(self) -> bytes:
        """Return the payload of OPEN."""
        return _PORT.pack(self.port) + self.host

    def refusal(self) -> bytes:
        """Return the payload of REFUSAL."""
        return _TRANSPORT.pack(self.transport) + self.opening()


def opened(transport: int, payload: bytes) -> Target:
    """Decode the payload of OPEN for a stream of kind *transport*."""
    return Target(transport, payload[_PORT.size :], _PORT.unpack_from(payload)[0])


def refused(payload: bytes) -> Target:
    """Decode the payload of REFUSAL. Raises PeerError."""
    if payload[0] not in {TCP, UDP}:
        raise PeerError("bad frame", f"transport {payload[0]}")
    return opened(payload[0], payload[_TRANSPORT.size :])
