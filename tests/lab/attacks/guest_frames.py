"""Runs in the guest: attacks on the gate by raw frames."""

from __future__ import annotations

import random
import struct
import time
from typing import Any

from tests.lab.attacks.guest_port import (
    CREDIT,
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
    wait_s: float = 0.1,
    keep: str = "",
    dribble: bool = False,
) -> dict[str, Any]:
    """Open a flow to a host (hex), send bytes (hex), and wait in between (up to so many seconds, or for data).

    keep: leave it open under that name. dribble: send the frame byte by byte.
    """
    gate = _port(state)
    gate.last += 2
    asked = asking(gate.last, bytes.fromhex(host), port, UDP if udp else TCP)
    number, known = gate.last, Stream()
    gate.streams[number] = known
    for at in range(0, len(asked), 1 if dribble else len(asked)):
        gate.write(asked[at : at + 1] if dribble else asked)
        time.sleep(0.002 if dribble else 0)
    gate.until(number, "code", 12)
    if known.code == 0:
        for one in say:
            if isinstance(one, str):
                _say(gate, number, bytes.fromhex(one), DATAGRAM if udp else DATA)
            else:
                _await(gate, known, one)
        if not keep:
            gate.until(number, "reset", wait_s)
            if not known.over:
                gate.write(frame(RESET, number))
    if keep:
        state[keep] = number
    return {"code": known.code, "reset": known.reset, "data": known.data.decode("latin-1")[:300], "lost": gate.lost}


def _say(gate: Port, number: int, data: bytes, kind: int) -> None:
    for at in range(0, len(data), 32768):
        gate.write(frame(kind, number, data[at : at + 32768]))


def _await(gate: Port, known: Stream, wait_s: float) -> None:
    """Wait until more has arrived."""
    seen, deadline = known.received, time.monotonic() + wait_s
    while time.monotonic() < deadline and known.received == seen and not known.over and not gate.lost:
        gate.read(deadline - time.monotonic())


def write(state: State, *, say: list[str]) -> dict[str, Any]:
    """Write bytes (hexadecimal); the gate stays open."""
    gate = _port(state)
    gate.write(b"".join(map(bytes.fromhex, say)))
    gate.quiet(0.1)
    return {"lost": gate.lost}


def claim_flood(state: State, *, host: str, port: int, count: int) -> dict[str, Any]:
    """Report *count* refusals by the guest that nobody asked for."""
    gate = _port(state)
    for start in range(0, count, 100):
        claims = [claim(host.format(at).encode("latin-1"), port) for at in range(start, start + 100)]
        gate.write(b"".join(claims))
    number = gate.open(host.format("end").encode("latin-1"), port)
    return {"code": gate.until(number, "code", 30).code, "lost": gate.lost}


def await_end(state: State, *, keep: str, wait_s: float) -> dict[str, Any]:
    """Wait for the end of a stream that was left open."""
    known = _port(state).until(state[keep], "reset", wait_s)
    return {"reset": known.reset, "data": known.data.decode("latin-1")[:300]}


def frames(
    state: State, *, opens: list[list[Any]], say: list[str], pause_s: float = 0.0, wait_s: float = 1.0
) -> dict[str, Any]:
    """Open streams (host, port, whether UDP), wait for their answers, write bytes; report whether the gate closed."""
    gate = _port(state)
    codes = []
    for host, port, udp in opens:
        number = gate.open(host.encode(), port, UDP if udp else TCP)
        codes.append(gate.until(number, "code", 12).code)
    for one in say:
        gate.write(bytes.fromhex(one))
        gate.quiet(pause_s)
    deadline = time.monotonic() + wait_s
    while not gate.lost and time.monotonic() < deadline:
        gate.read(0.05)
    # Nobody reads what is sent after the gate has closed.
    gate.lost, closed = False, gate.lost
    gate.write(asking(10_001, b"after.lab.example", 80), 0.3)
    return {"codes": codes, "closed": closed}


def past_credit(state: State, *, host: str, port: int) -> dict[str, Any]:
    """Send without end to a peer that does not read, ignoring the window."""
    gate = _port(state)
    number = gate.open(host.encode(), port)
    code = gate.until(number, "code", 12).code
    one = frame(DATA, number, bytes(32768))
    sent = 0
    while not gate.lost and sent < 256 << 20:
        done = gate.write(one, 3)
        sent += done
        gate.read(0)
        if done < len(one):
            gate.read(0.5)
            break
    return {"code": code, "closed": gate.lost, "sent": sent}


def restart(state: State, *, host: str, port: int) -> dict[str, Any]:
    """Start a second relay on the same stream: close the port, reopen it, and count its streams from 1."""
    import os

    gate = _port(state)
    number = gate.open(host.encode(), port)
    code = gate.until(number, "code", 12).code
    os.close(gate.fd)
    again = Port()
    first = again.open(host.encode(), port)
    answer = again.until(first, "code", 2).code
    state["port"] = again
    return {"code": code, "again": answer, "closed": again.lost}


# ---------------------------------------------------------------------------------------------------------- floods


def open_flood(state: State, *, host: str, port: int, count: int, reset: bool, pace_s: float = 0.0) -> dict[str, Any]:
    """Ask *count* times; {} in host is replaced by a number. reset: end each connection that is established."""
    gate = _port(state)
    first, began, unanswered = gate.last + 2, time.monotonic(), set[int]()

    def look() -> None:
        answered = [number for number in unanswered if gate.streams[number].code is not None]
        unanswered.difference_update(answered)
        for number in answered if reset else []:
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
        if pace_s:
            gate.quiet(pace_s)
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


def reset_flood(state: State, *, host: str, port: int, count: int) -> dict[str, Any]:
    """Send frames for a closed stream, and for a stream number of another machine, without end."""
    gate = _port(state)
    number = gate.open(host.encode(), port)
    gate.until(number, "code", 12)
    gate.write(frame(RESET, number))
    block = frame(RESET, number) * 1000 + frame(CREDIT, number, struct.pack(">I", 1)) * 1000
    sent = 0
    while sent < count and not gate.lost:
        sent += gate.write(block, 20) // 12
        gate.read(0)
    return {"sent": sent, "lost": gate.lost}


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
