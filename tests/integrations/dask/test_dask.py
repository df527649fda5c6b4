"""ClusterPool on a local cluster of two worker processes."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import as_completed, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from distributed import Client, LocalCluster

from x07_sandbox import SandboxError
from x07_sandbox.integrations.dask import RESOURCE, ClusterPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SQUARE = {"source": "n = int(input()); print(n * n)", "toolchain": "python"}
PROGRAMS = 200


@contextlib.contextmanager
def clients(workers: int = 2, **options: object) -> Iterator[Client]:
    """Yield the client of a new cluster."""
    options = {"resources": {RESOURCE: 2}, "threads_per_worker": 2} | options
    with (
        LocalCluster(n_workers=workers, processes=True, dashboard_address=":0", **options) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the records of all jobs of this module."""
    jobs = tmp_path_factory.mktemp("state") / "jobs"
    jobs.mkdir(mode=0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_VM_STATE_DIR", str(jobs))
        yield jobs


@pytest.fixture(scope="module")
def pool(state: Path) -> Iterator[ClusterPool]:
    """A pool on two workers."""
    assert state.is_dir()
    with clients() as client, ClusterPool(client, size=1) as pool:
        assert pool.wait_ready(120)
        yield pool


def running(state: Path) -> list[Path]:
    """Return the folders of the jobs that run programs."""
    return [path.parent for path in state.glob("*-run/owner.json") if not (path.parent / "done").exists()]


def wait_for(condition: Callable[[], Any], timeout_s: float = 60) -> None:
    """Wait until the condition is true. The records are files, so there is nothing to wait on."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_program_of_the_page_works(state: Path, tmp_path: Path) -> None:
    """The program that docs/how-to/grade-on-a-cluster.md shows prints its results."""
    page = Path(__file__).parents[3] / "docs" / "how-to" / "grade-on-a-cluster.md"
    found = re.search(r"cat > squares.py <<'END'\n(.*?)^END$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert found
    assert state.is_dir()
    (tmp_path / "squares.py").write_text(found[1])
    done = subprocess.run([sys.executable, "squares.py"], cwd=tmp_path, stdout=subprocess.PIPE, timeout=200, check=True)
    assert done.stdout.decode().splitlines()[-1] == str([number**2 for number in range(20)])


def test_it_has_the_methods_of_a_pool(pool: ClusterPool, tmp_path: Path) -> None:
    """`submit` takes a file of this computer or a source, with inputs and arguments; `map` keeps the order."""
    program = tmp_path / "words.py"
    program.write_text("import sys\nprint(sys.argv[1], input(), open('more').read())\n")
    result = pool.submit(program, b"in\n", args=["arg"], files={"more": "file"}, policy="built-in:default").result()
    assert result.stdout.text == "arg in file\n"
    results = pool.map(None, [b"%d\n" % number for number in range(10)], **SQUARE)
    assert [int(one.stdout.text) for one in results] == [number**2 for number in range(10)]


def test_errors_are_those_of_a_pool(pool: ClusterPool) -> None:
    """A refused run raises SandboxError with its result, a failed one only with check, and neither is repeated."""
    refused = pool.submit(None, source="", toolchain="python", policy="built-in:postgres-client")
    with pytest.raises(SandboxError) as caught:
        refused.result()
    assert caught.value.result.outcome == "refused"
    assert pickle.loads(pickle.dumps(caught.value)).result == caught.value.result  # noqa: S301 - our own bytes
    assert pool.submit(None, source="exit(3)", toolchain="python").result().exit_code == 3
    with pytest.raises(SandboxError, match="failed"):
        pool.submit(None, source="exit(3)", toolchain="python", check=True).result()


@pytest.mark.parametrize("options", [{"on_output": print}, {"workdir": "."}, {"out": "out"}, {"write_roots": ["."]}])
def test_options_that_concern_this_computer_are_refused(pool: ClusterPool, options: dict[str, Any]) -> None:
    """An option that would write files on a node, or call a function there, is refused at once."""
    with pytest.raises(SandboxError, match="cannot run this on a cluster"):
        pool.submit(None, **SQUARE, **options)


def test_functions_and_unknown_options_are_refused(pool: ClusterPool, tmp_path: Path) -> None:
    """A function, a missing file, a folder and an unknown option are errors of the call."""
    with pytest.raises(SandboxError, match="cannot run a function"):
        pool.submit(print)
    for path in (tmp_path / "missing.py", tmp_path):
        with pytest.raises(SandboxError, match="cannot read"):
            pool.submit(path)
    with pytest.raises(TypeError, match="sauce"):
        pool.submit(None, sauce="print(1)")


def test_cancelling_ends_the_vm(pool: ClusterPool, state: Path) -> None:
    """A cancelled future ends the VM of its program, wherever it runs."""
    future = pool.submit(None, source="import time; time.sleep(50)", toolchain="python")
    wait_for(lambda: running(state))
    (job,) = running(state)
    assert future.cancel()
    assert wait([future], timeout=60).done == {future}
    wait_for((job / "done").exists, timeout_s=20)


def test_a_fault_of_the_host_is_repeated(pool: ClusterPool, state: Path) -> None:
    """If the VM of a run is killed, the program runs again, and its future has the result of the second run."""
    future = pool.submit(None, source="import time; time.sleep(4); print('done')", toolchain="python")
    wait_for(lambda: running(state))
    (job,) = running(state)
    time.sleep(1)  # the program has started
    for process in json.loads((job / "owner.json").read_bytes())["processes"].values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process["pid"], signal.SIGKILL)
    result = future.result(timeout=60)
    assert (result.ok, result.stdout.text) == (True, "done\n")
    assert not job.name.startswith(result.run)


def test_a_killed_worker_loses_and_repeats_no_result(state: Path) -> None:
    """200 programs, and a worker killed in the middle, give 200 results, each once."""
    assert state.is_dir()
    with clients() as client, ClusterPool(client, size=1) as pool:
        futures = {pool.submit(None, b"%d\n" % number, **SQUARE): number for number in range(PROGRAMS)}
        counts: Counter[int] = Counter()
        for done, future in enumerate(as_completed(futures, timeout=400)):
            assert future.result().stdout.text == f"{futures[future] ** 2}\n"
            counts[futures[future]] += 1
            if done == PROGRAMS // 3:
                os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
        assert counts == dict.fromkeys(range(PROGRAMS), 1)
    wait_for(lambda: all(gone(job) for job in running(state)))


def gone(job: Path) -> bool:
    """Whether no process of a job is left."""
    processes = json.loads((job / "owner.json").read_bytes())["processes"].values()
    return not any(Path("/proc", str(one["pid"])).exists() for one in processes)


def test_a_node_without_the_image_gets_it(state: Path, tmp_path: Path) -> None:
    """The image is copied to a node that lacks it, once for its two workers, and progress says what is done."""
    assert state.is_dir()
    (tmp_path / "cache").mkdir(mode=0o700)
    said: list[str] = []
    with (
        clients(env={"X07_VM_CACHE_DIR": str(tmp_path / "cache")}) as client,
        ClusterPool(client, size=1, progress=said.append) as pool,
    ):
        assert pool.wait_ready(200)
        assert pool.submit(None, b"7\n", **SQUARE).result().stdout.text == "49\n"
    assert len([line for line in said if line.startswith("copying the image sha256:")]) == 1
    assert len(said) > 1
    (image,) = [path for path in (tmp_path / "cache" / "images").iterdir() if len(path.name) == 64]
    assert (image / "manifest.json").is_file()


def test_a_cluster_without_the_resource_is_refused() -> None:
    """A cluster on which no program could ever run is refused, with the option that workers need."""
    with clients(1, resources={}) as client, pytest.raises(SandboxError, match="--resources") as caught:
        ClusterPool(client)
    assert "none of its 1 workers" in str(caught.value)
