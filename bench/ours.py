"""Timing `x07 run` and the floors below it, each time with a check that no promise was skipped."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench import programs
from x07_sandbox.backends.base import Job, MachineKind
from x07_sandbox.backends.qemu.machine import qmp_quit
from x07_sandbox.backends.qemu.start import Accelerator, start_qemu
from x07_sandbox.backends.qemu.template import opened_template, template_for
from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.frames import Kind, Role
from x07_sandbox.channel.link import State
from x07_sandbox.images.store import find_image
from x07_sandbox.images.verify import open_image
from x07_sandbox.jobs.record import Claim, create_record, new_run_id
from x07_sandbox.plan.sizes import ram_class_bytes
from x07_sandbox.policy import default_policy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.backends.qemu.instance import QemuInstance

X07 = Path(sys.executable).with_name("x07")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """`x07 run` of a program with flags. start: how the run machine must have been started. built: what was built."""

    program: Path
    flags: tuple[str, ...]
    start: str
    built: str

    def seconds(self) -> float:
        """One run, from the command's start to its end. Raises SystemExit if it was not what it claims to be."""
        nonce = os.urandom(8).hex()
        argv = [str(X07), "run", *self.flags, "--json", str(self.program)]
        begun = time.monotonic()
        done = subprocess.run(argv, input=f"{nonce}\n".encode(), capture_output=True, check=False)
        seconds = time.monotonic() - begun
        self._check(json.loads(done.stdout), nonce)
        return seconds

    def _check(self, result: dict[str, object], nonce: str) -> None:
        phases, stdout, controls = result["phases"], result["stdout"], result["controls"]
        assert isinstance(phases, dict)
        assert isinstance(stdout, dict)
        assert isinstance(controls, list)
        state = Path(os.environ.get("X07_VM_STATE_DIR") or Path.home() / ".x07/vm/jobs")
        run = phases["run"]
        problems = {
            "outcome": result["outcome"] != "ok",
            "output": stdout.get("text") != programs.expected(nonce).decode(),
            "start": run["start"] != self.start,
            "artifact": result["artifact_from"] != self.built,
            "jail": not str(result["jail"]).startswith("namespaces"),
            "record": not (state / run["job_id"] / "done").is_file(),
            "controls": any(control["state"] == "refused" for control in controls) or not controls,
        }
        wrong = [name for name, bad in problems.items() if bad]
        if wrong:
            raise SystemExit(f"a timed run of {self.program.name} {self.flags} is not what it claims: {wrong}")


class Floor:
    """A clone as bare as it can be: the same jail and the same QEMU, without a run around it."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        image = stack.enter_context(open_image(find_image(None)))
        self.kind = MachineKind(image=image, ram_bytes=ram_class_bytes(default_policy().limits.mem_bytes))
        self.accelerator = Accelerator(kvm=False)
        self.saved = stack.enter_context(opened_template(template_for(self.kind, self.accelerator)))

    @contextlib.contextmanager
    def _started(self) -> Iterator[QemuInstance]:
        digest = self.kind.image.manifest.digest
        record = create_record(
            Claim(run_id=new_run_id(), phase="bench", wall_ms=1000), backend="qemu", image_digest=digest
        )
        job = Job(record=record, kind=self.kind, deadline_s=60)
        with start_qemu(job, self.accelerator, memory=self.saved) as instance:
            yield instance

    def quit_seconds(self) -> float:
        """From the start to the end of a QEMU that is told to quit at once."""
        begun = time.monotonic()
        with self._started() as instance:
            instance.tell(qmp_quit())
            instance.release()
            select.select([instance.pidfd], [], [])
            return time.monotonic() - begun

    def answer_seconds(self) -> float:
        """From the start of a clone to its acknowledgement of clock and entropy."""
        begun = time.monotonic()
        with self._started() as instance:
            instance.release()
            connection = Connection(instance.channel_fd, Role.HOST, State.WARM)
            nonce = os.urandom(16)
            body = {"unix_ns": time.time_ns(), "entropy": os.urandom(64), "nonce": nonce, "machine_id": nonce}
            connection.link.send(Kind.SEED, body)
            while connection.link.state is not State.READY:
                connection.flush()
                fds = [instance.channel_fd, *instance.side_fds()]
                for fd in select.select(fds, [], [])[0]:
                    if fd == instance.channel_fd:
                        for _ in connection.read() or ():
                            pass
                    else:
                        instance.drain(fd)
            return time.monotonic() - begun
