"""Tables of streams to test with."""

from __future__ import annotations

from typing import Final

from hypothesis import strategies as st

from tests.guest.messages import GUEST, HOST
from x07_sandbox.channel import egress, link
from x07_sandbox.channel.streams import HEADER, Kind, Role, Streams, Table
from x07_sandbox.channel.streams import Message as Form

ORDER, REPORT = 1, 2  # messages of the small table
DOWN, UP, BOTH, ASKED, PACKETS = 1, 2, 3, 4, 5  # kinds of streams in the small table
# A table with every feature, and windows that a test fills quickly.
SMALL: Final = Table(
    {ORDER: Form(HOST, 0, 9), REPORT: Form(GUEST, 2, 3)},
    {
        DOWN: Kind(HOST, HOST, 0, 4, 2),
        UP: Kind(GUEST, GUEST, 0, 4, 2),
        BOTH: Kind(HOST, None, 0, 4, 2),
        ASKED: Kind(GUEST, None, 1, 4, 3, answered=True),
        PACKETS: Kind(GUEST, None, 0, 4, 2, answered=True, datagrams=True),
    },
    data_max=16,
    window=64,
    datagram_max=8,
    code_max=7,
)
TABLES: Final = {"channel": link.STREAMS, "egress": egress.STREAMS, "small": SMALL}
ROLES: Final = st.sampled_from(Role)
SIZES: Final = st.sampled_from([1, 13, 70, 5000, 1 << 20])


def held(end: Streams) -> int:
    """Return the number of bytes that one end holds of its peer's."""
    return len(end._in)  # noqa: SLF001 - the bound on it is the promise


def most_of(table: Table, sender: Role) -> int:
    """Return the size of the largest frame that a role may send."""
    messages = [message.most for message in table.messages.values() if message.sender is sender]
    kinds = [kind.most for kind in table.streams.values() if kind.opener is sender]
    return HEADER.size + max(*messages, *kinds, table.data_max, table.datagram_max)
