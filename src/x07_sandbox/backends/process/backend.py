"""`os` and `none` as backends: what this host offers, and starting jobs on it."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import stat
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Final

from x07_sandbox.backends.base import Availability, Job
from x07_sandbox.backends.process.agentcode import LIBSECCOMP, agent_code
from x07_sandbox.backends.process.start import start_confined, start_unconfined
from x07_sandbox.backends.process.view import PYTHON
from x07_sandbox.backends.qemu.talk import talk_until
from x07_sandbox.channel.link import State
from x07_sandbox.errors import HostError, SandboxError
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.paths import cache_folder, replace_file
from x07_sandbox.host.processes import boot_id
from x07_sandbox.jail.bwrap import BWRAP, PERL, SETPRIV
from x07_sandbox.jail.cgroups import program_groups
from x07_sandbox.jobs.record import Claim, create_record, new_run_id
from x07_sandbox.plan.features import Features

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from x07_sandbox.backends.base import MachineKind
    from x07_sandbox.backends.process.start import ProcessInstance
_ANSWER_S: Final = 5.0
_BWRAP_LEAST: Final = (0, 8)
_PYTHON_LEAST: Final = (3, 12)  # the agent needs os.unshare and os.setns
_PACKAGES: Final = {BWRAP: "bubblewrap", PYTHON: "python3", PERL: "perl-base", SETPRIV: "util-linux"}
_WALLS: Final = frozenset({"host-files", "no-host-files", "no-host-variables", "no-network"})
_PER_PROCESS: Final = frozenset({"limits.fds", "limits.core_dumps"})
_BY_CONTROLLER: Final = {"memory": "limits.mem_bytes", "pids": "limits.procs", "cpuacct": "limits.cpu_ms"}
_LANDLOCK: Final = 444  # landlock_create_ruleset: the same number everywhere
_LANDLOCK_LEAST: Final = 2  # the first version that lets a program move files from folder to folder


class _Backend(ABC):
    """What both have in common."""

    name: str

    @abstractmethod
    def start(self, job: Job) -> AbstractContextManager[ProcessInstance]:
        """Start a job. Raises BackendError, HostError."""

    def distrust(self, kind: MachineKind, reason: str) -> None:  # noqa: B027 - as its words say
        """Nothing: there are no clones."""

    def prepare(self, kind: MachineKind) -> None:  # noqa: B027 - as its words say
        """Nothing: there is nothing to save."""

    def _answer(self) -> str:
        """Why our agent does not answer from a job of this backend; empty where it does. Raises SandboxError."""
        claim = Claim(run_id=new_run_id(), phase="probe", wall_ms=int(_ANSWER_S * 1000))
        record = create_record(claim, backend=self.name, image_digest="")
        job = Job(record=record, kind=None, deadline_s=int(_ANSWER_S) + 5)  # type: ignore[arg-type] # it needs no image
        with self.start(job) as instance:
            instance.release()
            why = talk_until(instance, State.GREETED, Deadline.after(_ANSWER_S))
            said = " ".join(instance.console_tail().split())[-300:]
            return f"{why}: {said}" if why and said else why


class OsBackend(_Backend):
    """A confined process of this host: bubblewrap, user namespaces, and the agent's own confinement."""

    name = "os"

    def probe(self) -> Availability:
        """Whether our agent answers from one: it is tried once a boot, and again where it failed."""
        features = _confined_features()
        try:
            _require_tools()
            record = _verdict()
            proof = f"our agent answered from a confined process under Linux {os.uname().release}"
            if not record.exists():
                if why := self._answer():
                    fix = "Allow user namespaces here (in a container: --privileged), or use another backend"
                    return Availability(usable=False, features=features, proof=why, fix=fix)
                replace_file(record, json.dumps({"proof": proof}).encode())
        except SandboxError as exc:
            return Availability(usable=False, features=features, proof=f"{exc.what}: {exc.why}", fix=exc.fix)
        warnings = ["the program's system calls meet this host's own kernel"]
        if missing := sorted(set(_BY_CONTROLLER.values()) - features.can_hold):
            warnings.append(f"this host gives no control groups that hold {', '.join(missing)}")
        return Availability(usable=True, features=features, proof=proof, warnings=tuple(warnings))

    def start(self, job: Job) -> AbstractContextManager[ProcessInstance]:
        """Start a job. Raises BackendError, HostError."""
        return start_confined(job)


class NoneBackend(_Backend):
    """An ordinary process of the user, without any wall."""

    name = "none"

    def probe(self) -> Availability:
        """Whether there is an interpreter for the agent."""
        # Root may raise its own limits again.
        held = frozenset() if os.geteuid() == 0 else _PER_PROCESS
        features = Features(isolation="none", own_kernel=False, can_hold=held)
        try:
            _require_python()
            agent_code(confined=False)
        except SandboxError as exc:
            return Availability(usable=False, features=features, proof=f"{exc.what}: {exc.why}", fix=exc.fix)
        warning = "nothing keeps the program from this user's files, processes and network"
        return Availability(
            usable=True, features=features, proof="an ordinary process needs no proof", warnings=(warning,)
        )

    def start(self, job: Job) -> AbstractContextManager[ProcessInstance]:
        """Start a job. Raises BackendError, HostError."""
        return start_unconfined(job)


def _confined_features() -> Features:
    held = set(_WALLS | _PER_PROCESS)
    if _landlock_version() >= _LANDLOCK_LEAST:
        held.add("confinement")
    groups = program_groups(f"probe-{os.urandom(8).hex()}", uid=os.geteuid())
    groups.remove()
    held |= {_BY_CONTROLLER[controller] for controller in groups.holds}
    return Features(isolation="process", own_kernel=False, can_hold=frozenset(held))


def _landlock_version() -> int:
    return max(0, int(ctypes.CDLL(None).syscall(_LANDLOCK, None, 0, 1)))


def _require_tools() -> None:
    """Raises HostError naming what is missing, and what to type."""
    missing = [package for path, package in _PACKAGES.items() if not os.access(path, os.X_OK)]
    try:
        ctypes.CDLL(LIBSECCOMP)
    except OSError:
        missing.append("libseccomp2")
    if missing:
        names = " ".join(missing)
        fix = f"Run: apt-get install --no-install-recommends {names}"
        raise HostError("cannot start a confined process", f"missing: {names}", fix)
    if Path(BWRAP).stat().st_mode & stat.S_ISUID:
        why, fix = f"{BWRAP} is set-user-ID, which gives it more rights than it needs", f"Run: chmod u-s {BWRAP}"
        raise HostError("cannot start a confined process", why, fix)
    if _version(BWRAP) < _BWRAP_LEAST:
        fix = "Install bubblewrap 0.8 or newer"
        raise HostError("cannot start a confined process", f"{BWRAP} is too old", fix)
    _require_python()


def _require_python() -> None:
    if not os.access(PYTHON, os.X_OK):
        fix = "Run: apt-get install --no-install-recommends python3"
        raise HostError("cannot start the agent", f"missing: {PYTHON}", fix)
    if _version(PYTHON) < _PYTHON_LEAST:
        fix = "Run on a system with Python 3.12 or newer, or use another backend"
        raise HostError("cannot start the agent", f"{PYTHON} is too old", fix)


def _version(path: str) -> tuple[int, ...]:
    """What a program says of its version; nothing where it does not."""
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=False,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(rb"(\d+)\.(\d+)", done.stdout)
    return tuple(int(word) for word in found.groups()) if found else ()


def _verdict() -> Path:
    """Where it is kept that it works: for this boot, kernel, user, bubblewrap and agent. Raises HostError."""
    info = Path(BWRAP).stat()
    parts = [boot_id(), os.uname().release, os.geteuid(), info.st_ino, info.st_mtime_ns, agent_code(confined=True).name]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return cache_folder("process") / f"{key}.json"
