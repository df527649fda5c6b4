"""The layers of a container image, merged into one archive, as the OCI image specification's "layer.md" says.

Nothing is unpacked on the host: the entries of all layers are read from their archives, and those that remain are
written to a new one. Devices and extended attributes are left out. The files and folders on which the guest mounts
something are added.
"""

from __future__ import annotations

import tarfile
from typing import IO, TYPE_CHECKING, Final

from x07_sandbox.images import tar as tars
from x07_sandbox.images.tar import BLOCK, ENCODING, Member, Part, bad_image, members

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
_FOLDERS: Final = {"dev": 0o755, "etc": 0o755, "opt": 0o755, "proc": 0o555, "run": 0o755, "sys": 0o555, "tmp": 0o1777}
_OURS: Final = ("x07", "opt/x07")
_EMPTY_FILES: Final = ("machine-id", "resolv.conf")  # in /etc


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
