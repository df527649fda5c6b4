"""Fuzz target: the changes that a guest reports, from bytes to the verdict.

Every input gives PeerError or a change set. In a set, entries and bytes are bounded, names stay inside their root,
contents match their position and digest, every violation of a rule is rejected by name, and writing and reading it
gives the same set. The root is unchanged, modes are permission bits, and without the rejected changes it applies.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Final

from tests.guest import lies
from x07_sandbox.channel.trees import Entry, check_name, file_record, segment
from x07_sandbox.channel.trees import Kind as R
from x07_sandbox.errors import BackendError, PeerError
from x07_sandbox.files.change_rules import AllowedActions, check_changes
from x07_sandbox.files.changes import ChangeSet, Node, RootChanges, decode, encode
from x07_sandbox.files.checks import check_set
from x07_sandbox.files.copy import Bounds
from x07_sandbox.files.incoming import Incoming
from x07_sandbox.files.protected import Protection
from x07_sandbox.sessions.selection import select_changes

if TYPE_CHECKING:
    from x07_sandbox.files.changes import Change

BYTES_MAX: Final = 4096
ENTRIES_MAX: Final = 30
ROOT: Final = "/home/u/work"
BOUNDS: Final = Bounds(deny_hidden=True, allow_symlinks=True, read_bytes=100, write_bytes=100, entries=20, depth=4)
BEFORE: Final = {
    "": Node(kind="folder", mode=0o755),
    "a": Node(kind="folder", mode=0o755),
    "a/b": Node(kind="file", mode=0o644, size=3, sha256=hashlib.sha256(b"abc").hexdigest()),
    "l": Node(kind="link", target="a/b"),
}


def seeds() -> dict[str, bytes]:
    """Return changes as the guest sends them, and hostile ones. The first byte cuts them."""
    whole, cut = b"\xff", b"\x04"
    root, other, end = (Entry(kind, name).encoded() for kind, name in ((R.ROOT, b"0"), (R.ROOT, b"1"), (R.END, b"")))
    sparse = Entry(R.FILE, b"sparse", mode=0o600, size=90).encoded() + segment(80, hole=True) + segment(10) + b"x" * 10
    folder, gone = Entry(R.FOLDER, b"new", mode=0o755).encoded(), Entry(R.DELETED, b"a/b").encoded()
    link = Entry(R.LINK, b"new/link", target=b"../a/b").encoded()
    sets = {
        **{name: b"".join(made()) for name, made in lies.CHANGES.items() if name != "million"},
        "renamed": gone + file_record(b"a/c", b"abc"),
        "mode": file_record(b"a/b", b"abc", 0o755),
        "deep": file_record(b"a/b/c/d/e/f", b"x"),
        "many": b"".join(file_record(b"%d" % number, b"") for number in range(40)),
        "staging": file_record(b".x07-apply-0", b""),
        # A link in place of the root was accepted as a change.
        "found-root-link": gone + Entry(R.LINK, b"", target=b"a").encoded(),
        "found-root-gone": Entry(R.DELETED, b"").encoded(),
    }
    return {
        **{name: whole + root + data + end for name, data in sets.items()},
        "all": cut + root + file_record(b"a/b", b"abcd") + folder + link + sparse + other + gone + end,
        "no-root": whole + file_record(b"x", b"1") + end,
        "third-root": whole + Entry(R.ROOT, b"2").encoded() + end,
        "after-end": whole + root + end + root,
    }


def one_input(data: bytes) -> None:
    """Check one input; its first byte says how the rest is cut."""
    size = data[0] + 1 if data else 1
    fd = os.memfd_create("x07-fuzz")
    try:
        incoming = Incoming(fd, roots=2, most_entries=ENTRIES_MAX, most_bytes=BYTES_MAX)
        for at in range(1, len(data), size):
            if not incoming.take(data[at : at + size]):
                break
        assert len(incoming.reported) <= ENTRIES_MAX
        assert not any(one.node and one.node.mode & ~0o7777 for one in incoming.reported)
        assert os.fstat(fd).st_size <= BYTES_MAX
        for number in range(2):
            _judge(incoming, number, fd)
    except (PeerError, BackendError):
        return
    finally:
        os.close(fd)


def _judge(incoming: Incoming, number: int, fd: int) -> None:
    allowed = AllowedActions(mkdir=number == 0, remove=number == 0, rename=number == 0)
    reported = [one for one in incoming.reported if one.root == number]
    judged = check_changes(BEFORE, {}, reported, BOUNDS, allowed, Protection(ROOT))
    refused = {refusal.name for refusal in judged.refused}
    for change in judged.changes:
        check_name(os.fsencode(change.name))
        _check_content(change, fd)
        assert change.name in refused or not _bad(change, allowed), change
        assert change.name, change  # the root, a folder, exists before and after
    root = RootChanges(root=ROOT, guest="/x", missing=False, changes=judged.changes, refused=judged.refused)
    made = ChangeSet(run="1-1-1", roots=(root,))
    assert decode(encode(made)) == made
    check_set(select_changes(made, sorted(refused)))
    split = check_changes(BEFORE, {}, reported, BOUNDS, allowed, Protection(ROOT), split=True)
    if not split.is_whole:
        names = {refusal.name for refusal in split.refused}
        assert not names & {change.name for change in split.changes}
        assert {change.name for change in (*split.changes, *split.left_out)} == {one.name for one in judged.changes}
        root = RootChanges(root=ROOT, guest="/x", missing=False, changes=split.changes, left_out=split.left_out)
        check_set(ChangeSet(run="1-1-1", roots=(root,), all_or_nothing=False))


def _check_content(change: Change, fd: int) -> None:
    node = change.after
    if node is not None and node.kind == "file" and node.at is not None:
        content = os.pread(fd, node.size, node.at).ljust(node.size, b"\0")
        assert hashlib.sha256(content).hexdigest() == node.sha256


def _bad(change: Change, allowed: AllowedActions) -> bool:
    """Return whether some rule must reject the change."""
    before, after, parts = change.before, change.after, change.name.split("/")
    if after is None:
        return not allowed.remove
    return (
        any(part.startswith(".") for part in parts)
        or len(parts) > BOUNDS.depth
        or (after.kind != "link" and bool(after.mode & 0o7000))
        or (after.kind == "file" and after.size > BOUNDS.write_bytes)
        or (after.kind == "link" and after.target.startswith("/"))
        or (after.kind == "folder" and (before is None or before.kind != "folder") and not allowed.mkdir)
    )
