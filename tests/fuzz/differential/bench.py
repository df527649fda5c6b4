"""Starts the real servers on a loopback address of this process, and collects their evidence.

No name is looked up, and nothing is sent outside the loopback. The servers end with their `Bench`, or with its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from tests.fuzz.differential.evidence import FENCE, Log, Taken
from tests.fuzz.differential.programs import PROGRAMS, SERVERS, Program
from tests.fuzz.differential.sink import Sink
from tests.fuzz.tls import hello, sni

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import TracebackType

_START_S: Final = 15.0
_FENCE_S: Final = 20.0
_POLL_S: Final = 0.005
_FIRST_PORT: Final = 20_000
_FIRST_SINK: Final = 21_000
TLS_PORTS: Final = frozenset({"haproxy-sni"})
HTTP2_PORTS: Final = frozenset({"node-h2"})
PROXY_LINE_PORTS: Final = frozenset({"nginx-proxy-line", "squid-proxy-line"})
"""Ports that expect a line of the PROXY protocol first."""


class Bench:
    """The running servers. ports: the port of each server, by name. An async context manager."""

    def __init__(self, programs: tuple[Program, ...] = PROGRAMS) -> None:
        self.programs = tuple(program for program in programs if program.command())
        pid = os.getpid()
        self.address = f"127.{64 + (pid >> 16)}.{pid >> 8 & 255}.{pid & 255}"
        names = [port for program in self.programs for port in program.ports]
        self.ports = {name: _FIRST_PORT + number for number, name in enumerate(names)}
        proxies = [port for program in self.programs for port in program.sinks]
        self._sink_ports = {name: _FIRST_SINK + number for number, name in enumerate(proxies)}
        self._sinks: list[Sink] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs: list[Log] = []
        self._found: list[Taken] = []
        self._fences = 0
        self._folder = Path()

    async def __aenter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="x07-differential-"))
        try:
            await self._start()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for sink in self._sinks:
            await sink.stop()
        for log in self._logs:
            log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _start(self) -> None:
        # Programs that another user runs write below the folder.
        self._folder.chmod(0o777)
        (self._folder / "www").mkdir()
        (self._folder / "www" / "index.html").write_text("good\n", encoding="utf-8")
        for name, port in self._sink_ports.items():
            sink = Sink(name, self._found.append)
            await sink.start(self.address, port)
            self._sinks.append(sink)
        for program in self.programs:
            self._run(program)
        async with asyncio.timeout(_START_S):
            for port in self.ports.values():
                await self._wait_for(port)
        await self.fence(_START_S)
        self._found.clear()

    def _run(self, program: Program) -> None:
        log = self._folder / f"{program.name}.log"
        file = self._folder / f"{program.name}.conf"
        words = {"@folder@": str(self._folder), "@address@": self.address, "@log@": str(log), "@file@": str(file)}
        words |= {f"@{name}@": str(port) for name, port in self.ports.items()}
        words |= {f"@sink-{name}@": f"{self.address}:{port}" for name, port in self._sink_ports.items()}
        words |= {f"@sink-port-{name}@": str(port) for name, port in self._sink_ports.items()}
        if (model := SERVERS / file.name).is_file():
            file.write_text(_replaced(model.read_text(encoding="utf-8"), words), encoding="utf-8")
        argv = [program.command() or program.argv[0], *(_replaced(word, words) for word in program.argv[1:])]
        log.touch()
        log.chmod(0o666)
        with log.open("ab") as out, (self._folder / f"{program.name}.stderr").open("wb") as errors:
            # A killed test leaves no servers behind. The kernel forgets this if a server changes its user, as some do
            # that root starts. Our own files may be readable for root only.
            nobody = ["--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]
            change = nobody if os.geteuid() == 0 and not program.ours else []
            command = ["setpriv", *change, "--pdeathsig", "KILL", *argv]
            self._processes.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, process_group=0, cwd=self._folder
                )
            )
        self._logs.append(Log(log))

    async def _wait_for(self, port: int) -> None:
        while True:
            try:
                _, writer = await asyncio.open_connection(self.address, port)
            except OSError:
                self._check()
                await asyncio.sleep(_POLL_S)
            else:
                writer.close()
                return

    def _check(self) -> None:
        """Raise OSError if a server has ended."""
        if ended := [process.args for process in self._processes if process.poll() is not None]:
            raise OSError(f"a server has ended: {ended}: {self._errors()}")

    def _errors(self) -> str:
        """Return what the servers have written to their error logs."""
        texts = [path.read_text(encoding="utf-8", errors="replace")[-2000:] for path in self._folder.glob("*.*err*")]
        return "\n".join(text for text in texts if text)

    async def evidence(self, only: Collection[str] = ()) -> list[Taken]:
        """Return the requests that servers have taken since the last call, except the fences. only: empty for all."""
        await self.fence(_FENCE_S, only)
        found = [taken for taken in self._found if FENCE not in " ".join((taken.text, *taken.hosts))]
        self._found.clear()
        return found

    async def fence(self, limit_s: float, only: Collection[str] = ()) -> None:
        """Send a request to each server, and wait until all have recorded theirs: all before it is recorded then."""
        self._fences += 1
        waiting = {name: f"{FENCE}{self._fences}-{name}-" for name in self.ports if not only or name in only}
        self._drain()
        self._check()
        async with asyncio.timeout(limit_s):
            await asyncio.gather(*(self._send_fence(name, mark) for name, mark in waiting.items()))
            while True:
                self._drain()
                text = "\n".join(" ".join((taken.text, *taken.hosts)) for taken in self._found)
                waiting = {name: mark for name, mark in waiting.items() if mark not in text}
                if not waiting and not any(sink.open for sink in self._sinks):
                    return
                await asyncio.sleep(_POLL_S)

    def _drain(self) -> None:
        for log in self._logs:
            self._found += log.read()

    async def _send_fence(self, name: str, mark: str) -> None:
        reader, writer = await asyncio.open_connection(self.address, self.ports[name])
        with contextlib.suppress(OSError):
            writer.write(_fence(name, mark.encode()))
            if name not in HTTP2_PORTS:
                await reader.read(65536)
            else:
                await asyncio.sleep(0.05)
        writer.close()


def _fence(name: str, mark: bytes) -> bytes:
    if name in TLS_PORTS:
        return hello(sni(mark + b".test"))
    if name in HTTP2_PORTS:
        path = b"/" + mark
        block = b"\x82\x86\x04" + bytes([len(path)]) + path + b"\x01\x09good.test"
        head = len(block).to_bytes(3) + b"\x01\x05\0\0\0\x01"
        return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0" + head + block
    target = b"http://good.test" if name in {"squid", "squid-proxy-line", "tinyproxy", "apache-proxy"} else b""
    line = b"PROXY TCP4 127.0.0.1 127.0.0.1 1000 80\r\n" if name in PROXY_LINE_PORTS else b""
    return line + b"GET %b/%b HTTP/1.1\r\nHost: good.test\r\nConnection: close\r\n\r\n" % (target, mark)


def _replaced(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(word, value)
    return text
