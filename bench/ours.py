"""Time `x07 run`, library calls and raw clones, and check that each timed run kept every promise."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.figures import WrongRunError, expected
from x07_sandbox.backends.base import MachineKind, greet
from x07_sandbox.backends.qemu.hot import VARIABLE, hot_template
from x07_sandbox.backends.qemu.start import QemuJob, start_qemu
from x07_sandbox.backends.qemu.template import template_for
from x07_sandbox.channel.messages import CWD, FREE, Exec
from x07_sandbox.conformance.box import Box
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.documents import render_json
from x07_sandbox.host.linux import children_of
from x07_sandbox.host.paths import state_dir
from x07_sandbox.host.waiting import Cancel
from x07_sandbox.images.store import find_image
from x07_sandbox.images.verify import open_image
from x07_sandbox.library.pool import Pool
from x07_sandbox.policy.controls import make_plan, run_limits
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.policy.features import vm_features
from x07_sandbox.policy.guest import ram_class_bytes
from x07_sandbox.programs.toolchains import ARTIFACT
from x07_sandbox.records.reader import open_stored
from x07_sandbox.records.runs import Claim, create_record, new_run_id
from x07_sandbox.sessions.request import in_memory
from x07_sandbox.sessions.session import Session
from x07_sandbox.sessions.specs import SessionSpec, opening
from x07_sandbox.sessions.transfers import CommandStreams, Receivers, Sink, memory_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.backends.qemu.instance import QemuInstance

X07 = Path(sys.executable).with_name("x07")
_SANDBOX_S = 2 * 3600
_START_S = 120
_QMP_QUIT = b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'


def variables(*, front: bool) -> dict[str, str]:
    """Return the variables of a command. front: whether the front of a pool may carry it out."""
    return os.environ | {"X07_NO_FRONT": "0" if front else "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """`x07 run` with a program, flags and more variables. start, built: see `check`. front: whether it may help."""

    program: Path
    flags: tuple[str, ...]
    start: str
    built: str
    env: dict[str, str] = field(default_factory=dict)
    front: bool = False

    def seconds(self) -> float:
        """Time one whole command. Raises WrongRunError if the run was not as expected."""
        nonce = os.urandom(8).hex()
        argv = [str(X07), "run", *self.flags, "--json=full", str(self.program)]
        started = time.monotonic()
        env = variables(front=self.front) | self.env
        done = subprocess.run(argv, input=f"{nonce}\n".encode(), capture_output=True, check=False, env=env)
        seconds = time.monotonic() - started
        check(done.stdout, expected(nonce), start=self.start, built=self.built)
        return seconds


def not_hot(command: Command) -> Command:
    """Return the same command with clones of a saved VM."""
    return replace(command, start="clone", env={VARIABLE: "1"})


def check(document: bytes, output: bytes, *, start: str, built: str | None) -> None:
    """Raise WrongRunError unless a result, as JSON, is that of a run that kept every promise.

    output: the expected output. start: the expected start mode of each VM. built: the expected origin of the artifact;
    None for no artifact.
    """
    result = json.loads(document)
    phases = result["phases"]
    # The run must have had the state of each control that the plan for the default policy has.
    plan = make_plan(default_policy(), vm_features(result["isolation"]))
    problems = {
        "outcome": result["outcome"] != "ok",
        "output": (result["stdout"]["text"] or "").encode() != output,
        "VMs": sorted(phases) != (["build", "run"] if built == "build" else ["run"]),
        "start": any(phase["start"] != start for phase in phases.values()),
        "artifact": result["artifact_from"] != built,
        "jail": not str(result["jail"]).startswith("namespaces"),
        "record": not all((state_dir() / phase["job_id"] / "done").is_file() for phase in phases.values()),
        "controls": {row["field"]: row["state"] for row in result["controls"]}
        != {control.field: control.state for control in plan.controls},
    }
    if wrong := [name for name, bad in problems.items() if bad]:
        raise WrongRunError(f"a timed run is not as expected: {wrong}: {result['reason']}")


class Pooled:
    """The pools for `x07 run` and the library, with a VM that is ready before each timing."""

    def __init__(self, stack: contextlib.ExitStack, size: int) -> None:
        self._command("stop")
        self.pool = stack.enter_context(Pool())
        self._command("start", "--size", str(size), "--idle", "3600")
        stack.callback(self._command, "stop")

    @staticmethod
    def _command(*words: str) -> bytes:
        return subprocess.run([X07, "pool", *words], check=True, capture_output=True).stdout

    def settle(self) -> None:
        """Wait until both pools are full: preparing a VM uses a core."""
        while True:
            status = json.loads(self._command("status", "--json"))["pool"]
            if status["ready"] == status["size"] and self.pool.wait_ready():
                return
            time.sleep(0.05)

    def library_seconds(self, program: Path) -> float:
        """Time one library call that uses a ready VM."""
        nonce = os.urandom(8).hex()
        started = time.monotonic()
        result = self.pool.submit(program, f"{nonce}\n".encode()).result()
        seconds = time.monotonic() - started
        check(render_json(result), expected(nonce), start="pool", built="cache")
        return seconds


class Floor:
    """Raw hot clones, and clones of a saved VM: the same jail and QEMU, without the rest of a run.

    program: the executable of the C program.
    """

    def __init__(self, stack: contextlib.ExitStack, program: Path) -> None:
        image = stack.enter_context(open_image(find_image(None)))
        self.kind = MachineKind(image=image, ram_bytes=ram_class_bytes(default_policy().limits.mem_bytes))
        template = template_for(self.kind, kvm=False)
        self.saved = stack.enter_context(template.opened())
        self.hot = stack.enter_context(hot_template(template).opened())
        self.artifact = program.read_bytes()

    @contextlib.contextmanager
    def _started(self, *, hot: bool = True, deadline_s: int = 60) -> Iterator[QemuInstance]:
        digest = self.kind.image_digest
        record = create_record(
            Claim(run_id=new_run_id(), phase="bench", wall_ms=1000), backend="qemu", image_digest=digest
        )
        job = QemuJob(record=record, kind=self.kind, deadline_s=deadline_s)
        with start_qemu(job, kvm=False, source=self.hot if hot else self.saved) as instance:
            yield instance

    def quit_seconds(self) -> float:
        """Time QEMU from its start to its end, with a quit command sent at once."""
        started = time.monotonic()
        with self._started(hot=False) as instance:
            instance.send_qmp(_QMP_QUIT)
            instance.release()
            select.select([instance.pidfd], [], [])
            return time.monotonic() - started

    def answer_seconds(self, *, hot: bool) -> float:
        """Time a clone from its start until it has confirmed clock and entropy."""
        started = time.monotonic()
        with self._started(hot=hot) as instance:
            instance.release()
            greet(instance)
            return time.monotonic() - started

    def program_seconds(self) -> float:
        """Time a hot clone that runs a C program, from its start to its end."""
        nonce = os.urandom(8).hex()
        started = time.monotonic()
        with self._started() as instance, contextlib.ExitStack() as stack:
            stdout = self._run(instance, f"{nonce}\n".encode(), stack)
        seconds = time.monotonic() - started
        if stdout != expected(nonce):
            raise WrongRunError("a raw clone did not run the program")
        return seconds

    def _run(self, instance: QemuInstance, data: bytes, stack: contextlib.ExitStack) -> bytes:
        keep_fd = memory_file(b"", stack)
        stdout = Sink("stdout", keep_fd=keep_fd, live_fd=None, max_bytes=1 << 20)
        stderr = Sink("stderr", keep_fd=memory_file(b"", stack), live_fd=None, max_bytes=1 << 20)
        given = CommandStreams(stdin_fd=memory_file(data, stack), stdout=stdout, stderr=stderr)
        spec = self._spec(stack)
        self._opened(instance, spec, stack).run(spec.order, given, spec.wall_ms, spec.receivers)
        return os.pread(keep_fd, 1 << 20, 0)

    def _spec(self, stack: contextlib.ExitStack) -> SessionSpec:
        policy = default_policy()
        program = in_memory(self.artifact, ARTIFACT, 0o755, stack)
        files = [program, in_memory(render_policy(policy), "/x07/in/policy.json", 0o644, stack)]
        limits = run_limits(policy).for_guest()
        return SessionSpec(
            name="run",
            opening=opening(FREE, limits, files, out_writable=False),
            order=Exec(1, [ARTIFACT], {}, CWD, limits),
            files=tuple(files),
            receivers=Receivers(),
            wall_ms=policy.limits.wall_ms,
            ram_bytes=self.kind.ram_bytes,
        )

    @staticmethod
    def _opened(instance: QemuInstance, spec: SessionSpec, stack: contextlib.ExitStack) -> Session:
        greet(instance)
        cancel = stack.enter_context(contextlib.closing(Cancel()))
        return Session(instance, cancel, spec.opening, spec.files)

    def sandbox(self, stack: contextlib.ExitStack) -> Box:
        """Open a session in a clone, for many commands."""
        instance = stack.enter_context(self._started(deadline_s=_SANDBOX_S))
        spec = self._spec(stack)
        return Box(self._opened(instance, spec, stack), instance, spec.order.limits)

    @contextlib.contextmanager
    def idle(self) -> Iterator[int]:
        """Start a clone that waits for the host; yield the pid of its QEMU."""
        with self._started() as instance:
            instance.release()
            time.sleep(0.3)  # until it runs
            yield _vmm(instance)


@contextlib.contextmanager
def waiting_run(program: Path) -> Iterator[int]:
    """Start `x07 run` of a program that waits for input, in a process of its own; yield the pid of its QEMU."""
    argv = [str(X07), "run", "--no-pool", str(program)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + _START_S
        while not (found := _started_vmm(child.pid)):
            if child.poll() is not None or time.monotonic() > deadline:
                child.kill()
                raise WrongRunError("a run that waits for input did not start")
            time.sleep(0.05)
        time.sleep(0.3)  # until the program reads its input
        yield found
        child.communicate(b"x\n")


def _started_vmm(runner: int) -> int:
    """Return the pid of the QEMU of a run by its x07 process, or 0 if there is none yet."""
    for stored in open_stored():
        owner = stored.owner
        if owner is not None and owner.runner.pid == runner and "inner" in owner.processes:
            return next(filter(_is_qemu, children_of(owner.processes["inner"].pid)), 0)  # before it, criu is there
    return 0


def _is_qemu(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/exe").readlink().name == Path(host_arch().qemu_binary).name
    return False


def next_command_seconds(box: Box) -> float:
    """Time one more C program in an open sandbox. Raises WrongRunError if its output is wrong."""
    nonce = os.urandom(8).hex()
    started = time.monotonic()
    text = box.output(box.start(ARTIFACT, stdin=f"{nonce}\n".encode()))
    seconds = time.monotonic() - started
    if text.encode() != expected(nonce):
        raise WrongRunError("a sandbox did not run the program")
    return seconds


def _vmm(instance: QemuInstance) -> int:
    """Return the pid of QEMU, the child of the jail's first process."""
    return children_of(instance.inner.pid)[0]
