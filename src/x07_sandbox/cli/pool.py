"""`x07 pool`: start, stop and query the process that keeps VMs ready."""

import argparse
from typing import Final

import msgspec

from x07_sandbox.backends.lease import GONE_S, Query, Stop, ask, connect_to_pool, pool_dir, send
from x07_sandbox.cli.console import Progress, show
from x07_sandbox.cli.json_output import document_wanted, print_document
from x07_sandbox.cli.parser import add_document_flags, inner_verb, whole_number
from x07_sandbox.errors import Command, HostError
from x07_sandbox.host import settings
from x07_sandbox.host.linux import peer_of
from x07_sandbox.host.waiting import wait_readable
from x07_sandbox.library import resident
from x07_sandbox.reports.commands import PoolReport, PoolStatus

_EPILOG: Final = """x07 run takes a waiting VM if there is one, and the pool then starts another one. Each VM runs only
one program. A waiting VM uses memory, but almost no CPU time. The pool stops after --idle seconds without use.

examples:
  x07 pool start --size 4 --idle 3600
  x07 run prog.py                       use one of the four
  x07 pool status --json
  x07 pool stop
"""


def add_pool(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 pool`."""
    parser.epilog = _EPILOG
    inner = parser.add_subparsers(metavar="ACTION", required=True)
    start = inner_verb(inner, "start", "start the pool")
    size, idle = whole_number(1, 4096, "VMs"), whole_number(1, 86_400, "seconds")
    start.add_argument("--size", type=size, default=2, metavar="N", help="number of waiting VMs (default: 2)")
    doc = "stop the pool after S seconds without use (default: 600)"
    start.add_argument("--idle", type=idle, default=settings.POOL_IDLE_S, metavar="S", help=doc)
    start.add_argument(
        "--image", default="", metavar="NAME|DIGEST", help="guest image (default: the one named default)"
    )
    stop = inner_verb(inner, "stop", "stop the pool and all its VMs, including those that run a program")
    status = inner_verb(inner, "status", "show how many VMs are waiting, and how many are running a program")
    for action, carry_out in ((start, _start), (stop, _stop), (status, _status)):
        add_document_flags(action, "print the pool's status as one JSON object")
        action.set_defaults(carry_out=carry_out)


def _start(options: argparse.Namespace) -> int:
    progress = Progress("pool")
    progress("starting")
    words = str(options.size), str(options.idle), options.image
    log = pool_dir() / "log"
    with log.open("a+b") as errors:
        log.chmod(0o600)
        module = "x07_sandbox.library.pool_server"
        count, pid = resident.start("cannot start the pool", module, *words, log=errors, progress=progress)
    progress.done(f"{'1 VM is' if count == '1' else f'{count} VMs are'} ready (process {pid})")
    if document_wanted(options):
        print_document(PoolReport(pool=_query_status()), options)
    return 0


def _stop(options: argparse.Namespace) -> int:
    connection = connect_to_pool()
    if connection is not None:
        with connection:
            send(connection, Stop())
            wait_readable(connection.fileno(), 2 * GONE_S)  # the answer is the end of its process
            if connect_to_pool() is not None:
                raise HostError("cannot stop the pool", "it does not end", "Check it with x07 pool status")
    if not print_document(PoolReport(pool=None), options):
        show("no pool is running" if connection is None else "the pool has stopped")
    return 0


def _status(options: argparse.Namespace) -> int:
    pool = _query_status()
    if print_document(PoolReport(pool=pool), options):
        return 0
    if pool is None:
        show("no pool is running")
        return 0
    unused = f"unused for {pool.unused_s:.0f} s, ends after {pool.idle_s:.0f} s (process {pool.pid})"
    show(f"{pool.ready} of {pool.size} VMs ready, {pool.running} running, {pool.claimed} used so far; {unused}")
    show("no process carries out commands" if pool.front is None else f"process {pool.front} carries out commands")
    if pool.problem:
        show(f"no VM can be started now: {pool.problem}")
    return 0


def _query_status() -> PoolStatus | None:
    """Return the status that the pool reports, or None if no pool is running. Raises HostError."""
    connection = connect_to_pool()
    if connection is None:
        return None
    with connection:
        pid, _ = peer_of(connection)
        try:
            status: PoolStatus | None = ask(connection, Query(), PoolStatus)
        except msgspec.MsgspecError as exc:  # a pool of another version
            restart = ("Restart it: ", Command("x07 pool stop, x07 pool start"))
            raise HostError("cannot read the pool's status", str(exc), restart) from exc
    if status is None:
        if (still := connect_to_pool()) is None:
            return None
        still.close()
        fix = f"End it with kill -KILL {pid}, or, if it is suspended, resume it with kill -CONT {pid}"
        raise HostError("cannot query the pool", f"its process {pid} does not answer", fix)
    return status
