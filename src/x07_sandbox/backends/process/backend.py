"""The `os` and `none` backends."""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Final

from x07_sandbox.backends.base import Availability, Job
from x07_sandbox.backends.handshake import Handshake, greet
from x07_sandbox.backends.jailed import StreamInstance
from x07_sandbox.backends.prerequisites import Need, require, version_in
from x07_sandbox.backends.process.agentcode import PYTHON, agent_code
from x07_sandbox.backends.process.start import files_folder, remove_folder, start_confined, start_unconfined
from x07_sandbox.channel.link import State
from x07_sandbox.errors import HostError
from x07_sandbox.host.verdicts import Verdict, file_state
from x07_sandbox.host.waiting import Deadline
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.jail.bwrap import BWRAP, PERL, SETPRIV
from x07_sandbox.jail.cgroups import program_groups, remove_groups
from x07_sandbox.kernel import landlock_version
from x07_sandbox.policy.features import LEAVES_TREE, NO_ROOT, NOT_OBSERVED, Features
from x07_sandbox.records.reader import StoredJob
from x07_sandbox.records.record import Claim, JobRecord, create_record, new_run_id
from x07_sandbox.records.stopping import stop_recorded

NFT: Final = "/usr/sbin/nft"
_ANSWER_S: Final = 5.0
_CANNOT_START: Final = "cannot start a confined process"
_NEED_PYTHON: Final = (Need("program", PYTHON, "python3"), Need("program", PERL, "perl-base"))
_NEW_PYTHON: Final = Need("version", PYTHON, "python3", least=(3, 12))  # the agent needs os.unshare and os.setns
_NEED_JAIL: Final = (
    Need("program", BWRAP, "bubblewrap"),
    Need("program", SETPRIV, "util-linux"),
    Need("library", "libseccomp.so.2", "libseccomp2"),
    Need("not-setuid", BWRAP),
)
_NAMESPACES: Final = Need("namespaces", "user namespaces", optional=True)
_NEW_JAIL: Final = Need("version", BWRAP, "bubblewrap", least=(0, 8))
_WALLS: Final = frozenset({"host-files", "no-host-files", "no-host-variables", "no-network"})
_PER_PROCESS: Final = frozenset({"limits.fds", "limits.core_dumps"})
_BY_CONTROLLER: Final = {"memory": "limits.mem_bytes", "pids": "limits.procs", "cpuacct": "limits.cpu_ms"}
_TASKS_APART: Final = (5, 14)  # since this Linux a process limit counts each user namespace separately
_LANDLOCK_LEAST: Final = 2  # the first version that allows moving files between folders
_SHARED: Final = {
    "whole-command": LEAVES_TREE,
    "root-inside": NO_ROOT,
    "observed-connections": NOT_OBSERVED,
    "connect-fails": "the relay accepts a connection before the gate decides, and resets it if the gate refuses",
}
_NO_IMAGE: Final = dict.fromkeys(("image-digest", "damaged-image"), "it uses this host's programs instead of an image")
_NO_COPIES: Final = "an unconfined program cannot get copies of folders"
_UNCONFINED: Final = {
    "whole-command": LEAVES_TREE,
    "root-inside": NO_ROOT,
    **dict.fromkeys(("cpu", "cpu-of-one"), "CPU time of children that are not waited for is not counted"),
    **dict.fromkeys(
        ("memory", "tasks", "memory-together", "tasks-together"),
        "no control group holds the program and its children together",
    ),
    **dict.fromkeys(("read-root", "write-root", "out-folder", "changes-so-far"), _NO_COPIES),
    **dict.fromkeys(("no-network", "no-host-servers", "observed-connections"), "the program uses this host's network"),
    **dict.fromkeys(("unlisted-name", "gate-asked", "connect-fails"), "nothing limits the program to a list of hosts"),
    **dict.fromkeys(("file-permissions", "file-root"), "the file server can use its user's files, and root any file"),
    "no-host-files": "the program can use its user's files",
    "no-host-variables": "the program can read the environment of its user's processes",
    "no-host-processes": "the program is one of its user's processes",
    "no-capabilities": "the program has its user's capabilities",
    **dict.fromkeys(("no-more-tasks", "no-execution"), "nothing filters its system calls"),
}


class _Backend(ABC):
    """The common part of the `os` and `none` backends."""

    name: str
    known_gaps: Mapping[str, str]
    uses_image = False
    engine_images = None
    cloning = None

    @abstractmethod
    def probe(self, _image: OpenImage | None = None, *, boot: bool = True) -> Availability:
        """Return what this host can limit. Raises HostError if programs are missing."""

    def least_features(self) -> Features:
        """Return what this host can limit. Raises HostError if programs are missing."""
        return self.probe(boot=False).features

    @abstractmethod
    def _started(self, record: JobRecord, deadline_s: int) -> AbstractContextManager[StreamInstance]:
        """Start an agent, without the handshake. Raises BackendError, HostError."""

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[StreamInstance]:
        """Start a job and wait until its agent has answered. Raises NoAnswerError, BackendError, HostError."""
        record = create_record(job.claim, backend=self.name, image_digest="")
        with self._started(record, job.claim.deadline_s) as instance:
            greet(instance, cancel_fd=job.caller.cancel.fd, meanwhile=job.meanwhile)
            yield instance

    def stop(self, record: JobRecord) -> bool:
        """Stop a recorded job, and remove its control groups and files."""

        def remove(stored: StoredJob) -> bool:
            groups = stored.owner is None or remove_groups(stored.owner.cgroups)
            return remove_folder(files_folder(record)) and groups

        return stop_recorded(record, remove)

    def _prove(self) -> str:
        """Start an agent and return why it did not answer, or "" if it did. Raises SandboxError."""
        claim = Claim(run_id=new_run_id(), phase="probe", wall_ms=int(_ANSWER_S * 1000))
        record = create_record(claim, backend=self.name, image_digest="")
        with self._started(record, int(_ANSWER_S) + 5) as instance:
            failure = Handshake(instance, State.WAITING).until(State.GREETED, Deadline.after(_ANSWER_S))
            return "" if failure is None else failure.text


class OsBackend(_Backend):
    """Confined processes: bubblewrap, user namespaces, and the agent's own confinement."""

    name = "os"
    known_gaps = _NO_IMAGE | _SHARED
    needs = (*_NEED_JAIL, *_NEED_PYTHON, _NAMESPACES, _NEW_JAIL, _NEW_PYTHON)

    def __init__(self) -> None:
        self._controllers: tuple[str, ...] = ()

    def probe(self, _image: OpenImage | None = None, *, boot: bool = True) -> Availability:
        """Return what this host can limit, proven once per boot by starting a process. Raises HostError."""
        require((*_NEED_JAIL, *_NEED_PYTHON), _CANNOT_START)
        self._controllers = _controllers()
        features = _confined_features(self._controllers)
        proof = f"x07's agent answered from a confined process under Linux {os.uname().release}"
        verdict = Verdict("confined", file_state(BWRAP), os.geteuid(), agent_code(confined=True).name)
        known = bool(verdict.read())
        if not known and boot:
            require((_NEW_JAIL, _NEW_PYTHON), _CANNOT_START)
            if why := self._prove():
                fix = "Allow user namespaces here (in a container: --privileged), or use another backend"
                raise HostError(_CANNOT_START, why, fix)
            verdict.write({"proof": proof})
            known = True
        warnings = ["the program's system calls reach this host's kernel"]
        if missing := sorted(set(_BY_CONTROLLER.values()) - features.can_enforce):
            warnings.append(f"this host provides no control groups for {', '.join(missing)}")
        proof = proof if known else "not tested on this host yet"
        return Availability(features=features, proof=proof, known=known, warnings=tuple(warnings))

    def _started(self, record: JobRecord, deadline_s: int) -> AbstractContextManager[StreamInstance]:
        return start_confined(record, deadline_s, self._controllers)


class NoneBackend(_Backend):
    """Ordinary processes of the user, without isolation."""

    name = "none"
    known_gaps = _NO_IMAGE | _UNCONFINED
    needs = (*_NEED_PYTHON, _NEW_PYTHON)

    def probe(self, _image: OpenImage | None = None, *, boot: bool = True) -> Availability:  # noqa: ARG002 - nothing boots
        """Return what this host can limit. Raises HostError if the agent's interpreter is missing."""
        require(self.needs, "cannot start the agent")
        root = os.geteuid() == 0  # root may raise its own limits again
        features = Features(isolation="none", own_kernel=False, can_enforce=frozenset() if root else _PER_PROCESS)
        proof = "programs run as ordinary processes, without confinement"
        whose = "root's" if root else "this user's"
        warning = f"nothing protects {whose} files, processes and network from the program"
        return Availability(features=features, proof=proof, warnings=(warning,))

    def _started(self, record: JobRecord, deadline_s: int) -> AbstractContextManager[StreamInstance]:
        return start_unconfined(record, deadline_s)


def _controllers() -> tuple[str, ...]:
    """Return the controllers for which this host lets this process make control groups."""
    groups = program_groups(f"probe-{os.urandom(8).hex()}", uid=os.geteuid())
    groups.remove()
    return groups.holds


def _confined_features(controllers: tuple[str, ...]) -> Features:
    held = set(_WALLS | _PER_PROCESS)
    if os.access(NFT, os.X_OK):  # needed by the agent for the relay's rules
        held.add("network")
    if landlock_version() >= _LANDLOCK_LEAST:
        held.add("confinement")
    if version_in(os.uname().release) >= _TASKS_APART:
        held.add("limits.procs")
    held |= {_BY_CONTROLLER[controller] for controller in controllers}
    return Features(isolation="process", own_kernel=False, can_enforce=frozenset(held))
