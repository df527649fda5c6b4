"""The client of a held sandbox, with a holder that the test plays."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.errors import BackendError
from x07_sandbox.host.sockets import listening
from x07_sandbox.library.held import HeldSandbox
from x07_sandbox.records.runs import SOCKET, all_runs
from x07_sandbox.sessions.execution import order

if TYPE_CHECKING:
    import socket
    from pathlib import Path

RUN = "1700000000000-1-0"


def test_a_holder_of_another_version_is_named_as_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the holder does not understand a command, the error says that it may be of another version."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path))
    folder = all_runs() / RUN
    folder.mkdir(parents=True, mode=0o700)

    def play(listener: socket.socket) -> None:
        with suppress(OSError), listener.accept()[0]:  # that of WATCH stays open
            listener.accept()[0].close()
            waiting.wait(60)

    waiting = threading.Event()
    with listening(folder, SOCKET) as listener:
        holder = threading.Thread(target=play, args=(listener,))
        holder.start()
        sandbox = HeldSandbox(RUN)
        with pytest.raises(BackendError, match="is of another version") as raised:
            sandbox.start(order(["true"]))
        assert f"x07 sandbox close {RUN}" in str(raised.value)
        sandbox.disconnect()
        waiting.set()
        holder.join()
