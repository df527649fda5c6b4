"""The processes of a command that has no control group of its own, found in /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Final

from x07_sandbox.guest.system import children_of, read_file

_PASSES: Final = 200
_PASS_S: Final = 0.001  # there is no event for a stopped process
_AT_REST: Final = frozenset("TtZXx")  # stopped, traced, or ended (proc(5))


def stat_of(pid: int) -> list[str]:
    """Return fields 3 and up of /proc/PID/stat (proc(5)), or an empty list if the process is gone."""
    try:
        return read_file(f"/proc/{pid}/stat").decode("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return []


def cpu_ticks(first: int) -> int:
    """Return the CPU time of a process, its reaped children and all its descendants, in clock ticks."""
    total = 0
    left = [first]
    while left:
        pid = left.pop()
        total += sum(int(word) for word in stat_of(pid)[11:15])  # utime, stime, cutime, cstime
        left += children_of(pid)
    return total


def pid_here(parent: int, inner: int) -> int:
    """Return the process id, as seen here, of the child of *parent* that is *inner* in its own namespace, or 0."""
    for pid in children_of(parent):
        with contextlib.suppress(OSError):
            for line in read_file(f"/proc/{pid}/status").splitlines():
                if line.startswith(b"NSpid:") and int(line.split()[-1]) == inner:
                    return pid
    return 0


def stopped_tree(leader: int) -> set[int]:
    """Stop a session leader, its descendants, and the other processes of their sessions. Return all of them.

    None can leave the tree once all are stopped. A process that had left tree and session before is not found.
    """
    tree, sessions = {leader}, {leader}
    for _ in range(_PASSES):
        found = {int(name): stat for name in os.listdir("/proc") if name.isdigit() and (stat := stat_of(int(name)))}
        size = 0
        while size < len(tree):
            size = len(tree)
            for pid, (_, parent, _, session, *_) in found.items():
                if pid in tree or int(parent) in tree or int(session) in sessions:
                    tree.add(pid)
                    sessions.add(int(session))
        moving = [pid for pid in tree if pid in found and found[pid][0] not in _AT_REST]
        if not moving:
            break
        for pid in moving:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGSTOP)
        time.sleep(_PASS_S)
    return tree
