"""Runs in the guest: attacks on the gate by raw frames."""

from __future__ import annotations

import random
import time
from typing import Any

from tests.lab.attacks.guest_port import (
    DATA,
    DATAGRAM,
    RESET,
    TCP,
    UDP,
    Port,
    Stream,
    asking,
    claim,
    frame,
)

State = dict[str, Any]


def _port(state: State) -> Port:
    if "port" not in state:
        state["port"] = Port()
    port = state["port"]
    assert isinstance(port, Port)
    return port


def exchange(  # noqa: PLR0913 - one order that says all
    state: State,
    *,
    host: str,
    port: int,
    say: list[str | float],
    udp: bool = False,
    answer_s: float = 12,
    wait_s: float = 0.1,
) -> dict[str, Any]:
    """Open a flow to a host (hex), send bytes (hex), and wait in between (up to so many seconds, or for data)."""
    gate = _port(state)
    number = gate.open(bytes.fromhex(host), port, UDP if udp else TCP)
    known = gate.until(number, "code", answer_s)
    if known.code == 0:
        for one in say:
            if isinstance(one, str):
                _say(gate, number, bytes.fromhex(one), DATAGRAM if udp else DATA)
            else:
                _await(gate, known, one)
        gate.until(number, "reset", wait_s)
        if not known.over:
            gate.write(frame(RESET, number))
    return {"code": known.code, "reset": known.reset, "data": known.data.decode("latin-1")[:300], "lost": gate.lost}


def _say(gate: Port, number: int, data: bytes, kind: int) -> None:
    for at in range(0, len(data), 32768):
        gate.write(frame(kind, number, data[at : at + 32768]))


def _await(gate: Port, known: Stream, wait_s: float) -> None:
    """Wait until more has arrived."""
    seen, deadline = known.received, time.monotonic() + wait_s
    while time.monotonic() < deadline and known.received == seen and not known.over and not gate.lost:
        gate.read(deadline - time.monotonic())


def claim_flood(state: State, *, host: str, port: int, count: int) -> dict[str, Any]:
    """Report *count* refusals by the guest that nobody asked for."""
    gate = _port(state)
    for start in range(0, count, 100):
        claims = [claim(host.format(at).encode("latin-1"), port) for at in range(start, start + 100)]
        gate.write(b"".join(claims))
    number = gate.open(host.format("end").encode("latin-1"), port)
    return {"code": gate.until(number, "code", 30).code, "lost": gate.lost}


def frames(state: State, *, host: str, port: int, say: str) -> dict[str, Any]:
    """Open a stream, wait for its answer, write bytes (hexadecimal); report whether the gate closed."""
    gate = _port(state)
    number = gate.open(host.encode(), port)
    code = gate.until(number, "code", 12).code
    gate.write(bytes.fromhex(say))
    deadline = time.monotonic() + 1
    while not gate.lost and time.monotonic() < deadline:
        gate.read(0.05)
    # Nobody reads what is sent after the gate has closed.
    gate.lost, closed = False, gate.lost
    gate.write(asking(10_001, b"after.lab.example", 80), 0.3)
    return {"code": code, "closed": closed}


def restart(state: State, *, host: str, port: int) -> dict[str, Any]:
    """Start a second relay on the same stream: close the port, reopen it, and count its streams from 1."""
    import os

    gate = _port(state)
    number = gate.open(host.encode(), port)
    code = gate.until(number, "code", 12).code
    os.close(gate.fd)
    again = Port()
    first = again.open(host.encode(), port)
    again.until(first, "code", 2)
    state["port"] = again
    return {"code": code, "closed": again.lost and again.streams[first].code is None}


# ---------------------------------------------------------------------------------------------------------- floods


def open_flood(state: State, *, host: str, port: int, count: int) -> dict[str, Any]:
    """Ask *count* times; {} in host is replaced by a number. Reset each connection that is established."""
    gate = _port(state)
    first, began, unanswered = gate.last + 2, time.monotonic(), set[int]()

    def look() -> None:
        answered = [number for number in unanswered if gate.streams[number].code is not None]
        unanswered.difference_update(answered)
        for number in answered:
            if gate.streams[number].code == 0:
                gate.write(frame(RESET, number))

    for start in range(0, count, 50):
        batch = b""
        for at in range(start, min(start + 50, count)):
            gate.last += 2
            gate.streams[gate.last] = Stream()
            unanswered.add(gate.last)
            batch += asking(gate.last, host.format(at).encode("latin-1"), port)
        gate.write(batch)
        while gate.read(0):
            pass
        look()
    deadline = time.monotonic() + 40
    while unanswered and time.monotonic() < deadline:
        gate.read(0.1)
        look()
    codes: dict[str, int] = {}
    for number in range(first, gate.last + 1, 2):
        name = str(gate.streams[number].code)
        codes[name] = codes.get(name, 0) + 1
    return {"codes": codes, "seconds": time.monotonic() - began, "lost": gate.lost}


def noise(state: State, *, count: int) -> dict[str, Any]:
    """Send random bytes."""
    gate = _port(state)
    gate.write(random.Random(7).randbytes(count), 5)  # noqa: S311 - reproducible
    gate.quiet(0.3)
    return {"closed": gate.lost}


def download(state: State, *, host: str, port: int, size: int) -> dict[str, Any]:
    """Read *size* bytes from an endless source."""
    gate = _port(state)
    number = gate.open(host.encode(), port)
    known = gate.until(number, "code", 12)
    began = time.monotonic()
    while known.received < size and not known.over and not gate.lost:
        gate.read(1)
    gate.write(frame(RESET, number))
    return {"code": known.code, "received": known.received, "seconds": time.monotonic() - began, "lost": gate.lost}
