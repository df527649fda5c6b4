"""Container images in files: OCI layouts, and archives of docker and podman. References are fetched by skopeo.

Formats: the OCI image specification 1.1 ("image-layout.md", "manifest.md", "config.md", "layer.md"), and docker's
"image/spec/v1.2.md" for `docker save`.

The layers are merged into one archive. Nothing is unpacked on the host: the entries of all layers are read from their
archives, and those that remain are written to a new one. Devices and extended attributes are left out. The files and
folders on which the guest mounts something are added.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import stat
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

import msgspec

from x07_sandbox.errors import HostError, ImageError, UsageError
from x07_sandbox.host import beneath
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.documents import prepared
from x07_sandbox.host.linux import path_flag
from x07_sandbox.host.paths import closing_fd
from x07_sandbox.images import commands
from x07_sandbox.images import tar as tars
from x07_sandbox.images.store import ProgramRoot
from x07_sandbox.images.tar import BLOCK, ENCODING, Member, Part, bad_image, members

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

REFERENCE: Final = "docker://"
_JSON_MAX: Final = 4 << 20
_LAYERS_MAX: Final = 128
_MEMBERS_MAX: Final = 10_000  # of an archive that contains an image
_CHUNK: Final = 1 << 20
_WORDS_MAX: Final = 1000
_TEXT_MAX: Final = 256 << 10  # characters of these words, so that the image's manifest stays readable
_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_FETCH_S: Final = 1800.0
BYTES_MAX: Final = 16 << 30  # of all layers, uncompressed, and of the archive that is written
# Of all layers, also what later layers remove.
LIMITS: Final = {
    "entries and folders": 1_000_000,
    "bytes in extended headers": 256 << 20,
    "steps from folder to folder": 100_000_000,  # about a minute
}
_NAME_MAX: Final = 255
_PATH_MAX: Final = 4096
_DEPTH_MAX: Final = 200
_LINKS_MAX: Final = 40  # path_resolution(7)
_OPAQUE: Final = ".wh..wh..opq"
_WHITEOUT: Final = ".wh."
# What the guest mounts over, and what it needs as folders on the way.
_MODES: Final = {"proc": 0o555, "sys": 0o555, "tmp": 0o1777}
_FOLDERS: Final = ("dev", "etc", "opt", "proc", "run", "sys", "tmp", "x07", "opt/x07")
_EMPTY_FILES: Final = ("machine-id", "resolv.conf")  # in /etc


class _Platform(msgspec.Struct):
    architecture: str = ""
    os: str = ""


class _Descriptor(msgspec.Struct, rename="camel"):
    digest: str
    size: int
    media_type: str = ""
    platform: _Platform | None = None


class _Index(msgspec.Struct):
    manifests: list[_Descriptor]


class _Manifest(msgspec.Struct):
    config: _Descriptor
    layers: list[_Descriptor]


class _RootFs(msgspec.Struct):
    diff_ids: list[str]


class _Settings(msgspec.Struct, rename="pascal"):
    env: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None


class _Config(msgspec.Struct):
    architecture: str = ""
    os: str = "linux"
    config: _Settings | None = None
    rootfs: _RootFs | None = None


class _Saved(msgspec.Struct, rename="pascal"):
    config: str
    layers: list[str]


class _Source(Protocol):
    """Files by name."""

    def open(self, name: str) -> Part | None:
        """Open a file for reading, or return None if there is none."""


class _Folder:
    """A folder. stack: closes its files."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self._path, self._stack = path, stack

    def open(self, name: str) -> Part | None:
        try:
            with closing_fd(os.open(self._path, path_flag() | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
                fd = beneath.open_file(folder, name)
        except (OSError, ValueError) as exc:
            if isinstance(exc, OSError) and exc.errno == errno.ENOSYS:
                raise
            return None
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(fd)
            return None
        return Part(self._stack.enter_context(os.fdopen(fd, "rb")), 0, info.st_size)


class _Archive:
    def __init__(self, file: IO[bytes]) -> None:
        self._members: dict[str, Member] = {}
        extended = 0
        for count, member in enumerate(members(file, "it"), 1):
            extended += member.extended
            if count > _MEMBERS_MAX or extended > _JSON_MAX:
                raise bad_image(f"it has more than {_MEMBERS_MAX} files, or {_JSON_MAX >> 20} MiB of extended headers")
            self._members[member.name.removeprefix("./")] = member

    def open(self, name: str) -> Part | None:
        member = self._members.get(name)
        if member is not None and member.kind == tarfile.SYMTYPE:  # docker saves a layer once
            member = self._members.get(os.path.normpath(os.path.join(os.path.dirname(name), member.link)))  # noqa: PTH118, PTH120 - of an archive
        return member.content if member is not None and member.kind == tarfile.REGTYPE else None


def make_root(source: str, work: Path, target: Path, progress: Callable[[str], None]) -> tuple[ProgramRoot, int]:
    """Write the merged layers of an image to the new archive *target*. Raises SandboxError.

    source: the path of a folder or an archive, or a reference that starts with docker://. work: a folder for temporary
    files. Return what a program of the image needs to know, and how many devices and sockets were left out.
    """
    merged = Merged()
    with contextlib.ExitStack() as stack:
        found = _opened(source, work, stack, progress)
        digest, config, layers = _described(found)
        _check_platform(config)
        if not 0 < len(layers) <= _LAYERS_MAX:
            raise bad_image(f"it has {len(layers)} layers, and 1 to {_LAYERS_MAX} are allowed")
        left = BYTES_MAX
        for number, (name, wanted, diff_id) in enumerate(layers, 1):
            progress(f"reading layer {number} of {len(layers)}")
            file = stack.enter_context(tempfile.TemporaryFile(dir=work))
            left -= _unpack(found, name, wanted, diff_id, file, left)
            merged.add(file)
        program = _program(digest, config.config or _Settings())
        merged.prepare(program.workdir)
        with target.open("xb") as out:
            merged.write(out)
    return program, merged.left_out


def _opened(source: str, work: Path, stack: contextlib.ExitStack, progress: Callable[[str], None]) -> _Source:
    if source.startswith(REFERENCE):
        progress(f"fetching {source}")
        return _Folder(_fetched(source, work, progress), stack)
    path = Path(source)
    if path.is_dir():
        return _Folder(path, stack)
    fix = f"Use an OCI layout, an archive of docker save or podman save, or {REFERENCE}NAME"
    try:
        return _Archive(stack.enter_context(path.open("rb")))
    except OSError as exc:
        raise UsageError(f"cannot import {source}", exc.strerror or str(exc), fix) from exc
    except ImageError as exc:
        raise ImageError(f"cannot import {source}", exc.why, fix, code=exc.code) from exc


def _fetched(reference: str, work: Path, progress: Callable[[str], None]) -> Path:
    layout = work / "layout"
    argv = [commands.tool("skopeo"), "copy", "--override-os", "linux"]
    if re.match(r"docker://(localhost|127\.\d+\.\d+\.\d+)(:\d+)?/", reference):  # as docker and podman do
        argv.append("--src-tls-verify=false")
    try:
        commands.run([*argv, "--", reference, f"oci:{layout}"], cwd=work, timeout_s=_FETCH_S, on_line=progress)
    except ImageError as exc:
        raise HostError(f"cannot fetch {reference}", exc.why, "Check the name and the network, then try again") from exc
    return layout


def _described(source: _Source) -> tuple[str, _Config, list[tuple[str, str, str]]]:
    """Return the image's digest and configuration, and for each layer its file, digest ("" if unknown) and diff id."""
    if (index := _json(source, "index.json", _Index)) is not None:
        return _of_layout(source, index)
    saved = _json(source, "manifest.json", list[_Saved])
    if not saved:
        raise bad_image("it has neither an index.json nor a manifest.json")
    if (data := _bytes(source, saved[0].config)) is None:
        raise bad_image(f"its configuration {saved[0].config[:100]!a} is missing")
    config = _decoded(data, _Config, "configuration")
    ids = config.rootfs.diff_ids if config.rootfs is not None else []
    if len(saved) != 1 or len(ids) != len(saved[0].layers):
        raise bad_image("the archive has several images, or not as many layers as it says")
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return digest, config, [(name, "", diff_id) for name, diff_id in zip(saved[0].layers, ids, strict=True)]


def _of_layout(source: _Source, index: _Index) -> tuple[str, _Config, list[tuple[str, str, str]]]:
    chosen = _chosen(index)
    data = _blob(source, chosen)
    if "manifests" in _decoded(data, dict[str, Any], "manifest"):  # an index may contain another one
        chosen = _chosen(_decoded(data, _Index, "index"))
        data = _blob(source, chosen)
    manifest = _decoded(data, _Manifest, "manifest")
    config = _decoded(_blob(source, manifest.config), _Config, "configuration")
    ids = config.rootfs.diff_ids if config.rootfs is not None else []
    if len(ids) != len(manifest.layers):
        raise bad_image("its configuration names other layers than its manifest")
    layers = [(_path(one), one.digest, diff_id) for one, diff_id in zip(manifest.layers, ids, strict=True)]
    return chosen.digest, config, layers


def _chosen(index: _Index) -> _Descriptor:
    wanted = host_arch().deb
    fitting = [
        one
        for one in index.manifests
        if one.platform is None or (one.platform.os, one.platform.architecture) == ("linux", wanted)
    ]
    if len(fitting) != 1:
        why = f"it has {len(fitting)} images for Linux on {wanted}, and one is needed"
        raise bad_image(why)
    return fitting[0]


def _check_platform(config: _Config) -> None:
    wanted = host_arch().deb
    if config.os != "linux" or config.architecture not in {"", wanted}:
        raise bad_image(f"it is for {config.os[:20]!a} on {config.architecture[:20]!a}, not for linux on {wanted}")


def _path(descriptor: _Descriptor) -> str:
    if (match := _DIGEST.fullmatch(descriptor.digest)) is None:
        raise bad_image(f"the digest {descriptor.digest[:80]!a} is no sha256")
    return f"blobs/sha256/{match[1]}"


def _blob(source: _Source, descriptor: _Descriptor) -> bytes:
    data = _bytes(source, _path(descriptor))
    if data is None or f"sha256:{hashlib.sha256(data).hexdigest()}" != descriptor.digest:
        raise bad_image(f"the file of {descriptor.digest} is missing or damaged")
    return data


def _bytes(source: _Source, name: str) -> bytes | None:
    if (part := source.open(name)) is None:
        return None
    if part.size > _JSON_MAX:
        raise bad_image(f"{name[:80]} has more than {_JSON_MAX >> 20} MiB")
    return b"".join(part.pieces())


def _json(source: _Source, name: str, kind: Any) -> Any:  # noqa: ANN401 - of many types
    data = _bytes(source, name)
    return None if data is None else _decoded(data, kind, name)


def _decoded(data: bytes, kind: Any, what: str) -> Any:  # noqa: ANN401 - as above
    try:
        return msgspec.json.decode(data, type=prepared(kind) if isinstance(kind, type) else kind)
    except (ValueError, RecursionError) as exc:  # msgspec.MsgspecError, UnicodeDecodeError
        raise bad_image(f"its {what} is malformed ({str(exc)[:100]})") from exc


def _unpack(source: _Source, name: str, wanted: str, diff_id: str, out: IO[bytes], left: int) -> int:
    """Write a layer to *out*, uncompressed, and return its size. Raises ImageError if a digest differs."""
    if (part := source.open(name)) is None:
        raise bad_image(f"the layer {name[:100]!a} is missing")
    packed, plain, size = hashlib.sha256(), hashlib.sha256(), 0
    for data in _plain(part.pieces(), packed):
        size += len(data)
        if size > left:
            raise bad_image(f"its layers have more than {BYTES_MAX >> 30} GiB")
        plain.update(data)
        out.write(data)
    if wanted and f"sha256:{packed.hexdigest()}" != wanted:
        raise bad_image(f"the layer {wanted} is damaged")
    if f"sha256:{plain.hexdigest()}" != diff_id:
        raise bad_image(f"the layer {name[:100]!a} differs from its configuration")
    out.flush()
    out.seek(0)
    return size


def _plain(pieces: Iterator[bytes], packed: hashlib._Hash) -> Iterator[bytes]:
    """Yield a layer's uncompressed bytes."""
    unzip, inside = None, False
    for count, data in enumerate(pieces):
        if not count and data.startswith(_ZSTD):
            yield from _unzstd(itertools.chain([data], pieces), packed)
            return
        if not count and data.startswith(_GZIP):
            unzip = zlib.decompressobj(wbits=31)
        packed.update(data)
        if unzip is None:
            yield data
            continue
        waiting = data if inside else data.lstrip(b"\0")
        while waiting:
            inside = True
            try:
                yield unzip.decompress(waiting, _CHUNK)
            except zlib.error as exc:
                raise bad_image("a layer is damaged") from exc
            waiting = unzip.unconsumed_tail
            if unzip.eof:  # perhaps another stream follows, or padding
                waiting, inside = unzip.unused_data.lstrip(b"\0"), False
                unzip = zlib.decompressobj(wbits=31)


def _unzstd(pieces: Iterable[bytes], packed: hashlib._Hash) -> Iterator[bytes]:
    with tempfile.TemporaryFile() as whole:
        for data in pieces:
            packed.update(data)
            whole.write(data)
        whole.seek(0)
        argv = [commands.tool("zstd"), "-dcq"]
        with subprocess.Popen(argv, stdin=whole, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout is not None  # it is a pipe
            try:
                while data := child.stdout.read(_CHUNK):
                    yield data
            except BaseException:  # such as the end of this generator
                child.kill()
                raise
        if child.returncode:
            raise bad_image("a layer is damaged")


def _program(digest: str, found: _Settings) -> ProgramRoot:
    env = {}
    for entry in found.env or ():
        name, equals, value = entry.partition("=")
        if equals and _VARIABLE.fullmatch(name) and not name.startswith("X07_") and "\0" not in value:
            env[name] = value
    workdir = found.working_dir or ""
    if "\0" in workdir or (workdir and not workdir.startswith("/")):
        raise bad_image("its working folder is no absolute path")
    words = [*(found.entrypoint or ()), *(found.cmd or ()), *env.values()]
    if len(words) > _WORDS_MAX or sum(map(len, words)) > _TEXT_MAX or any("\0" in word for word in words):
        raise bad_image("its command is too long, or contains a NUL byte")
    return ProgramRoot(
        oci=digest,
        env=env,
        workdir=os.path.normpath(workdir) if workdir else "",
        user=(found.user or "")[:256],
        entrypoint=list(found.entrypoint or ()),
        cmd=list(found.cmd or ()),
    )


class Content:
    """What hard links share: a file's bytes in the archive of its layer. name: where it was written, once it was."""

    __slots__ = ("name", "part")

    def __init__(self, part: Part | None = None) -> None:
        self.part = part
        self.name = ""


class Node:
    """A file, folder, link or pipe under one name. layer: the number of the last layer that has that name."""

    __slots__ = ("children", "content", "gid", "kind", "layer", "mode", "target", "uid")

    def __init__(self, kind: bytes, mode: int, layer: int, uid: int = 0, gid: int = 0) -> None:
        self.kind, self.mode, self.layer, self.uid, self.gid = kind, mode, layer, uid, gid
        self.children: dict[str, Node] = {}
        self.target = ""
        self.content = Content()


class Merged:
    """The files of an image's layers, which are added from the lowest one on."""

    def __init__(self) -> None:
        self.root = Node(tarfile.DIRTYPE, 0o755, 0)
        self.left_out = 0
        self._used = dict.fromkeys(LIMITS, 0)
        self._layer = 0

    def add(self, file: IO[bytes]) -> None:
        """Add a layer, an archive that stays open. Raises ImageError."""
        self._layer += 1
        for member in members(file, f"layer {self._layer}"):
            self._count("bytes in extended headers", member.extended)
            self._take(member)

    def _count(self, what: str, more: int) -> None:
        self._used[what] += more
        if self._used[what] > LIMITS[what]:
            raise bad_image(f"it has more than {LIMITS[what]:,} {what}")

    def _take(self, member: Member) -> None:
        self._count("entries and folders", 1)
        parts = _parts(member.name)
        if not parts:
            if member.kind == tarfile.DIRTYPE:
                self.root.mode, self.root.uid, self.root.gid = member.mode, member.uid, member.gid
            return
        folder, name = self._folder(parts[:-1]), parts[-1]
        if name == _OPAQUE:
            self._hide(folder)
        elif name.startswith(_WHITEOUT):
            hidden = folder.children.get(name.removeprefix(_WHITEOUT))
            if hidden is not None and hidden.layer < self._layer:
                del folder.children[name.removeprefix(_WHITEOUT)]
        elif member.kind == tarfile.LNKTYPE:
            folder.children[name] = self._linked(member.link)
        elif member.kind in {tarfile.CHRTYPE, tarfile.BLKTYPE}:
            self.left_out += 1
            folder.children.pop(name, None)
        else:
            node, before = self._node(member), folder.children.get(name)
            if before is not None and before.kind == node.kind == tarfile.DIRTYPE:
                node.children = before.children
            folder.children[name] = node

    def _node(self, member: Member) -> Node:
        made = Node(member.kind, member.mode, self._layer, member.uid, member.gid)
        if member.kind == tarfile.REGTYPE:
            made.content = Content(member.content)
        elif member.kind == tarfile.SYMTYPE:
            made.target = member.link
            if not made.target or "\0" in made.target or len(made.target.encode(*ENCODING)) > _PATH_MAX:
                raise bad_image("a symbolic link has no valid target")
        return made

    def _linked(self, path: str) -> Node:
        *parents, name = _parts(path) or [""]
        found = self._folder(parents, create=False).children.get(name)
        if found is None or found.kind == tarfile.DIRTYPE:
            raise bad_image(f"a hard link leads to {path[:100]!a}, which is no file of the image")
        made = Node(found.kind, found.mode, self._layer, found.uid, found.gid)
        made.target, made.content = found.target, found.content
        return made

    def _folder(self, parts: Sequence[str], *, create: bool = True) -> Node:
        """Return a folder, with links resolved inside the image. Raises ImageError."""
        way, waiting, links = [self.root], list(parts)[::-1], 0
        while waiting:
            self._count("steps from folder to folder", 1)
            name = waiting.pop()
            if name == "..":
                way[1:] = way[1:-1]
                continue
            found = self._entered(way[-1], name, create=create)
            if found.kind == tarfile.SYMTYPE:
                links += 1
                if links > _LINKS_MAX:
                    raise bad_image("symbolic links lead in a circle")
                self._count("steps from folder to folder", len(found.target))
                if found.target.startswith("/"):
                    del way[1:]
                waiting += [part for part in found.target.split("/") if part not in {"", "."}][::-1]
                continue
            way.append(found)
            if len(way) > _DEPTH_MAX:
                raise bad_image(f"its folders are more than {_DEPTH_MAX} deep")
        return way[-1]

    def _entered(self, folder: Node, name: str, *, create: bool) -> Node:
        """Return a folder or link in *folder*; create: make a folder if there is none."""
        found = folder.children.get(name)
        if found is None or found.kind not in {tarfile.DIRTYPE, tarfile.SYMTYPE}:
            if not create:
                raise bad_image(f"a link leads through {name[:100]!a}, which is no folder")
            self._count("entries and folders", 1)
            found = folder.children[name] = Node(tarfile.DIRTYPE, 0o755, self._layer)
        return found

    def _hide(self, folder: Node) -> None:
        """Remove what lower layers have put into a folder."""
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            self._count("steps from folder to folder", len(here.children) + 1)
            here.children = {name: child for name, child in here.children.items() if child.layer >= self._layer}
            waiting += here.children.values()

    def prepare(self, workdir: str) -> None:
        """Add what the guest mounts over, and the working folder. Raises ImageError if something else is there."""
        self._layer += 1
        for path in _FOLDERS:
            at = self.root
            for name in path.split("/"):
                made = Node(tarfile.DIRTYPE, _MODES.get(path, 0o755), self._layer)
                at = at.children.setdefault(name, made)
                if at.kind != tarfile.DIRTYPE:
                    raise bad_image(f"its /{path} is no folder")
        for name in _EMPTY_FILES:
            self.root.children["etc"].children[name] = Node(tarfile.REGTYPE, 0o644, self._layer)
        self._folder(_parts(workdir))

    def write(self, out: IO[bytes]) -> None:
        """Write everything as one archive, for mkfs.erofs. Raises ImageError, OSError."""
        left = BYTES_MAX
        for data in self._blocks():
            left -= len(data)
            if left < 0:
                raise bad_image(f"its files have more than {BYTES_MAX >> 30} GiB")
            out.write(data)

    def _blocks(self) -> Iterator[bytes]:
        """Yield the archive in pieces."""
        for path, node in self._walk():
            if len(path.encode(*ENCODING)) > _PATH_MAX:
                raise bad_image(f"the path {path[:100]!a} is too long")
            info = tars.entry(path, node.kind, node.mode, link=node.target)
            info.uid, info.gid, content = node.uid, node.gid, node.content
            if content.name:
                info.type, info.linkname = tarfile.LNKTYPE, content.name
            elif content.part is not None:
                info.size = content.part.size
            yield info.tobuf(tarfile.PAX_FORMAT, *ENCODING)
            if info.size and content.part is not None:
                yield from content.part.pieces()
                yield bytes(-info.size % BLOCK)
            content.name = content.name or path
        yield bytes(2 * BLOCK)

    def _walk(self) -> Iterator[tuple[str, Node]]:
        yield ".", self.root
        waiting = [iter(sorted(self.root.children.items()))]
        names: list[str] = []
        while waiting:
            entry = next(waiting[-1], None)
            if entry is None:
                waiting.pop()
                if names:
                    names.pop()
                continue
            name, node = entry
            yield "/".join((*names, name)), node
            if node.kind == tarfile.DIRTYPE:
                names.append(name)
                waiting.append(iter(sorted(node.children.items())))


def _parts(path: str) -> list[str]:
    """Return the names in a path. Raises ImageError for a path that leads out of the image, or is too long."""
    parts = [part for part in path.split("/") if part not in {"", "."}]
    encoded = [len(part.encode(*ENCODING)) for part in parts]
    if ".." in parts or "\0" in path or max(encoded, default=0) > _NAME_MAX or sum(encoded) > _PATH_MAX:
        raise bad_image(f"the path {path[:100]!a} leads out of it, or is too long")
    return parts
