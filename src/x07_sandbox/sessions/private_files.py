"""Files in a program's private folders: files that the program gets, and files that it leaves for its caller."""

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Final

from x07_sandbox.channel.messages import CWD
from x07_sandbox.files.incoming import Incoming
from x07_sandbox.files.pack import check_files, tree_of
from x07_sandbox.sessions.transfers import InFile, memory_file

FILES_MAX: Final = 10_000
_FOLDERS: Final = 2  # the working folder and /x07/out


class LeftFiles:
    """Receiver of the files that a program leaves in its private folders, at most *max_bytes* in total."""

    def __init__(self, stack: contextlib.ExitStack, max_bytes: int) -> None:
        self._stack = stack
        self._max_bytes = max_bytes
        self._fd = -1
        self._incoming: Incoming | None = None

    def take(self, data: bytes) -> bool:
        """Take the next bytes from the guest. Return False once a limit is exceeded. Raises PeerError, BackendError."""
        if self._incoming is None:
            self._fd = memory_file(b"", self._stack)
            self._incoming = Incoming(self._fd, roots=_FOLDERS, most_entries=FILES_MAX, most_bytes=self._max_bytes)
        return self._incoming.take(data)

    def files(self) -> dict[str, bytes]:
        """Return the regular files' contents by name, or {} unless all arrived. Files in /x07/out take precedence."""
        if self._incoming is None or not self._incoming.complete:
            return {}
        found = {}
        for reported in self._incoming.reported:
            name, node = reported.name, reported.node
            is_text = name.encode(errors="ignore").decode() == name
            if node is not None and node.kind == "file" and node.at is not None and name and is_text:
                found[name] = os.pread(self._fd, node.size, node.at)
        return found


def work_files(files: Mapping[str, bytes], stack: contextlib.ExitStack) -> InFile:
    """Return *files* as a file tree for the program's private working folder. Raises UsageError."""
    check_files(files, "the files of the program")
    now = time.time_ns()
    tree = tree_of({name: (data, 0o644, now) for name, data in files.items()})
    return InFile(path=CWD, mode=0, kind="tree", fd=memory_file(tree, stack), size=len(tree))
