"""What a sandbox says about one of its files."""

from __future__ import annotations

from typing import Literal, NamedTuple


class FileInfo(NamedTuple):
    """A file, folder or other entry of a sandbox. mode: permission bits. target: of a link, else "".

    size: in bytes. mtime_s: when its content last changed, in seconds since 1970.
    """

    name: str
    kind: Literal["file", "folder", "link", "other"]
    mode: int
    size: int
    mtime_s: float
    target: str
