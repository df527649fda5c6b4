"""The cached verdict on hardware virtualisation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from x07_sandbox.backends.base import HandshakeFailure
from x07_sandbox.backends.qemu import backend
from x07_sandbox.backends.qemu.backend import boot_limit_s, known_verdict, proof_limit_s
from x07_sandbox.host import settings
from x07_sandbox.host.linux import boot_id, boot_ms
from x07_sandbox.host.verdicts import Verdict


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the cached verdict, on a host with an accessible /dev/kvm."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    verdict = Verdict("kvm")
    monkeypatch.setattr(backend, "_verdict", lambda: verdict)
    monkeypatch.setattr(Path, "exists", lambda _path: True)
    monkeypatch.setattr(os, "access", lambda _path, _mode: True)
    return verdict.path


def test_a_late_guest_is_tried_again_minutes_later(record: Path) -> None:
    """After a timeout of a test guest, KVM is retried minutes later."""
    found = {"boot_id": boot_id(), "works": False, "reason": "no answer", "retry_at_ms": boot_ms() + 290_000}
    record.write_text(json.dumps(found))
    known = known_verdict()
    assert known is not None
    assert (known.works, known.reason) == (False, "no answer. KVM is not tried again for 5 minutes")
    assert known.fix == "Try again later"
    record.write_text(json.dumps(found | {"retry_at_ms": boot_ms() - 1}))
    assert known_verdict() is None


def test_a_guest_that_ended_is_evidence_until_the_host_reboots(record: Path) -> None:
    """The verdict of a test guest that ended or answered, and how long it took, holds until the host reboots."""
    record.write_text(json.dumps({"boot_id": boot_id(), "works": False, "reason": "a guest ended"}))
    known = known_verdict()
    assert known is not None
    assert (known.works, known.reason) == (False, "a guest ended. KVM is not tried again until this host reboots")
    assert known.fix == "Use a host where KVM works"
    record.write_text(json.dumps({"boot_id": boot_id(), "works": True, "reason": "our agent answered", "boot_s": 20.0}))
    known = known_verdict()
    assert known is not None
    assert (known.works, known.reason) == (True, "our agent answered")
    # On a host where the test of KVM took long, other VMs get more time to boot.
    assert (boot_limit_s(known.boot_s), boot_limit_s(0.5)) == (80.0, settings.BOOT_S)


@pytest.mark.parametrize(
    ("failure", "transient"),
    [
        (HandshakeFailure(kind="late", why="it did not answer in time"), True),
        (HandshakeFailure(kind="ended", why="it ended", exit_status=137), True),
        (HandshakeFailure(kind="ended", why="it ended", exit_status=-6), True),
        (HandshakeFailure(kind="ended", why="it ended", exit_status=1), True),  # no memory for the guest's RAM
        (HandshakeFailure(kind="ended", why="its channel ended"), True),
        (HandshakeFailure(kind="ended", why="it ended", exit_status=0), False),
        (HandshakeFailure(kind="failed", why="preload: No module named x"), False),
    ],
)
def test_only_a_failure_of_the_guest_itself_is_evidence(failure: HandshakeFailure, *, transient: bool) -> None:
    """If QEMU was late, killed or failed, the state of the host may be the cause; not if the guest powered off."""
    assert failure.transient is transient


@pytest.mark.parametrize(("jail_s", "limit_s"), [(0.0, 5.0), (0.03, 5.0), (0.2, 20.0), (2.0, 30.0)])
def test_the_limit_of_the_proof_grows_with_the_measured_start_of_the_jail(jail_s: float, limit_s: float) -> None:
    """A slow host gets more time to prove that KVM works, at most as much as for any boot."""
    assert proof_limit_s(jail_s, settings.KVM_PROOF_S, settings.BOOT_S) == limit_s


@pytest.mark.usefixtures("record")
def test_a_user_without_access_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this user may not open /dev/kvm, the fix is to get access, and not another host."""
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    for group, fix in (("kvm", "As root, run usermod -aG kvm "), ("root", "As root, allow this user")):
        monkeypatch.setattr(Path, "group", lambda _path, found=group: found)
        known = known_verdict()
        assert known is not None
        assert not known.works
        assert known.fix.startswith(fix)


@pytest.mark.parametrize("left", ["", "[]", '{"works": true}', '{"works": false, "reason": "x", "retry_at_ms": "y"}'])
def test_a_damaged_verdict_is_none(record: Path, left: str) -> None:
    """A damaged verdict is ignored."""
    record.write_text(left)
    assert known_verdict() is None
