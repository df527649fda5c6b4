"""A tree of the host's, read once and packed for the guest, within what the policy and the host's owner allow.

No link is followed, no other file system entered, nothing read twice: the digests are of the very bytes that travel.
What may not travel is left out and told. For the program it is not there, but for empty folders on the way to a root
below it, which is a tree of its own. A root that is missing in a folder that may be changed is made, for the program.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import itertools
import os
import posixpath
import re
import shlex
import stat
import time
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from x07_sandbox.channel.contents import parts
from x07_sandbox.channel.trees import NAME_MAX, Entry, Kind, segment
from x07_sandbox.errors import RefusedError, UsageError
from x07_sandbox.files.changes import Node, parent_folders
from x07_sandbox.files.contents import add_zeros
from x07_sandbox.files.roots import Mount
from x07_sandbox.host import beneath
from x07_sandbox.plan.guest_paths import OUT, inside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO

    from x07_sandbox.files.changes import Rule
    from x07_sandbox.files.roots import Tree
    from x07_sandbox.policy.model import Policy

# What X07's runtime takes where a policy says 0.
READ_BYTES: Final = 16 << 20
WRITE_BYTES: Final = 16 << 20
ENTRIES: Final = 10_000
DEPTH: Final = 64
DEPTH_MAX: Final = 256  # one open folder for each
NUMBER_MAX: Final = (1 << 32) - 1  # of a policy's fields
_TRIES: Final = 3
# What is said of a name that has become something else since it was looked at: nothing, a link, a folder, a socket.
_CHANGED: Final = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EINVAL, errno.ENXIO}
_TOLD: Final = 5
_LOOKED_AT: Final = 1000
# Names under which people keep secrets: left out wherever they lie, unless the host's owner says otherwise.
SECRETS: Final = (
    *(".env", ".env.*", ".netrc", ".npmrc", ".pypirc", ".git-credentials", ".aws", ".azure", ".gnupg", ".kube"),
    *(".ssh", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks"),
    *("*.keystore", "credentials.json", "service-account*.json"),
)

Reason = Literal[
    "hidden", "chosen", "secret", "link", "link-out", "large", "deep", "special", "other-disk", "unreadable", "changing"
]


class EntriesError(RefusedError):
    """A tree has more entries than a policy lets go in (fs.max_entries)."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What may travel. read_bytes, write_bytes: of one file.

    secrets, hide: patterns (fnmatch(3)) of names that stay, in any case of letters, unless one of reveal matches them
    too; hide: those of --hide.
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
    """Those of a policy; 0 stands for X07's defaults. hide, reveal: patterns of names."""
    fs = policy.fs
    return Bounds(
        deny_hidden=fs.deny_hidden,
        allow_symlinks=fs.allow_symlinks,
        read_bytes=fs.max_read_bytes or READ_BYTES,
        write_bytes=fs.max_write_bytes or WRITE_BYTES,
        entries=fs.max_entries or ENTRIES,
        depth=min(fs.max_depth or DEPTH, DEPTH_MAX),
        hide=tuple(hide),
        reveal=tuple(reveal),
    )


class LeftOut(msgspec.Struct):
    """What was left out for one reason. names: the first few. most: the largest, in bytes, or the deepest, in parts.

    links: whether one is a folder with links in it, which stay out even if it is let in.
    """

    count: int = 0
    names: list[str] = msgspec.field(default_factory=list)
    most: int = 0
    links: bool = False


class Skipped(msgspec.Struct, frozen=True):
    """One thing that was left out. most: as LeftOut has it, 0 where that says nothing."""

    reason: Reason
    most: int


class Copied(msgspec.Struct):
    """What was packed. entries, size: of all.

    nodes: of what the program may change, by the name in its tree; made: those that are not there. stayed: what was
    left out of that, with all below it. A name in both is a folder on the way to another tree's place. apart: mounts
    for which the tree has nothing, since they are missing or were left out: they travel alone.
    """

    nodes: dict[str, Node] = msgspec.field(default_factory=dict)
    skipped: dict[str, Skipped] = msgspec.field(default_factory=dict)
    created: set[str] = msgspec.field(default_factory=set)
    left_out: dict[Reason, LeftOut] = msgspec.field(default_factory=dict)
    separate: list[Mount] = msgspec.field(default_factory=list)
    entries: int = 0
    size: int = 0


def copy_tree(tree: Tree, bounds: Bounds, out: BinaryIO, most_bytes: int) -> Copied:
    """Write the stream of *tree* (channel/trees) to the seekable *out*. most_bytes: all contents together.

    Raises EntriesError, RefusedError, UsageError, OSError (of *out*).
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
        self._written = [mount.sub for mount in tree.mounts if mount.write]
        self._subs = {mount.sub for mount in tree.mounts if mount.sub}
        self._ways = self._subs | parent_folders(self._subs)
        self._there: set[str] = set()  # of these ways
        self._secret = _one_of(bounds.secrets)
        self._chosen = _one_of(bounds.hide)
        self._revealed = _one_of(bounds.reveal)

    def run(self) -> None:
        fd = self._open()
        if fd is not None:
            try:
                info = os.fstat(fd)
                if self._tree.only:
                    only = self._tree.only
                    self._tried(lambda: self._file(fd, only, only, info.st_dev), only)
                else:
                    self._put(Entry(Kind.FOLDER, b"", mode=info.st_mode & 0o777, mtime_ns=info.st_mtime_ns), "")
                    self._folders(fd, info.st_dev)
            finally:
                os.close(fd)
        self._places()
        self._out.write(Entry(Kind.END, b"").encoded())

    def _places(self) -> None:
        """Make places for mounts of which nothing was met: what is missing, and what was left out."""
        mounts = sorted(self._tree.mounts, key=lambda mount: mount.sub)
        for mount in mounts:
            if mount.missing and self._may_make(mount):
                self._make(mount.sub)
        met = [mount.at for mount in mounts if mount.sub in {"", self._tree.only} or mount.sub in self._there]
        self.copied.separate = [mount for mount in mounts if mount.at not in met]
        for mount in self.copied.separate:
            if any(inside(mount.at, at) for at in met):
                self._way_to(mount)

    def _may_make(self, mount: Mount) -> bool:
        """Whether it lies in a write root: there it is replaced and removed as anything, and is one wherever shown."""
        folder, _, part = mount.sub.rpartition("/")
        if mount.sub in self._there or (folder and folder not in self._there) or self._stays(part, mount.sub):
            return False
        around = [other.sub for other in self._tree.mounts if other.write and inside(mount.host, other.host)]
        return any(not sub or sub in self._there for sub in around)

    def _make(self, name: str) -> None:
        from x07_sandbox.files.checks import default_mode  # seldom needed

        mode = default_mode()
        self._out.write(Entry(Kind.FOLDER, os.fsencode(name), mode=mode, mtime_ns=time.time_ns()).encoded())
        self.copied.nodes[name] = Node(kind="folder", mode=mode)
        self.copied.created.add(name)
        self._there.add(name)

    def _way_to(self, mount: Mount) -> None:
        """The empty folders on the way to another tree's place in this one, and what it will lie over."""
        for name in [*sorted(parent_folders([mount.sub]), key=len), mount.sub]:  # outer ones first
            if name in self._there:
                continue
            self._there.add(name)
            if name == mount.sub and mount.single:
                self._out.write(Entry(Kind.FILE, os.fsencode(name), mode=0o644).encoded())
                # As of a folder, it is known here that it was there: it may go with the folder that it lies in.
                self._count(name, Node(kind="file", mode=0o644, sha256=hashlib.sha256().hexdigest()))
            else:
                self._put(Entry(Kind.FOLDER, os.fsencode(name), mode=0o755, mtime_ns=time.time_ns()), name)

    def _open(self) -> int | None:
        """The folder of the tree; None for a write root that is not there yet. No part of the way may be a link."""
        host = self._tree.host
        try:
            return beneath.open_root(host)
        except OSError as exc:
            if isinstance(exc, FileNotFoundError) and any(mount.missing for mount in self._tree.mounts):
                return None
            fix = "Name a folder that stays there, and that you may read"
            raise UsageError(f"cannot give the program {host}", exc.strerror or str(exc), fix) from exc

    def _folders(self, top: int, device: int) -> None:
        """All below *top*, folders before what is in them. Their descriptors are open only while they are walked."""
        stack: list[tuple[int, str, Iterator[str]]] = [(top, "", iter(self._names(top, "")))]
        try:
            while stack:
                fd, prefix, names = stack[-1]
                name = next(names, None)
                if name is None:
                    stack.pop()
                    if fd != top:
                        os.close(fd)
                    continue
                inner = self._entry(fd, name, f"{prefix}{name}", device)
                if inner is not None:
                    stack.append((inner, f"{prefix}{name}/", iter(self._names(inner, f"{prefix}{name}"))))
        finally:
            for fd, _, _ in stack:
                if fd != top:
                    os.close(fd)

    def _names(self, fd: int, name: str) -> list[str]:
        try:
            return sorted(os.listdir(fd))
        except FileNotFoundError:
            return []  # it was removed meanwhile
        except OSError:
            self._leave("unreadable", name)
            return []

    def _entry(self, folder: int, part: str, name: str, device: int) -> int | None:
        """Pack one entry; the descriptor of a folder whose entries follow."""
        if reason := self._stays(part, name):
            self._leave(reason, name, name.count("/") + 1 if reason == "deep" else 0)
            left = self.copied.left_out.get(reason)
            if left is not None and reason == "hidden" and not (self._bounds.allow_symlinks or left.links):
                left.links = _holds_links(folder, part, name)
            return None
        return self._tried(lambda: self._packed(folder, part, name, device), name)

    def _tried(self, pack: Callable[[], int | None], name: str) -> int | None:
        """Pack one entry, anew where it became something else meanwhile."""
        for _ in range(_TRIES):
            try:
                return pack()
            except OSError as exc:
                if exc.filename is None:  # of the stream that is written
                    raise
                if exc.errno == errno.ENOENT and not self._tree.only:
                    return None  # it went away meanwhile
                if exc.errno not in _CHANGED:
                    self._leave("unreadable", name)
                    return None
        self._leave("changing", name)
        return None

    def _packed(self, folder: int, part: str, name: str, device: int) -> int | None:
        info = os.stat(part, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode):
            return self._folder(folder, part, name, device)
        if stat.S_ISLNK(info.st_mode):
            self._link(folder, part, name, info.st_mtime_ns)
        elif stat.S_ISREG(info.st_mode):
            self._file(folder, part, name, device)
        else:
            self._leave("special", name)
        return None

    def _stays(self, part: str, name: str) -> Reason | None:
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

    def _folder(self, folder: int, part: str, name: str, device: int) -> int | None:
        fd = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        info = os.fstat(fd)
        if info.st_dev != device:
            os.close(fd)
            self._leave("other-disk", name)
            return None
        mode, mtime_ns = info.st_mode & 0o777, info.st_mtime_ns
        self._put(Entry(Kind.FOLDER, os.fsencode(name), mode=mode, mtime_ns=mtime_ns), name)
        return fd

    def _link(self, folder: int, part: str, name: str, mtime_ns: int) -> None:
        target = os.readlink(part, dir_fd=folder)
        if not link_stays_inside(name, target):
            self._leave("link-out", name)
            return
        if not self._bounds.allow_symlinks:
            self._leave("link", name)
            return
        self._put(Entry(Kind.LINK, os.fsencode(name), mtime_ns=mtime_ns, target=os.fsencode(target)), name)

    def _file(self, folder: int, part: str, name: str, device: int) -> None:
        """A regular file, read anew where it changed meanwhile."""
        for _ in range(_TRIES):
            start = self._out.tell()
            fd = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=folder)
            try:
                before = os.fstat(fd)
                if not stat.S_ISREG(before.st_mode):  # as it was when it was looked at
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), part)
                if before.st_size > self._bounds.read_bytes:
                    self._leave("large", name, before.st_size)
                    return
                if before.st_dev != device:
                    self._leave("other-disk", name)
                    return
                try:
                    sha256 = self._content(fd, before, name)
                except OSError:  # it became shorter
                    sha256 = None
                after = os.fstat(fd)
            finally:
                os.close(fd)
            if sha256 is not None and _state(before) == _state(after):
                node = Node(kind="file", mode=before.st_mode & 0o777, size=before.st_size, sha256=sha256)
                self._count(name, node)
                return
            self._out.seek(start)
            self._out.truncate()
        self._leave("changing", name)

    def _content(self, fd: int, info: os.stat_result, name: str) -> str:
        size = info.st_size
        entry = Entry(Kind.FILE, os.fsencode(name), mode=info.st_mode & 0o777, mtime_ns=info.st_mtime_ns, size=size)
        self._out.write(entry.encoded())
        digest = hashlib.sha256()
        for part in parts(fd, size):
            if isinstance(part, int):
                self._out.write(segment(part, hole=True))
                add_zeros(digest, part)
            else:
                self._left -= len(part)
                if self._left < 0:
                    why = "what it names has more bytes than a machine takes"
                    raise RefusedError("the program cannot be given its files", why, "Name smaller roots")
                self._out.write(segment(len(part)) + part)
                digest.update(part)
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
            self._there.add(name)
        copied.entries += bool(name)  # the root itself is none
        copied.size += node.size
        if copied.entries > self._bounds.entries:
            why = f"{self._tree.host} has more than {self._bounds.entries} entries (fs.max_entries)"
            raise EntriesError("the program cannot be given its files", why, "Raise fs.max_entries, or name less")
        if self._is_written(name):
            copied.nodes[name] = node

    def _is_written(self, name: str) -> bool:
        return any(not sub or name == sub or name.startswith(f"{sub}/") for sub in self._written)

    def _has_places(self, name: str) -> bool:
        """Whether a root of that name lies wherever one around it would have shown it, or where --out always does."""
        mounts = self._tree.mounts
        places = {mount.at for mount in mounts if mount.sub == name}
        around = [mount for mount in mounts if not mount.sub or name.startswith(f"{mount.sub}/")]
        printable = {posixpath.join(mount.at, posixpath.relpath(name, mount.sub or ".")) for mount in around}
        return OUT in places or printable <= places

    def _leave(self, reason: Reason, name: str, size: int = 0) -> None:
        if self._tree.only:
            why = why_left_out(reason, self._bounds)
            error = UsageError(f"cannot give the program {name}", why, "Leave it out, or see docs/reference/policy.md")
            raise error.by(FIELDS[reason], value_for(reason, size, self._bounds))
        if self._is_written(name):
            self.copied.skipped[name] = Skipped(reason, size)
        if name in self._subs and self._has_places(name):
            return  # it travels by itself
        left = self.copied.left_out.setdefault(reason, LeftOut())
        left.count += 1
        left.most = max(left.most, size)
        if len(left.names) < _TOLD:
            left.names.append(name)


_WORDS: Final[dict[Reason, str]] = {
    "hidden": "its name begins with a dot (fs.deny_hidden)",
    "chosen": "hidden by --hide",
    "secret": "its name looks like a secret's",
    "link": "it is a link (fs.allow_symlinks)",
    "link-out": "it is a link that leads out of its root",
    "large": "it is larger than fs.max_read_bytes",
    "deep": "it lies deeper than fs.max_depth",
    "special": "it is neither a file nor a folder nor a link",
    "other-disk": "it is on another file system",
    "unreadable": "it may not be read",
    "changing": "it changes while it is read",
}
FIELDS: Final[dict[Reason, Rule]] = {
    "hidden": "fs.deny_hidden",
    "chosen": "secrets",
    "secret": "secrets",
    "link": "fs.allow_symlinks",
    "link-out": "fs.allow_symlinks",
    "large": "fs.max_read_bytes",
    "deep": "fs.max_depth",
    **dict.fromkeys(("special", "other-disk", "unreadable", "changing"), "fs.read_roots"),
}
"""Under which field of a policy each is told; `secrets` is none."""


def why_left_out(reason: Reason, bounds: Bounds) -> str:
    """Why something was left out, as a clause; of what --hide names with its patterns, as a shell takes them."""
    patterns = map(shlex.quote, bounds.hide if reason == "chosen" else ())
    return " ".join([_WORDS[reason], *patterns])


def value_for(reason: Reason, most: int, bounds: Bounds) -> int | bool | None:
    """The value of that field that lets in what was left out; None where none does. most: as LeftOut has it."""
    if reason == "hidden":
        return False
    if reason == "link":
        return True
    if reason == "large" and most <= NUMBER_MAX:
        return most
    if reason == "deep" and bounds.depth < min(most, DEPTH_MAX):
        return min(most, DEPTH_MAX)
    return None


def link_stays_inside(name: str, target: str) -> bool:
    """Whether a link of that name below a root leads to a place below the same root. Only names are looked at.

    It may go up, from where it lies, and then down; up again not, since a part of the way down may be a link itself.
    """
    way = [part for part in target.split("/") if part not in {"", "."}]
    up = next((count for count, part in enumerate(way) if part != ".."), len(way))
    return bool(name) and not target.startswith("/") and up <= name.count("/") and ".." not in way[up:]


def _holds_links(folder: int, part: str, name: str) -> bool:
    """Whether links that stay inside are among the first entries of the folder *part*; of what is none, false."""
    try:
        fd = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return False
    try:
        with os.scandir(fd) as entries:
            return any(
                link_stays_inside(f"{name}/{entry.name}", os.readlink(entry.name, dir_fd=fd))
                for entry in itertools.islice(entries, _LOOKED_AT)
                if entry.is_symlink()
            )
    except OSError:
        return False
    finally:
        os.close(fd)


def _one_of(patterns: Sequence[str]) -> re.Pattern[str] | None:
    """What matches a name in lower case that one of them does; None for no pattern."""
    return re.compile("|".join(fnmatch.translate(pattern.lower()) for pattern in patterns)) if patterns else None


def _state(info: os.stat_result) -> tuple[int, ...]:
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
