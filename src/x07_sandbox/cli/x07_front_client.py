#!/bin/false
"""The client of the front: how an installed command starts, and lets a pool's front carry it out if there is one.

This file is also installed beside the launchers, which import it into a Python that knows no packages yet (-S), since
finding these takes as long as the start of Python. So it imports only what is loaded or built in. It is no command,
though it is in the folder of the commands. `cli/front` describes the messages.
"""

import os
import sys

TYPE_CHECKING = False  # importing typing takes longer than all that happens here
if TYPE_CHECKING:
    import signal
    from _socket import socket
    from types import FrameType
else:
    import _signal as signal

PROTOCOL = b"1"
FILE = "x07-front-"
"""Begins the names of the memory files."""

_RIGHTS = ("Uid:", "Gid:", "Groups:", "Cap", "NoNewPrivs:", "Seccomp")
_NAMESPACES = ("user", "mnt", "pid", "net")
_FORWARDED = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGTSTP),
)


def start() -> None:
    """Carry out the command line: the module of the command, and its arguments. Does not return."""
    module, *words = sys.argv[1:]
    hand_over(module, words)
    sys.argv[1:] = words
    import site

    site.main()
    __import__(f"x07_sandbox.cli.{module}", fromlist=["entry"]).entry()


def hand_over(module: str, words: list[str]) -> None:
    """Let the front carry a command out, and end with its exit code. Return if this process has to do it itself."""
    opened: list[int] = []
    try:
        if folder := _pool():
            _ask(folder, module, words, opened)
    except KeyboardInterrupt:
        os._exit(130)
    except Exception:  # noqa: BLE001 - whatever it is, this process can carry the command out
        pass
    for fd in opened:
        os.close(fd)


def _pool() -> str:
    """Return the folder of a pool whose front may carry the command out, or an empty string."""
    env = os.environ
    caches = env.get("XDG_CACHE_HOME") or env.get("HOME", "") + "/.cache"
    folder = (env.get("X07_VM_CACHE_DIR") or caches + "/x07-sandbox") + "/pool"
    wanted = env.get("X07_NO_FRONT", "").strip().lower() in {"", "0", "false", "no"}
    if not wanted or not os.path.lexists(folder + "/front"):
        return ""
    if any(name.startswith(("LD_", "GLIBC_")) for name in env):  # they have an effect on this process
        return ""
    if {sys.getfilesystemencoding(), getattr(sys.stdout, "encoding", "utf-8")} != {"utf-8"}:
        return ""
    return folder if _in_foreground() else ""


def _in_foreground() -> bool:
    return not os.isatty(0) or os.tcgetpgrp(0) == os.getpgrp()


def _ask(folder: str, module: str, words: list[str], opened: list[int]) -> None:
    """Find the front, ask it, and end with the command. Return or raise an error if it declines.

    opened: gets the descriptors that are then to be closed.
    """
    import _socket

    fds = set(map(int, os.listdir("/proc/self/fd")))
    free = os.open("/", os.O_PATH)  # the number that the listing had, too
    os.close(free)
    fds.discard(free)
    opened.extend(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW) for path in (folder, "."))
    place, here = opened
    if (info := os.fstat(place)).st_uid != os.geteuid() or info.st_mode & 0o77:
        return
    link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    link.settimeout(1)
    link.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
    link.connect(f"/proc/self/fd/{place}/front")
    _, pid = _message(link, 1)
    opened.append(os.pidfd_open(pid))
    worker = _Worker(opened[-1])
    name = FILE + os.urandom(16).hex()
    opened.append(os.memfd_create(name))
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    theirs = [text[7:].partition(" ")[0] for text in links if text.startswith(f"/memfd:{FILE}")]
    link.send(theirs[0].encode())
    if _message(link, len(name)) != (name.encode(), pid) or _rights(pid) != _rights("self"):
        return
    signal.pidfd_send_signal(worker.fd, 0)  # raises if it has ended
    if _accepts(link, _request(module, words, sorted(fds)), [*sorted(fds), here]):
        _follow(link, worker)


def _message(link: "socket", size: int) -> tuple[bytes, int]:
    """Receive a message, and return it with the pid of its sender."""
    import _socket

    data, parts, _, _ = link.recvmsg(size, _socket.CMSG_SPACE(12))
    senders = [part for _, kind, part in parts if kind == _socket.SCM_CREDENTIALS]
    return data, int.from_bytes(senders[0][:4], sys.byteorder)


def _rights(who: int | str) -> list[str]:
    with open(f"/proc/{who}/status", encoding="utf-8", errors="replace") as file:
        found = [line for line in file if line.startswith(_RIGHTS)]
    return found + [os.readlink(f"/proc/{who}/ns/{name}") for name in _NAMESPACES]


def _request(module: str, words: list[str], fds: list[int]) -> bytes:
    errors = getattr(sys.stdout, "errors", "strict").encode()
    head = PROTOCOL, os.fsencode(sys.executable), module.encode(), errors, b" ".join(b"%d" % fd for fd in fds)
    rest = b"%d" % len(words), *map(os.fsencode, words), *map(b"=".join, os.environb.items())
    return b"".join(part + b"\0" for part in (*head, *rest))


def _accepts(link: "socket", request: bytes, fds: list[int]) -> bool:
    """Send a request with descriptors, and return whether the worker accepts it."""
    import _socket

    parts = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
    head = len(request).to_bytes(4, "big")
    sent = link.sendmsg([head, request], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, parts)])
    link.sendall(request[sent - len(head) :])
    return link.recv(1) == b"."


class _Worker:
    """The process that carries the command out. last: the signal that may have ended it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.last: int = signal.SIGKILL

    def send(self, number: int) -> None:
        """Send a signal, if the process is still there."""
        try:
            signal.pidfd_send_signal(self.fd, number)
        except OSError:
            pass

    def forward(self, number: int, _frame: "FrameType | None") -> None:
        """Handle a signal by sending it."""
        self.last = self.last if number == signal.SIGWINCH else number
        self.send(number)

    def suspend(self, number: int, _frame: "FrameType | None") -> None:
        """Handle SIGTSTP: stop both processes, until this one continues."""
        self.send(signal.SIGSTOP)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        try:
            for _ in range(100):  # as if the command had read from the terminal in the background
                if _in_foreground():
                    break
                os.kill(os.getpid(), signal.SIGTTIN)
        except OSError:
            pass  # the terminal is gone
        signal.signal(number, self.suspend)
        self.send(signal.SIGCONT)
        self.send(signal.SIGWINCH)


def _starts(link: "socket", worker: _Worker) -> bool:
    """Let the worker start the command. Return whether it has started, and not ended before."""
    try:
        link.send(b".")
        try:
            return bool(link.recv(1))
        except TimeoutError:
            worker.send(signal.SIGKILL)
            return bool(link.recv(1))
    except OSError:
        return False


def _follow(link: "socket", worker: _Worker) -> None:
    """Let the command start, forward signals to it, and end as it does. Return if it does not start."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    if not _starts(link, worker):
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return
    try:
        for number in _FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, worker.suspend if number == signal.SIGTSTP else worker.forward)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        link.settimeout(None)
        if code := link.recv(1):
            os._exit(code[0])
        if worker.last != signal.SIGKILL:  # the worker was killed
            signal.signal(worker.last, signal.SIG_DFL)
        os.kill(os.getpid(), worker.last)
    finally:
        os._exit(125)
