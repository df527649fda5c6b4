"""A backend written in this one file, which starts the agent as a child process, passes the contract.

Run as a program, this file carries out one run on that backend, for checks that need another process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from msgspec.structs import replace

from x07_sandbox.backends import registry
from x07_sandbox.backends.base import Availability, Cloning, Greeting, Job, Snapshots, greet
from x07_sandbox.backends.jailed import Jailed, Start, inner_process
from x07_sandbox.backends.process import NoneBackend, agent_argv, agent_code, remove_folder
from x07_sandbox.backends.registry import BackendRow
from x07_sandbox.conformance import behaviours, harness
from x07_sandbox.conformance.behaviours import BEHAVIOURS, check_behaviour, conform
from x07_sandbox.conformance.harness import open_bench
from x07_sandbox.host.processes import FdGroup, Launch, launch, own_identity
from x07_sandbox.jail.bwrap import supervisor_argv
from x07_sandbox.policy.features import Features
from x07_sandbox.records.runs import JobRecord, create_record, mark_done
from x07_sandbox.records.stopping import stop_recorded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from x07_sandbox.backends.base import Backend
    from x07_sandbox.backends.prerequisites import Need
    from x07_sandbox.images.verify import OpenImage

pytestmark = [pytest.mark.vm, pytest.mark.user]

NAME: Final = "one-file"
ROW: Final = BackendRow(NAME, "none", ("none",), registry.create)  # `registered` replaces the factory
BY_NAME: Final = {behaviour.name: behaviour for behaviour in BEHAVIOURS}
RUNNER: Final = (sys.executable, __file__)


@contextlib.contextmanager
def registered(row: BackendRow, factory: Callable[[], Backend]) -> Iterator[None]:
    """Register *row* with this factory for the duration of the context."""
    registry.BY_NAME[row.name] = replace(row, factory=lambda _name: factory())
    try:
        yield
    finally:
        del registry.BY_NAME[row.name]


class Child(Jailed):
    """An agent below our supervisor, which kills everything that the program started."""

    net_fd: int | None = None
    notes: tuple[str, ...] = ()
    greeting: Greeting
    channel_fd: int

    def release(self) -> None:
        """Do nothing: the agent already waits for the channel."""

    def side_fds(self) -> tuple[int, ...]:
        """Return no descriptors."""
        return ()

    def drain(self, fd: int) -> None:
        """Return nothing."""

    def console_tail(self) -> str:
        """Return nothing."""
        return ""


class OneFile:
    """Starts the agent without confinement."""

    name = NAME
    uses_image = False
    engine_images = None
    cloning: Cloning | None = None
    snapshots: Snapshots | None = None
    needs: Sequence[Need] = ()

    @property
    def known_gaps(self) -> Mapping[str, str]:
        """Return the gaps of an unconfined process."""
        return NoneBackend.known_gaps

    def least_features(self) -> Features:
        """Guarantee nothing."""
        return Features(isolation="none", own_kernel=False, can_enforce=frozenset())

    def probe(self, image: OpenImage | None, *, boot: bool = True) -> Availability:
        """Return the features without a test."""
        del image, boot
        return Availability(features=self.least_features(), proof="none needed")

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[Child]:
        """Start the agent, record it, do the handshake; end it on exit."""
        record = create_record(job.claim, backend=self.name, image_digest="")
        folder = record.folder / "files"
        folder.mkdir(mode=0o700)
        near, far = socket.socketpair()
        with near, far, Path(os.devnull).open("wb") as nowhere:
            agent = agent_argv(str(agent_code(confined=False)), "none", str(far.fileno()), str(folder), record.mark)
            argv = supervisor_argv(
                agent,
                deadline_s=job.claim.deadline_s,
                runner_pid=os.getpid(),
                nest=False,
            )
            child = launch(Launch(argv=argv, pass_fds=(far.fileno(),), stderr_fd=nowhere.fileno()))
            start = Start(record, "none", FdGroup(), 1, lambda: remove_folder(folder))
            instance = Child(start, child, inner_process(child, depth=1))
            instance.channel_fd = near.fileno()
            near.setblocking(False)  # noqa: FBT003 - it takes no names
            try:
                far.close()
                instance.record_owner(own_identity())
                greet(instance, cancel_fd=job.caller.cancel.fd, meanwhile=job.meanwhile)
                yield instance
            finally:
                if instance.stop():
                    mark_done(record)
                instance.close()

    def stop(self, record: JobRecord) -> bool:
        """Stop a job by its record."""
        return stop_recorded(record)


class Idle(OneFile):
    """A backend that stops no job by its record."""

    def stop(self, record: JobRecord) -> bool:
        """Do nothing."""
        del record
        return True


class Boastful(OneFile):
    """A backend that claims guarantees it does not have."""

    def least_features(self) -> Features:
        """Claim the memory limit and hidden host files."""
        held = frozenset({"limits.mem_bytes", "no-host-files"})
        return Features(isolation="none", own_kernel=False, can_enforce=held)


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))


def test_a_backend_in_one_file_passes_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of one file and one registry row passes the contract, except for its declared gaps."""
    from tests.conftest import sample  # not found where this file is the program

    checked = {one.name for one in sample(BEHAVIOURS, 15)} | set(NoneBackend.known_gaps)
    monkeypatch.setattr(behaviours, "BEHAVIOURS", [one for one in BEHAVIOURS if one.name in checked])
    with registered(ROW, OneFile):
        report = conform(NAME, runner=RUNNER)
    assert [(verdict.name, verdict.reason) for verdict in report.verdicts if verdict.verdict == "failed"] == []
    found = {verdict.name for verdict in report.verdicts if verdict.verdict == "gap"}
    assert found == set(NoneBackend.known_gaps)


def test_a_backend_that_does_not_stop_its_jobs_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that only claims to have stopped a job fails every check of stopping jobs by their records."""
    monkeypatch.setattr(harness, "ANSWER_S", 3.0)
    with registered(ROW, Idle), open_bench(NAME, RUNNER) as bench:
        verdicts = [check_behaviour(BY_NAME[name], bench) for name in ("listed", "stop-by-record")]
    assert {verdict.reason for verdict in verdicts} == {"expected a line of output, got none in 3 s"}


def test_a_backend_that_claims_a_known_gap_fails() -> None:
    """A backend cannot both guarantee a limit and declare it as a gap."""
    with registered(ROW, Boastful), open_bench(NAME, RUNNER) as bench:
        verdict = check_behaviour(BY_NAME["honest-plan"], bench)
    assert (verdict.verdict, verdict.reason) == ("failed", "claim to hold limits.mem_bytes: expected False, got True")


if __name__ == "__main__":
    with registered(ROW, OneFile):
        harness.main(sys.argv[1:])
