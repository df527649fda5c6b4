"""A git repository of the host: its history for a guest, and the commits that come back.

The repository and the guest may both be hostile. So git never reads the repository's own configuration, and runs only
in a jail (jail/programs), over a git directory that is made here: HEAD, branches and tags are copied as text, and only
the objects are the repository's own. A guest gets such a directory too. It sends back files, from which branches are
read as text, and git packs the new objects into a bundle (gitformat-bundle(5)) and checks them. Only a pack and files
below refs/x07 go into the repository (gitrepository-layout(5)).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, NamedTuple, Self

from x07_sandbox.channel.contents import parts
from x07_sandbox.channel.trees import FOLDER_FLAGS, Entry, Kind, file_record, open_folder, segment_of, walk
from x07_sandbox.errors import Command, Flag, HostError, RefusedError, SandboxError, Text, UsageError, escaped
from x07_sandbox.files.changes import Commit, Commits, Node, parent_folders
from x07_sandbox.host import beneath
from x07_sandbox.host.linux import copy_range, memory_file
from x07_sandbox.host.paths import closing_fd, find_program
from x07_sandbox.host.settings import COPY_IN_MAX_BYTES, MIB
from x07_sandbox.host.waiting import write_all
from x07_sandbox.jail.programs import Folder, run_jailed

if TYPE_CHECKING:
    from x07_sandbox.files.incoming import ReportedEntry

BUNDLE: Final = "commits.bundle"
BUNDLE_MAX_BYTES: Final = 256 * MIB
_TEXT_MAX: Final = 64 * MIB
_REF_MAX: Final = 1024
_PART_MAX: Final = 255
_REFS_MAX: Final = 100_000
_BRANCHES_MAX: Final = 100  # from a guest
_LISTED: Final = 1000
_FIELD_MAX: Final = 200
_TIMEOUT_S: Final = 120
_HEADS: Final = "refs/heads/"
_TAGS: Final = "refs/tags/"
_ID: Final = re.compile(r"[0-9a-f]{40}", re.ASCII)
_BRANCH: Final = re.compile(r"ref: (refs/heads/.+)", re.ASCII)
# git reads these settings from this file only, which may include no other for them (gitrepository-layout(5)).
_FORMATS: Final = re.compile(r"(?:objectformat|refstorage)\s*=\s*(?!\"?(?:sha1|files)\b)", re.ASCII | re.IGNORECASE)
_WHY_FORMAT: Final = "its objects or branches have another format (SHA-256, reftable)"
_ID_LINE: Final = re.compile(r"^[0-9a-f]{40}\n", re.ASCII | re.MULTILINE)
_FORMAT: Final = "--format=%H%x00%S%x00%<(100,trunc)%an%x00%<(200,trunc)%s"  # git cuts what is longer
_FSCK: Final = ("To check the repository: ", Command("git fsck"))
_OBJECT: Final = re.compile(r"objects/(?:[0-9a-f]{2}/[0-9a-f]{38}|pack/pack-[0-9a-f]{40}\.(?:pack|idx))", re.ASCII)
_NOT_IN_NAMES: Final = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|\.lock(?:/|$)|(?:^|/)\.|[./]$")
_FILTER: Final = re.compile(rb"^[^#\n]*[ \t]filter=([^ \t\r\n]+)", re.MULTILINE)
_GITLINK: Final = "160000"
_EMPTY_FILE: Final = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # a file that git add -N has added, and not stored
_OURS: Final = b"""[core]
	repositoryformatversion = 0
	bare = false
	sharedRepository = 0666
	bigFileThreshold = 16m
	packedGitWindowSize = 64m
	packedGitLimit = 512m
"""
_FOLDERS: Final = ("objects", "objects/info", "objects/pack", "refs", "refs/heads", "refs/tags")
_GUESTS: Final = b"""[core]
	repositoryformatversion = 0
	filemode = true
	bare = false
	logallrefupdates = true
[gc]
	auto = 0
[maintenance]
	auto = false
[user]
	name = x07-sandbox
	email = x07-sandbox@localhost
"""


class History(NamedTuple):
    """What a guest got of a repository. head: its commit, or "". refs: objects of branches and tags, by full name.

    store: a folder with the objects.
    """

    head: str
    refs: dict[str, str]
    store: Path

    @property
    def ids(self) -> list[str]:
        """The objects whose history the guest got."""
        return list(dict.fromkeys(filter(None, (self.head, *self.refs.values()))))


class Repository:
    """The repository whose work tree is the folder *root*. A context manager."""

    def __init__(self, root: str) -> None:
        """Open the repository. Raises UsageError or RefusedError for one that cannot be used."""
        self.root = root
        self._what = ("cannot use ", Flag("--git"), f" with {escaped(root)}")
        try:
            self._fd = beneath.open_root(f"{root}/.git")
        except OSError as exc:
            raise self._not_opened(exc) from exc
        try:
            self._check()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _not_opened(self, exc: OSError) -> SandboxError:
        if exc.errno == errno.ENOENT:
            fix = ("Use the top folder of a git repository, or omit ", Flag("--git"))
            return UsageError(self._what, "it contains no .git", fix)
        if (real := os.path.realpath(self.root)) != self.root:
            return UsageError(self._what, "its path contains a symbolic link", f"Use the path {escaped(real)}")
        if exc.errno in {errno.ENOTDIR, errno.ELOOP}:
            return self._refused("it is a worktree or a submodule: its .git is not a folder", "git clone --no-local")
        return UsageError(self._what, f".git cannot be opened ({exc.strerror})", "Check its permissions")

    def _refused(self, why: str, command: str = "") -> RefusedError:
        fix: Text = ("Omit ", Flag("--git"))
        if command:
            fix = ("To make a clone that can be used: ", Command(f"{command} {escaped(self.root)} CLONE"))
        return RefusedError(self._what, why, fix, code="git-unsupported")

    def _check(self) -> None:
        try:
            with closing_fd(self._folder("objects")) as fd:
                mode = os.fstat(fd).st_mode
        except FileNotFoundError as exc:
            raise self._refused("its .git has no objects") from exc
        if os.geteuid() == 0 and mode & 0o005 != 0o005:  # noqa: PLR2004 - listing and entering, for others
            raise self._refused("git runs under another uid, which may not read .git/objects (chmod -R o+rX)")
        if _FORMATS.search((self._read("config") or b"").decode("utf-8", "replace")):
            raise self._refused(_WHY_FORMAT)
        if self._exists("commondir"):
            raise self._refused("it is a worktree of another repository", "git clone --no-local")
        if self._exists("objects/info/alternates") or self._exists("objects/info/http-alternates"):
            raise self._refused("it uses objects of another repository (alternates)", "git clone --no-local")
        with contextlib.suppress(FileNotFoundError), closing_fd(self._folder("objects/pack")) as pack:
            if any(name.endswith(".promisor") for name in os.listdir(pack)):  # noqa: PTH208 - of a descriptor
                raise self._refused("it is a partial clone")

    # reading

    def _folder(self, name: str) -> int:
        """Open a folder. Raises FileNotFoundError, RefusedError."""
        try:
            return open_folder(self._fd, os.fsencode(name))
        except FileNotFoundError:
            raise
        except OSError as exc:
            raise self._refused(f".git/{name} cannot be opened ({exc.strerror})") from exc

    def _exists(self, name: str) -> bool:
        try:
            os.close(beneath.look(self._fd, name))
        except OSError as exc:
            return exc.errno not in {errno.ENOENT, errno.ENOTDIR}
        return True

    def _read(self, name: str, most: int = _TEXT_MAX) -> bytes | None:
        """Return the content of a file, or None if there is none. Raises RefusedError."""
        try:
            with closing_fd(beneath.open_file(self._fd, name)) as fd:
                info = os.fstat(fd)
                data = os.pread(fd, most + 1, 0) if stat.S_ISREG(info.st_mode) else b""
                if not stat.S_ISREG(info.st_mode) or len(data) > most:
                    raise self._refused(f".git/{name} is no file, or larger than {most} bytes")
                return data
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise self._refused(f".git/{name} cannot be read ({exc.strerror})") from exc

    def _refs(self) -> dict[str, str]:
        """Return the objects of all branches and tags by their full names."""
        found = self._packed()
        for folder in (_HEADS, _TAGS):
            with contextlib.suppress(FileNotFoundError), closing_fd(self._folder(folder.rstrip("/"))) as top:
                for entry in walk(top, failed=lambda _name, _exc: None):
                    name = folder + os.fsdecode(entry.name)
                    if not stat.S_ISREG(entry.info.st_mode):
                        continue
                    text = (self._read(name, _REF_MAX) or b"").decode("ascii", "replace").strip()
                    if is_ref_name(name) and _ID.fullmatch(text) and len(found) < _REFS_MAX:
                        found[name] = text
        return found

    def _head(self, refs: Mapping[str, str]) -> tuple[str, str]:
        """Return the text of HEAD, and its commit, or "" if it has none."""
        text = (self._read("HEAD", _REF_MAX) or b"").decode("utf-8", "replace").strip()
        branch = _BRANCH.fullmatch(text)
        if branch is not None and is_ref_name(branch[1]):
            return text, refs.get(branch[1], "")
        if not _ID.fullmatch(text):
            raise self._refused("its HEAD is neither a branch nor a commit")
        return text, text

    # to a guest

    def copy_history(self, store: Path, out: IO[bytes], is_left_out: Callable[[str], bool]) -> History:
        """Write the stream (channel/trees) of a guest's `.git` to *out*. Raises SandboxError, OSError.

        It has the history of HEAD, the branches and tags in it, and the index. store: a new folder for the objects.
        is_left_out: whether a file of the work tree exists, and is not in the guest's copy: it then gets the flag
        skip-worktree, so that git does not take it for deleted.
        """
        refs = self._refs()
        text, head = self._head(refs)
        with self._git(store.parent, refs, head or text) as git:
            if shallow := _ID_LINE.findall((self._read("shallow") or b"").decode("ascii", "replace")):
                git.write("shallow", "".join(shallow).encode())
            merged = git.rows("\n", "for-each-ref", "--merged=HEAD", "--format=%(refname)") if head else []
            history = History(head, {name: refs[name] for [name] in merged if name in refs}, store)
            objects = self._copy_index(git, is_left_out)
            texts = {"HEAD": f"{text}\n".encode(), "config": _GUESTS, "packed-refs": _packed(history.refs)}
            made = ["index"] if objects is not None else []
            made += ["shallow"] if shallow else []
            if wanted := history.ids + (objects or []):
                name = git.pack(
                    "pack-objects", "--revs", "-q", "/git/objects/pack/pack", stdin="\n".join(wanted).encode()
                )
                made += [f"{name}.pack", f"{name}.idx"]
                texts[f"{name}.keep"] = b""  # so that git gc does not pack it again
            for name in ("", *_FOLDERS):
                out.write(Entry(Kind.FOLDER, name.encode(), mode=0o755).encoded())
            out.writelines(file_record(name.encode(), data) for name, data in texts.items())
            for name in made:
                with git.opened(name) as fd:
                    size = os.fstat(fd).st_size
                    out.write(Entry(Kind.FILE, name.encode(), mode=0o644, size=size).encoded())
                    out.writelines(map(segment_of, parts(fd, size)))
            out.write(Entry(Kind.END, b"").encoded())
            git.keep_objects(store)
        return history

    def _copy_index(self, git: _Git, is_left_out: Callable[[str], bool]) -> list[str] | None:
        """Copy the index, if there is one, and return the objects in it.

        Raises RefusedError for files that a guest cannot have.
        """
        if (index := self._read("index")) is None:
            return None
        if any(name.startswith("sharedindex.") for name in os.listdir(self._fd)):  # noqa: PTH208 - of a descriptor
            raise self._refused("its index is split; git update-index --no-split-index joins it")
        git.write("index", index)
        rows = git.rows(
            "\0", "ls-files", "-z", "--format=%(objectmode) %(objectname) %(stage) %(path)", between=" ", count=4
        )
        for mode, _, _, name in rows:
            if mode == _GITLINK:
                raise self._refused(f"it has a submodule, {escaped(name)}")
        attributes = [oid for _, oid, _, name in rows if name.rpartition("/")[2] == ".gitattributes"]
        texts = git.read("cat-file", "--batch", stdin="\n".join(attributes)) if attributes else b""
        if found := _FILTER.search(texts + b"\n" + (self._read("info/attributes") or b"")):
            used = escaped(found[1].decode("utf-8", "replace"))
            raise self._refused(f"its files pass through the filter {used} (.gitattributes), as with Git LFS")
        if absent := [name for _, _, stage, name in rows if stage == "0" and is_left_out(name)]:
            git.read("update-index", "--skip-worktree", "-z", "--stdin", stdin="\0".join([*absent, ""]))
        return [oid for oid in dict.fromkeys(oid for _, oid, _, _ in rows) if oid != _EMPTY_FILE]

    @contextlib.contextmanager
    def _git(self, folder: Path, refs: Mapping[str, str], head: str, store: Path | None = None) -> Iterator[_Git]:
        """Yield git in a new directory in *folder*, with the objects in *store*, or those of the repository."""
        opened = self._folder("objects") if store is None else os.open(store, FOLDER_FLAGS | os.O_NOFOLLOW)
        with closing_fd(opened) as objects, tempfile.TemporaryDirectory(dir=folder, prefix=".git-") as scratch:
            yield _Git(Path(scratch, "git"), objects, refs, head, self._what)

    # from a guest

    def bundle(self, history: History, entries: Iterable[ReportedEntry], data_fd: int, folder: Path) -> Commits | None:
        """Return the commits that a guest has made since it got *history*, or None if it has made none.

        entries: what it has changed in its `.git`; their contents are in *data_fd*. The commits are stored in
        folder/commits.bundle. They may refer only to what the guest got or sends. Raises OSError.
        """
        files = {one.name: one.node for one in entries if one.node is not None and one.node.kind == "file"}

        def text(name: str, most: int = _REF_MAX) -> str:
            node = files.get(name)
            data = b"" if node is None or node.at is None else os.pread(data_fd, min(node.size, most), node.at)
            return data.decode("utf-8", "replace").strip()

        loose = {name: text(name) for name in files if name.startswith(_HEADS)}
        now = {**history.refs, **_packed_refs(text("packed-refs", _TEXT_MAX)), **loose, "HEAD": text("HEAD")}
        new, left_out = _new_branches(history, now)
        bundle = folder / BUNDLE
        found: list[Commit] = []
        try:
            with self._git(folder, {}, history.head or "ref: refs/heads/none", history.store) as git:
                for name, node in files.items() if new else ():
                    if _OBJECT.fullmatch(name):
                        git.copy(name, data_fd, node)
                if missing := git.missing(new):
                    left_out |= dict.fromkeys(missing, "its last commit is missing or too large")
                    new = {name: oid for name, oid in new.items() if name not in missing}
                if new:
                    _write_bundle(git, history, new, bundle)
            if new:
                with self._unpacked(bundle, new, history.store) as (git, _):
                    revisions = "\n".join([*map(_full, new), *(f"^{one}" for one in history.ids)])
                    words = ("log", "--source", _FORMAT, "--stdin")
                    found = [_commit(row) for row in git.rows("\n", *words, count=4, stdin=revisions)]
        except HostError as exc:
            left_out |= dict.fromkeys(new, f"{exc.why}")
            found = []
        ids = {one.id for one in found}
        branches = {name: oid for name, oid in new.items() if oid in ids}  # not those that only went back
        if not branches:
            bundle.unlink(missing_ok=True)
        if not branches and not left_out:
            return None
        listed = tuple(found[:_LISTED])
        return Commits(root=self.root, branches=branches, count=len(found), listed=listed, left_out=left_out)

    @contextlib.contextmanager
    def _unpacked(
        self, bundle: Path, branches: Mapping[str, str], store: Path | None = None
    ) -> Iterator[tuple[_Git, str]]:
        """Yield git in a directory with the pack of a bundle, which it has checked, and its name. Raises HostError.

        store: the objects of a guest's history, instead of those of the repository.
        """
        refs = {_full(name): oid for name, oid in branches.items() if name != "HEAD"}
        head = branches.get("HEAD", next(iter(branches.values())))
        with bundle.open("rb") as file, self._git(bundle.parent, refs, head, store) as git:
            while file.readline(_REF_MAX * 2).strip():
                pass
            os.lseek(file.fileno(), file.tell(), os.SEEK_SET)
            yield git, git.pack("index-pack", "--strict", "--stdin", stdin=file.fileno())

    def fetch(self, commits: Commits, run: str, bundle: Path) -> None:
        """Put the commits into the repository, under refs/x07/RUN. What is there already stays. Raises HostError."""
        with self._unpacked(bundle, commits.branches) as (git, pack), self._writing():
            for name in (f"{pack}.pack", f"{pack}.idx"):  # with the last one, git uses the pack
                with git.opened(name) as fd:
                    self._put(name, fd, 0o444)
            for name, oid in refs_of(commits, run).items():
                with closing_fd(memory_file(f"{oid}\n".encode())) as fd:
                    self._put(name, fd, 0o644)
                if self._ref(name) != oid:
                    raise HostError(*self._moved(name))

    def is_fetched(self, commits: Commits, run: str) -> bool:
        """Return whether the repository has a reference that `fetch` has made."""
        return any(self._ref(name) == oid for name, oid in refs_of(commits, run).items())

    def own_refs(self, commits: Commits, run: str) -> list[str]:
        """Return the references that `fetch` has made. Raises HostError if one has another value now."""
        refs = refs_of(commits, run)
        for name, oid in refs.items():
            if self._ref(name) not in {oid, ""}:
                raise HostError(*self._moved(name))
        return list(refs)

    def forget(self, refs: Collection[str]) -> None:
        """Delete references that `fetch` has made. The objects stay, until git removes them. Raises HostError."""
        with self._writing():
            if self._packed(refs):  # by git pack-refs or git gc
                self._drop_packed(refs)
            for name in refs:
                self._delete(name)

    def _drop_packed(self, refs: Collection[str]) -> None:
        """Remove references from packed-refs, under git's lock of that file. Raises OSError."""
        lock, names, skip = "packed-refs.lock", set(map(str.encode, refs)), False
        with self._new_file(self._fd, lock) as fd:
            for line in (self._read("packed-refs") or b"").splitlines(keepends=True):
                if not line.startswith(b"^"):  # the object of the tag before it
                    skip = line.rstrip(b"\n").partition(b" ")[2] in names
                if not skip:
                    write_all(fd, line)
            self._give(fd, 0o644)
            os.fsync(fd)
            os.rename(lock, "packed-refs", src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def _moved(self, name: str) -> tuple[str, str, str]:
        return f"cannot use {name}", "it points to another commit than the run's", "Rename or delete that reference"

    def _ref(self, name: str) -> str:
        """Return the commit of a reference below refs/x07, or ""."""
        loose = self._read(name, _REF_MAX)
        return self._packed({name}).get(name, "") if loose is None else loose.decode("ascii", "replace").strip()

    def _packed(self, names: Collection[str] = ()) -> dict[str, str]:
        return _packed_refs((self._read("packed-refs") or b"").decode("utf-8", "replace"), names)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            why = f"{exc.strerror or exc} in {escaped(self.root)}/.git"
            raise HostError("cannot change the repository", why, "Check its permissions and the free space") from exc

    @contextlib.contextmanager
    def _new_file(self, dir_fd: int, name: str) -> Iterator[int]:
        """Yield a new file that the caller renames in the context. Remove it after an error. Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with closing_fd(os.open(name, flags, 0o600, dir_fd=dir_fd)) as fd:
            try:
                yield fd
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=dir_fd)
                raise

    def _give(self, fd: int, mode: int) -> None:
        """Set the mode of a new file or folder, and as root its owner to that of the repository. Raises OSError."""
        owner = os.fstat(self._fd)
        os.fchmod(fd, mode)
        if os.geteuid() == 0:
            os.fchown(fd, owner.st_uid, owner.st_gid)

    def _put(self, name: str, source_fd: int, mode: int) -> None:
        """Create a file in `.git` with the content of *source_fd*, unless it exists. Raises OSError."""
        folder, _, part = name.rpartition("/")
        temporary = f"tmp_x07_{secrets.token_hex(8)}"  # git prune removes tmp_*
        with (
            closing_fd(self._folder("objects/pack")) as packs,
            closing_fd(self._made(folder)) as there,
            contextlib.suppress(FileExistsError),
            self._new_file(packs, temporary) as fd,
        ):
            copy_range(source_fd, fd, os.fstat(source_fd).st_size)
            self._give(fd, mode)
            os.fsync(fd)
            beneath.move(packs, temporary, there, part)

    def _made(self, name: str) -> int:
        """Open a folder in `.git`; create it and those above it if they are missing. Raises OSError."""
        fd = os.dup(self._fd)
        for part in name.split("/"):
            with closing_fd(fd) as above:
                try:
                    os.mkdir(part, 0o755, dir_fd=above)
                    made = True
                except FileExistsError:
                    made = False
                fd = open_folder(above, os.fsencode(part))
            if made:
                self._give(fd, 0o755)
        return fd

    def _delete(self, name: str) -> None:
        """Delete a reference, and the empty folders above it. Raises OSError."""
        with contextlib.suppress(FileNotFoundError), beneath.parent_of(self._fd, name) as (fd, part):
            os.unlink(part, dir_fd=fd)
        folder = name.rpartition("/")[0]
        with contextlib.suppress(OSError):  # other references are in it
            while folder != "refs":
                with beneath.parent_of(self._fd, folder) as (fd, part):
                    os.rmdir(part, dir_fd=fd)
                folder = folder.rpartition("/")[0]


class _Git:
    """Git in the jail, in the new git directory *place*.

    Hostile objects may make git do anything that the jail allows. So after git has run, no link in that directory is
    followed.
    """

    def __init__(self, place: Path, objects_fd: int, refs: Mapping[str, str], head: str, what: Text) -> None:
        self._place = place
        self._objects = Folder(objects_fd, "/objects")
        self._what = what
        for name in ("", *_FOLDERS):
            (place / name).mkdir(parents=True, exist_ok=True)
            (place / name).chmod(0o777)  # git has another uid; only we can enter the folders above
        self.write("HEAD", head.encode() + b"\n")
        self.write("config", _OURS)
        self.write("packed-refs", _packed(refs))
        self.write("objects/info/alternates", b"/objects\n")

    def write(self, name: str, data: bytes = b"") -> Path:
        """Create a file of the directory, before git has run, and return its path. Raises OSError."""
        path = self._place / name
        with path.open("xb") as file:
            file.write(data)
        path.chmod(0o644)
        return path

    def copy(self, name: str, data_fd: int, node: Node) -> None:
        """Create a file with objects that a guest sends, before git has run, unless it is too large. Raises OSError."""
        if node.at is not None:
            folder = (self._place / name).parent
            folder.mkdir(exist_ok=True)
            folder.chmod(0o777)
            with self.write(name).open("r+b") as file:
                copy_range(data_fd, file.fileno(), node.size, at=node.at)

    def keep_objects(self, store: Path) -> None:
        """Move the folder with the objects, and cut its connection to others. Raises OSError."""
        (self._place / "objects").rename(store)  # if git has replaced it by a link, this fails next
        with (
            closing_fd(os.open(store, FOLDER_FLAGS | os.O_NOFOLLOW)) as fd,
            closing_fd(open_folder(fd, b"info")) as info,
        ):
            os.unlink("alternates", dir_fd=info)

    def missing(self, branches: Mapping[str, str]) -> list[str]:
        """Return the branches whose last commit does not exist. Raises HostError."""
        if not branches:
            return []
        stdin = "\n".join(branches.values())
        rows = self.rows("\n", "cat-file", "--batch-check=%(objecttype)", stdin=stdin)
        return [name for name, [kind] in zip(branches, rows, strict=False) if kind != "commit"]

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """Yield a descriptor of a file of the directory, for reading. Raises HostError, OSError."""
        with closing_fd(os.open(self._place, FOLDER_FLAGS)) as place, closing_fd(beneath.open_file(place, name)) as fd:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise HostError(self._what, f"git has not written the file {name}", "Try again")
            yield fd

    def pack(self, *words: str, stdin: bytes | int) -> str:
        """Run git, which makes a pack, and return its name without the extension. Raises HostError."""
        found = self.read(*words, stdin=stdin, most=COPY_IN_MAX_BYTES).split()[-1:]
        name = found[0].decode("ascii", "replace") if found else ""
        if not _ID.fullmatch(name):
            raise HostError(self._what, f"git {words[0]} has made no pack", "Try again")
        return f"objects/pack/pack-{name}"

    def read(self, *words: str, stdin: str | bytes | int = b"", most: int = _TEXT_MAX) -> bytes:
        """Run git, and return its output. most: the limit of each file that it writes. Raises HostError."""
        with closing_fd(memory_file(b"")) as fd:
            given = stdin.encode("utf-8", "surrogateescape") if isinstance(stdin, str) else stdin
            self.run(*words, stdin=given, out_fd=fd, most=most)
            return os.pread(fd, min(os.fstat(fd).st_size, _TEXT_MAX), 0)

    def rows(self, end: str, *words: str, between: str = "\0", count: int = 1, stdin: str = "") -> list[list[str]]:
        """Run git, and return the fields of each row of its output. Raises HostError."""
        data = self.read(*words, stdin=stdin).decode("utf-8", "surrogateescape")
        found = [row.split(between, count - 1) for row in data.split(end) if row]
        if any(len(row) != count for row in found):
            raise HostError(self._what, f"the output of git {words[0]} is invalid", _FSCK)
        return found

    def run(self, *words: str, stdin: bytes | int, most: int, out_fd: int | None = None) -> None:
        """Run git, with a limit for its files. Raises HostError if it fails."""
        if (git := find_program("git")) is None:
            raise HostError(self._what, "git is not installed", ("To install it: ", Command("apt-get install git")))
        argv = [git, "--git-dir=/git", "--work-tree=/git", *words]
        with contextlib.ExitStack() as stack:
            own = stack.enter_context(closing_fd(os.open(self._place, FOLDER_FLAGS)))
            out = stack.enter_context(closing_fd(memory_file(b""))) if out_fd is None else out_fd
            folders = [self._objects, Folder(own, "/git", write=True)]
            done = run_jailed(argv, folders, stdin=stdin, stdout_fd=out, most_bytes=most, timeout_s=_TIMEOUT_S)
        if done.status:
            said = f"git {words[0]} failed: {done.said or f'status {done.status}'}"
            why = f"they are larger than {most // MIB} MiB" if done.too_large else said
            if done.timed_out:
                why = f"git {words[0]} took longer than {_TIMEOUT_S} s"
            raise HostError(self._what, why, _FSCK)


def refs_of(commits: Commits, run: str) -> dict[str, str]:
    """Return the references on the host for the commits of a run, and their commits."""
    return {f"refs/x07/{run}/{name}": oid for name, oid in commits.branches.items()}


def is_ref_name(name: str) -> bool:
    """Return whether git accepts the full name of a branch or tag (git-check-ref-format(1)), and it is UTF-8."""
    parts_fit = all(0 < len(part.encode(errors="replace")) <= _PART_MAX for part in name.split("/"))
    is_text = "\ufffd" not in name and name.encode(errors="ignore").decode() == name
    return is_text and parts_fit and not _NOT_IN_NAMES.search(name)


def _full(name: str) -> str:
    return name if name == "HEAD" else f"{_HEADS}{name}"


def _short(name: str) -> str:
    return name.removeprefix(_HEADS)


def _new_branches(history: History, now: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the new values of a guest's branches, and why others cannot be used, which are named as in messages.

    now: its references and HEAD. git takes no notice of lock files, and a symbolic reference is no branch of its own.
    """
    new, left_out = dict[str, str](), dict[str, str]()
    changed = {
        _short(name): oid for name, oid in now.items() if name.startswith(_HEADS) and oid != history.refs.get(name)
    }
    above = parent_folders(changed)
    if _ID.fullmatch(now["HEAD"]) and now["HEAD"] not in {history.head, *changed.values(), *history.refs.values()}:
        changed["HEAD"] = now["HEAD"]
    for name, oid in changed.items():
        if name.endswith(".lock") or _BRANCH.fullmatch(oid):
            continue
        why = ""
        if not is_ref_name(_full(name)) or len(name) > _REF_MAX // 2:
            why = "its name is invalid"
        elif name in above:
            why = "there are branches with names below it"
        elif not _ID.fullmatch(oid):
            why = "it points to no commit"
        elif len(new) >= _BRANCHES_MAX:
            why = f"there are more than {_BRANCHES_MAX} branches"
        if not why:
            new[name] = oid
        elif len(left_out) < _BRANCHES_MAX:
            left_out[escaped(name[:_FIELD_MAX])] = why
    return new, left_out


def _write_bundle(git: _Git, history: History, new: Mapping[str, str], bundle: Path) -> None:
    """Write the objects of the *new* branches that *history* lacks to *bundle*. Raises HostError, OSError."""
    known = [oid for name, oid in history.refs.items() if name.startswith(_HEADS)] or history.ids[:1]
    lines = ["# v2 git bundle", *(f"-{oid} " for oid in known), *(f"{oid} {_full(name)}" for name, oid in new.items())]
    revisions = "\n".join([*new.values(), *(f"^{one}" for one in history.ids)])
    with bundle.open("wb", buffering=0) as out:
        out.write("\n".join([*lines, "", ""]).encode())
        words = ("pack-objects", "--revs", "--stdout", "-q")
        git.run(*words, stdin=revisions.encode(), out_fd=out.fileno(), most=BUNDLE_MAX_BYTES)


def _packed_refs(text: str, names: Collection[str] = ()) -> dict[str, str]:
    """Return the branches and tags in a file packed-refs, or those references that *names* has."""
    rows = (line.split(" ", 1) for line in text.split("\n")[:_REFS_MAX])
    found = {row[1]: row[0] for row in rows if len(row) == 2 and _ID.fullmatch(row[0])}  # noqa: PLR2004 - id and name
    return {name: oid for name, oid in found.items() if (name in names if names else _is_known(name))}


def _is_known(name: str) -> bool:
    return name.startswith((_HEADS, _TAGS)) and is_ref_name(name)


def _packed(refs: Mapping[str, str]) -> bytes:
    return "".join(f"{refs[name]} {name}\n" for name in sorted(refs)).encode()


def _commit(fields: Sequence[str]) -> Commit:
    """Return a commit from the fields of `_FORMAT`. They may contain bytes that are not UTF-8."""
    oid, ref, author, subject = (
        field.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for field in fields
    )
    return Commit(id=oid, branch=_short(ref), author=author.strip()[:_FIELD_MAX], subject=subject.strip()[:_FIELD_MAX])
