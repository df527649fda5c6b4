"""Staging folders: planned steps, the new content for them, and the old content of the last application, for an undo.

New content is written to private folders on the same file system. Replaced and removed content is moved there, and
copied from there to the undo set. *folder* is always the private folder of the change set. publish() replaces the
current undo set by the prepared one. An undo is a change set too: its folder is named UNDOING and lies in the one whose
undo set it uses. It has no undo set of its own, and publish() takes the used one away.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.errors import HostError
from x07_sandbox.files import changes as data_model
from x07_sandbox.files import inode
from x07_sandbox.files.changes import Change, ChangeSet, Node, same_node
from x07_sandbox.files.checks import Item, only_mode
from x07_sandbox.files.inode import Ident, open_inode
from x07_sandbox.files.journal import OLD, Site, Step, StepKind, displaced_slot
from x07_sandbox.host.paths import closing_fd, replace_file

# The owner needs both bits to create or remove entries in a folder and to move the folder.
_OPEN: Final = 0o300
_ACL: Final = "system.posix_acl_access"

_SLOT: Final = re.compile(rf"\d+({re.escape(OLD)})?", re.ASCII)
_NEXT, _PLANNED, _CHANGES, _DATA = "undo.new", "planned.json", "changes.json", "data"
UNDOING: Final = "undoing"


class Planner:
    """The plan of the steps for all roots. data_fd: the set's contents. content: the new nodes, by slot."""

    def __init__(self, data_fd: int) -> None:
        self.data_fd = data_fd
        self.steps: list[Step] = []
        self.content: dict[str, Node] = {}
        self._undo_size = 0
        self._slots = 0

    def add(self, place: int, items: Iterable[Item]) -> None:
        """Add the steps of one root. items: the changes; each folder comes before its entries.

        Removals go from the deepest name up, additions from the top down. Modes of folders are set last.
        """
        opening, removing, adding, closing = list[Step](), list[Step](), list[Step](), list[Step]()
        for item in items:
            before, after = item.change.before, item.change.after
            mode = stat.S_IMODE(item.info.st_mode) if item.info else 0
            if before and before.kind == "folder" and mode & _OPEN != _OPEN:
                opening.append(self._mode(place, item, mode, mode | 0o700))
                mode |= 0o700
            # A new mode would affect other names (hard links) too. In the VM each name was a separate file.
            linked = item.info is not None and stat.S_ISREG(item.info.st_mode) and item.info.st_nlink > 1
            if only_mode(item.change) and not linked:
                assert after is not None
                # A folder keeps its setgid and sticky bits; a changed file loses its special bits.
                wanted = after.mode | (mode & 0o7000 if after.kind == "folder" else 0)
                if wanted != mode:
                    (closing if after.kind == "folder" else adding).append(self._mode(place, item, mode, wanted))
            elif after is None:
                removing.append(self._swap(place, item, mode))
            else:
                adding.append(self._swap(place, item, mode))
                if after.kind == "folder" and after.mode | 0o700 != after.mode:
                    closing.append(Step(kind="mode", place=place, name=item.name, slot=adding[-1].slot))
                    closing[-1].old_mode, closing[-1].new_mode = after.mode | 0o700, after.mode
        self.steps += [*opening, *reversed(removing), *adding, *reversed(closing)]

    def _mode(self, place: int, item: Item, mode: int, wanted: int) -> Step:
        step = Step(kind="mode", place=place, name=item.name, old_mode=mode, new_mode=wanted, before=item.change.before)
        if item.info:
            step.old = item.info.st_dev, item.info.st_ino
        return step

    def _swap(self, place: int, item: Item, mode: int) -> Step:
        before, after = item.change.before, item.change.after
        kind: StepKind = "add" if before is None else "remove" if after is None else "replace"
        step = Step(kind=kind, place=place, name=item.name, slot=str(self._slots), old_mode=mode, before=before)
        self._slots += 1
        if after:
            self.content[step.slot] = after
            step.new_folder = after.kind == "folder"
        if item.info:
            step.old = item.info.st_dev, item.info.st_ino
        if before and before.kind == "file":
            step.undo_at = self._undo_size
            self._undo_size += before.size
        return step


def fill(site: Site, steps: Iterable[Step], planner: Planner) -> None:
    """Create the new inodes of one place in its staging folder and set `Step.new`. Raises HostError, OSError."""
    created = dict[str, Step]()
    for step in steps:
        if step.kind == "mode":
            if step.slot:
                step.old = created[step.slot].new
            continue
        node = planner.content.get(step.slot)
        if node is None:
            continue
        try:
            info = _create(site, step, node, planner.data_fd)
        except OSError as exc:
            exc.filename = site.path(step.name)  # the name of a slot would mean nothing to the user
            raise
        step.new = info.st_dev, info.st_ino
        created[step.slot] = step


def _create(site: Site, step: Step, node: Node, data_fd: int) -> os.stat_result:
    staging_fd = site.staging_fd
    if node.kind == "link":
        os.symlink(node.target, step.slot, dir_fd=staging_fd)
    elif node.kind == "folder":
        os.mkdir(step.slot, 0o700, dir_fd=staging_fd)
        os.chmod(step.slot, node.mode | 0o700, dir_fd=staging_fd)
    else:
        return _create_file(site, step, node, data_fd)
    return os.stat(step.slot, dir_fd=staging_fd, follow_symlinks=False)


def _create_file(site: Site, step: Step, node: Node, data_fd: int) -> os.stat_result:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with closing_fd(os.open(step.slot, flags, 0o600, dir_fd=site.staging_fd)) as fd:
        try:
            with _source(site.fd, step, node, data_fd) as source:
                found = inode.copy(source, node.at or 0, node.size, fd, 0)
        except EOFError:
            found = ""
        if found != node.sha256:
            why = f"the saved content of {site.path(step.name)!a} is damaged"
            raise HostError("cannot apply the changes", why, "Run the program again")
        os.ftruncate(fd, node.size)
        if step.kind == "replace" and step.before and step.before.kind == "file":
            _inherit(site.fd, step, fd)
        os.fchmod(fd, node.mode)  # after the owner and the access list, both of which change it
        return os.fstat(fd)


@contextlib.contextmanager
def _source(dir_fd: int, step: Step, node: Node, data_fd: int) -> Iterator[int]:
    if node.at is not None:
        yield data_fd
        return
    with open_inode(dir_fd, step.name) as old:
        if old is None or old.ident != step.old:
            raise EOFError
        with closing_fd(old.open_file()) as fd:
            yield fd


def _inherit(dir_fd: int, step: Step, fd: int) -> None:
    with open_inode(dir_fd, step.name) as old:
        if old is None or old.ident != step.old:
            return  # the step itself will find the conflict
        mine = os.fstat(fd)
        if (mine.st_uid, mine.st_gid) != (old.info.st_uid, old.info.st_gid):
            os.fchown(fd, old.info.st_uid, old.info.st_gid)
        with contextlib.suppress(OSError):
            for name in os.listxattr(old.proc_path):
                if name.startswith("user.") or name == _ACL:
                    with contextlib.suppress(OSError):
                        os.setxattr(fd, name, os.getxattr(old.proc_path, name))


def undo_changes(items: Iterable[Item], steps: Iterable[Step]) -> Iterator[Change]:
    """Yield the changes that undo the items of a root. steps: the planned steps of that root."""
    at = {step.name: step.undo_at for step in steps if step.undo_at >= 0}
    for item in items:
        before, after = item.change.before, item.change.after
        if same_node(before, after):
            continue
        yield msgspec.structs.replace(
            item.change,
            before=after and msgspec.structs.replace(after, at=None),
            after=before and msgspec.structs.replace(before, at=at.get(item.name), mode=before.mode & 0o777),
        )


def undo_entries(folder: Path) -> dict[tuple[str, str], Change]:
    """Return the changes that an undo would make, by root and name. Raises OSError, and ValueError for damaged data."""
    try:
        undo_set = data_model.decode((folder / "undo" / _CHANGES).read_bytes())
    except FileNotFoundError:
        return {}
    return {(root.root, change.name): change for root in undo_set.roots for change in root.changes}


def prepare(folder: Path, undo_set: ChangeSet) -> None:
    """Write *undo_set* to *folder*, to be published later. Raises OSError."""
    _remove(folder / _NEXT)
    (folder / _NEXT).mkdir(0o700)
    replace_file(folder / _NEXT / _PLANNED, data_model.encode(undo_set), sync=True)


def drop_prepared(folder: Path) -> None:
    """Remove a prepared undo set that was not published. Raises OSError."""
    _remove(folder / _NEXT)


def publish_empty(folder: Path, undo_set: ChangeSet) -> None:
    """Publish an undo set without content, unless an undo set exists already. Raises OSError."""
    if folder.name == UNDOING:
        publish(folder)
    elif not (folder / "undo").exists():
        prepare(folder, undo_set)
        (folder / _NEXT / _DATA).touch(0o600)
        (folder / _NEXT / _PLANNED).rename(folder / _NEXT / _CHANGES)
        publish(folder)


def save_displaced(folder: Path, sites: list[Site], steps: list[Step]) -> None:
    """Copy the content of every replaced or removed file into the prepared undo set. Raises OSError, HostError."""
    prepared = folder / _NEXT
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with closing_fd(os.open(prepared / _DATA, flags, 0o600)) as fd:
        end = 0
        for step in steps:
            if step.undo_at >= 0 and step.before is not None:
                _copy_displaced(fd, sites[step.place], step, step.before)
                end = max(end, step.undo_at + step.before.size)
        os.ftruncate(fd, end)  # the last file may end in a hole
        os.fsync(fd)
    (prepared / _PLANNED).rename(prepared / _CHANGES)


def publish(folder: Path) -> None:
    """Make the prepared undo set the current one, or end an undo. May be repeated after a kill. Raises OSError."""
    if folder.name == UNDOING:
        if not (folder / _NEXT).exists():  # else it was moved before the kill
            (folder.parent / "undo").rename(folder / _NEXT)
    elif (folder / _NEXT).exists():
        _remove(folder / "undo")
        (folder / _NEXT).rename(folder / "undo")


def remove_staging(site: Site, known: dict[str, Ident] | None, mode: int | None = None) -> None:
    """Remove a staging folder and its inodes. known: the inodes to remove, by slot; None to go by the names of slots.

    mode: the final mode of the parent folder, if x07 has set one. Raises OSError, and HostError if anything is left.
    """
    if site.staging_fd >= 0:
        names = os.listdir(site.staging_fd)  # noqa: PTH208 - it is a descriptor
        left = [name for name in names if not _remove_slot(site.staging_fd, name, known)]
        if left:
            shown = ", ".join(map(ascii, sorted(left)[:5]))
            why = f"{site.path(site.place.staging)!a} holds {shown}, which x07 did not create"
            raise HostError("cannot clean up after the changes", why, "Move these files away, then try again")
        if mode is not None and stat.S_IMODE(os.fstat(site.fd).st_mode) == mode:
            os.fchmod(site.fd, mode | _OPEN)  # else we could not remove anything from it
        os.rmdir(site.place.staging, dir_fd=site.fd)
    if mode is not None and stat.S_IMODE(os.fstat(site.fd).st_mode) == mode | _OPEN:
        os.fchmod(site.fd, mode)


def _copy_displaced(fd: int, site: Site, step: Step, before: Node) -> None:
    why = f"{site.path(step.name)!a} changed or was removed while the changes were applied"
    lost = HostError("cannot apply the changes", why, "Try again")
    if site.staging_fd < 0:
        raise lost
    with open_inode(site.staging_fd, displaced_slot(site, step)) as old:
        if old is None or old.ident != step.old or old.info.st_size != before.size:
            raise lost
        try:
            with closing_fd(old.open_file()) as source:
                copied = inode.copy(source, 0, before.size, fd, step.undo_at)
        except EOFError:
            raise lost from None
        if copied != before.sha256:
            raise lost


def _remove_slot(staging_fd: int, name: str, known: dict[str, Ident] | None) -> bool:
    with open_inode(staging_fd, name) as found:
        if found is None:
            return True
        if found.kind == "folder" and _SLOT.fullmatch(name):
            if found.names():
                return False
            os.rmdir(name, dir_fd=staging_fd)
            return True
        if not (_SLOT.fullmatch(name) if known is None else known.get(name) == found.ident):
            return False
        os.unlink(name, dir_fd=staging_fd)
        return True


def _remove(folder: Path) -> None:
    """Remove an undo set, which may be incomplete. `changes.json` goes first, so that a partial set is never used."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name != _CHANGES):
            path.unlink()  # including what a killed replace_file() left behind
        folder.rmdir()
