"""The layers of a container image, merged into one archive, as the OCI image specification's "layer.md" says.

Nothing is unpacked on the host: the entries of all layers are read from their archives, and those that remain are
written to a new one. Devices, sockets and extended attributes are left out. The files and folders on which the guest
mounts something are added.
"""

from __future__ import annotations

import os
import tarfile
from typing import IO, TYPE_CHECKING, Final

from x07_sandbox.errors import ImageError
from x07_sandbox.images import tar as tars

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ENTRIES_MAX: Final = 2_000_000  # of all layers, also those that later layers remove
_NAME_MAX: Final = 255
_PATH_MAX: Final = 4096
_DEPTH_MAX: Final = 200
_LINKS_MAX: Final = 40  # path_resolution(7)
_HEADER_MAX: Final = 1 << 20  # of an extended header, which is read at once
_CHUNK: Final = 1 << 20
_OPAQUE: Final = ".wh..wh..opq"
_WHITEOUT: Final = ".wh."
# What the guest mounts over, and what it needs as folders on the way.
_FOLDERS: Final = {"dev": 0o755, "etc": 0o755, "opt": 0o755, "proc": 0o555, "run": 0o755, "sys": 0o555, "tmp": 0o1777}
_OURS: Final = ("x07", "opt/x07")
_EMPTY_FILES: Final = ("machine-id", "resolv.conf")  # in /etc


class Content:
    """What hard links share: a file's bytes in the archive of its layer. name: where it was written, once it was."""

    __slots__ = ("at", "name", "size", "source")

    def __init__(self, source: IO[bytes] | None = None, at: int = 0, size: int = 0) -> None:
        self.source, self.at, self.size = source, at, size
        self.name = ""


class Node:
    """A file, folder, link or pipe under one name. layer: the number of the last layer that has that name."""

    __slots__ = ("children", "content", "gid", "kind", "layer", "mode", "target", "uid")

    def __init__(self, kind: bytes, mode: int, layer: int, uid: int = 0, gid: int = 0) -> None:
        self.kind, self.mode, self.layer, self.uid, self.gid = kind, mode, layer, uid, gid
        self.children: dict[str, Node] = {}
        self.target = ""
        self.content = Content()


class _Headers:
    """A layer's archive for tarfile, which gets no more than a header at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        """Read up to *size* bytes. Raises ImageError for an extended header that is too long."""
        if size > _HEADER_MAX:
            raise bad_image(f"a header has {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        """Set the position."""
        return self._file.seek(offset)

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()


class Merged:
    """The files of an image's layers, which are added from the lowest one on."""

    def __init__(self) -> None:
        self.root = Node(tarfile.DIRTYPE, 0o755, 0)
        self.left_out = 0
        self._count = 0
        self._layer = 0

    def add(self, file: IO[bytes]) -> None:
        """Add a layer, an archive that stays open. Raises ImageError."""
        self._layer += 1
        try:
            with tarfile.TarFile(fileobj=_Headers(file)) as archive:  # type: ignore[arg-type]  # it only reads
                while (info := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # else it keeps all
                    self._count += 1
                    if self._count > ENTRIES_MAX:
                        raise bad_image(f"it has more than {ENTRIES_MAX} entries")
                    self._take(info, file)
        except (tarfile.TarError, ValueError, EOFError, OverflowError) as exc:
            raise bad_image(f"a layer is no tar archive ({str(exc)[:100]})") from exc

    def _take(self, info: tarfile.TarInfo, file: IO[bytes]) -> None:
        parts = _parts(info.name)
        if not parts:
            if info.isdir():
                self.root.mode, self.root.uid, self.root.gid = info.mode & 0o7777, info.uid, info.gid
            return
        folder, name = self._folder(parts[:-1]), parts[-1]
        if name == _OPAQUE:
            self._hide(folder)
        elif name.startswith(_WHITEOUT):
            hidden = folder.children.get(name.removeprefix(_WHITEOUT))
            if hidden is not None and hidden.layer < self._layer:
                del folder.children[name.removeprefix(_WHITEOUT)]
        elif info.islnk():
            folder.children[name] = self._linked(info.linkname)
        elif (node := self._node(info, file)) is None:
            self.left_out += 1
            folder.children.pop(name, None)
        else:
            before = folder.children.get(name)
            if before is not None and before.kind == node.kind == tarfile.DIRTYPE:
                node.children = before.children
            folder.children[name] = node

    def _node(self, info: tarfile.TarInfo, file: IO[bytes]) -> Node | None:
        made = Node(info.type, info.mode & 0o7777, self._layer, *_owner(info))
        if info.sparse is not None:
            raise bad_image(f"it has a sparse file, {info.name[:100]!a}")
        if info.isreg():
            made.kind, made.content = tarfile.REGTYPE, Content(file, info.offset_data, info.size)
        elif info.issym():
            made.target = info.linkname
            if not made.target or "\0" in made.target or len(os.fsencode(made.target)) > _PATH_MAX:
                raise bad_image("a symbolic link has no valid target")
        elif not (info.isdir() or info.isfifo()):
            return None
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
            name = waiting.pop()
            if name == "..":
                way[1:] = way[1:-1]
                continue
            found = self._entered(way[-1], name, create=create)
            if found.kind == tarfile.SYMTYPE:
                links += 1
                if links > _LINKS_MAX:
                    raise bad_image("symbolic links lead in a circle")
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
            found = folder.children[name] = Node(tarfile.DIRTYPE, 0o755, self._layer)
        return found

    def _hide(self, folder: Node) -> None:
        """Remove what lower layers have put into a folder."""
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            here.children = {name: child for name, child in here.children.items() if child.layer >= self._layer}
            waiting += here.children.values()

    def prepare(self, workdir: str) -> None:
        """Add what the guest mounts over, and the working folder. Raises ImageError if something else is there."""
        self._layer += 1
        for name, mode in _FOLDERS.items():
            found = self.root.children.setdefault(name, Node(tarfile.DIRTYPE, mode, self._layer))
            if found.kind != tarfile.DIRTYPE:
                raise bad_image(f"its /{name} is no folder")
        for path in _OURS:
            self._real(path.split("/"))
        for name in _EMPTY_FILES:
            self.root.children["etc"].children[name] = Node(tarfile.REGTYPE, 0o644, self._layer)
        self._folder(_parts(workdir))

    def _real(self, parts: Sequence[str]) -> None:
        at = self.root
        for name in parts:
            found = at.children.setdefault(name, Node(tarfile.DIRTYPE, 0o755, self._layer))
            if found.kind != tarfile.DIRTYPE:
                raise bad_image(f"its /{'/'.join(parts)} is no folder")
            at = found

    def write(self, out: IO[bytes]) -> None:
        """Write everything as one archive, for mkfs.erofs. Raises OSError."""
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for path, node in self._walk():
                info = tars.entry(path, node.kind, node.mode, link=node.target)
                info.uid, info.gid = node.uid, node.gid
                if node.content.name:
                    info.type, info.linkname = tarfile.LNKTYPE, node.content.name
                    archive.addfile(info)
                    continue
                node.content.name = path
                info.size = node.content.size
                archive.addfile(info, _Bytes(node.content) if info.size else None)

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


class _Bytes:
    """The content of a file, for tarfile."""

    def __init__(self, content: Content) -> None:
        self._fd = -1 if content.source is None else content.source.fileno()
        self._at, self._left = content.at, content.size

    def read(self, size: int = _CHUNK, /) -> bytes:
        """Return the next bytes. Raises ImageError if the archive is cut off."""
        if not self._left:
            return b""
        data = os.pread(self._fd, min(size, self._left, _CHUNK), self._at)
        if not data:
            raise bad_image("a layer is cut off")
        self._at += len(data)
        self._left -= len(data)
        return data


def bad_image(why: str) -> ImageError:
    """Return the error for an image that cannot be imported."""
    return ImageError(
        "cannot import the image", why, "Use an image that was made by an image builder", code="bad-oci-image"
    )


def _owner(info: tarfile.TarInfo) -> tuple[int, int]:
    for number in (info.uid, info.gid):
        if not 0 <= number < 1 << 32:
            raise bad_image("an owner's number is out of range")
    return info.uid, info.gid


def _parts(path: str) -> list[str]:
    """Return the names in a path. Raises ImageError for a path that leads out of the image, or is too long."""
    parts = [part for part in path.split("/") if part not in {"", "."}]
    encoded = [len(os.fsencode(part)) for part in parts]
    if ".." in parts or "\0" in path or max(encoded, default=0) > _NAME_MAX or sum(encoded) > _PATH_MAX:
        raise bad_image(f"the path {path[:100]!a} leads out of it, or is too long")
    return parts
