"""The files that a program needs in its jail: all of them and no others."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from x07_sandbox.errors import HostError
from x07_sandbox.host.arch import host_arch
from x07_sandbox.jail.bwrap import SETPRIV
from x07_sandbox.jail.forms import needed_files


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_program_needs_itself_its_loader_and_its_libraries() -> None:
    """A program's files are itself, its loader and its libraries, once each; a missing one is an error."""
    files = needed_files(SETPRIV)
    assert files[0] == SETPRIV
    assert host_arch().loader in files
    assert any(Path(path).name.startswith("libc.so") for path in files)
    assert len(set(files)) == len(files)
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in files)
    with pytest.raises(HostError, match="/nowhere/qemu") as caught:
        needed_files("/nowhere/qemu")
    assert "x07 doctor" in caught.value.fix


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"key":[]}', b'{"key":[],"files":["/etc/shadow"]}', b"\xff"]
)
def test_a_damaged_cache_entry_is_recomputed(content: bytes, cache: Path) -> None:
    """The cached list is private and used again, and a damaged entry is discarded and recomputed."""
    first = needed_files(SETPRIV)
    (record,) = (cache / "verdicts").iterdir()
    assert stat.S_IMODE((cache / "verdicts").stat().st_mode) == 0o700
    assert needed_files(SETPRIV) == first
    record.write_bytes(content)
    assert needed_files(SETPRIV) == first
    assert json.loads(record.read_bytes())["files"] == list(first)


def test_a_changed_program_is_examined_again(tmp_path: Path) -> None:
    """The cached list is recomputed when the program changes."""
    program = tmp_path / "program"
    program.write_bytes(Path(SETPRIV).read_bytes())
    program.chmod(0o755)
    assert len(needed_files(str(program))) == len(needed_files(SETPRIV))
    source = tmp_path / "p.c"
    source.write_text("int main(void) { return 0; }\n", encoding="ascii")
    other = tmp_path / "other"
    subprocess.run(["/usr/bin/cc", "-static", "-o", str(other), str(source)], check=True)
    other.replace(program)
    assert needed_files(str(program)) == (str(program),)


def test_the_environment_does_not_affect_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LD_LIBRARY_PATH and LD_PRELOAD do not affect the jail's files."""
    expected = needed_files(SETPRIV)
    libc = next(path for path in expected if Path(path).name.startswith("libc.so"))
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / Path(libc).name).write_bytes(Path(libc).read_bytes())
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "second"))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "evil"))
    monkeypatch.setenv("LD_PRELOAD", str(tmp_path / "evil" / Path(libc).name))
    assert needed_files(SETPRIV) == expected
    assert os.environ["LD_LIBRARY_PATH"]
