"""One connection through the gate's inspection to a real server, with the server's real answers fed back."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from tests.fuzz.differential.case import GOOD, Case
from x07_sandbox.network.first_bytes import Inspector
from x07_sandbox.network.protocols import InspectionError

if TYPE_CHECKING:
    from collections.abc import Callable

PORT: Final = 80
_QUIET_S: Final = 0.05
"""How long a server is silent until the client goes on. Servers on the loopback answer within a millisecond."""


@dataclass(slots=True)
class Passed:
    """What the gate let out of one case.

    rule: the rule that refused the rest; "" if none did. waiting: whether the server's answer decides what else passes.
    """

    data: bytearray = field(default_factory=bytearray)
    rule: str = ""
    waiting: bool = False


class Gate:
    """Does with an inspector what the gate does with it. send: writes bytes to the server."""

    def __init__(self, case: Case, send: Callable[[bytes], None]) -> None:
        self._inspector = Inspector(case.mode, GOOD.decode(), PORT, lambda _name: None)
        self._send = send
        self.passed = Passed()

    def client(self, data: bytes) -> None:
        """Take bytes of the client."""
        self._do(lambda: self._inspector.from_client(data))

    def server(self, data: bytes) -> None:
        """Take bytes of the server."""
        if self._inspector.watches_server:
            self._do(lambda: self._inspector.from_server(data))
            self.client(b"")

    def check_waiting(self) -> None:
        """Note whether the server's answer decides what passes."""
        self.passed.waiting = self._inspector.held > 0 or self._inspector.watches_server

    def end(self) -> None:
        """Take the end of the client's bytes."""
        self._do(self._inspector.client_eof)
        self.client(b"")

    def _do(self, call: Callable[[], bytes | None]) -> None:
        if self.passed.rule:
            return
        try:
            out = call()
        except InspectionError as exc:
            self.passed.rule = exc.rule
            return
        if out:
            self.passed.data += out
            self._send(out)


class _NoGate(Gate):
    """Forwards all bytes, as a broken gate would."""

    def client(self, data: bytes) -> None:
        self._do(lambda: data)

    def server(self, data: bytes) -> None:
        """Ignore the server."""

    def end(self) -> None:
        """Do nothing."""


def dry_run(case: Case) -> Passed:
    """Return what passes if the server stays silent."""
    gate = Gate(case, lambda _data: None)
    for step in case.steps:
        gate.client(step or b"")
    if case.half_close:
        gate.end()
    gate.check_waiting()
    return gate.passed


class _Connection(asyncio.Protocol):
    """The gate's connection to the server. heard: set whenever the server has sent bytes, or ended."""

    def __init__(self) -> None:
        self.gate: Gate | None = None
        self.transport: asyncio.Transport | None = None
        self.ended = False
        self.heard = asyncio.Event()
        self.over = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.gate is not None:
            self.gate.server(data)
        self.heard.set()

    def connection_lost(self, _error: Exception | None) -> None:
        self.over.set()
        self.heard.set()

    def send(self, data: bytes) -> None:
        """Write to the server, unless one side has ended the connection."""
        if self.transport is not None and not self.ended and not self.transport.is_closing():
            self.transport.write(data)

    def end(self) -> None:
        """End the bytes to the server. Those that were written reach it first."""
        self.ended = True
        if self.transport is not None:
            with contextlib.suppress(OSError):
                self.transport.write_eof()

    async def quiet(self) -> None:
        """Wait until the server has sent nothing for a while, or has ended the connection."""
        while not self.over.is_set():
            self.heard.clear()
            try:
                async with asyncio.timeout(_QUIET_S):
                    await self.heard.wait()
            except TimeoutError:
                return


async def play(case: Case, address: str, port: int, *, gated: bool = True) -> None:
    """Send a case through the gate to a server. gated: False for all bytes."""
    _, connection = await asyncio.get_running_loop().create_connection(_Connection, address, port)
    connection.gate = gate = (Gate if gated else _NoGate)(case, connection.send)
    transport = connection.transport
    assert transport is not None
    try:
        for step in case.steps:
            if step is None:
                await connection.quiet()
            else:
                gate.client(step)
            if gate.passed.rule:
                break
        await connection.quiet()
        if case.half_close:
            gate.end()
        # What passed must reach the server before the connection ends, even if the rest was refused.
        connection.end()
        await connection.quiet()
    finally:
        transport.abort()
