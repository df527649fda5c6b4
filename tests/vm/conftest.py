"""Real machines for tests: the image, private state folders, and a check that runs leave no remains."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from x07_sandbox.backends.base import MachineKind
from x07_sandbox.backends.qemu.backend import known_verdict
from x07_sandbox.backends.qemu.hot import VARIABLE, unsupported
from x07_sandbox.backends.qemu.template import template_for
from x07_sandbox.host import settings
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_dir, replace_file
from x07_sandbox.host.processes import Identity, has_mark, is_alive
from x07_sandbox.host.waiting import Cancel
from x07_sandbox.images.verify import open_image
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.policy.guest import RAM_CLASSES
from x07_sandbox.programs.toolchains import OUTPUT, Source, toolchain_for
from x07_sandbox.sessions.request import RunCaller, RunRequest
from x07_sandbox.sessions.run import attempt
from x07_sandbox.sessions.transfers import OutFile
from x07_sandbox.x07.programs import load_x07

if TYPE_CHECKING:
    from x07_sandbox.backends.qemu.saved import Template
    from x07_sandbox.images.store import Image
    from x07_sandbox.sessions.result import Result

PROGRAMS = Path(__file__).parent / "programs"
BEHAVE = PROGRAMS / "behave.c"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A run that has ended. seconds: total time, as the caller waited."""

    result: Result
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def outcome(self) -> str:
        """The outcome, in one word."""
        return self.result.outcome

    @property
    def reason(self) -> str:
        """The reason, in one sentence."""
        return self.result.reason

    @property
    def program_ms(self) -> float:
        """Time from the program's exec to the end of its phase, by the host's clock."""
        times = self.result.phases["run"].times_ms
        return times["end"] - times["started"]

    def lines(self) -> list[str]:
        """The lines of standard output."""
        return self.stdout.decode().splitlines()

    def denied(self, field: str) -> int:
        """Return how often the run was denied something that *field* allows."""
        return sum(denial.count for denial in self.result.denials if denial.field == field)


class Sandbox:
    """Starts runs as a caller of the library does, and checks after each that it left nothing on the host."""

    def __init__(self, state: Path, work: Path, artifacts: Artifacts) -> None:
        self.state = state
        self.work = work
        self.artifacts = artifacts
        self._count = 0

    def run(  # noqa: PLR0913 - one place for all that a request may hold
        self,
        program: Path,
        *args: str,
        stdin: bytes | int | None = b"",
        policy: Mapping[str, object] | None = None,
        image: str | None = None,
        max_output_bytes: int = settings.OUTPUT_MAX_BYTES,
        live_stdout: int | None = None,
        live_stderr: int | None = None,
        artifact: bytes | None = None,
        cancel: Cancel | None = None,
        cold: bool = False,
        cache: bool = False,
        env: Mapping[str, str] | None = None,
        alone: bool = True,
    ) -> Ran:
        """Carry out one run. stdin: bytes, or a descriptor to stream from. artifact: a prebuilt program.

        alone: no other run is active at the same time, so any remains are this run's.
        """
        with contextlib.ExitStack() as stack:
            if cancel is None:
                cancel = Cancel()
                stack.callback(cancel.close)
            request = RunRequest(
                program=program,
                args=args,
                policy=None if policy is None else self.policy(policy),
                image=image,
                max_output_bytes=max_output_bytes,
                cold=cold,
                cache=cache,
                env=env or {},
                stdin=True,
                changes="all-or-nothing",  # a retried run finds the files as this one did
            )
            caller = RunCaller(
                cancel=cancel,
                loaders=(load_x07,),
                stdin_fd=_memory_file(stdin, stack) if isinstance(stdin, bytes) else stdin,
                live_stdout=live_stdout,
                live_stderr=live_stderr,
                artifact=None if artifact is None else _out_file(artifact, stack),
            )
            began = time.monotonic()
            result, _ = attempt(request, caller)
            seconds = time.monotonic() - began
        assert not alone or left_behind(self.state) == []
        return Ran(result=result, stdout=result.stdout.data, stderr=result.stderr.data, seconds=seconds)

    def run_text(self, name: str, text: str | bytes, *args: str, **options: object) -> Ran:
        """Run a source text under *name*."""
        path = self.work / name
        # By rename: a concurrent run may be reading a source of the same name.
        temporary = path.with_name(f".{threading.get_ident()}.{name[:64]}")
        temporary.write_bytes(text.encode() if isinstance(text, str) else text)
        temporary.replace(path)
        return self.run(path, *args, **options)  # type: ignore[arg-type] # the caller's are checked by `run` itself

    def behave(self, *args: str, **options: object) -> Ran:
        """Run programs/behave.c, prebuilt."""
        artifact = self.artifacts.built(BEHAVE)
        return self.run(BEHAVE, *args, artifact=artifact, **options)  # type: ignore[arg-type] # as above

    def policy(self, changes: Mapping[str, object]) -> Path:
        """Write the built-in policy with *changes* (dotted names) to a file."""
        document = msgspec.to_builtins(default_policy())
        for name, value in changes.items():
            section, _, key = name.partition(".")
            document[section][key] = value
        self._count += 1
        path = self.work / f"policy-{self._count}.json"
        path.write_bytes(render_policy(document))
        return path


class Artifacts:
    """Built programs by the content of their source, shared by workers and sessions.

    These tests are about running programs; other tests prove that building works.
    """

    def __init__(self, folder: Path, image: Image) -> None:
        self.folder = folder
        self.image = image
        self._known: dict[Path, bytes] = {}

    def built(self, source: Path) -> bytes:
        """Return the artifact of *source*."""
        if source not in self._known:
            self._known[source] = self._load_or_build(source)
        return self._known[source]

    def _load_or_build(self, source: Path) -> bytes:
        build = toolchain_for(source.name).build
        assert build is not None
        argv = build(Source(name=source.name))
        key = hashlib.sha256(repr((self.image.digest, argv, source.read_bytes())).encode()).hexdigest()
        path = self.folder / key
        with file_lock(self.folder / f"{key}.lock"):
            if not path.exists():
                temporary = path.with_suffix(".new")
                temporary.write_bytes(self._build(source))
                temporary.replace(path)
        return path.read_bytes()

    def _build(self, source: Path) -> bytes:
        with contextlib.ExitStack() as stack:
            cancel = Cancel()
            stack.callback(cancel.close)
            output = _out_file(None, stack)
            caller = RunCaller(cancel=cancel, artifact=output)
            result, _ = attempt(RunRequest(program=source, cache=False), caller)
            assert result.ok, result.reason
            return os.pread(output.fd, output.size, 0)


def _memory_file(data: bytes, stack: contextlib.ExitStack) -> int:
    fd = os.memfd_create("x07-test")
    stack.callback(os.close, fd)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _out_file(content: bytes | None, stack: contextlib.ExitStack) -> OutFile:
    file = OutFile(path=OUTPUT, fd=_memory_file(b"", stack), max_bytes=settings.ARTIFACT_MAX_BYTES)
    if content is not None:
        assert file.take(content)
        file.complete = True
    return file


def usual_start() -> str:
    """How a run's VM starts here, if nothing is in the way."""
    verdict = known_verdict()
    return "clone" if unsupported(kvm=verdict is not None and verdict.works) else "hot"


def owners(state: Path) -> list[dict[str, object]]:
    """Return the owner records of all jobs below *state*."""
    return [json.loads(path.read_bytes()) for path in sorted(state.glob("*/owner.json"))]


def wait_done(state: Path, timeout_s: float) -> None:
    """Wait until a job below *state* is recorded as done: its machine is gone, though its run may continue."""
    deadline = time.monotonic() + timeout_s
    while not any(state.glob("*/done")):
        assert time.monotonic() < deadline, f"no job was done within {timeout_s} s"
        time.sleep(0.05)  # the record is a file on purpose: there is nothing to wait on


def marked(mark: str) -> list[int]:
    """Return every process of this machine that carries *mark*."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and has_mark(int(name), mark)]  # noqa: PTH208 - numbers


def left_behind(state: Path) -> list[str]:
    """Return the remains on the host of the jobs recorded below *state*, one sentence each."""
    found = []
    for folder in sorted(path.parent for path in state.glob("*/job.json")):
        if not any((folder / end).is_file() for end in ("done", "reaped")):
            found.append(f"{folder.name} is recorded neither as done nor as reaped")
        owner = folder / "owner.json"
        if owner.is_file():
            found += [f"{folder.name}: {what}" for what in _still_there(json.loads(owner.read_bytes()))]
    return found


def _still_there(owner: dict[str, object]) -> Iterator[str]:
    for pid in marked(str(owner["instance"])):
        yield f"process {pid} carries its mark"
    processes, groups = owner["processes"], owner["cgroups"]
    assert isinstance(processes, dict)
    assert isinstance(groups, list)
    for name, fields in processes.items():
        if is_alive(Identity(**fields)):
            yield f"its {name} process lives"
    for group in groups:
        if Path(group).exists():
            yield f"its control group {group} is there"


@pytest.fixture(scope="session")
def artifacts(image: Image, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Programs that tests share, each built once."""
    assert pytestconfig.cache is not None
    made = Artifacts(pytestconfig.cache.mkdir("x07-artifacts"), image)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_VM_STATE_DIR", str(tmp_path_factory.mktemp("building") / "jobs"))
        made.built(BEHAVE)
    return made


def copy_cache(place: Path) -> None:
    """Make a cache of images and saved machines beside the user's, with its own queue and pool."""
    place.mkdir(mode=0o700)
    for path in cache_dir().iterdir():
        if path.name in {"images", "templates", "verdicts", "artifacts"}:
            _link_all(path, place / path.name)
    copy_kvm_verdict(place)


def run_vm(image: Image) -> Template:
    """The saved VM that ordinary runs of an image clone, in the cache in use."""
    verdict = known_verdict()
    with open_image(image) as opened:
        kind = MachineKind(image=opened, ram_bytes=RAM_CLASSES[0])
        return template_for(kind, kvm=verdict is not None and verdict.works)


def copy_saved(folder: Path, target: Path) -> None:
    """Copy a saved VM or process, for tests that change its files."""
    subprocess.run(["/bin/cp", "-aT", "--sparse=always", folder, target], check=True)


def cache_with_base(place: Path) -> Path:
    """Make a cache beside the user's with the base of its images, for images with another agent."""
    (place / "images").mkdir(parents=True, mode=0o700)
    place.chmod(0o700)
    for base in (cache_dir() / "images").glob("base-*"):
        shutil.copytree(base, place / "images" / base.name, copy_function=_link_or_copy)
    copy_kvm_verdict(place)
    return place


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def copy_kvm_verdict(cache: Path) -> None:
    """Tell another cache whether KVM works, for all of its life: a test of it takes a processor for 5 to 30 s."""
    (cache / "verdicts").mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (cache_dir() / "verdicts").glob("kvm-*"):
        stored = json.loads(path.read_bytes())
        stored.pop("retry_at_ms", None)
        replace_file(cache / "verdicts" / path.name, json.dumps(stored).encode())


def _link_all(source: Path, target: Path) -> None:
    """Hard-link a folder that others change meanwhile, in which case cp finds some files gone."""
    said = b""
    for _ in range(20):
        target.mkdir(mode=0o700)
        linked = subprocess.run(["/bin/cp", "-al", "--", f"{source}/.", target], check=False, capture_output=True)
        if linked.returncode == 0:
            return
        said = linked.stderr
        shutil.rmtree(target)
    pytest.fail(said.decode())


@pytest.fixture
def sandbox(state: Path, tmp_path: Path, artifacts: Artifacts) -> Sandbox:
    """Runs with the test's own records; the exit checks that they left no remains."""
    return Sandbox(state, tmp_path, artifacts)


@pytest.fixture
def no_hot_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save no processes of VMs: for an image with few runs, that takes more than it saves."""
    monkeypatch.setenv(VARIABLE, "1")


@pytest.fixture
def under_os(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run under `os`, where the same agent carries out programs in the same way, without the start of a VM."""
    monkeypatch.setenv("X07_SANDBOX_BACKEND", "os")
    monkeypatch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "1")


@pytest.fixture
def in_vms(under_os: None, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in VMs, in a file whose other tests run under `os`."""
    del under_os, image
    for name in ("X07_SANDBOX_BACKEND", "X07_I_ACCEPT_WEAKER_ISOLATION"):
        monkeypatch.delenv(name)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Threads for tests that watch a run while it is active."""
    with ThreadPoolExecutor(4) as pool:
        yield pool
