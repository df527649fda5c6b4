"""The folders and files of the host that a policy opens (roots), and packing them for the guest.

Roots are grouped into trees, which are packed within the limits of the policy and the user's settings. Links are not
followed, other file systems are not entered, and files are read once. Entries that are left out are reported and do not
exist for the program, except for empty folders above another root. A missing root in a writable folder is created.
"""

import errno
import fnmatch
import hashlib
import itertools
import os
import re
import shlex
import stat
import time
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, Literal

import msgspec

from x07_sandbox.channel.contents import parts
from x07_sandbox.channel.trees import (
    CHANGED,
    FOLDER_FLAGS,
    NAME_MAX,
    TRIES,
    Entry,
    Found,
    Kind,
    entry_of,
    file_record,
    segment_of,
    walk,
)
from x07_sandbox.errors import Flag, RefusedError, UsageError
from x07_sandbox.files.changes import DEPTH_MAX, Node, Rule, parent_folders
from x07_sandbox.files.inode import add_zeros
from x07_sandbox.host import beneath, settings
from x07_sandbox.host.paths import closing_fd, collapse_leading_slashes
from x07_sandbox.options import BY_FLAG, GRANTS, flag_for_file, size_text
from x07_sandbox.policy.guest import guest_path, is_below
from x07_sandbox.policy.model import FILE_BYTES, Policy

# x07's own limits, used if the policy has 0, as FILE_BYTES is.
ENTRIES: Final = 10_000
DEPTH: Final = 64
NUMBER_MAX: Final = (1 << 32) - 1  # of a policy's fields
_MODE: Final = 0o777
_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NAMES_MAX: Final = 5
# Names that usually hold secrets: left out everywhere, unless --reveal names them.
SECRETS: Final = (
    *(".env", ".env.*", ".netrc", ".npmrc", ".pypirc", ".git-credentials", ".aws", ".azure", ".gnupg", ".kube"),
    *(".ssh", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks"),
    *("*.keystore", "credentials.json", "service-account*.json"),
)

Reason = Literal[
    "hidden", "chosen", "secret", "link", "link-out", "large", "deep", "special", "other-disk", "unreadable", "changing"
]


class Root(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A folder or file of the host that the program may use.

    field: the policy field or flag that lists it. given: the path as listed. host, guest: its absolute paths.
    """

    field: str
    given: str
    host: str
    guest: str
    write: bool


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """A tree, or its part *sub*, mounted at *at* in the guest. missing: it is not on the host. single: it is a file.

    separate: whether it is always a tree of its own, whose content may be another one than that on the host.
    """

    sub: str
    at: str
    host: str
    write: bool
    missing: bool
    single: bool = False
    separate: bool = False


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    """The folder *host*, which is copied in one piece. only: the only file to copy from it; "" for all files."""

    host: str
    only: str
    mounts: tuple[Mount, ...]


def roots_of(policy: Policy, base: Path, start: str) -> tuple[Root, ...]:
    """Return a policy's roots, with relative paths below *base*. Roots that the plan refuses are left out."""
    if not policy.fs.enabled:
        return ()
    found = []
    for field, names in (("fs.read_roots", policy.fs.read_roots), ("fs.write_roots", policy.fs.write_roots)):
        for given in names:
            guest, _ = guest_path(given, start, deny_hidden=policy.fs.deny_hidden)
            if guest is not None:
                host = collapse_leading_slashes(os.path.normpath(base / given))
                found.append(Root(field=field, given=given, host=host, guest=guest, write=field == "fs.write_roots"))
    return tuple(found)


def trees_of(roots: Sequence[Root]) -> tuple[Tree, ...]:
    """Group the roots into trees. A root inside another one is copied once, and write access wins. Raises UsageError.

    No part of a path may be a link, because links can be redirected. A missing write root needs an existing parent
    folder.
    """
    states = {root.host: _look(root) for root in roots}
    tops: list[str] = []
    for host in sorted(states):
        if not any(is_below(host, top) and states[top] == "folder" for top in tops):
            tops.append(host)
    trees = []
    for top in tops:
        inner = [root for root in roots if root.host == top or (states[top] == "folder" and is_below(root.host, top))]
        base, only = (str(Path(top).parent), Path(top).name) if states[top] == "file" else (top, "")
        trees.append(Tree(host=base, only=only, mounts=_mounts(inner, base, states)))
    return tuple(trees)


def _mounts(roots: Iterable[Root], base: str, states: dict[str, str]) -> tuple[Mount, ...]:
    writable = [root.host for root in roots if root.write]
    found: dict[str, Mount] = {}
    for root in sorted(roots, key=lambda root: (len(PurePosixPath(root.guest).parts), root.guest)):
        write = any(root.host == host or is_below(root.host, host) for host in writable)
        sub = "" if root.host == base else os.path.relpath(root.host, base)
        state = states[root.host]
        found[root.guest] = Mount(
            sub=sub,
            at=root.guest,
            host=root.host,
            write=write,
            missing=state == "missing",
            single=state == "file",
            separate=root.field == "--git",
        )
    return tuple(found.values())


def mounts_of(trees: Sequence[Tree]) -> list[tuple[int, Mount]]:
    """Return the mounts and the indexes of their trees. Outer mounts come first, so that no mount covers another.

    A root that is visible through another mount gets no mount: a mount point cannot be replaced or removed (EBUSY).
    """
    every = [(number, mount) for number, tree in enumerate(trees) for mount in tree.mounts]
    every.sort(key=lambda one: (one[1].at.count("/"), one[1].at))
    return [one for one in every if not _is_shown(one, every)]


def _is_shown(one: tuple[int, Mount], every: Sequence[tuple[int, Mount]]) -> bool:
    number, mount = one
    around = [other for other in every if is_below(mount.at, other[1].at)]
    if not around:
        return False
    tree, outer = around[-1]
    there = f"{outer.sub}/{os.path.relpath(mount.at, outer.at)}".lstrip("/")
    return (tree, outer.write, there) == (number, mount.write, mount.sub)


def change_roots(trees: Sequence[Tree]) -> list[tuple[int, Mount]]:
    """Return the mounts whose changes are copied back, each host folder once, and the indexes of their trees."""
    found: list[tuple[int, Mount]] = []
    for number, tree in enumerate(trees):
        hosts: set[str] = set()
        for mount in sorted(tree.mounts, key=lambda mount: mount.host):
            if mount.write and not any(mount.host == host or is_below(mount.host, host) for host in hosts):
                hosts.add(mount.host)
                found.append((number, mount))
    return found


def _origin(root: Root) -> tuple[str, ...]:
    """Return the words for the flag or policy entry that names a root."""
    if root.field in BY_FLAG:
        return Flag(root.field), f" {root.given}"
    flag = next(row.flag for row in GRANTS if row.field == root.field)
    return f"{root.given} (", Flag(flag), f", or {root.field} in the policy)"


def _look(root: Root) -> str:
    """Return a root's kind: `folder`, `file` or `missing`. Raises UsageError for other kinds and paths with links."""
    out = root.field == "--out"
    what = ("cannot use ", *_origin(root)) if out else f"cannot copy {root.given} into the VM"
    path, mode = Path(root.host), 0
    for here in (*reversed(path.parents), path):
        try:
            mode = here.lstat().st_mode
        except FileNotFoundError as exc:
            if root.write and here == path:
                return "missing"
            raise UsageError(what, f"{here} does not exist", (f"Create {here}, or omit ", *_origin(root))) from exc
        except OSError as exc:
            why = f"{root.host} cannot be opened ({exc.strerror})"
            raise UsageError(what, why, "Check the path and its permissions") from exc
        if stat.S_ISLNK(mode):
            raise UsageError(what, f"{here} is a symbolic link", f"Use the path {os.path.realpath(root.host)}")
    if stat.S_ISREG(mode) and out:
        raise UsageError(what, f"{root.host} is a file", ("Use ", Flag("--out"), " with a folder"))
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UsageError(what, f"{root.host} is neither a file nor a folder", "Use the path of a file or folder")
    return "folder" if stat.S_ISDIR(mode) else "file"


class EntriesError(RefusedError):
    """A tree has more entries than the policy allows (fs.max_entries)."""

    code = "too-many-files"


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """The limits for copying.

    read_bytes, write_bytes: maximum size of one file.
    secrets, hide (--hide): patterns of names to leave out (fnmatch(3), ignoring case).
    reveal (--reveal): patterns of names to which secrets and hide do not apply.
    """

    deny_hidden: bool
    allow_symlinks: bool
    read_bytes: int
    write_bytes: int
    entries: int
    depth: int
    secrets: tuple[str, ...] = SECRETS
    hide: tuple[str, ...] = ()
    reveal: tuple[str, ...] = ()


def bounds_of(policy: Policy, hide: Sequence[str] = (), reveal: Sequence[str] = ()) -> Bounds:
    """Return the limits of a policy, with x07's defaults for 0. hide, reveal: patterns of names."""
    fs = policy.fs
    return Bounds(
        deny_hidden=fs.deny_hidden,
        allow_symlinks=fs.allow_symlinks,
        read_bytes=fs.max_read_bytes or FILE_BYTES,
        write_bytes=fs.max_write_bytes or FILE_BYTES,
        entries=fs.max_entries or ENTRIES,
        depth=min(fs.max_depth or DEPTH, DEPTH_MAX),
        hide=tuple(hide),
        reveal=tuple(reveal),
    )


class LeftOut(msgspec.Struct):
    """The entries that were left out for one reason.

    largest: the first few entries: the size in bytes, or the number of parts of the path, or 0; and the name. Those
    with the largest numbers come first.
    links: whether one entry is a folder that contains symbolic links, such as node_modules/.bin.
    """

    count: int = 0
    largest: list[tuple[int, str]] = msgspec.field(default_factory=list)
    links: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the first few entries."""
        return [name for _, name in self.largest]


class Skipped(msgspec.Struct, frozen=True):
    """One entry that was left out. most: its size in bytes or the number of parts in its path; 0 if neither matters."""

    reason: Reason
    most: int


class Copied(msgspec.Struct):
    """The outcome of packing a tree.

    nodes: writable entries by name.
    created: names in *nodes* that do not exist on the host.
    skipped: entries that were left out. An entry in both *nodes* and *skipped* is a folder above another tree.
    separate: mounts that the packed tree does not contain. The caller copies them separately.
    entries, size: number and total size of all entries.
    """

    nodes: dict[str, Node] = msgspec.field(default_factory=dict)
    skipped: dict[str, Skipped] = msgspec.field(default_factory=dict)
    created: set[str] = msgspec.field(default_factory=set)
    left_out: dict[Reason, LeftOut] = msgspec.field(default_factory=dict)
    separate: list[Mount] = msgspec.field(default_factory=list)
    entries: int = 0
    size: int = 0


def copy_tree(tree: Tree, bounds: Bounds, out: BinaryIO, most_bytes: int) -> Copied:
    """Write the stream of *tree* (channel/trees) to the seekable *out*. most_bytes: limit for all contents together.

    Raises EntriesError, RefusedError and UsageError, and OSError if *out* cannot be written.
    """
    walk = _Walk(tree, bounds, out, most_bytes)
    walk.run()
    return walk.copied


class _Walk:
    def __init__(self, tree: Tree, bounds: Bounds, out: BinaryIO, most_bytes: int) -> None:
        self.copied = Copied()
        self._tree = tree
        self._bounds = bounds
        self._out = out
        self._left = most_bytes
        self._device = 0
        self._written = [mount.sub for mount in tree.mounts if mount.write]
        self._subs = {mount.sub for mount in tree.mounts if mount.sub}
        self._separate = {mount.sub for mount in tree.mounts if mount.separate}
        self._ways = self._subs | parent_folders(self._subs)
        self._present: set[str] = set()  # those of _ways that are in the stream
        self._secret = _any_of(bounds.secrets)
        self._chosen = _any_of(bounds.hide)
        self._revealed = _any_of(bounds.reveal)

    def run(self) -> None:
        top = self._open()
        if top is not None:
            with closing_fd(top) as fd:
                self._device = os.fstat(fd).st_dev
                if self._tree.only:
                    only = os.fsencode(self._tree.only)
                    self._take(Found(only, os.stat(only, dir_fd=fd, follow_symlinks=False), -1, fd, only))
                else:
                    for found in walk(
                        fd, wanted=self._wanted, enters=lambda _: True, failed=self._failed, one_disk=True
                    ):
                        self._take(found)
        self._places()
        self._out.write(Entry(Kind.END, b"").encoded())

    def _places(self) -> None:
        """Create the mount points that the walk did not find: roots that are missing, and roots in folders left out."""
        mounts = sorted(self._tree.mounts, key=lambda mount: mount.sub)
        for mount in mounts:
            if mount.missing and self._may_create(mount):
                self._create(mount.sub)
        met = [mount.at for mount in mounts if mount.sub in {"", self._tree.only} or mount.sub in self._present]
        self.copied.separate = [mount for mount in mounts if mount.at not in met]
        for mount in self.copied.separate:
            if any(is_below(mount.at, at) for at in met):
                self._way_to(mount)

    def _may_create(self, mount: Mount) -> bool:
        folder, _, part = mount.sub.rpartition("/")
        if mount.sub in self._present or (folder and folder not in self._present) or self._why_skip(part, mount.sub):
            return False
        around = [other.sub for other in self._tree.mounts if other.write and is_below(mount.host, other.host)]
        return any(not sub or sub in self._present for sub in around)

    def _create(self, name: str) -> None:
        from x07_sandbox.files.checks import default_mode  # rarely needed

        mode = default_mode()
        self._out.write(Entry(Kind.FOLDER, os.fsencode(name), mode=mode, mtime_ns=time.time_ns()).encoded())
        self.copied.nodes[name] = Node(kind="folder", mode=mode)
        self.copied.created.add(name)
        self._present.add(name)

    def _way_to(self, mount: Mount) -> None:
        """Create the mount point of another tree in this one, and the empty folders above that mount point."""
        for name in [*sorted(parent_folders([mount.sub]), key=len), mount.sub]:
            if name in self._present:
                continue
            self._present.add(name)
            if name == mount.sub and mount.single:
                self._out.write(file_record(os.fsencode(name), b""))
                # Counted as present, so that the file may be removed together with its folder.
                self._count(name, Node(kind="file", mode=0o644, sha256=hashlib.sha256().hexdigest()))
            else:
                self._put(Entry(Kind.FOLDER, os.fsencode(name), mode=0o755, mtime_ns=time.time_ns()), name)

    def _open(self) -> int | None:
        host = self._tree.host
        try:
            return beneath.open_root(host)
        except OSError as exc:
            if isinstance(exc, FileNotFoundError) and any(mount.missing for mount in self._tree.mounts):
                return None
            fix = "Check the path and its permissions"
            raise UsageError(f"cannot copy {host} into the VM", exc.strerror or str(exc), fix) from exc

    def _wanted(self, folder_fd: int, raw: bytes) -> bool:
        name = os.fsdecode(raw)
        part = name.rpartition("/")[2]
        if name in self._separate:
            return False
        if not (reason := self._why_skip(part, name)):
            return True
        self._skip(reason, name, name.count("/") + 1 if reason == "deep" else 0)
        left = self.copied.left_out.get(reason)
        if left is not None and reason == "hidden" and not (self._bounds.allow_symlinks or left.links):
            left.links = _holds_links(folder_fd, part)
        return False

    def _failed(self, raw: bytes, exc: OSError) -> None:
        reason: Reason = "changing" if exc.errno in CHANGED else "unreadable"
        self._skip("other-disk" if exc.errno == errno.EXDEV else reason, os.fsdecode(raw))

    def _take(self, found: Found) -> None:
        """Pack an entry. Start again if it changes meanwhile."""
        name = os.fsdecode(found.name)
        if found.fd >= 0:
            self._put(entry_of(found.name, found.info, _MODE), name)
            return
        for left in reversed(range(TRIES)):
            start = self._out.tell()
            try:
                self._packed(found, name)
            except OSError as exc:
                if exc.filename is None:  # the error is about the stream
                    raise
                if exc.errno == errno.ENOENT and not self._tree.only:
                    return  # it was just removed
                if exc.errno not in CHANGED or not left:
                    self._failed(found.name, exc)
                    return
                self._out.seek(start)
                self._out.truncate()
            else:
                return

    def _packed(self, found: Found, name: str) -> None:
        info = os.stat(found.part, dir_fd=found.folder_fd, follow_symlinks=False)
        if stat.S_ISLNK(info.st_mode):
            self._link(found, name, info)
        elif stat.S_ISREG(info.st_mode):
            self._file(found, name)
        elif stat.S_ISDIR(info.st_mode):  # it has replaced another entry
            raise _changed(name)
        else:
            self._skip("special", name)

    def _why_skip(self, part: str, name: str) -> Reason | None:
        bounds = self._bounds
        if bounds.deny_hidden and part.startswith("."):
            return "hidden"
        lower = part.lower()
        revealed = self._revealed and self._revealed.match(lower)
        if self._chosen and self._chosen.match(lower) and not revealed:
            return "chosen"
        if self._secret and self._secret.match(lower) and not revealed:
            return "secret"
        if name.count("/") >= bounds.depth or len(os.fsencode(name)) > NAME_MAX:
            return "deep"
        return None

    def _link(self, found: Found, name: str, info: os.stat_result) -> None:
        target = found.target()
        if not link_stays_inside(name, os.fsdecode(target)):
            self._skip("link-out", name)
        elif not self._bounds.allow_symlinks:
            self._skip("link", name)
        else:
            self._put(entry_of(found.name, info, _MODE, target), name)

    def _file(self, found: Found, name: str) -> None:
        with closing_fd(found.open()) as fd:
            before = os.fstat(fd)
            if not stat.S_ISREG(before.st_mode):  # it was replaced after its stat
                raise _changed(name)
            if before.st_size > self._bounds.read_bytes:
                self._skip("large", name, before.st_size)
                return
            if before.st_dev != self._device:
                self._skip("other-disk", name)
                return
            try:
                sha256 = self._content(fd, entry_of(found.name, before, _MODE))
            except OSError as exc:
                if exc.errno in _FULL:  # of the stream. Other errors concern the file, such as EIO after it shrank
                    raise
                raise _changed(name) from exc
            if _state(before) != _state(os.fstat(fd)):
                raise _changed(name)
        self._count(name, Node(kind="file", mode=before.st_mode & _MODE, size=before.st_size, sha256=sha256))

    def _content(self, fd: int, entry: Entry) -> str:
        self._out.write(entry.encoded())
        digest = hashlib.sha256()
        for part in parts(fd, entry.size):
            if isinstance(part, int):
                add_zeros(digest, part)
            else:
                self._left -= len(part)
                if self._left < 0:
                    why = f"they are larger than {settings.COPY_IN_MAX_BYTES >> 20} MiB"
                    raise RefusedError(
                        "cannot copy the files into the VM", why, "Use smaller folders", code="files-too-large"
                    )
                digest.update(part)
            self._out.write(segment_of(part))
        return digest.hexdigest()

    def _put(self, entry: Entry, name: str) -> None:
        self._out.write(entry.encoded())
        if entry.kind is Kind.LINK:
            self._count(name, Node(kind="link", target=os.fsdecode(entry.target)))
        else:
            self._count(name, Node(kind="folder", mode=entry.mode))

    def _count(self, name: str, node: Node) -> None:
        copied = self.copied
        if name in self._ways:
            self._present.add(name)
        copied.entries += bool(name)  # the root itself does not count
        copied.size += node.size
        if copied.entries > self._bounds.entries:
            why = f"{self._tree.host} has more than {self._bounds.entries} files and folders (fs.max_entries)"
            raise EntriesError(
                "cannot copy the files into the VM", why, "Raise fs.max_entries, or use a smaller folder"
            )
        if self._is_written(name):
            copied.nodes[name] = node

    def _is_written(self, name: str) -> bool:
        return any(not sub or name == sub or name.startswith(f"{sub}/") for sub in self._written)

    def _skip(self, reason: Reason, name: str, size: int = 0) -> None:
        if self._tree.only:
            why = why_left_out(reason, self._bounds)
            what = f"cannot copy {self._tree.host}/{name} into the VM"
            larger = f"use {flag_for_file(size)}" if reason == "large" and size <= NUMBER_MAX else ""
            error = UsageError(what, why, f"Omit this file, or {larger or 'see docs/reference/policy.md'}")
            raise error.caused_by(FIELDS[reason], value_for(reason, size, self._bounds))
        self.copied.skipped[name] = Skipped(reason, size)
        if name in self._subs:
            return  # it is copied separately
        left = self.copied.left_out.setdefault(reason, LeftOut())
        left.count += 1
        left.largest = sorted([*left.largest, (size, name)], key=lambda one: -one[0])[:_NAMES_MAX]


_WORDS: Final[dict[Reason, str]] = {
    "hidden": "hidden name, fs.deny_hidden",
    "chosen": "hidden by --hide",
    "secret": "looks like a secret",
    "link": "symbolic link, fs.allow_symlinks",
    "link-out": "symbolic link to a path outside the folder",
    "deep": "deeper than fs.max_depth",
    "special": "not a file, folder or link",
    "other-disk": "on another file system",
    "unreadable": "not readable",
    "changing": "changes while it is read",
}
FIELDS: Final[dict[Reason, Rule]] = {
    "hidden": "fs.deny_hidden",
    "chosen": "hide",
    "secret": "secrets",
    "link": "fs.allow_symlinks",
    "link-out": "fs.allow_symlinks",
    "large": "fs.max_read_bytes",
    "deep": "fs.max_depth",
    **dict.fromkeys(("special", "other-disk", "unreadable", "changing"), "fs.read_roots"),
}
"""The policy field of each reason; `secrets` and `hide` (for --hide) are no fields."""


def why_left_out(reason: Reason, bounds: Bounds) -> str:
    """Return why entries were left out. For --hide, the text contains the patterns, quoted for a shell."""
    if reason == "large":
        return f"larger than {size_text(bounds.read_bytes)}, fs.max_read_bytes"
    patterns = map(shlex.quote, bounds.hide if reason == "chosen" else ())
    return " ".join([_WORDS[reason], *patterns])


def value_for(reason: Reason, most: int, bounds: Bounds) -> int | bool | None:
    """Return the value of the policy field that would allow an entry, or None if no value would. most: see Skipped."""
    if reason == "hidden":
        return False
    if reason == "link":
        return True
    if reason == "large" and most <= NUMBER_MAX:
        return most
    if reason == "deep" and bounds.depth < min(most, DEPTH_MAX):
        return min(most, DEPTH_MAX)
    return None


def _holds_links(folder: int, part: str) -> bool:
    """Return whether *part* is a folder that has symbolic links among its first entries."""
    try:
        fd = os.open(part, FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=folder)
    except OSError:
        return False
    with closing_fd(fd), os.scandir(fd) as entries:
        return any(entry.is_symlink() for entry in itertools.islice(entries, 100))


def link_stays_inside(name: str, target: str) -> bool:
    """Return whether the link *name* leads to a name below the same root. Only the text is checked.

    The target may start with `..` parts, but may not contain `..` later, because a part before it may be a link.
    """
    way = [part for part in target.split("/") if part not in {"", "."}]
    up = next((count for count, part in enumerate(way) if part != ".."), len(way))
    return bool(name) and not target.startswith("/") and up <= name.count("/") and ".." not in way[up:]


def _any_of(patterns: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(fnmatch.translate(pattern.lower()) for pattern in patterns)) if patterns else None


def _changed(name: str) -> OSError:
    return OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)


def _state(info: os.stat_result) -> tuple[int, ...]:
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
