"""Calls of a real containerd over ttrpc."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import need
from tests.engines import containerd, missing
from x07_sandbox.backends.firecracker import call, create_vm, stop_vm
from x07_sandbox.backends.protobuf import encode
from x07_sandbox.errors import BackendError
from x07_sandbox.host.waiting import Deadline, wait_readable

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root
EVENTS = "containerd.services.events.ttrpc.v1.Events"


@pytest.fixture(scope="module", name="address")
def address_fixture() -> Iterator[str]:
    """The socket of a containerd of its own."""
    reason = missing("containerd")
    need(not reason, reason, installable=os.geteuid() == 0)
    with (
        tempfile.TemporaryDirectory(prefix="x07-containerd-", dir="/var/tmp") as folder,
        containerd(Path(folder)) as at,
    ):
        yield at


def forward(address: str, topic: str) -> bytes:
    """Send an event to containerd, which has one service on this socket: it forwards events."""
    content = encode((1, "containerd.events.NamespaceCreate"), (2, encode((1, "made"))))
    event = encode((2, "x07"), (3, topic), (4, content))
    return call(f"{address}.ttrpc", EVENTS, "Forward", encode((1, event)), metadata={"k": "v"}, timeout_s=20)


def test_plain_containerd_does_not_know_the_calls_of_firecracker(address: str) -> None:
    """Plain containerd answers that it has no such service, and the error says so."""
    with pytest.raises(BackendError, match="CreateVM: unimplemented: service Firecracker"):
        create_vm(address, "x07", "vm-1", memory_mib=128, vcpus=1, timeout_s=20)
    with pytest.raises(BackendError, match="StopVM: unimplemented"):
        stop_vm(address, "x07", "vm-1", 5)


def test_containerd_accepts_a_call_and_acts_on_it(address: str) -> None:
    """A call that containerd accepts has an empty answer and takes effect: its own client sees the event."""
    argv = [shutil.which("ctr") or "", "--address", address, "--namespace", "x07", "events"]
    seen, deadline = b"", Deadline.after(60)
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0) as client:
        assert client.stdout is not None
        try:
            while b"/x07/made" not in seen:  # the client does not report when it has subscribed
                assert client.poll() is None
                assert not deadline.passed()
                assert forward(address, "/x07/made") == b""
                if wait_readable(client.stdout.fileno(), 0.1):
                    seen += client.stdout.read(4096)
        finally:
            client.kill()
    assert b' x07 /x07/made {"name":"made"}' in seen


def test_containerds_own_refusal_of_a_call_is_an_error(address: str) -> None:
    """A call that containerd refuses is an error with containerd's status and reason."""
    with pytest.raises(BackendError, match=r"Forward: invalid argument: .*topic"):
        forward(address, "no-slash")
