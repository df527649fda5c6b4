"""`x07 pool`: start, stop and look at the process that keeps machines warm."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from x07_sandbox.backends.lease import GONE_S, PROTOCOL, connected, peer_of, pool_dir, receive, send
from x07_sandbox.cli.console import Progress, show
from x07_sandbox.cli.json_output import print_document, wanted
from x07_sandbox.cli.parser import add_document_flags, whole_number
from x07_sandbox.errors import HostError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.decoding import prepared
from x07_sandbox.reports.pool import PoolReport, PoolStatus

if TYPE_CHECKING:
    from typing import IO

_EPILOG = """A warm machine has run two programs of ours and waits for one of yours. `x07 run` takes it where there
is one, and another is made in its place. No machine is used for two programs. Each that waits takes memory, and hardly
any time of the processor. The pool ends by itself when nobody has used it for a while.

examples:
  x07 pool start --size 4 --idle 3600
  x07 run prog.py                       takes one of the four
  x07 pool status --json
  x07 pool stop
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb and its own verbs."""
    parser = verbs.add_parser("pool", help=help, description="Machines that wait, warm, for programs.", epilog=_EPILOG)
    inner = parser.add_subparsers(metavar="ACTION", required=True)
    start = inner.add_parser("start", help="keep machines warm from now on")
    size, idle = whole_number(1, 4096, "machines"), whole_number(1, 86_400, "seconds")
    start.add_argument("--size", type=size, default=2, metavar="N", help="how many (default: 2)")
    doc = "end when nobody has used it for S seconds (default: 600)"
    start.add_argument("--idle", type=idle, default=settings.POOL_IDLE_S, metavar="S", help=doc)
    start.add_argument("--image", default="", metavar="NAME|DIGEST", help="the guest image (default: default)")
    stop = inner.add_parser("stop", help="end it, and every machine of its that waits or runs")
    status = inner.add_parser("status", help="how many wait and run")
    for action, carry_out in ((start, _start), (stop, _stop), (status, _status)):
        add_document_flags(action, "how it stands then, as one JSON object")
        action.set_defaults(carry_out=carry_out)


def _start(options: argparse.Namespace) -> int:
    progress = Progress("pool")
    progress("starting")
    log = pool_dir() / "log"
    ready_r, ready_w = os.pipe2(os.O_CLOEXEC)
    argv = [sys.executable, "-m", "x07_sandbox.pool.server"]
    argv += [str(options.size), str(options.idle), options.image, str(ready_w)]
    with os.fdopen(ready_r, "rb") as ready, log.open("ab") as errors:
        log.chmod(0o600)
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(ready_w,),
            start_new_session=True,
            cwd="/",
        )
        os.close(ready_w)
        try:
            told = _heard(ready, progress)
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise
    if "ready" in told:
        progress.done(f"{told['ready']} machines are warm (process {child.pid})")
        if wanted(options):
            print_document(PoolReport(pool=_told()), options)
        return 0
    child.terminate()
    child.wait()
    words = {"what": "cannot start the pool", "why": f"its process ended; see {log}", "fix": "Run x07 doctor"}
    kind = UsageError if told.get("usage") else HostError
    raise kind(*(str(told.get(key, word)) for key, word in words.items()))


def _heard(ready: IO[bytes], progress: Progress) -> dict[str, Any]:
    """What the pool's process says in the end: that it is ready, or what went wrong."""
    for line in ready:
        told: dict[str, Any] = json.loads(line)
        if "progress" not in told:
            return told
        progress(str(told["progress"]))
    return {}


def _stop(options: argparse.Namespace) -> int:
    connection = connected()
    if connection is not None:
        with connection:
            connection.settimeout(2 * GONE_S)
            send(connection, {"protocol": PROTOCOL, "want": "stop"})
            if receive(connection) is not None or connected() is not None:
                raise HostError("cannot stop the pool", "it does not end", "Look at it with x07 pool status")
    if not print_document(PoolReport(pool=None), options):
        show("no pool runs" if connection is None else "the pool has ended")
    return 0


def _status(options: argparse.Namespace) -> int:
    pool = _told()
    if print_document(PoolReport(pool=pool), options):
        return 0
    if pool is None:
        show("no pool runs")
        return 0
    unused = f"unused for {pool.unused_s:.0f} of {pool.idle_s:.0f} s (process {pool.pid})"
    show(f"{pool.ready} of {pool.size} machines wait, {pool.running} run, {pool.claimed} were taken; {unused}")
    if pool.problem:
        show(f"none can be made now: {pool.problem}")
    return 0


def _told() -> PoolStatus | None:
    """What the pool's process says of itself; None where there is none, or it ends just now. Raises HostError."""
    connection = connected()
    if connection is None:
        return None
    with connection:
        pid, _ = peer_of(connection)
        with contextlib.suppress(OSError):  # as its end, which the answer tells
            send(connection, {"protocol": PROTOCOL, "want": "status"})
        answer = receive(connection)
    if answer is None:
        if (still := connected()) is None:
            return None
        still.close()
        fix = f"If it is stopped, let it go on with kill -CONT {pid}, or end it with kill -KILL {pid}"
        raise HostError("cannot ask the pool", f"its process {pid} does not answer", fix)
    told = {key: value for key, value in answer[0].items() if key != "protocol"}
    try:
        return msgspec.convert(told, prepared(PoolStatus))
    except msgspec.ValidationError as exc:  # one that another version of ours has started
        raise HostError("cannot read what the pool says", str(exc), "Run x07 pool stop, and start it anew") from exc
