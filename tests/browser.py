"""A real headless Chromium, driven through its pipe for debugging."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FLAGS: Final = (  # for a browser without a window, that asks no server by itself
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
)
_WITHIN_S: Final = 60.0


def missing() -> str:
    """Return why there is no browser, or an empty text."""
    return "" if shutil.which("chromium") else "chromium (more than 100 MB, so scripts/setup.sh does not install it)"


class Browser:
    """One tab of a browser. events: what the browser reported, in order."""

    def __init__(self, to_fd: int, from_fd: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._to, self._from = to_fd, from_fd
        self._count, self._session, self._rest = 0, "", b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **words: object) -> dict[str, Any]:
        """Send a command of the Chrome DevTools Protocol, and return its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": words}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, path: Path, width: int, *, dark: bool = False) -> None:
        """Load a page in a window of this width, and wait until it has loaded."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:  # noqa: ANN401 - of any type
        """Return the value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def requested(self) -> list[str]:
        """Return the addresses that the page has asked for."""
        found = (event for event in self.events if event.get("method") == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in found]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + _WITHIN_S
        while b"\0" not in self._rest:
            ready = select.select([self._from], [], [], max(0.0, end - time.monotonic()))[0]
            data = os.read(self._from, 1 << 16) if ready else b""
            assert data, "the browser has ended, or does not answer"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer


@contextlib.contextmanager
def running() -> Iterator[Browser]:
    """Start a browser with a new profile, and end it with its files."""
    # A short path: the browser makes a socket there.
    with tempfile.TemporaryDirectory(prefix="x07-browser-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        (read_fd, to_fd), (from_fd, write_fd) = os.pipe(), os.pipe()
        # The browser reads commands from descriptor 3 and answers on descriptor 4.
        argv = ["bash", "-c", f'exec "$@" 3<&{read_fd} 4>&{write_fd}', "bash", "chromium", *_FLAGS.split()]
        argv.append(f"--user-data-dir={folder}/profile")
        null, env = subprocess.DEVNULL, {**os.environ, "TMPDIR": folder}
        process = subprocess.Popen(
            argv, stdin=null, stdout=null, stderr=null, pass_fds=(read_fd, write_fd), start_new_session=True, env=env
        )
        try:
            os.close(read_fd)
            os.close(write_fd)
            yield Browser(to_fd, from_fd)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(to_fd)
            os.close(from_fd)
