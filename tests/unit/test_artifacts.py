"""The artifact cache returns exactly what was stored, or nothing."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path

import pytest

from x07_sandbox.errors import Cancelled
from x07_sandbox.host import settings
from x07_sandbox.programs import artifacts
from x07_sandbox.programs.artifacts import (
    HEADER_BYTES,
    NOTES_MAX_BYTES,
    artifact_key,
    build_lock,
    cached_artifact,
    remove_artifact,
    store_artifact,
)

DATA = b"\x7fELF" + bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "artifacts"


def keep(key: str, data: bytes = DATA, notes: bytes = b"") -> None:
    """Store *data* as a build's artifact."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        store_artifact(key, file.fileno(), len(data), hashlib.sha256(data).hexdigest(), notes)


def recalled(key: str) -> bytes | None:
    """Return the cached artifact if it matches its digest."""
    with cached_artifact(key) as found:
        if found is None:
            return None
        data = os.pread(found.fd, found.size, HEADER_BYTES)
        return data if hashlib.sha256(data).hexdigest() == found.sha256 else None


def test_an_artifact_of_the_last_release_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact in an earlier format, under its own key or that of today, is not used."""
    key = artifact_key("image", "python", ["python3"], "source")
    with monkeypatch.context() as earlier:
        earlier.setattr(artifacts, "SCHEMA", "x07.sandbox.artifact@0.3.0")
        old_key = artifact_key("image", "python", ["python3"], "source")
        keep(old_key)
        keep(key)
        assert recalled(old_key) == DATA
    assert old_key != key
    assert recalled(key) is None
    assert recalled(old_key) is None


def test_stored_artifact_is_returned(cache: Path) -> None:
    """A stored artifact is returned byte for byte under its own key until it is dropped."""
    key = artifact_key("image", "c", ["gcc"], "source")
    keep(key)
    assert recalled(key) == DATA
    assert recalled(artifact_key("image", "c", ["gcc"], "other")) is None
    assert (cache / key).stat().st_mode & 0o777 == 0o600
    remove_artifact(key)
    assert recalled(key) is None


def test_every_part_changes_the_key() -> None:
    """Image, toolchain, arguments and source each change the key, and their boundaries count."""
    keys = {artifact_key(*parts) for parts in (["a", "b"], ["ab", ""], ["a", ["b"]], ["b", "a"], ["a", "b", ""])}
    assert len(keys) == 5


def test_notes_about_the_build_come_back_too() -> None:
    """Build notes are returned unchanged, and an artifact with oversized notes is not stored."""
    key, notes = artifact_key("x"), b'{"stderr": "a warning"}'
    keep(key, DATA, notes)
    assert recalled(key) == DATA
    with cached_artifact(key) as found:
        assert found is not None
        assert found.notes == notes
    keep(artifact_key("y"), DATA, bytes(NOTES_MAX_BYTES + 1))
    assert recalled(artifact_key("y")) is None


@pytest.mark.parametrize("at", [0, 100, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 5000, -1])
def test_damage_is_found(cache: Path, at: int) -> None:
    """A changed byte in a cache entry never yields a wrong artifact."""
    key = artifact_key("x")
    keep(key)
    data = bytearray((cache / key).read_bytes())
    data[at] ^= 0x55
    (cache / key).write_bytes(data)
    got = recalled(key)
    assert got is None or (got == DATA and 0 < at < HEADER_BYTES)


def test_a_truncated_or_misplaced_entry_is_not_used(cache: Path) -> None:
    """A truncated, extended, linked or misplaced cache entry is not used."""
    key, other = artifact_key("x"), artifact_key("y")
    keep(key, notes=b"notes")
    whole = (cache / key).read_bytes()
    (cache / other).write_bytes(whole)
    (cache / other).chmod(0o600)
    assert recalled(other) is None
    for wrong in (whole[:-1], whole[:-1] + b"?", whole + b"x", b"", b"{}"):
        (cache / key).write_bytes(wrong)
        assert recalled(key) is None
    (cache / key).unlink()
    (cache / key).symlink_to(cache / other)
    assert recalled(key) is None


def test_least_recently_used_artifact_is_evicted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache evicts the least recently used artifacts and stores none above a quarter of its size."""
    monkeypatch.setattr(settings, "ARTIFACTS_MAX_BYTES", 200_000)
    keys = [artifact_key(number) for number in range(8)]
    for number, key in enumerate(keys):
        keep(key, os.urandom(40_000))
        if (cache / key).exists():
            os.utime(cache / key, (number, number))
        if number >= 2:
            assert recalled(keys[0]) is not None  # used again each time, so never the oldest
    there = [key for key in keys if (cache / key).exists()]
    assert keys[0] in there
    assert keys[-1] in there
    assert sum((cache / key).stat().st_blocks * 512 for key in there) <= 200_000
    big = artifact_key("big")
    keep(big, bytes(60_000))
    assert recalled(big) is None


def test_a_wait_for_another_build_can_be_cancelled_and_times_out() -> None:
    """A wait for another process's build can be cancelled and has a timeout."""

    def never() -> None:
        raise Cancelled("x", "y", "z")

    with build_lock("ab" * 32, never, 60) as waited:
        assert waited is False
        with pytest.raises(Cancelled), build_lock("ab" * 32, never, 60):
            pass
        with build_lock("ab" * 32, lambda: time.sleep(0.01), 0.05) as waited_too:
            assert waited_too is True
    with build_lock("ab" * 32, never, 60) as waited:
        assert waited is False
