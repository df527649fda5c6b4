"""The proof that a guest boots, with or without KVM."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.backends.qemu import backend
from x07_sandbox.backends.qemu.backend import prove
from x07_sandbox.backends.qemu.instance import QemuInstance
from x07_sandbox.host import settings
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_folder
from x07_sandbox.images.verify import open_image

if TYPE_CHECKING:
    from pathlib import Path

    from x07_sandbox.images.store import Image

pytestmark = pytest.mark.vm


def test_an_agent_that_answers_is_the_proof(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof succeeds if the guest's agent answers in time."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    with open_image(image) as opened:
        found = prove(opened, settings.BOOT_S, settings.BOOT_S, kvm=False)
    assert found.works, found.reason
    assert "agent answered" in found.reason
    assert 0.1 < found.boot_s < settings.BOOT_S


def test_a_late_guest_is_reported_as_late(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that does not answer in time is no evidence that guests do not work."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    with open_image(image) as opened:
        found = prove(opened, 0.2, 0.2, kvm=False)
    assert (found.works, found.transient) == (False, True), found.reason


def test_a_killed_guest_proves_nothing(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest killed during the proof, for example by the OOM killer, is no evidence that guests do not work."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    release = QemuInstance.release

    def killed(instance: QemuInstance) -> None:
        release(instance)
        signal.pidfd_send_signal(instance.inner_pidfd, signal.SIGKILL)

    monkeypatch.setattr(QemuInstance, "release", killed)
    with open_image(image) as opened:
        found = prove(opened, settings.BOOT_S, settings.BOOT_S, kvm=False)
    assert (found.works, found.transient) == (False, True), found.reason
    assert "if this host ran out of memory" in found.reason


TRY = """
from x07_sandbox.backends.qemu.backend import prove
from x07_sandbox.errors import HostError
from x07_sandbox.images.store import find_image
from x07_sandbox.images.verify import open_image
import resource
resource.setrlimit(resource.RLIMIT_CPU, (1, 2))
with open_image(find_image(None)) as opened:
    try:
        print(prove(opened, 60, 60, kvm=False))
    except HostError as exc:
        print(exc)
"""


def test_a_cpu_time_limit_of_the_shell_makes_the_proof_fail(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest ended by the shell's CPU time limit is an error, and no verdict is recorded."""
    assert image.digest
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    done = subprocess.run([sys.executable, "-c", TRY], capture_output=True, text=True, check=False)
    assert "QEMU reached the CPU time limit of this shell" in done.stdout, done.stderr


def test_a_stopped_proof_does_not_block_others(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stopped during its proof does not block other processes for ever."""
    monkeypatch.setattr(backend, "known_verdict", lambda: None)
    monkeypatch.setattr(settings, "BOOTS_MAX", 0)
    with open_image(image) as opened, file_lock(cache_folder("verdicts") / ".lock"):
        found = backend.kvm_verdict(opened)
    assert not found.works
    assert "another process has held the lock" in found.reason
