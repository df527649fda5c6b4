"""Job records: X07's exact format, our own data beside it, and unique ids."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from x07_sandbox.errors import HostError
from x07_sandbox.host.linux import boot_id, boot_ms, pid_namespace
from x07_sandbox.host.processes import identify
from x07_sandbox.host.waiting import unix_ms
from x07_sandbox.records import runs as records
from x07_sandbox.records.runs import (
    Claim,
    JobRecord,
    create_record,
    mark_done,
    new_run_id,
    runner_instance,
    write_owner,
)

# facts of upstream, 6.4
KEYS = [
    "schema_version",
    "run_id",
    "backend",
    "container_id",
    "pid",
    "created_unix_ms",
    "deadline_unix_ms",
    "grace_ms",
    "cleanup_ms",
    "ctr",
]
LABELS = {
    "io.x07.schema",
    "io.x07.run_id",
    "io.x07.job_id",
    "io.x07.runner_instance",
    "io.x07.deadline_unix_ms",
    "io.x07.backend",
    "io.x07.created_unix_ms",
    "io.x07.image_digest",
}
DIGEST = "sha256:" + "0123456789abcdef" * 4
ALLOWANCE_MS = 750_000
INSTANCE_FILES = ("runner_instance", "runner_instance.owner")
INSTANCE = re.compile(r"ri-[0-9a-f]{32}")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state root, which does not exist yet."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "vm" / "jobs"))
    return tmp_path / "vm" / "jobs"


def create(phase: str = "run", wall_ms: int = 60_000) -> JobRecord:
    """A record as for a VM."""
    return create_record(Claim(run_id=new_run_id(), phase=phase, wall_ms=wall_ms), backend="qemu", image_digest=DIGEST)


@pytest.mark.usefixtures("root")
def test_job_json_has_exactly_upstreams_keys() -> None:
    """job.json has exactly the keys and types of x07.vm.job@0.1.0."""
    record = create()
    text = (record.folder / "job.json").read_text(encoding="ascii")
    job = json.loads(text)
    assert list(job) == KEYS
    assert text == json.dumps(job, indent=2) + "\n"
    assert job["schema_version"] == "x07.vm.job@0.1.0"
    assert (job["run_id"], job["backend"]) == (record.job_id, "qemu")
    assert (job["pid"], job["ctr"], job["cleanup_ms"]) == (None, None, 30_000)
    assert all(type(job[name]) is int for name in KEYS if name.endswith("_ms"))


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("phase", ["build", "run"])
def test_names_fit_upstreams_patterns(phase: str) -> None:
    """A container's name is x07- and the job id, valid for every runtime."""
    record = create(phase)
    job = json.loads((record.folder / "job.json").read_bytes())
    assert re.fullmatch(rf"\d+-{os.getpid()}-\d+-{phase}", record.job_id)
    assert job["container_id"] == f"x07-{record.job_id}"
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", job["container_id"])
    assert len(job["container_id"]) <= 63  # Apple's; docker and podman take 128
    assert record.folder.name == record.job_id


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(("wall_ms", "grace_ms"), [(1, 1), (500, 50), (60_000, 1000), (600_000, 1000)])
def test_times_are_those_of_one_clock(wall_ms: int, grace_ms: int) -> None:
    """The deadline is the creation time plus the allowance and the wall time."""
    before = unix_ms()
    record = create(wall_ms=wall_ms)
    job = json.loads((record.folder / "job.json").read_bytes())
    assert before <= job["created_unix_ms"] <= unix_ms()
    assert job["deadline_unix_ms"] - job["created_unix_ms"] == ALLOWANCE_MS + wall_ms
    assert job["grace_ms"] == grace_ms


@pytest.mark.usefixtures("root")
def test_labels_are_upstreams() -> None:
    """An instance carries X07's labels, consistent with job.json and within X07's bounds."""
    record = create()
    job = json.loads((record.folder / "job.json").read_bytes())
    labels = record.labels()
    assert labels.keys() == LABELS
    assert labels["io.x07.schema"] == "1"
    assert labels["io.x07.run_id"] == labels["io.x07.job_id"] == job["run_id"]
    assert labels["io.x07.backend"] == "vm.qemu"
    assert labels["io.x07.image_digest"] == DIGEST
    assert INSTANCE.fullmatch(labels["io.x07.runner_instance"])
    assert all(re.fullmatch(r"[A-Za-z0-9._:@/+-]+", value) for value in labels.values())
    assert all(len(key) + len(value) <= 4096 for key, value in labels.items())
    for name in ("created_unix_ms", "deadline_unix_ms"):
        assert int(labels[f"io.x07.{name}"]) == job[name] > 0


def test_everything_is_private(root: Path) -> None:
    """Folders have mode 0700 and files 0600 under any umask, and no temporary file is left."""
    before = os.umask(0)
    try:
        record = create()
        runner = identify(os.getpid())
        assert runner is not None
        write_owner(record, runner=runner, processes={}, cgroups=())
        mark_done(record)
    finally:
        os.umask(before)
    assert sorted(path.name for path in record.folder.iterdir()) == ["done", "job.json", "owner.json"]
    assert (record.folder / "done").read_bytes() == b"done\n"
    assert sorted(path.name for path in root.parent.iterdir()) == ["jobs", *INSTANCE_FILES]
    for path in (root, *root.rglob("*"), *(root.parent / name for name in INSTANCE_FILES)):
        assert stat.S_IMODE(path.lstat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.usefixtures("root")
def test_owner_processes_are_fully_identified() -> None:
    """owner.json identifies processes by boot, namespace, start time and a random mark, not by pid alone."""
    record = create()
    runner = identify(os.getpid())
    assert runner is not None
    write_owner(record, runner=runner, processes={"supervisor": runner, "inner": runner}, cgroups=("/sys/fs/cgroup/x",))
    owner = json.loads((record.folder / "owner.json").read_bytes())
    own = {"pid": os.getpid(), "start_ticks": runner.start_ticks}
    assert owner["schema_version"] == "x07.sandbox.owner@0.1.0"
    assert (owner["boot_id"], owner["pid_namespace"]) == (boot_id(), pid_namespace())
    assert (owner["runner"], owner["processes"]) == (own, {"supervisor": own, "inner": own})
    assert owner["cgroups"] == ["/sys/fs/cgroup/x"]
    assert 0 < owner["deadline_boot_ms"] - boot_ms() <= record.deadline_unix_ms - record.created_unix_ms
    assert (owner["run"], owner["instance"], owner["labels"]) == (record.run_id, record.mark, record.labels())
    assert "mark" not in json.loads((record.folder / "job.json").read_bytes())
    assert re.fullmatch(r"[0-9a-f]{32}", record.mark)
    assert record.mark != create().mark


def test_a_record_is_not_overwritten(root: Path) -> None:
    """A second job with the same id is an error, and the first record is kept."""
    record = create()
    before = (record.folder / "job.json").read_bytes()
    with pytest.raises(HostError, match=record.job_id):
        create_record(Claim(run_id=record.run_id, phase="run", wall_ms=1), backend="qemu", image_digest=DIGEST)
    assert (root / record.job_id / "job.json").read_bytes() == before


def test_run_ids_are_never_given_twice() -> None:
    """Concurrent threads get different run ids."""
    threads, each = 8, 500
    barrier = threading.Barrier(threads)
    found: list[list[str]] = [[] for _ in range(threads)]

    def ask(at: int) -> None:
        barrier.wait(60)
        found[at] = [new_run_id() for _ in range(each)]

    workers = [threading.Thread(target=ask, args=(at,)) for at in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    ids = [run_id for part in found for run_id in part]
    assert len(set(ids)) == threads * each
    assert all(re.fullmatch(rf"\d{{13}}-{os.getpid()}-\d+", run_id) for run_id in ids)


# the runner's instance


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A state root in a private folder."""
    folder = tmp_path / "vm" / "jobs"
    folder.mkdir(parents=True, mode=0o700)
    (tmp_path / "vm").chmod(0o700)
    return folder


def test_the_runner_has_one_id_beside_its_state(home: Path) -> None:
    """The runner's id is created once, next to the state root as in X07, and one created by X07 is reused."""
    first = runner_instance(home)
    assert INSTANCE.fullmatch(first)
    assert (home.parent / "runner_instance").read_text(encoding="ascii") == first + "\n"
    assert runner_instance(home) == first
    assert sorted(path.name for path in home.parent.iterdir()) == ["jobs", *INSTANCE_FILES]
    (home.parent / "runner_instance.owner").unlink()
    (home.parent / "runner_instance").write_text("ri-" + "ab" * 16 + "\n", encoding="ascii")
    assert runner_instance(home) == "ri-" + "ab" * 16


def test_two_machines_that_share_a_home_are_two_owners(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that share a home folder have different ids, and so have users."""
    machine = home.parent / "machine-id"
    machine.write_text("a" * 32 + "\n")
    monkeypatch.setattr(records, "_MACHINE_ID", machine)
    first = runner_instance(home)
    machine.write_text("b" * 32 + "\n")
    second = runner_instance(home)
    assert INSTANCE.fullmatch(second)
    assert second != first
    assert runner_instance(home) == second
    machine.write_text("a" * 32 + "\n")
    assert runner_instance(home) == first
    assert (home.parent / "runner_instance").read_text(encoding="ascii") == first + "\n"
    monkeypatch.setattr(records, "state_home", lambda _root: home.parent)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert runner_instance(home) not in {first, second}


@pytest.mark.parametrize("bits", [0o770, 0o702, 0o1777])
def test_the_id_is_stored_in_a_private_folder(bits: int, home: Path) -> None:
    """If others can write next to the state root, the id is stored inside it."""
    home.parent.chmod(bits)
    (home.parent / "runner_instance").write_text("ri-" + "0" * 32 + "\n", encoding="ascii")
    found = runner_instance(home)
    assert found != "ri-" + "0" * 32
    assert (home / "runner_instance").read_text(encoding="ascii") == found + "\n"


@pytest.mark.parametrize(
    "content",
    [b"", b"ri-", b"x" * 35, b"ri-" + b"A" * 32, b"ri-" + b"0" * 33, b"\xff\xfe", b"ri-" + b"0" * 32 + b"\n\n"],
)
def test_a_damaged_id_is_an_error(content: bytes, home: Path) -> None:
    """A damaged id is an error that names the file, and is not replaced."""
    path = home.parent / "runner_instance"
    path.write_bytes(content)
    with pytest.raises(HostError, match="runner_instance"):
        runner_instance(home)
    assert path.read_bytes() == content


def test_processes_that_start_together_agree_on_one_id(home: Path) -> None:
    """Processes that start at the same time agree on one id."""
    code = (
        "import pathlib, sys\n"
        "from x07_sandbox.records.runs import runner_instance\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(runner_instance(pathlib.Path(sys.argv[1])))\n"
    )
    command = [sys.executable, "-c", code, str(home)]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    found = {child.communicate(timeout=60)[0] for child in children}
    assert [child.returncode for child in children] == [0] * 6
    assert found == {runner_instance(home) + "\n"}
