"""A sweep after the SIGKILL of a runner removes its job's processes, control groups and files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.process.conftest import Backend, left, started
from x07_sandbox.library.cleanup import sweep
from x07_sandbox.records.reader import all_stored

if TYPE_CHECKING:
    from x07_sandbox.records.reader import StoredJob

ROOT = Path(__file__).resolve().parents[2]
GONE_S = 20.0
RUNNER = """
import sys
from tests.process.conftest import started
from tests.process.conversation import Conversation, python
from x07_sandbox.backends.registry import create

backend = create(sys.argv[1])
backend.probe()
with started(backend) as instance:
    source = '''
import os, signal
os.makedirs('deep/er', exist_ok=True)
open('deep/er/file', 'w').write('x')
os.chmod('deep', 0)
os.fork() or os.setsid()
print('here', flush=True)
signal.pause()
'''
    Conversation(instance).run(python(source), on_output=lambda _it: print("runs", flush=True))
"""


def killed(backend: Backend, state: Path, cache: Path) -> StoredJob:
    """The record of a job whose runner was killed while its program ran."""
    env = {**os.environ, "X07_VM_STATE_DIR": str(state), "X07_VM_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", RUNNER, backend.name]
    with subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        assert runner.stdout.readline() == "runs\n"
        runner.kill()
    (stored,) = [one for one in all_stored() if one.ended is None]
    return stored


def test_a_sweep_removes_a_killed_runners_job(backend: Backend, state: Path, cache: Path) -> None:
    """After SIGKILL of the runner one sweep ends the job, removes its files and groups, and records it as reaped."""
    stored = killed(backend, state, cache)
    assert stored.record is not None
    assert stored.owner is not None
    report = sweep(dry_run=False, progress=lambda _text: None)
    assert ("job", stored.folder.name) in {(gone.kind, gone.id) for gone in report.removed}
    assert not left(stored.record.mark)
    assert not [name for name in stored.owner.cgroups if Path(name).exists()]
    assert sorted(path.name for path in stored.folder.iterdir()) == ["job.json", "owner.json", "reaped"]
    assert not sweep(dry_run=False, progress=lambda _text: None).removed


def test_a_sweep_ends_a_job_after_its_deadline(backend: Backend) -> None:
    """A sweep ends a job after its deadline even if its runner is alive but hangs."""
    with started(backend) as instance:
        path = instance.record.folder / "owner.json"
        text = path.read_text()
        path.write_text(
            text.replace(f'"deadline_boot_ms": {instance.record.deadline_boot_ms}', '"deadline_boot_ms": 1')
        )
        report = sweep(dry_run=False, progress=lambda _text: None)
        assert [gone.id for gone in report.removed] == [instance.record.job_id]
        deadline = time.monotonic() + GONE_S
        while left(instance.record.mark) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left(instance.record.mark)
