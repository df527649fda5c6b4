"""The gate's process: it takes its rights away from itself before it hears of anything hostile.

    python -I -S -c CODE CONTROL_FD CONFIG_FD LOG_FD ACCOUNT_FD RESOLVER_FD UID

`processes.py` starts it. CONTROL_FD: a socket of packets; the gate says on it which walls stand, gets the stream from
the guest by it, and ends when its other end does. UID: a uid of its own to take where it was started by root, else -1.
"""

from __future__ import annotations

import array
import asyncio
import encodings.punycode  # noqa: F401 - as idna below
import gc
import json
import os
import socket
import sys
from functools import partial
from typing import Any, Final, NamedTuple

import idna  # noqa: F401 - names.py imports it where it is needed, which is too late here
import msgspec

from x07_sandbox.jail.own_limits import confine
from x07_sandbox.network.dialler import Dialler, Names, bind_tells_own
from x07_sandbox.network.gate import Gate
from x07_sandbox.network.ledger import Ledger
from x07_sandbox.network.rules import Allowlist, make_allowlist
from x07_sandbox.network.settings import settings_from_json
from x07_sandbox.policy.decode import decode_policy

READY: Final = "ready"
RESOLVER_LOST: Final = 3
BUG: Final = 4
_MESSAGE_MAX: Final = 4096


def allowlist_of(config: dict[str, Any]) -> Allowlist:
    """Return what decides, from the configuration that the runner has written. Raises SandboxError."""
    policy = decode_policy(config["policy"].encode(), source="the policy")
    denied = {host: None if ports is None else frozenset(ports) for host, ports in config["denied"].items()}
    return make_allowlist(policy, denied, settings_from_json(config["settings"]))


class Ends(NamedTuple):
    """What a gate has from its runner. control, names: sockets of packets; names leads to the resolver."""

    control: socket.socket
    names: socket.socket
    log_fd: int


async def _serve(allowlist: Allowlist, ends: Ends, *, bind_tells: bool) -> Ledger:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_fail)
    control = ends.control
    ledger = Ledger(partial(_write, ends.log_fd), loop.time)
    names = Names(ends.names, loop)
    gate = Gate(allowlist, Dialler(allowlist, names, loop, bind_tells=bind_tells), ledger, loop)
    control.setblocking(False)  # noqa: FBT003 - it takes no names
    finished = asyncio.Event()
    loop.add_reader(control, _hear, control, gate, finished)
    lost = loop.create_task(names.lost.wait())
    done = loop.create_task(finished.wait())
    await asyncio.wait({lost, done}, return_when=asyncio.FIRST_COMPLETED)
    gate.close()
    if not finished.is_set():
        sys.exit(RESOLVER_LOST)
    return ledger


def _fail(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """End at the first bug, which asyncio would only log: a gate that has one must not go on deciding."""
    exc = context.get("exception")
    os.write(2, f"{context['message']}: {type(exc).__name__}: {exc}\n".encode("ascii", "backslashreplace"))
    os._exit(BUG)


def _write(fd: int, line: bytes) -> bool:
    """Append to the log, and say whether that was done: a full disk costs lines, nothing else."""
    try:
        return os.write(fd, line) == len(line)
    except OSError:
        return False


def _hear(control: socket.socket, gate: Gate, finished: asyncio.Event) -> None:
    """Take the stream from the guest, or the end."""
    loop = asyncio.get_running_loop()
    fds = array.array("i")
    data, rights, _, _ = control.recvmsg(_MESSAGE_MAX, socket.CMSG_SPACE(4 * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
    if not data or len(fds) != 1:
        loop.remove_reader(control)
        finished.set()
        return
    stream = socket.socket(fileno=fds[0])
    stream.setblocking(False)  # noqa: FBT003 - it takes no names
    gate.starting = loop.create_task(loop.create_connection(lambda: gate, sock=stream))


def _gate(words: list[str]) -> None:
    control_fd, config_fd, log_fd, account_fd, resolver_fd, uid = map(int, words)
    with os.fdopen(config_fd, "rb") as file:
        allowlist = allowlist_of(json.load(file))
    ends = Ends(socket.socket(fileno=control_fd), socket.socket(fileno=resolver_fd), log_fd)
    bind_tells = bind_tells_own()
    # The loop is made before: what it opens, a socket pair and an epoll object, it keeps.
    with asyncio.Runner() as runner:
        runner.get_loop()
        walls = confine("gate", uid=None if uid < 0 else uid)
        gc.freeze()
        ends.control.send(json.dumps({"state": READY, "walls": walls}).encode())
        ledger = runner.run(_serve(allowlist, ends, bind_tells=bind_tells))
    os.write(account_fd, msgspec.json.encode(ledger.use()))


def main() -> None:
    """Be a gate, as the command line says."""
    _gate(sys.argv[1:])
