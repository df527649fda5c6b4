"""Runs of an attacker with root in the guest: a test sends commands one by one and sees what each one reached.

The image is a real one, built in a separate cache, with another agent (root_agent.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import subprocess
import sys
import time
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec
from msgspec.structs import replace

from x07_sandbox.images.build import build_image
from x07_sandbox.images.store import GuestCode, read_guest_code
from x07_sandbox.policy.decode import default_policy, render_policy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from tests.lab.laboratory import Contact, Laboratory

HERE: Final = Path(__file__).parent
ANSWER_S: Final = 60.0
START_S: Final = 150.0  # the first run saves the VM that it starts from
_INSIDE: Final = ("guest_main.py", "guest_port.py", "guest_frames.py", "guest_stack.py")


def attack_program() -> bytes:
    """Return the program for the guest: a zip archive that Python executes."""
    archive = io.BytesIO(b"#!/usr/bin/python3\n")
    archive.seek(0, os.SEEK_END)
    with zipfile.ZipFile(archive, "a") as file:
        for folder in ("tests", "tests/lab", "tests/lab/attacks"):
            file.writestr(_entry(f"{folder}/__init__.py"), b"")
        for name in _INSIDE:
            file.writestr(_entry(f"tests/lab/attacks/{name}"), (HERE / name).read_bytes())
        file.writestr(_entry("__main__.py"), b"from tests.lab.attacks.guest_main import main\nmain()\n")
    return archive.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


def compromised_code() -> GuestCode:
    """Return the guest code with the compromised agent."""
    honest = read_guest_code()
    agent = dict(honest.agent)
    agent["guest/honest.py"] = agent["guest/agent.py"]
    agent["guest/agent.py"] = (HERE / "root_agent.py").read_bytes()
    return replace(honest, agent=agent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The result of one command. contacts, packets: since the last one. answer: the guest's report."""

    answer: dict[str, Any]
    contacts: list[Contact]
    packets: list[Contact]


@dataclass(kw_only=True)
class Stage:
    """What all runs of an attacker share. image: a digest, since a name would be rebuilt with honest code."""

    lab: Laboratory
    folder: Path
    cache: Path
    image: str = ""
    count: int = 0

    def prepare(self) -> None:
        """Build the image."""
        with _environment(X07_VM_CACHE_DIR=str(self.cache)):
            self.image = build_image(name="lost", progress=lambda _text: None, code=compromised_code()).digest
        self.program.write_bytes(attack_program())
        self.program.chmod(0o755)

    @property
    def program(self) -> Path:
        """The guest program on the host."""
        return self.folder / "attack"

    def policy(self, hosts: Mapping[str, Sequence[int]], **net: bool) -> Path:
        """Write a policy that lists these hosts and ports."""
        document = msgspec.to_builtins(default_policy())
        document["net"] |= {"enabled": True, "allow_dns": True, "allow_tcp": True, "allow_udp": True} | net
        document["net"]["allow_hosts"] = [{"host": host, "ports": list(ports)} for host, ports in hosts.items()]
        document["limits"] |= {"cpu_ms": 300_000, "wall_ms": 300_000, "mem_bytes": 512 << 20, "fds": 1024, "procs": 64}
        self.count += 1
        path = self.folder / f"policy-{self.count}.json"
        path.write_bytes(render_policy(document))
        return path

    def session(
        self, way: str, hosts: Mapping[str, Sequence[int]], *, deny: Sequence[str] = (), **net: bool
    ) -> Session:
        """Start a run. way: "frames" or "stack", the module of attacks that the guest loads."""
        policy = self.policy(hosts, **net)
        return Session(self, way, policy, deny)


@contextlib.contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Session:
    """One run, as a context manager. result, code: the result and the exit code of `x07 run`, once it has ended."""

    def __init__(self, stage: Stage, way: str, policy: Path, deny: Sequence[str]) -> None:
        self.stage = stage
        self.lab = stage.lab
        stage.count += 1
        home = stage.folder / f"home-{stage.count}"
        home.mkdir(mode=0o700)
        self.home = home
        self._report = home / "report.json"
        self._errors = (home / "errors.txt").open("w+b")
        denied = [word for one in deny for word in ("--deny-host", one)]
        argv = [
            sys.executable,
            "-m",
            "x07_sandbox.cli.main",
            "run",
            "--policy",
            str(policy),
            "--image",
            stage.image,
            *denied,
        ]
        argv += ["--no-pool", "--stdin", "--report-out", str(self._report), str(stage.program), "--", way]
        env = os.environ | {
            "X07_VM_STATE_DIR": str(home / "jobs"),
            "X07_VM_CACHE_DIR": str(stage.cache),
            "XDG_CONFIG_HOME": str(home / "config"),
        }
        self._mark = self.lab.mark()
        self.process = subprocess.Popen(
            [*self.lab.gate_prefix, *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=env,
            bufsize=0,
        )
        self._buffer = b""
        self.result: dict[str, Any] = {}
        self.code = -1

    def __enter__(self) -> Self:
        try:
            assert self._line(START_S) == {"ready": True}, self.errors()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def do(self, name: str, **words: object) -> Seen:
        """Have the guest carry out a command, and return what it reached."""
        self.order(name, **words)
        answer = self._line()
        return self.look(answer)

    def order(self, name: str, **words: object) -> None:
        """Send a command; `answer` waits for its end."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": name, **words}).encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the last command."""
        return self._line()

    def look(self, answer: dict[str, Any] | None = None) -> Seen:
        """Return the contacts since the last call."""
        # Later contacts count for the next call: none is lost.
        self.lab.wait_quiet(quiet_s=0.05)
        mark, self._mark = self._mark, self.lab.log.stat().st_size
        contacts, packets = self.lab.contacts(mark), self.lab.packets(mark)
        return Seen(answer=answer or {}, contacts=contacts, packets=packets)

    def errors(self) -> str:
        """Return the standard error of `x07 run`."""
        self._errors.flush()
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def child(self, role: str) -> int:
        """Return the process id of this run's "gate" or "resolver"."""
        for _ in range(100):
            for pid in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208
                with contextlib.suppress(OSError):
                    line = Path("/proc", pid, "cmdline").read_bytes()
                    if f"network.{role} import".encode() in line and self._is_below(int(pid)):
                        return int(pid)
            time.sleep(0.02)
        raise AssertionError(f"no {role}")

    def _is_below(self, pid: int) -> bool:
        while pid > 1:
            if pid == self.process.pid:
                return True
            found = re.search(r"^PPid:\s+(\d+)", Path("/proc", str(pid), "status").read_text(), re.MULTILINE)
            pid = int(found[1]) if found else 0
        return False

    def net_log(self) -> list[bytes]:
        """Return the lines of the run's net.jsonl."""
        (path,) = self.home.glob("runs/*/net.jsonl")
        return path.read_bytes().splitlines(keepends=True)

    def net(self, table: str) -> list[dict[str, Any]]:
        """Return one table of the result's `net`: allowed, denied or failed."""
        rows: list[dict[str, Any]] = (self.result.get("net") or {}).get(table, [])
        return rows

    def counted(self, table: str) -> Counter[str]:
        """Return the connections of one table, counted by rule."""
        counter: Counter[str] = Counter()
        for row in self.net(table):
            counter[row["rule"]] += row["count"]
        return counter

    def _line(self, most_s: float = ANSWER_S) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + most_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            readable, _, _ = select.select([self.process.stdout], [], [], max(0, left))
            data = os.read(self.process.stdout.fileno(), 65536) if readable else b""
            if not data:
                why = "ended" if readable else f"was silent for {most_s} s"
                raise AssertionError(f"the attacker {why}: {self._buffer!r} {self.errors()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        assert "error" not in found, found["error"]
        return found

    def _end(self) -> None:
        if self.code != -1:
            return
        self.order("end")
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.process.stdout.close()
            if self._report.is_file():
                self.result = json.loads(self._report.read_bytes())
            self._said = self.errors()
            self._errors.close()

    @property
    def said(self) -> str:
        """Return the standard error of `x07 run` after it has ended."""
        return self._said
