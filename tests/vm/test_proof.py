"""The proof that a guest boots: the same for any way to provide its processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from x07_sandbox.backends.qemu.proof import prove
from x07_sandbox.backends.qemu.start import Accelerator
from x07_sandbox.host import settings
from x07_sandbox.images.verify import open_image

if TYPE_CHECKING:
    from pathlib import Path

    from x07_sandbox.images.store import Image

pytestmark = pytest.mark.vm


def test_an_agent_that_answers_is_the_proof(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where our agent answers from a guest in time, the proof holds; tried with emulation, which works everywhere."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    with open_image(image) as opened:
        works, reason = prove(opened, Accelerator(kvm=False), settings.BOOT_S)
    assert works, reason
    assert "agent answered" in reason
