"""The checked image is the one that runs, even if paths are swapped or bytes change on the disk."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.conftest import overwrite
from tests.vm.jail_helpers import (
    Account,
    Runner,
    account_fixture,  # noqa: F401 - pytest finds it here
    accounts_fixture,  # noqa: F401 - pytest finds it here
    copy_image,
    own_tree,
    parse,
)
from x07_sandbox.images.verify import write_disk

if TYPE_CHECKING:
    from pathlib import Path

    from x07_sandbox.images.store import Image

pytestmark = pytest.mark.vm

SCRATCH_LOOK_BYTES = 8 << 20
PARTS = ("vmlinux", "initrd.cpio", "root.erofs", "scratch.head")


@pytest.fixture
def copied(account: Account, image: Image, tmp_path: Path) -> tuple[Account, Path]:
    """The account with a separate cache below its home, and the image's folder in it."""
    cache = account.home / f"cache-{tmp_path.name}"
    folder = copy_image(image, cache)
    own_tree(cache, account.uid)
    places = {"X07_VM_CACHE_DIR": str(cache), "X07_VM_STATE_DIR": str(cache / "jobs")}
    return replace(account, env=account.env | places), folder


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


@pytest.mark.parametrize("how", ["file", "link"])
def test_the_machine_gets_the_checked_bytes(
    copied: tuple[Account, Path], image: Image, tmp_path: Path, how: str
) -> None:
    """If a file or a link replaces the path of a checked part, the machine still gets the checked bytes."""
    account, folder = copied
    checked = {name: _crc(folder / name) for name in PARTS[:3]}
    scratch = tmp_path / "scratch"
    with (folder / "scratch.head").open("rb") as head, scratch.open("wb+") as disk:
        write_disk(head.fileno(), image.manifest.scratch_disk, disk.fileno())
        disk.truncate(SCRATCH_LOOK_BYTES)
    with Runner(account, mode="digest", do="talk", swap=how) as runner:
        assert all((folder / name).read_bytes() == b"not what was checked" for name in PARTS)
        runner.say(json.dumps(str(SCRATCH_LOOK_BYTES)))
        message = runner.hear("findings")
        runner.say("stop")
        assert runner.hear("gone")["done"]
    found = {finding.arg: finding.value for finding in parse(message["text"]) if finding.probe == "digest"}
    assert found == {
        "/img/vmlinux": checked["vmlinux"],
        "/img/initrd.cpio": checked["initrd.cpio"],
        "/img/root.erofs": checked["root.erofs"],
        "scratch": _crc(scratch),
    }


def test_nothing_runs_if_the_checked_files_are_gone(copied: tuple[Account, Path]) -> None:
    """If the checked files were replaced and are gone, nothing runs, and the error says why."""
    account, _folder = copied
    with Runner(account, mode="digest", do="talk", may_fail=True, swap="over") as runner:
        # Bubblewrap finds out while it makes the jail: before or after we have set our limits on it.
        if runner.started["event"] == "refused":
            text = str(runner.started["text"])
            assert "A file that it needs was just replaced or removed" in text
        else:
            runner.say(json.dumps("0"))
            message = runner.hear("findings")
            assert message["text"] == ""
            text = message["console"]
    assert "Can't find source path" in text


def _run(account: Account, folder: Path, *args: str) -> tuple[int, dict[str, object]]:
    program = account.folder / "answer.py"
    program.write_text("print(42)\n", encoding="ascii")
    done = account.x07("run", "--json", "--image", f"sha256:{folder.name}", *args, str(program))
    assert done.stderr == b""
    return done.returncode, json.loads(done.stdout)


def _flip(path: Path) -> None:
    """Flip a byte in the middle and restore the times and mode."""
    before = path.stat()
    overwrite(path)
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns, after.st_mode) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
        before.st_mode,
    )


def test_one_flipped_byte_is_refused(copied: tuple[Account, Path]) -> None:
    """A previously checked image with one changed byte is refused, and the error names the part."""
    account, folder = copied
    for part in PARTS:
        _flip(folder / part)
        code, result = _run(account, folder)
        assert (code, result["outcome"], result["fault"]) == (125, "refused", "host")
        assert f"the content of {part} has changed since it was built" in str(result["reason"])
        assert result["phases"] == {}
        _flip(folder / part)
    assert not list((account.state).glob("*/owner.json"))


@pytest.mark.parametrize("part", PARTS)
def test_a_link_in_place_of_a_part_is_refused(copied: tuple[Account, Path], part: str) -> None:
    """A symbolic link in place of a part is refused, even if it leads to the same bytes."""
    account, folder = copied
    (folder / part).rename(folder.parent / part)
    (folder / part).symlink_to(folder.parent / part)
    code, result = _run(account, folder)
    assert (code, result["outcome"]) == (125, "refused")
    assert f"{part} cannot be opened, or is a link" in str(result["reason"])
