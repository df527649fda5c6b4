"""The cached verdict on hardware virtualisation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from x07_sandbox.backends.qemu import proof
from x07_sandbox.backends.qemu.proof import known_verdict
from x07_sandbox.host.clocks import boot_ms


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the cached verdict, on a host with an accessible /dev/kvm."""
    path = tmp_path / "proof.json"
    monkeypatch.setattr(proof, "_record", lambda: path)
    monkeypatch.setattr(Path, "exists", lambda _path: True)
    monkeypatch.setattr(os, "access", lambda _path, _mode: True)
    return path


def test_a_late_guest_is_tried_again_minutes_later(record: Path) -> None:
    """After a timeout of a test guest, KVM is retried minutes later."""
    found = {"works": False, "reason": "no answer", "retry_at_ms": boot_ms() + 290_000}
    record.write_text(json.dumps(found))
    known = known_verdict()
    assert known is not None
    assert (known[0], "tried again in 5 min" in known[1]) == (False, True)
    record.write_text(json.dumps(found | {"retry_at_ms": boot_ms() - 1}))
    assert known_verdict() is None


def test_a_guest_that_ended_is_evidence_until_the_host_reboots(record: Path) -> None:
    """The verdict of a test guest that ended or answered holds until the host reboots."""
    record.write_text(json.dumps({"works": False, "reason": "a guest ended"}))
    assert known_verdict() == (False, "a guest ended. KVM is not tried again until this host reboots")
    record.write_text(json.dumps({"works": True, "reason": "our agent answered"}))
    assert known_verdict() == (True, "our agent answered")


@pytest.mark.parametrize("left", ["", "[]", '{"works": true}', '{"works": false, "reason": "x", "retry_at_ms": "y"}'])
def test_a_damaged_verdict_is_none(record: Path, left: str) -> None:
    """A damaged verdict is ignored."""
    record.write_text(left)
    assert known_verdict() is None
