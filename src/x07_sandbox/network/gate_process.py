"""The gate's process, which confines itself before it reads hostile data. `processes.py` starts it.

    python -I -S -c CODE CONTROL_FD CONFIG_FD LOG_FD ACCOUNT_FD RESOLVER_FD UID

CONTROL_FD: a packet socket. The gate reports its confinement on it and receives the guest's stream from it. Later, the
gate writes its account to ACCOUNT_FD for each message ACCOUNT, and sends the message back. It exits when the other end
is closed. UID: the uid to switch to if root started the process, else -1.
"""

import array
import asyncio
import encodings.punycode  # noqa: F401 - used by idna
import gc
import json
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import idna  # noqa: F401 - names.py imports it lazily, which fails in a confined process
import msgspec

from x07_sandbox.jail.own_limits import confine
from x07_sandbox.network.dialler import Dialler, ResolverClient, bind_reveals_own
from x07_sandbox.network.gate import Gate, mode_of
from x07_sandbox.network.ledger import ACCOUNT, Ledger
from x07_sandbox.network.rules import Allowlist, make_allowlist
from x07_sandbox.network.settings import settings_from_json
from x07_sandbox.policy.decode import decode_policy

READY: Final = "ready"
RESOLVER_LOST: Final = 3
BUG: Final = 4
_MESSAGE_MAX: Final = 4096


async def _serve(
    allowlist: Allowlist,
    control: socket.socket,
    resolver: socket.socket,
    log_fd: int,
    account_fd: int,
    *,
    own_by_bind: bool,
) -> Ledger:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_fail)
    ledger = Ledger(partial(_write, log_fd), loop.time)
    names = ResolverClient(resolver, loop)
    gate = Gate(allowlist, Dialler(allowlist, names, loop, own_by_bind=own_by_bind), ledger, loop)
    control.setblocking(False)  # noqa: FBT003 - it takes no names
    finished = asyncio.Event()
    loop.add_reader(control, _hear, control, gate, finished, partial(_write_account, account_fd, ledger))
    lost = loop.create_task(names.lost.wait())
    done = loop.create_task(finished.wait())
    await asyncio.wait({lost, done}, return_when=asyncio.FIRST_COMPLETED)
    gate.close()
    if not finished.is_set():
        sys.exit(RESOLVER_LOST)
    return ledger


def _fail(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Exit on an unhandled exception. asyncio would only log the exception, but a faulty gate must not decide."""
    exc = context.get("exception")
    os.write(2, f"{context['message']}: {type(exc).__name__}: {exc}\n".encode("ascii", "backslashreplace"))
    os._exit(BUG)


def _write(fd: int, line: bytes) -> bool:
    """Append a line to the log. Return whether that succeeded; a full disk only loses log lines."""
    try:
        return os.write(fd, line) == len(line)
    except OSError:
        return False


def _write_account(fd: int, ledger: Ledger) -> None:
    data = msgspec.json.encode(ledger.use())
    os.pwrite(fd, data, 0)
    os.ftruncate(fd, len(data))


def _answer(control: socket.socket, write_account: Callable[[], None]) -> None:
    write_account()
    control.send(ACCOUNT)


def _hear(control: socket.socket, gate: Gate, finished: asyncio.Event, write_account: Callable[[], None]) -> None:
    """Receive the guest's stream, answer ACCOUNT, or notice that the control socket was closed."""
    loop = asyncio.get_running_loop()
    fds = array.array("i")
    data, rights, _, _ = control.recvmsg(_MESSAGE_MAX, socket.CMSG_SPACE(4 * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
    if data == ACCOUNT and not fds:
        # What the guest sent before is readable now, and is read in this turn of the loop.
        loop.call_soon(_answer, control, write_account)
        return
    if not data or len(fds) != 1:
        loop.remove_reader(control)
        finished.set()
        return
    stream = socket.socket(fileno=fds[0])
    stream.setblocking(False)  # noqa: FBT003 - it takes no names
    gate.starting = loop.create_task(loop.create_connection(lambda: gate, sock=stream))


def main() -> None:
    """Run the gate."""
    control_fd, config_fd, log_fd, account_fd, resolver_fd, uid = map(int, sys.argv[1:])
    with os.fdopen(config_fd, "rb") as file:
        config = json.load(file)
    policy = decode_policy(config["policy"].encode(), source="the policy")
    denied = {host: None if ports is None else frozenset(ports) for host, ports in config["denied"].items()}
    allowlist = make_allowlist(policy, denied, settings_from_json(config["settings"]))
    control, resolver = socket.socket(fileno=control_fd), socket.socket(fileno=resolver_fd)
    own_by_bind = bind_reveals_own()
    if any(mode_of(port, allowlist) == "any" for entry in allowlist.entries for port in entry.ports):
        import hpack  # noqa: F401 - http2_frames.py imports it lazily, since it is slow to import
    # The loop opens a socket pair and an epoll descriptor, which the confinement would forbid.
    with asyncio.Runner() as runner:
        runner.get_loop()
        walls = confine("gate", uid=None if uid < 0 else uid)
        gc.freeze()
        control.send(json.dumps({"state": READY, "walls": walls}).encode())
        ledger = runner.run(_serve(allowlist, control, resolver, log_fd, account_fd, own_by_bind=own_by_bind))
    _write_account(account_fd, ledger)
