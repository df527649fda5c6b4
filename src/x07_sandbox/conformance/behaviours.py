"""The behaviours that every backend must have, with the programs and observations that prove them, and their check.

An observation runs a program as a user would and returns facts by name. It runs once for all behaviours that use it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from x07_sandbox.backends.base import Job, MachineKind, Needs
from x07_sandbox.conformance import commands
from x07_sandbox.conformance.harness import (
    ANSWER_S,
    RUNNER,
    Bench,
    BrokenError,
    Facts,
    expect,
    fact,
    open_bench,
    policy_with,
    remaining,
)
from x07_sandbox.errors import printable
from x07_sandbox.host import settings
from x07_sandbox.host.paths import cache_folder
from x07_sandbox.host.processes import own_identity
from x07_sandbox.host.waiting import Caller, Cancel
from x07_sandbox.images.store import find_image
from x07_sandbox.policy.denials import CONNECTS
from x07_sandbox.policy.features import Isolation
from x07_sandbox.policy.guest import RAM_CLASSES
from x07_sandbox.policy.model import HostPorts
from x07_sandbox.records.runs import Claim, new_run_id

if TYPE_CHECKING:
    from x07_sandbox.sessions.result import Result

Group = Literal[
    "channel", "files", "outcome", "deadline", "stop", "limits", "isolation", "network", "images", "roots", "commands"
]
Check = Callable[[Bench], None]


class Behaviour(msgspec.Struct, frozen=True, kw_only=True):
    """A promise about every backend, and a check that raises BrokenError if the promise is broken.

    needs: the capability (policy/features) without which the check is skipped; empty if the check needs none.
    """

    name: str
    group: Group
    promise: str
    check: Check
    needs: str = ""


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The outcome of checking one behaviour. reason: empty if it passed. seconds: duration of the check."""

    name: str
    group: str
    promise: str
    verdict: Literal["passed", "failed", "gap", "skipped"]
    reason: str = ""
    seconds: float = 0.0


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The outcomes of all behaviours of one backend."""

    backend: str
    isolation: Isolation
    verdicts: tuple[Verdict, ...]


class ConformReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 conform --json`. good: whether no check failed; the exit code is then 0, else 1."""

    schema_version: Literal["x07.sandbox.conform@0.1.0"] = "x07.sandbox.conform@0.1.0"
    good: bool
    backends: tuple[Report, ...]


# harness.LAUNCHER runs these programs. It provides the names json, os, signal, sys, time and tried().


def _ends(outcome: str, exit_code: int, code: str, **limits: int) -> Check:
    end = outcome, exit_code
    return lambda bench: expect(_END, end, _end(bench.run(code, policy=policy_with(limits=limits))))


_END: Final = "outcome and exit code"


def _end(result: Result) -> tuple[str, int | None]:
    return result.outcome, result.x07_exit_code


_ARGS: Final = ("", "-x", "two words", "line\nend", "\N{SNOWMAN}")
_ENV: Final = {"CONFORMANCE": "a word, \N{SNOWMAN}"}
_PYTHON_VARIABLES: Final = ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")
_OWN_VARIABLES: Final = frozenset({"PATH", "HOME", "LANG", "LC_CTYPE", *_PYTHON_VARIABLES, *_ENV})
_LOOK: Final = """
import socket
secret, port, pid, ticks, *args = sys.argv[2:]
stat = tried(open, f"/proc/{pid}/stat")
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
open("made", "w").write("made")
print(json.dumps({
    "arguments": args,
    "variables": dict(os.environ),
    "its file exists": "made" in os.listdir("."),
    "capabilities": int(status["CapEff"], 16),
    "interfaces": [name for _, name in socket.if_nameindex() if name != "lo"],
    "host server answers": tried(socket.create_connection, ("127.0.0.1", int(port)), 5) is not None,
    "host file opens": tried(open, secret) is not None,
    "caller in /proc": bool(stat) and stat.read().rpartition(")")[2].split()[19] == ticks,
}))
"""
_ECHO: Final = """
import hashlib
data = sys.stdin.buffer.read()
sys.stdout.buffer.write(data)
print(hashlib.sha256(data).hexdigest(), file=sys.stderr)
"""
_BYTES: Final = bytes(range(256)) * 2000
_SHA256: Final = hashlib.sha256(_BYTES).hexdigest()
_TALK: Final = "print('ready', flush=True)\nfor line in sys.stdin: print(line.strip().upper(), flush=True)\n"


def _seen(bench: Bench) -> Facts:
    secret = bench.folder / "secret"
    secret.write_text("secret", encoding="ascii")
    us = own_identity()
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = str(secret), str(server.getsockname()[1]), str(us.pid), str(us.start_ticks)
        facts: Facts = json.loads(bench.output(_LOOK, *words, *_ARGS, env=_ENV))
    variables = facts["variables"]
    return facts | {
        "its named variable": variables.get("CONFORMANCE"),
        "other variables": [name for name in variables if name not in _OWN_VARIABLES and not name.startswith("X07_")],
        "the next run finds its file": bench.output("print('made' in os.listdir('.'))") == "True\n",
    }


_UNCONNECTED: Final = """
import socket
for host in ("1.1.1.1", "2606:4700:4700::1111", "x07-conform.invalid"):
    tried(socket.create_connection, (host, 443), 5)
"""


def _unconnected(bench: Bench) -> Facts:
    denials = bench.run(_UNCONNECTED).denials
    return {"denied": sorted(one.subject for one in denials if one.action in CONNECTS)}


def _echoed(bench: Bench) -> Facts:
    result = bench.run(_ECHO, stdin=_BYTES)
    return {
        "digests of the input": (result.stderr.data.decode().strip(), result.digests.input),
        "both outputs are whole": result.stdout.data == _BYTES and result.stderr.data.count(b"\n") == 1,
        "artifact": result.digests.artifact,
        "image": result.digests.image,
    }


def _talked(bench: Bench) -> Facts:
    with bench.running(_TALK) as running:
        said = [running.line()]
        for word in ("one", "two"):
            running.stdin.write(f"{word}\n".encode())
            said.append(running.line())
        running.stdin.close()
        return {"lines": said, "outcome": running.result().outcome}


def _unread(bench: Bench) -> None:
    with bench.running("print('ready', flush=True)") as running:
        running.stdin.write(b"never read\n")
        expect("outcome", "ok", running.result().outcome)


def _artifact(bench: Bench) -> None:
    expect("where the program came from", "build", bench.build.artifact_from)
    data = os.pread(bench.artifact.fd, bench.artifact.size + 1, 0)
    expect("digest of what came back", f"sha256:{hashlib.sha256(data).hexdigest()}", bench.build.digests.artifact)
    expect("digest of what was run", bench.build.digests.artifact, bench.cached(_echoed)["artifact"])


def _beside(bench: Bench) -> None:
    files = {"beside.py": b"print('beside')\n"}
    expect("output", "beside\n", bench.output("", source=b"import beside", files=files, artifact=None))


_ABORT: Final = "os.kill(os.getpid(), signal.SIGABRT)"
_STAND: Final = "os.kill(os.getpid(), signal.SIGSTOP)"
_LEAVE: Final = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 3)
        time.sleep(1000)
    os._exit(0)
os.wait()
sys.exit(5)
"""
_DEAF: Final = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0: os.setsid()
while True: time.sleep(1)
"""
_LONG: Final = """
if os.fork() == 0:
    os.setsid()
    print("ready", flush=True)
time.sleep(1000)
"""
_WALL_MS: Final = 700
_GRACE_MS: Final = int(settings.STOPPED_S * 1000) + 1000  # STOP and its answer, and 1 s for a busy host


def _flooded(bench: Bench) -> None:
    result = bench.run("while True: sys.stdout.write('x' * 4096)", max_output_bytes=10_000)
    found = *_end(result), len(result.stdout.data)
    expect("outcome, exit code, bytes kept", ("output-limit", 153, 10_000), found)


def _left(bench: Bench) -> Facts:
    mark = secrets.token_hex(16)
    return {_END: _end(bench.run(_LEAVE, mark)), "processes left": remaining(mark)}


def _late(bench: Bench) -> Facts:
    mark = secrets.token_hex(16)
    result = bench.run(_DEAF, mark, policy=policy_with(limits={"wall_ms": _WALL_MS}))
    times = result.phases["run"].times_ms
    over_ms = times["end"] - times["started"] - _WALL_MS
    read_deadline = "met" if 0 <= over_ms <= _GRACE_MS else f"ended {over_ms:.0f} ms after its deadline"
    return {_END: _end(result), "grace": read_deadline, "processes left": remaining(mark)}


def _cancelled(bench: Bench) -> None:
    mark = secrets.token_hex(16)
    with bench.running(_LONG, mark) as running:
        running.line()
        running.cancel(signal.SIGINT)
        expect(_END, ("cancelled", 130), _end(running.result()))
    expect("processes left", [], remaining(mark))


_ENDS: Final = {"done", "reaped"}  # written by the runner, or by another process that stopped the job
_RECORD: Final = {"job.json", "owner.json", *_ENDS}


def _other_process(bench: Bench, *, kill: bool) -> Facts:
    """Start a run in another process and stop the run's job by its record. kill: whether to kill the process first."""
    mark = secrets.token_hex(16)
    with bench.in_process(_LONG, mark) as (runner, line):
        line()
        records = bench.owned_by(runner.pid)
        expect("jobs listed", [bench.backend.name], [record.backend for record in records])
        left = []
        if kill:
            runner.kill()
            runner.wait(ANSWER_S)
            left = remaining(mark, records[0].mark)
        stopped = [bench.backend.stop(records[0]) for _ in range(2)]
        outcome = "" if kill else line().partition(":")[0]
        runner.wait(ANSWER_S)
        return {
            "outcome": outcome,
            "stop returned": stopped,
            "processes left": left or remaining(mark, records[0].mark),
            "recorded as gone": any((records[0].folder / end).exists() for end in _ENDS),
            "files left": sorted({path.name for path in records[0].folder.iterdir()} - _RECORD),
            "jobs listed afterwards": len(bench.owned_by(runner.pid)),
        }


_stopped: Final = partial(_other_process, kill=False)
_killed: Final = partial(_other_process, kill=True)


def _gone_when_stopped(bench: Bench) -> None:
    facts = bench.cached(_stopped)
    expect("what is left", ([], []), (facts["processes left"], facts["files left"]))
    expect("recorded as gone", "yes", "yes" if facts["recorded as gone"] else "no")
    expect("outcome", "guest-lost", facts["outcome"])


_SMALL: Final = Needs(mem_bytes=256 * settings.MIB, tmp_bytes=settings.MIB, tasks=8, fds=64, files_bytes=0)


def _unused(bench: Bench) -> None:
    claim = Claim(run_id=new_run_id(), phase="run", wall_ms=1000)
    kind = MachineKind(image=bench.image, ram_bytes=RAM_CLASSES[0])
    with contextlib.closing(Cancel()) as cancel:
        with bench.backend.start(Job(claim=claim, kind=kind, caller=Caller(cancel=cancel), needs=_SMALL)) as instance:
            record, alive = instance.record, instance.exit_status() is None
        found = alive, remaining(record.mark), (record.folder / "done").exists()
    expect("alive, left, done", (True, [], True), found)


_FDS: Final = 64
_PROCS: Final = 8
_BURN: Final = "os.fork()\nos.fork()\nwhile True: pass\n"
_EAT: Final = "held = []\nwhile True: held.append(bytearray(1 << 20))\n"
_COUNT: Final = """
import resource
def count(most, make):
    made = []
    while len(made) < most and (one := tried(make)) is not None: made.append(one)
    return made
fds = count(1000, lambda: os.open("/dev/null", os.O_RDONLY))
for fd in fds: os.close(fd)
children = count(100, lambda: os.fork() or signal.pause())
for pid in children: os.kill(pid, signal.SIGKILL)
print(json.dumps({
    "descriptors": fds[-1] + 1,
    "children": len(children),
    "core files have content": resource.getrlimit(resource.RLIMIT_CORE)[1] > 1,  # 1: core(5), for pipes
}))
"""
_DARE: Final = """
import threading
done = []
def child():
    os.waitpid(os.fork() or os._exit(0), 0)
    done.append("child")
tried(threading.Thread(target=done.append, args=["thread"]).start)
tried(child)
print(json.dumps(done), flush=True)
tried(os.execv, "/bin/echo", ["echo", "executed"])
"""
_FIELDS: Final = {  # the policy fields of capabilities that are not fields themselves
    "no-network": "net.enabled",
    "network": "net.allow_hosts",
    "no-host-files": "fs.enabled",
    "no-host-variables": "env.enabled",
    "confinement": "process.max_live",
}


def _counted(bench: Bench) -> Facts:
    facts: Facts = json.loads(bench.output(_COUNT, policy=policy_with(limits={"fds": _FDS, "procs": _PROCS})))
    return facts


def _dared(bench: Bench) -> Facts:
    process = {"allow_spawn": False, "allow_exec": False, "allow_exec_prefixes": ()}
    policy = policy_with(threads={"enabled": False}, process=process)
    started, *executed = bench.output(_DARE, policy=policy).splitlines()
    return {"tasks started": json.loads(started), "programs executed": executed}


_CONNECT: Final = """
import socket
said = {}
for name, host in (("listed", "x07-conform.invalid"), ("unlisted", "unlisted.example"), ("special", "10.255.255.1")):
    with socket.socket() as sock:
        sock.settimeout(20)
        try:
            sock.connect((host, 80))
            said[name] = "connected"
        except OSError as exc:
            said[name] = "unknown" if isinstance(exc, socket.gaierror) else "refused"
print(json.dumps(said))
"""


def _connected(bench: Bench) -> Facts:
    hosts = tuple(HostPorts(host=host, ports=(80,)) for host in ("x07-conform.invalid", "10.255.255.1"))
    result = bench.run(_CONNECT, policy=policy_with(net={"allow_hosts": hosts}))
    expect(_END, ("ok", 0), _end(result))
    net = result.net
    rows = [] if net is None else [*net.failed, *net.denied]
    facts: Facts = json.loads(result.stdout.data)
    return facts | {"the gate saw": sorted(row.host for row in rows)}


def _honest_plan(bench: Bench) -> None:
    states = {control.field: control.state for control in bench.build.controls}
    for behaviour in BEHAVIOURS:
        if behaviour.needs and behaviour.name in bench.backend.known_gaps:
            claimed = behaviour.needs in bench.features.can_enforce
            if behaviour.needs != "network":  # the policy lists no hosts, which is held without a gate
                claimed |= states.get(_FIELDS.get(behaviour.needs, behaviour.needs)) == "enforced"
            expect(f"claim to hold {behaviour.needs}", expected=False, found=claimed)


_FOLDERS: Final = """
read, write = sys.argv[2:]
print(open(f"{read}/given").read())
try: open(f"{read}/given", "w")
except OSError: print("read-only")
open(f"{write}/changed", "w").write("after")
open(f"{write}/added", "w").write("new")
os.remove(f"{write}/deleted")
open("/x07/out/report", "w").write("report")
"""


def _damaged(bench: Bench) -> None:
    digest, images = bench.image_digest, bench.backend.engine_images
    with tempfile.TemporaryDirectory(prefix="conformance-", dir=cache_folder("tmp")) as cache:
        variables = {"X07_VM_CACHE_DIR": cache, "X07_VM_GUEST_IMAGE": digest}
        place = Path(f"{cache}/images/{digest.removeprefix('sha256:')}")
        if images is None:
            shutil.copytree(find_image(digest).folder, place)
        else:  # an engine's images cannot be damaged from here, which is a known gap
            shutil.copytree(os.environ[images.image_variable], place)
            variables = {images.image_variable: str(place)}
        largest = max(place.iterdir(), key=lambda path: path.stat().st_size)
        place.parent.chmod(0o700)
        mode, middle = largest.stat().st_mode, largest.stat().st_size // 2
        largest.chmod(0o600)
        with largest.open("r+b") as file:
            byte = os.pread(file.fileno(), 1, middle)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1]), middle)
        largest.chmod(mode)
        bench.expect_refused(largest.name, variables)


def _folders(bench: Bench) -> Facts:
    read, write, out = folders = [bench.folder / name for name in ("read", "write", "out")]
    for folder in folders:
        folder.mkdir()
    for path in (read / "given", write / "same", write / "changed", write / "deleted"):
        path.write_text("before", encoding="ascii")
    fs = {"read_roots": (str(read),), "write_roots": (str(write),), "deny_hidden": False}
    printed = bench.output(_FOLDERS, str(read), str(write), policy=policy_with(fs=fs), out=out).splitlines()
    after = {at.name: {path.name: path.read_text(encoding="ascii") for path in at.iterdir()} for at in folders}
    return after | {"printed": printed}


_WRITTEN: Final = {"same": "before", "changed": "after", "added": "new"}
_TABLE: Final[Mapping[Group, tuple[tuple[str, str, Check], ...]]] = {
    "channel": (
        ("arguments", "The program gets its arguments unchanged.", fact(_seen, "arguments", list(_ARGS))),
        ("variables", "The program gets the variables that the user named.",
            fact(_seen, "its named variable", _ENV["CONFORMANCE"])),
        ("input", "Input arrives complete and in order, and then ends.",
            fact(_echoed, "digests of the input", (_SHA256, f"sha256:{_SHA256}"))),
        ("outputs", "Both outputs arrive complete and separate.", fact(_echoed, "both outputs are whole")),
        ("streaming", "Input and output are streamed while the program runs.",
            fact(_talked, "lines", ["ready", "ONE", "TWO"])),
        ("end-of-input", "The program sees the end of streamed input.", fact(_talked, "outcome", "ok")),
        ("unread-input", "A program that reads no input can end before its input does.", _unread),
    ),
    "files": (
        ("artifact", "The output of a build arrives unchanged and is what runs.", _artifact),
        ("files-beside", "Files passed with the program are in the program's folder.", _beside),
        ("work-folder", "The program can write files in the folder where it starts.", fact(_seen, "its file exists")),
        ("fresh-folder", "A run finds no files of an earlier run.",
            fact(_seen, "the next run finds its file", expected=False)),
    ),
    "outcome": (
        ("exit-status", "The program's exit status is reported.", _ends("failed", 7, "sys.exit(7)")),
        ("status-137", "An exit status of 137 is not mistaken for a kill.", _ends("failed", 137, "sys.exit(137)")),
        ("signal", "The signal that ended a program is reported.", _ends("signalled", 128 + signal.SIGABRT, _ABORT)),
        ("output-limit", "Output is stored up to its limit. Then the program is ended.", _flooded),
        ("left-status", "The exit status counts even if the program leaves processes behind.",
            fact(_left, _END, ("failed", 5))),
        ("left-processes", "Processes that a program leaves behind are killed.", fact(_left, "processes left", [])),
    ),
    "deadline": (
        ("deadline", "A program that ignores signals is ended at its deadline.", fact(_late, _END, ("timeout", 124))),
        ("deadline-of-children", "Child processes of such a program are ended too.",
         fact(_late, "processes left", [])),
        ("grace", "A program is ended within a grace period after its deadline.", fact(_late, "grace", "met")),
        ("stopped-program", "A program stopped by a signal is ended at its deadline.",
            _ends("timeout", 124, _STAND, wall_ms=_WALL_MS)),
    ),
    "stop": (
        ("cancel", "A cancelled run ends and leaves nothing behind.", _cancelled),
        ("listed", "A job is listed only while it is alive.", fact(_stopped, "jobs listed afterwards", 0)),
        ("stop-by-record", "Another process can stop a job by its record. Nothing is left behind.", _gone_when_stopped),
        ("stop-again", "Stopping a job again succeeds.", fact(_stopped, "stop returned", [True, True])),
        ("killed-runner", "If the x07 process that started a job is killed, the job ends.",
         fact(_killed, "processes left", [])),
        ("killed-record", "A job of a killed x07 process is no longer listed once it is stopped.",
            fact(_killed, "jobs listed afterwards", 0)),
        ("unused-instance", "An unused instance ends with its caller.", _unused),
    ),
    "limits": (
        ("cpu", "A program and its children end at their CPU time limit.", _ends("cpu-limit", 124, _BURN, cpu_ms=500)),
        ("memory", "A program over its memory limit is killed and reported as `oom`.",
            _ends("oom", 137, _EAT, mem_bytes=144 * settings.MIB)),
        ("descriptors", "A process has no more open descriptors than allowed.", fact(_counted, "descriptors", _FDS)),
        ("tasks", "A program has no more processes than allowed.", fact(_counted, "children", _PROCS)),
        ("core-dumps", "No core file is written.", fact(_counted, "core files have content", expected=False)),
    ),
    "isolation": (
        ("no-network", "The program has no network interface.", fact(_seen, "interfaces", [])),
        ("observed-connections", "Without a network, the connections and lookups that a program tries are reported.",
            fact(_unconnected, "denied", ["1.1.1.1:443", "[2606:4700:4700::1111]:443", "x07-conform.invalid"])),
        ("no-host-servers", "The program reaches no server on the host.",
            fact(_seen, "host server answers", expected=False)),
        ("no-host-files", "The program cannot open a file of the host.",
            fact(_seen, "host file opens", expected=False)),
        ("no-host-variables", "The program gets no variable of its caller.", fact(_seen, "other variables", [])),
        ("no-host-processes", "The program sees no process of the host.",
            fact(_seen, "caller in /proc", expected=False)),
        ("no-capabilities", "The program has no capabilities.", fact(_seen, "capabilities", 0)),
        ("no-more-tasks", "A policy without threads and children is enforced.", fact(_dared, "tasks started", [])),
        ("no-execution", "A policy without execution is enforced.", fact(_dared, "programs executed", [])),
        ("honest-plan", "The plan does not report a known gap as `enforced`.", _honest_plan),
    ),
    "network": (
        ("unlisted-name", "A name not in the policy does not resolve.", fact(_connected, "unlisted", "unknown")),
        ("gate-asked", "The gate sees each connection, including refused ones.",
            fact(_connected, "the gate saw", ["10.255.255.1", "unlisted.example", "x07-conform.invalid"])),
        ("connect-fails", "A program's connect() fails if the gate refuses the connection.",
            fact(_connected, "special", "refused")),
    ),
    "images": (
        ("image-digest", "The result contains the digest of the image.",
            lambda bench: expect("digest", bench.image_digest, bench.cached(_echoed)["image"])),
        ("pinned-image", "An image other than the pinned one is refused.",
            lambda bench: bench.expect_refused("not allowed", {"X07_VM_GUEST_IMAGE_DIGEST": f"sha256:{'0' * 64}"})),
        ("damaged-image", "An image with one changed bit is refused.", _damaged),
    ),
    "roots": (
        ("read-root", "The program can read a copy of a folder but not change it.",
            fact(_folders, "printed", ["before", "read-only"])),
        ("write-root", "Only changes in a write root are copied back.", fact(_folders, "write", _WRITTEN)),
        ("out-folder", "Files in `/x07/out` are copied back.", fact(_folders, "out", {"report": "report"})),
    ),
    "commands": commands.ROWS,
}  # fmt: skip
_NEEDS: Final = {
    "cpu": "limits.cpu_ms", "memory": "limits.mem_bytes", "descriptors": "limits.fds", "tasks": "limits.procs",
    "core-dumps": "limits.core_dumps", "no-network": "no-network", "no-host-servers": "no-network",
    "no-host-files": "no-host-files", "no-host-variables": "no-host-variables", "no-more-tasks": "confinement",
    "unlisted-name": "network", "gate-asked": "network", "observed-connections": "observed-connections",
    "connect-fails": "held-connections",
    "cpu-of-one": "limits.cpu_ms", "memory-together": "limits.mem_bytes", "tasks-together": "limits.procs",
    "whole-command": "command-groups", "changes-so-far": "host-files",
    "no-execution": "confinement", "read-root": "host-files", "write-root": "host-files", "out-folder": "host-files",
}  # fmt: skip
BEHAVIOURS: Final = tuple(
    Behaviour(name=name, group=group, promise=promise, check=check, needs=_NEEDS.get(name, ""))
    for group, rows in _TABLE.items()
    for name, promise, check in rows
)


def conform(
    name: str, *, runner: Sequence[str] = RUNNER, on_verdict: Callable[[Verdict], object] = lambda _verdict: None
) -> Report:
    """Check all behaviours of the backend *name*. Raises SandboxError if it cannot run here. runner: see Bench."""
    verdicts = []
    with open_bench(name, runner) as bench:
        for behaviour in BEHAVIOURS:
            verdicts.append(check_behaviour(behaviour, bench))
            on_verdict(verdicts[-1])
        return Report(backend=name, isolation=bench.features.isolation, verdicts=tuple(verdicts))


def check_behaviour(behaviour: Behaviour, bench: Bench) -> Verdict:
    """Check one behaviour, unless it is a known gap of the backend or this host lacks a requirement."""
    known = Verdict(name=behaviour.name, group=behaviour.group, promise=behaviour.promise, verdict="passed")
    verdict = partial(msgspec.structs.replace, known)
    if reason := bench.backend.known_gaps.get(behaviour.name):
        return verdict(verdict="gap", reason=reason)
    if behaviour.name == commands.FORK and bench.backend.snapshots is None:
        return verdict(verdict="gap", reason="it cannot save a running sandbox")
    if behaviour.needs and behaviour.needs not in bench.features.can_enforce:
        return verdict(verdict="skipped", reason=f"the backend cannot enforce {behaviour.needs} on this host")
    started = time.monotonic()
    failed = {}
    try:
        behaviour.check(bench)
    except BrokenError as exc:
        failed = {"verdict": "failed", "reason": printable(str(exc))}
    except Exception as exc:  # noqa: BLE001 - whatever a backend does wrong is a verdict on it
        failed = {"verdict": "failed", "reason": printable(f"{type(exc).__name__}: {exc}")}
    return verdict(seconds=round(time.monotonic() - started, 2), **failed)
