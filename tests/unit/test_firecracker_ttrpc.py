"""Calls of firecracker-containerd, answered by a stand-in for the daemon that speaks ttrpc."""

from __future__ import annotations

import contextlib
import socket
import struct
import tempfile
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.fuzz_ttrpc import failed, field, frame
from x07_sandbox.backends.firecracker import (
    ANSWER_MAX,
    HEADER_SIZE,
    call,
    create_vm,
    message_size,
    stop_vm,
)
from x07_sandbox.errors import BackendError, HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

SHORT_S = 0.3
MADE = frame(field(2, field(1, b"vm-1") + field(2, b"/run/fc.sock")))


class StandInDaemon(NamedTuple):
    """A stand-in for firecracker-containerd. address: as of containerd. requests: the bytes that it received."""

    address: str
    requests: list[bytes]

    @property
    def ttrpc(self) -> str:
        """The socket for calls."""
        return f"{self.address}.ttrpc"


@contextlib.contextmanager
def stand_in(
    answer: bytes, pause_s: float = 0.0, *, reads: bool = True, closes: bool = True
) -> Iterator[StandInDaemon]:
    """Run a stand-in that reads one request and sends *answer*.

    pause_s: before each byte, if not 0. reads: whether it reads at all. closes: whether it then closes the connection.
    """
    ended = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as connection:
            if reads:
                head = connection.recv(HEADER_SIZE, socket.MSG_WAITALL)
                daemon.requests.append(head + connection.recv(int.from_bytes(head[:4], "big"), socket.MSG_WAITALL))
            for piece in [answer[at : at + 1] for at in range(len(answer))] if pause_s else [answer]:
                time.sleep(pause_s)
                connection.sendall(piece)
            if not closes:
                ended.wait()

    with (
        tempfile.TemporaryDirectory(prefix="x07-ttrpc-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
    ):
        daemon = StandInDaemon(f"{folder}/c.sock", [])
        listener.bind(daemon.ttrpc)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield daemon
        finally:
            ended.set()
            listener.shutdown(socket.SHUT_RDWR)  # ends `accept`, if the call was too late to connect
            thread.join()


def ask(daemon: StandInDaemon, payload: bytes = b"", timeout_s: float = 20.0) -> bytes:
    """Call a method of no service in particular."""
    return call(daemon.ttrpc, "S", "Method", payload, metadata={}, timeout_s=timeout_s)


def sent(daemon: StandInDaemon) -> bytes:
    """The only request, without its header, which is checked."""
    (request,) = daemon.requests
    assert struct.unpack(">IIBB", request[:10]) == (len(request) - 10, 1, 1, 0)
    return request[10:]


def asked(service: str, method: str, payload: bytes, timeout_s: int, metadata: dict[str, str]) -> bytes:
    """A request, written independently of the client."""
    parts = [field(1, service.encode()), field(2, method.encode()), field(3, payload), field(4, timeout_s * 10**9)]
    parts += [field(5, field(1, key.encode()) + field(2, text.encode())) for key, text in metadata.items()]
    return b"".join(parts)


NAMESPACE = {"containerd-namespace-ttrpc": "x07"}


def test_a_vm_is_created_with_the_fields_of_the_daemons_protocol() -> None:
    """CreateVM has the VM's id, size, one container, its end with the last task and a timeout, and the namespace."""
    with stand_in(MADE) as daemon:
        create_vm(daemon.address, "x07", "vm-1", memory_mib=384, vcpus=2, timeout_s=30)
    body = field(1, b"vm-1") + field(2, field(3, 384) + field(4, 2)) + field(8, 1) + field(9, 1) + field(11, 30)
    assert sent(daemon) == asked("Firecracker", "CreateVM", body, 35, NAMESPACE)


def test_a_vm_is_stopped_with_a_timeout() -> None:
    """StopVM has the VM's id, a timeout and the namespace."""
    with stand_in(frame(b"")) as daemon:
        stop_vm(daemon.address, "x07", "vm-1", 5)
    assert sent(daemon) == asked("Firecracker", "StopVM", field(1, b"vm-1") + field(2, 5), 10, NAMESPACE)


@pytest.mark.parametrize("answer", [frame(b""), frame(field(2, field(1, b"vm-2"))), frame(field(2, b"\x0a\x04vm"))])
def test_an_answer_about_another_vm_is_refused(answer: bytes) -> None:
    """A CreateVM answer that does not name the requested VM is an error."""
    with stand_in(answer) as daemon, pytest.raises(BackendError, match="not about the requested VM"):
        create_vm(daemon.address, "x07", "vm-1", memory_mib=128, vcpus=1, timeout_s=20)


@given(st.binary(max_size=300), st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))
def test_any_payload_and_metadata_arrive_and_come_back(payload: bytes, metadata: dict[str, str]) -> None:
    """Any payload and metadata reach the daemon as they are, and any answer comes back, also with unknown fields."""
    answer = frame(field(9, 1) + field(1, field(1, 0)) + field(2, payload[::-1]) + field(15, b"new"))
    with stand_in(answer) as daemon:
        got = call(daemon.ttrpc, "a.Service", "Do", payload, metadata=metadata, timeout_s=20)
    assert got == payload[::-1]
    assert sent(daemon) == asked("a.Service", "Do", payload, 20, metadata)


def test_the_daemons_error_is_shown_with_its_kind_and_one_line_of_text() -> None:
    """A failed call is an error with the status and the daemon's text, on one line, printable and shortened."""
    text = b"no such VM\n  x07: ok \x1b[2J\xff" + b"y" * 10_000
    with stand_in(failed(5, text)) as daemon, pytest.raises(BackendError) as caught:
        ask(daemon)
    error = caught.value
    assert error.why.startswith("Method: not found: no such VM x07: ok \\x1b[2J\N{REPLACEMENT CHARACTER}yyy")
    assert error.why.isprintable()
    assert len(error.why) < 600


@pytest.mark.parametrize(
    ("status", "kind"), [(12, "unimplemented"), (16, "unauthenticated"), (17, "status 17"), (-1, "status ")]
)
def test_an_error_without_a_text_has_its_kind(status: int, kind: str) -> None:
    """Every status other than 0 is an error, also one that nobody knows."""
    with stand_in(failed(status, b"")) as daemon, pytest.raises(BackendError, match=kind):
        ask(daemon)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        pytest.param(b"", "closed the connection", id="nothing"),
        pytest.param(MADE[:7], "closed the connection", id="half-a-header"),
        pytest.param(MADE[:-1], "closed the connection", id="half-a-message"),
        pytest.param(frame(b"", stream=3), "malformed: it is not the response", id="other-stream"),
        pytest.param(frame(b"", kind=1), "malformed: it is not the response", id="a-request"),
        pytest.param(frame(b"", kind=3), "malformed: it is not the response", id="data"),
        pytest.param(frame(b"", flags=1), "malformed: it is not the response", id="flags"),
        pytest.param(struct.pack(">IIBB", ANSWER_MAX + 1, 1, 2, 0), "more than 4194304 bytes", id="too-large"),
        pytest.param(frame(field(2, b"a") * 2), "malformed: field 2", id="two-answers"),
        pytest.param(frame(field(1, b"") * 2), "malformed: field 1", id="two-statuses"),
        pytest.param(frame(field(1, 12)), "malformed: field 1", id="number-as-status"),
        pytest.param(frame(field(1, field(1, b"12"))), "malformed: field 1", id="text-as-number"),
        pytest.param(frame(field(1, field(1, 5) + field(2, 1))), "malformed: field 2", id="number-as-text"),
        pytest.param(frame(b"\xff"), "malformed: the last field is cut off", id="no-message"),
    ],
)
def test_a_malformed_answer_is_an_error(answer: bytes, why: str) -> None:
    """An answer that is cut off, too large, for another call or malformed is an error that says so."""
    with stand_in(answer) as daemon, pytest.raises(BackendError, match=why):
        ask(daemon)


def test_the_largest_answer_arrives_whole() -> None:
    """An answer of the largest size arrives, and bytes after it are not read."""
    payload = bytes(ANSWER_MAX - len(b"\x12\xff\xff\xff\x01"))  # the field's number and its length
    answer = frame(field(2, payload))
    assert message_size(answer[:HEADER_SIZE]) == ANSWER_MAX
    with stand_in(answer + b"more") as daemon:
        assert ask(daemon) == payload


@pytest.mark.parametrize(
    ("answer", "pause_s", "reads", "payload"),
    [
        pytest.param(b"", 0.0, True, b"", id="silent"),
        pytest.param(MADE[:-1], 0.0, True, b"", id="unfinished"),
        pytest.param(MADE, SHORT_S / 4, True, b"", id="slow"),
        pytest.param(b"", 0.0, False, bytes(8 << 20), id="not-reading"),
    ],
)
def test_a_call_ends_at_its_deadline(answer: bytes, pause_s: float, reads: bool, payload: bytes) -> None:  # noqa: FBT001 - a case
    """A daemon that is silent, slow or does not read cannot keep a call beyond its deadline."""
    before = time.monotonic()
    with stand_in(answer, pause_s, reads=reads, closes=False) as daemon:
        with pytest.raises(BackendError, match=f"Method: no answer within {SHORT_S} s"):
            ask(daemon, payload, SHORT_S)
        assert time.monotonic() - before < SHORT_S + 10


def test_a_call_without_a_daemon_says_how_to_start_it() -> None:
    """A call to a socket that nobody serves is an error of the host, and so is a path that is too long."""
    with tempfile.TemporaryDirectory() as folder:
        for path in (f"{folder}/absent", f"{folder}/{'x' * 200}"):
            with pytest.raises(HostError, match="Start firecracker-containerd") as caught:
                call(path, "S", "Method", b"", metadata={}, timeout_s=5)
            assert caught.value.what == f"cannot connect to {path}"
