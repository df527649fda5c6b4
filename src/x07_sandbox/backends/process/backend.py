"""`os` and `none` as backends: what this host offers, and starting jobs on it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import stat
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Final

from x07_sandbox.backends.base import Availability
from x07_sandbox.backends.handshake import Talk, greet
from x07_sandbox.backends.process.agentcode import LIBSECCOMP, agent_code
from x07_sandbox.backends.process.start import files_folder, remove_folder, start_confined, start_unconfined
from x07_sandbox.backends.process.view import PYTHON
from x07_sandbox.backends.proofs import proof_file
from x07_sandbox.channel.link import State
from x07_sandbox.errors import HostError
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.paths import replace_file
from x07_sandbox.jail.bwrap import BWRAP, PERL, SETPRIV
from x07_sandbox.jail.cgroups import program_groups, remove_groups
from x07_sandbox.jobs.record import Claim, create_record, new_run_id
from x07_sandbox.jobs.stopping import live_records, stop_recorded
from x07_sandbox.plan.features import Features

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from x07_sandbox.backends.base import Job
    from x07_sandbox.backends.process.start import ProcessInstance
    from x07_sandbox.images.verify import OpenImage
    from x07_sandbox.jobs.reader import StoredJob
    from x07_sandbox.jobs.record import JobRecord
NFT: Final = "/usr/sbin/nft"
_ANSWER_S: Final = 5.0
_BWRAP_LEAST: Final = (0, 8)
_PYTHON_LEAST: Final = (3, 12)  # the agent needs os.unshare and os.setns
PACKAGES: Final = {BWRAP: "bubblewrap", PYTHON: "python3", PERL: "perl-base", SETPRIV: "util-linux"}
_WALLS: Final = frozenset({"host-files", "no-host-files", "no-host-variables", "no-network"})
_PER_PROCESS: Final = frozenset({"limits.fds", "limits.core_dumps"})
_BY_CONTROLLER: Final = {"memory": "limits.mem_bytes", "pids": "limits.procs", "cpuacct": "limits.cpu_ms"}
_TASKS_APART: Final = (5, 14)  # from this Linux on a process limit counts a user namespace by itself
_LANDLOCK: Final = 444  # landlock_create_ruleset: the same number everywhere
_LANDLOCK_LEAST: Final = 2  # the first version that lets a program move files from folder to folder
_WHY: Final = "it uses no image: programs are this host's own"
_RESETS: Final = {"connect-fails": "the relay accepts a connection before it asks, and resets it then"}
_NO_IMAGE: Final = dict.fromkeys(("image-digest", "damaged-image"), _WHY)
_NO_COPIES: Final = "an unconfined program cannot be given copies of folders"
_UNCONFINED: Final = {
    "cpu": "children for whose end nobody waits are not counted",
    **dict.fromkeys(("memory", "tasks"), "no control group holds the program and its children together"),
    **dict.fromkeys(("read-root", "write-root", "out-folder"), _NO_COPIES),
    **dict.fromkeys(("no-network", "no-host-servers"), "the program uses this host's network"),
    **dict.fromkeys(("unlisted-name", "gate-asked", "connect-fails"), "nothing holds a program to a list of hosts"),
    "no-host-files": "the program has its user's files",
    "no-host-variables": "the program can read the variables of its user's processes",
    "no-host-processes": "the program is one of its user's processes",
    "no-capabilities": "the program has its user's capabilities",
    **dict.fromkeys(("no-more-tasks", "no-execution"), "nothing filters its system calls"),
}


class _Backend(ABC):
    """What both have in common."""

    name: str
    known_gaps: Mapping[str, str]
    uses_image = False
    engine_images = None
    cloning = None

    @abstractmethod
    def _started(self, record: JobRecord, deadline_s: int) -> AbstractContextManager[ProcessInstance]:
        """An agent that has not been heard of yet. Raises BackendError, HostError."""

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[ProcessInstance]:
        """Start a job, greeted. Raises NoAnswerError, BackendError, HostError."""
        record = create_record(job.claim, backend=self.name, image_digest="")
        with self._started(record, job.claim.deadline_s) as instance:
            greet(instance, cancel_fd=job.caller.cancel.fd, meanwhile=job.meanwhile)
            yield instance

    def list_owned(self) -> Sequence[JobRecord]:
        """Jobs of this user that are not recorded as gone."""
        return live_records(self.name)

    def stop(self, record: JobRecord) -> bool:
        """Stop a job by its record: its supervisor ends all of it, and its control groups and files go."""

        def remove(stored: StoredJob) -> bool:
            groups = stored.owner is None or remove_groups(stored.owner.cgroups)
            return remove_folder(files_folder(record)) and groups

        return stop_recorded(record, remove)

    def _prove(self) -> str:
        """Start an agent, and wait for its answer; why none came, empty where it did. Raises SandboxError."""
        claim = Claim(run_id=new_run_id(), phase="probe", wall_ms=int(_ANSWER_S * 1000))
        record = create_record(claim, backend=self.name, image_digest="")
        with self._started(record, int(_ANSWER_S) + 5) as instance:
            silence = Talk(instance, State.WAITING).until(State.GREETED, Deadline.after(_ANSWER_S))
            if silence is None:
                return ""
            said = " ".join(instance.console_tail().split())[-300:]
            return f"{silence.why}: {said}" if said else silence.why


class OsBackend(_Backend):
    """A confined process of this host: bubblewrap, user namespaces, and the agent's own confinement."""

    name = "os"
    known_gaps = _NO_IMAGE | _RESETS

    def __init__(self) -> None:
        self._controllers: tuple[str, ...] = ()

    def probe(self, _image: OpenImage | None = None, *, boot: bool = True) -> Availability:
        """What this host can hold; tried once a boot, and again where it failed. Raises HostError where it cannot."""
        require_tools()
        self._controllers = _controllers()
        features = _confined_features(self._controllers)
        proof = f"our agent answered from a confined process under Linux {os.uname().release}"
        verdict = _verdict()
        known = verdict.exists()
        if not known and boot:
            require_versions()
            if why := self._prove():
                fix = "Allow user namespaces here (in a container: --privileged), or use another backend"
                raise HostError("cannot start a confined process", why, fix)
            replace_file(verdict, json.dumps({"proof": proof}).encode())
            known = True
        warnings = ["the program's system calls meet this host's own kernel"]
        if missing := sorted(set(_BY_CONTROLLER.values()) - features.can_enforce):
            warnings.append(f"this host gives no control groups that hold {', '.join(missing)}")
        proof = proof if known else "no confined process has been tried yet"
        return Availability(features=features, proof=proof, known=known, warnings=tuple(warnings))

    def _started(self, record: JobRecord, deadline_s: int) -> AbstractContextManager[ProcessInstance]:
        return start_confined(record, deadline_s, self._controllers)


class NoneBackend(_Backend):
    """An ordinary process of the user, without any wall."""

    name = "none"
    known_gaps = _NO_IMAGE | _UNCONFINED

    def probe(self, _image: OpenImage | None = None, *, boot: bool = True) -> Availability:  # noqa: ARG002 - nothing boots
        """What this host can hold. Raises HostError where there is no interpreter for the agent."""
        require_python()
        # Root may raise its own limits again.
        held = frozenset() if os.geteuid() == 0 else _PER_PROCESS
        features = Features(isolation="none", own_kernel=False, can_enforce=held)
        whose = "root's" if os.geteuid() == 0 else "this user's"
        warning = f"nothing keeps the program from {whose} files, processes and network"
        return Availability(features=features, proof="an ordinary process needs no proof", warnings=(warning,))

    def _started(self, record: JobRecord, deadline_s: int) -> AbstractContextManager[ProcessInstance]:
        return start_unconfined(record, deadline_s)


def _controllers() -> tuple[str, ...]:
    """Of which control groups this host lets us make."""
    groups = program_groups(f"probe-{os.urandom(8).hex()}", uid=os.geteuid())
    groups.remove()
    return groups.holds


def _confined_features(controllers: tuple[str, ...]) -> Features:
    held = set(_WALLS | _PER_PROCESS)
    if os.access(NFT, os.X_OK):  # the agent's, for the rules around the relay
        held.add("network")
    if _landlock_version() >= _LANDLOCK_LEAST:
        held.add("confinement")
    if _numbers(os.uname().release) >= _TASKS_APART:
        held.add("limits.procs")
    held |= {_BY_CONTROLLER[controller] for controller in controllers}
    return Features(isolation="process", own_kernel=False, can_enforce=frozenset(held))


def _numbers(text: str) -> tuple[int, ...]:
    """The first version number in *text*, (major, minor); () for none."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return tuple(int(word) for word in found.groups()) if found else ()


def _landlock_version() -> int:
    return max(0, int(ctypes.CDLL(None).syscall(_LANDLOCK, None, 0, 1)))


def require_tools() -> None:
    """Raises HostError naming what is missing, and what to type."""
    missing = [package for path, package in PACKAGES.items() if not os.access(path, os.X_OK)]
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


def require_versions() -> None:
    """Raises HostError where a program is too old."""
    if _version(BWRAP) < _BWRAP_LEAST:
        fix = "Install bubblewrap 0.8 or newer"
        raise HostError("cannot start a confined process", f"{BWRAP} is too old", fix)
    require_python()


def require_python() -> None:
    """Raises HostError where there is no interpreter, or an old one."""
    if not os.access(PYTHON, os.X_OK):
        fix = "Run: apt-get install --no-install-recommends python3"
        raise HostError("cannot start the agent", f"missing: {PYTHON}", fix)
    if _version(PYTHON) < _PYTHON_LEAST:
        fix = "Run on a system with Python 3.12 or newer, or use another backend"
        raise HostError("cannot start the agent", f"{PYTHON} is too old", fix)


def _version(path: str) -> tuple[int, ...]:
    """What a program says of its version; nothing where it does not."""
    argv, env, no_input = [path, "--version"], {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}, subprocess.DEVNULL
    try:
        done = subprocess.run(argv, stdin=no_input, capture_output=True, timeout=30, check=False, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return _numbers(done.stdout.decode("ascii", "replace"))


def _verdict() -> Path:
    """Where it is kept that it works: for this boot, kernel, user, bubblewrap and agent. Raises HostError."""
    return proof_file(BWRAP, os.geteuid(), agent_code(confined=True).name)
