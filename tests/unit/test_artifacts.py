"""The artifact cache: what comes back is what was kept, or nothing."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from x07_sandbox.errors import Cancelled
from x07_sandbox.host import settings
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
    """Keep *data* as a build's artifact."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        store_artifact(key, file.fileno(), len(data), hashlib.sha256(data).hexdigest(), notes)


def recalled(key: str) -> bytes | None:
    """What the cache has, if that is what it says."""
    with cached_artifact(key) as found:
        if found is None:
            return None
        data = os.pread(found.fd, found.size, HEADER_BYTES)
        return data if hashlib.sha256(data).hexdigest() == found.sha256 else None


def test_what_was_kept_comes_back(cache: Path) -> None:
    """An artifact comes back byte for byte under its key, under no other, and no longer once dropped."""
    key = artifact_key("image", "c", ["gcc"], "source")
    keep(key)
    assert recalled(key) == DATA
    assert recalled(artifact_key("image", "c", ["gcc"], "other")) is None
    assert (cache / key).stat().st_mode & 0o777 == 0o600
    remove_artifact(key)
    assert recalled(key) is None


def test_every_part_changes_the_key() -> None:
    """Image, toolchain, arguments and source each make another key, and none can pass for its neighbour."""
    keys = {artifact_key(*parts) for parts in (["a", "b"], ["ab", ""], ["a", ["b"]], ["b", "a"], ["a", "b", ""])}
    assert len(keys) == 5


def test_notes_about_the_build_come_back_too(cache: Path) -> None:
    """What was noted about a build comes back as it was given, and is not used when damaged or a part of it."""
    key, notes = artifact_key("x"), b'{"stderr": "a warning"}'
    keep(key, DATA, notes)
    assert recalled(key) == DATA
    with cached_artifact(key) as found:
        assert found is not None
        assert found.notes == notes
    whole = (cache / key).read_bytes()
    for wrong in (whole[:-1] + b"?", whole[:-1], whole + b"?"):
        (cache / key).write_bytes(wrong)
        assert recalled(key) is None
    keep(artifact_key("y"), DATA, bytes(NOTES_MAX_BYTES + 1))
    assert not (cache / artifact_key("y")).exists()


@pytest.mark.parametrize("at", [0, 100, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 5000, -1])
def test_damage_is_found(cache: Path, at: int) -> None:
    """A changed byte anywhere that counts means nothing is taken from the cache."""
    key = artifact_key("x")
    keep(key)
    data = bytearray((cache / key).read_bytes())
    data[at] ^= 0x55
    (cache / key).write_bytes(data)
    got = recalled(key)
    assert got is None or (got == DATA and 0 < at < HEADER_BYTES)


@pytest.mark.parametrize(("size", "notes_size"), [("1e999", "0"), ("-600", str(len(DATA) + 600)), ("null", "0")])
def test_sizes_that_no_file_has_are_damage_too(cache: Path, size: str, notes_size: str) -> None:
    """A header with a size that is no size means that nothing is taken from the cache, also where the sum is right."""
    key = artifact_key("x")
    keep(key)
    header = f'{{"bytes": {size}, "notes_bytes": {notes_size}}}'.encode().ljust(HEADER_BYTES)
    (cache / key).write_bytes(header + (cache / key).read_bytes()[HEADER_BYTES:])
    assert recalled(key) is None


def test_a_file_cut_short_or_of_another_key_is_nothing(cache: Path) -> None:
    """What was cut, grew, is a link, or lies under another's name is not used."""
    key, other = artifact_key("x"), artifact_key("y")
    keep(key)
    whole = (cache / key).read_bytes()
    (cache / other).write_bytes(whole)
    (cache / other).chmod(0o600)
    assert recalled(other) is None
    for wrong in (whole[:-1], whole + b"x", b"", b"{}"):
        (cache / key).write_bytes(wrong)
        assert recalled(key) is None
    (cache / key).unlink()
    (cache / key).symlink_to(cache / other)
    assert recalled(key) is None


def test_the_oldest_goes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the size limit the least recently used artifacts are removed; one larger than a quarter is not kept."""
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


def test_who_waits_for_a_build_can_be_cancelled_and_is_not_held_for_ever() -> None:
    """The wait for another's build ends by what `pause` raises, and after the time that it may take."""

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


def test_a_killed_builder_holds_nobody() -> None:
    """Where the process that builds is killed, the one that waits for it is next, and knows that another had been."""
    source = "import sys\nfrom x07_sandbox.programs.artifacts import build_lock\n"
    source += "with build_lock('cd' * 32, lambda: None, 60):\n    print('builds', flush=True)\n    sys.stdin.read()\n"
    with subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == b"builds\n"
        with build_lock("cd" * 32, builder.kill, 60) as waited:
            assert waited is True
