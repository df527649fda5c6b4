"""Child processes that apply change sets and are killed, or interfered with, at each changing system call.

A separate single-threaded process, because it forks: `python -m tests.unit.apply_driver CASE FOLDER [UID]`. It prints
a summary and fails with a description of the fault.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import struct
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.unit.apply_trees import NEW, OLD, Tree, applied, difference, put, read, remove, undone
from x07_sandbox.errors import HostError
from x07_sandbox.files.apply import ConflictError, recover
from x07_sandbox.host import settings

if TYPE_CHECKING:
    from collections.abc import Callable

CHANGING = {
    *("mkdir", "rmdir", "unlink", "remove", "rename", "link", "symlink", "chmod", "fchmod", "fchown", "pwrite"),
    *("ftruncate", "fsync", "setxattr"),
}
# How many calls further the next try is made where each costs most.
STRIDE = 1 if os.environ.get("X07_TEST_FULL") == "1" else 5
"""Of the calls at which something can go wrong, every so many are tried; the tests of a full run try all."""
WIDE = 1 if STRIDE == 1 else 12
"""The same where each try costs more, or a second file system or user has the same calls."""
KILLED, FINE, CONFLICT, REFUSED = -signal.SIGKILL, 0, 3, 4


def at_call(number: int, act: Callable[[], None]) -> None:
    """Call *act* before the *number*-th call (counted from 1) that changes something on disk."""
    count = 0

    def watch(frame: Any, event: str, arg: Any) -> None:  # noqa: ANN401 - what sys.setprofile gives
        nonlocal count
        ours = event in {"call", "return"} and frame.f_code.co_name == "renameat2"
        if ours or (event == "c_call" and arg.__module__ == "posix" and arg.__name__ in CHANGING):
            count += 1
            if count == number:
                sys.setprofile(None)
                act()

    sys.setprofile(watch)


def die() -> None:
    """Kill this process, as a user or the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(action: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> int:
    """Return the exit status of a forked process that called *action*."""
    return ended(start(action, prepare))


def start(action: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> int:
    """Fork a process that calls *action*; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        prepare()
        action()
        code = FINE
    except ConflictError:
        code = CONFLICT
    except HostError:
        code = REFUSED
    except BaseException:  # noqa: BLE001 - whatever it is, it must not go on as a second driver
        traceback.print_exc()
    finally:
        sys.setprofile(None)
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for the process; return its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def same(found: Tree, expected: Tree, when: str) -> None:
    """Exit with the differences unless both trees are equal."""
    if found != expected:
        names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        lines = [f"{name!a}: {found.get(name)} instead of {expected.get(name)}" for name in names]
        raise SystemExit("\n".join([f"{when}: not as it should be", *lines]))


def say(what: object) -> None:
    """Print a summary for the person who runs this."""
    sys.stdout.write(f"{what}\n")


class Case:
    """A tree and a change set for it, rebuilt for each attempt."""

    def __init__(self, base: Path) -> None:
        self.root, self.folder = base / "root", base / "state"
        self.changes, self.data = difference(self.root, OLD, NEW)

    def begin(self) -> None:
        """Mount the old tree with an empty upper layer."""
        for path in (self.root, self.folder):
            if path.exists():
                remove(path)
        put(self.root, OLD)

    def apply(self) -> None:
        """Apply the change set."""
        applied(self.changes, self.data, self.folder)

    def check(self, when: str) -> str:
        """Check folder owners too, including those of replaced folders."""
        now = read(self.root)
        left = sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []
        if left not in ([], ["undo"]):
            raise SystemExit(f"{when}: {left} is left")
        if now.get("changed") == OLD["changed"]:
            same(now, OLD, when)
            self.apply()
            same(read(self.root), NEW, f"{when}, then applied")
            return "old"
        same(now, NEW, when)
        undone(self.folder)
        same(read(self.root), OLD, f"{when}, then undone")
        return "new"


def killed_on_fuse(base: Path) -> None:
    """Kill the process on a file system that cannot rename without replacing."""
    for name in ("disk", "shown"):
        (base / name).mkdir()
    subprocess.run(["/usr/bin/bindfs", base / "disk", base / "shown"], check=True)
    try:
        case = Case(base)
        case.root = base / "shown" / "root"
        case.changes, case.data = difference(case.root, OLD, NEW)
        killed(base, case, WIDE)
    finally:
        subprocess.run(["/usr/bin/umount", base / "shown"], check=True)


def killed(base: Path, given: Case | None = None, stride: int = STRIDE) -> None:
    """Kill the process at every *stride*-th call, and its recovery twice at random calls."""
    case = given or Case(base)
    results: list[str] = []
    dice = random.Random(7)  # noqa: S311 - nothing secret
    while True:
        number = stride * len(results) + 1
        case.begin()
        code = in_child(case.apply, partial(at_call, number, die))
        if code != KILLED:
            break
        for _ in range(2):
            call = dice.randint(1, 40)
            again = in_child(lambda: recover(case.folder), partial(at_call, call, die))
            if again not in {KILLED, FINE}:
                raise SystemExit(f"killed at call {number}, then recovery at {call}: it ended with {again}")
        recover(case.folder)
        recover(case.folder)
        results.append(case.check(f"killed at call {number}"))
    if code != FINE:
        raise SystemExit(f"without a kill it ended with {code}")
    same(read(case.root), NEW, "not killed")
    if results != sorted(results, reverse=True):
        raise SystemExit(f"the mark is no point in time: {results}")
    say(f"{results.count('old')} old, {results.count('new')} new")


def disturbed(base: Path) -> None:
    """Replace a file that is about to change, at every call; the replacement is never lost."""
    case = Case(base)
    foreign = ("file", 0o644, b"somebody else's")
    names = ("changed", "deleted", "to-folder", "open/changed", "added", "to-folder/a/b", "mode")
    codes: list[int] = []

    def disturb(name: str) -> None:
        other = base / "other"
        other.write_bytes(foreign[2])
        other.chmod(foreign[1])
        path = case.root / name
        if path.parent.is_dir() and not path.is_dir():
            other.replace(path)

    for first, name in enumerate(names, start=1):
        number = first - WIDE
        while True:
            number += WIDE
            case.begin()
            (base / "other").unlink(missing_ok=True)
            code = in_child(case.apply, partial(at_call, number, partial(disturb, name)))
            when = f"{name} replaced at call {number}: it ended with {code}"
            if (base / "other").exists():  # there was no place for it just then
                continue
            found = read(case.root)
            if found.get(name) != foreign:
                if found != NEW:
                    raise SystemExit(f"{when}, and {name} is {found.get(name)}")
                break  # it was never done: there are no more calls
            expected = {**(NEW if code == FINE else OLD), name: foreign}
            if code == REFUSED:
                # It lies where the old one has to go back to, or in a folder of ours that can only go without it.
                (case.root / name).unlink()
                recover(case.folder)
                found, expected = read(case.root), OLD
            elif code not in {FINE, CONFLICT}:
                raise SystemExit(when)
            same(found, expected, when)
            codes.append(code)
    say({code: codes.count(code) for code in sorted(set(codes))})


def written(base: Path) -> None:
    """Write into a file that is about to change, at every call; what was written is never lost."""
    case = Case(base)
    path, mark, text = case.root / "changed", base / "mark", b"written meanwhile"
    codes: list[int] = []

    def write() -> None:
        if path.is_file():
            path.write_bytes(text)
            mark.touch()

    number = 1 - WIDE
    while mark.exists() or not codes:
        number += WIDE
        case.begin()
        mark.unlink(missing_ok=True)
        code = in_child(case.apply, partial(at_call, number, write))
        if mark.exists() and read(case.root)["changed"][2] != text:
            raise SystemExit(f"written at call {number} and lost: it ended with {code}")
        codes.append(code)
    if {*codes} != {FINE, CONFLICT}:  # after the change, and before it
        raise SystemExit(f"it ended with {sorted(set(codes))}")
    say({code: codes.count(code) for code in sorted(set(codes))})


def led_outside(base: Path) -> None:
    """Swap a folder for a link to an outside folder at every call; nothing outside changes."""
    case = Case(base)
    outside, away = base / "outside", base / "away"
    codes: list[int] = []
    trap = {**OLD, "": ("folder", 0o755, b""), "changed": OLD["open/changed"], "deep": ("folder", 0o755, b"")}

    def swap(name: str) -> None:
        path = case.root / name
        if path.is_dir() and not path.is_symlink():
            path.rename(away)
            path.symlink_to(outside)

    for first, name in enumerate(("open", "gone", "to-folder", "added-tree", "to-file/a"), start=1):
        number = first - WIDE
        while True:
            number += WIDE
            case.begin()
            for path in (outside, away):
                if path.exists():
                    remove(path)
            put(outside, trap)
            code = in_child(case.apply, partial(at_call, number, partial(swap, name)))
            when = f"{name} swapped at call {number}: it ended with {code}"
            same(read(outside), trap, f"{when}: outside")
            if not away.exists():
                if code == FINE and read(case.root) == NEW and number > 100:
                    break
                continue
            if code not in {FINE, CONFLICT, REFUSED}:
                raise SystemExit(when)
            (case.root / name).unlink()
            mode = away.stat().st_mode
            away.chmod(0o700)  # else only root could move a folder elsewhere that its owner may not write to
            away.rename(case.root / name)
            (case.root / name).chmod(mode & 0o7777)
            recover(case.folder)
            case.check(when)
            codes.append(code)
    say({code: codes.count(code) for code in sorted(set(codes))})


def together(base: Path) -> None:
    """Apply two exclusive sets in two processes at once: one succeeds, the other reports a conflict."""
    root = base / "root"
    trees = [{**OLD, f"new-{n}": ("file", 0o644, b"n"), "changed": ("file", 0o644, b"%d" % n)} for n in range(2)]
    for _ in range(8):
        if root.exists():
            remove(root)
        put(root, OLD)
        sets = [difference(root, OLD, tree) for tree in trees]
        gate, go = os.pipe()
        pids = []
        for n in range(2):
            apply_one = partial(applied, *sets[n], base / f"state-{n}")
            pids.append(start(apply_one, partial(os.read, gate, 1)))
        os.write(go, b"go")
        codes = [ended(pid) for pid in pids]
        os.close(gate)
        os.close(go)
        if sorted(codes) != [FINE, CONFLICT]:
            raise SystemExit(f"they ended with {codes}")
        same(read(root), trees[codes.index(FINE)], "two at once")
    say("one of two")


def refused_owner(base: Path) -> None:
    """Apply a change whose owner cannot be set; print the error."""
    changes, data = difference(base / "root", {"f": ("file", 0o644, b"old")}, {"f": ("file", 0o600, b"new")})
    try:
        applied(changes, data, base / "mine" / "state")
    except HostError as exc:
        say(exc)


def closed_root(base: Path) -> None:
    """Kill the process at every call while it makes the root read-only."""
    case = Case(base)
    new = {**OLD, "": ("folder", 0o555, b""), "changed": ("file", 0o644, b"new")}
    # Nothing can be done below the outer one once it has its mode.
    new |= {"outer": ("folder", 0o600, b""), "outer/inner": ("folder", 0o555, b"")}
    case.changes, case.data = difference(case.root, OLD, new)
    number, code = 0, KILLED
    while code == KILLED:
        number += 1
        case.begin()
        code = in_child(case.apply, partial(at_call, number, die))
        recover(case.folder)
        found = read(case.root)
        if found != OLD:
            same(found, new, f"killed at call {number}")
    if code != FINE or read(case.root) != new:
        raise SystemExit(f"it ended with {code}")
    say(number)


def mounted(base: Path) -> None:
    """Mount something over a folder or file of the set; print the error."""
    root = base / "root"
    put(root, OLD)
    put(base / "other", {"": ("folder", 0o755, b""), "deep": ("folder", 0o755, b"")})
    for name in ("gone/deep", "gone"):
        subprocess.run(["/usr/bin/mount", "--bind", base / "other", root / name], check=True)
        before = read(base / "other")
        try:
            applied(*difference(root, OLD, NEW), base / "state")
        except HostError as exc:
            say(exc)
        subprocess.run(["/usr/bin/umount", root / name], check=True)
        same(read(base / "other"), before, "what is mounted")
        same(read(root), OLD, "where it is mounted")


def without_exchange(base: Path) -> None:
    """Apply on a file system without RENAME_EXCHANGE and RENAME_NOREPLACE."""
    _block({"x86_64": 316, "aarch64": 276}[os.uname().machine], errno.EINVAL, flags_at=48)  # renameat2's fifth argument
    case = Case(base)
    case.begin()
    case.apply()
    same(read(case.root), NEW, "without exchange")
    undone(case.folder)
    same(read(case.root), OLD, "without exchange, undone")
    killed(base, stride=WIDE)
    led_outside(base)


def without_openat2(base: Path) -> None:
    """Apply where the kernel has no openat2; print the error."""
    case = Case(base)
    case.begin()
    _block(437, errno.ENOSYS)
    try:
        case.apply()
    except HostError as exc:
        say(exc)
    same(read(case.root), OLD, "without openat2")
    if left := sorted(path.name for path in case.folder.iterdir()):
        raise SystemExit(f"{left} is left")


def _block(number: int, error: int, flags_at: int = 0) -> None:
    """Make a call fail for this process and its children (seccomp(2)). flags_at: only if the argument there is not 0.

    flags_at is an offset in struct seccomp_data; at 0 is the call's number.
    """
    load, equal, give = 0x20, 0x15, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000
    program = [
        (load, 0, 0, 0),
        (equal, 0, 3, number),
        (load, 0, 0, flags_at),
        (equal, 1, 0, 0),
        (give, 0, 0, refuse | error),
        (give, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, head, 0, 0):
        raise SystemExit(f"no seccomp: {os.strerror(ctypes.get_errno())}")


RUNS = {
    "killed": killed,
    "killed-on-fuse": killed_on_fuse,
    "disturbed": disturbed,
    "written": written,
    "led-outside": led_outside,
    "together": together,
    "closed-root": closed_root,
    "refused-owner": refused_owner,
    "mounted": mounted,
    "without-exchange": without_exchange,
    "without-openat2": without_openat2,
}

if __name__ == "__main__":
    settings.SETTLE_S = 0.02  # type: ignore[misc] # nothing that is in the way here goes by itself
    if len(sys.argv) > 3:
        os.setgroups([])
        os.setresgid(*[int(sys.argv[3])] * 3)
        os.setresuid(*[int(sys.argv[3])] * 3)
    RUNS[sys.argv[1]](Path(sys.argv[2]))
