"""The self-confinement of gate and resolver: what they can do, and what is refused."""

from __future__ import annotations

import json
import os
import select
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need
from x07_sandbox.jail.resources import free_range

# "root": started by root, with its own uid. "plain root": started by root, as root. "user": by an ordinary user.
FORMS = ["root", "plain root", "user"]
HELPERS = [(kind, form) for kind in ("gate", "resolver") for form in FORMS]
GATES = pytest.mark.parametrize("helper", HELPERS[:3], ids="-".join, indirect=True)
RESOLVERS = pytest.mark.parametrize("helper", HELPERS[3:], ids="-".join, indirect=True)
REFUSED = {
    "start a program or process": "execute,spawn,fork",
    "signal or trace a process": (
        "signal parent,signal itself,signal a thread,pidfd,ptrace,pidfd_getfd,process_vm_readv"
    ),
    "change a file": (
        "write,write settings,create,create without a name,unlink,rmdir,rename,link,symlink,mkdir,mkfifo,chmod,chown,"
        "truncate,chdir,chroot,mount,statfs"
    ),
    "use other parts of the kernel": (
        "memfd_create,io_uring_setup,userfaultfd,bpf,perf_event_open,keyctl,add_key,unshare,setns,seccomp,shmget,"
        "io_setup,inotify_init1,flock,writable code"
    ),
    "loosen its limits": "limits of another,change a limit,prctl",
    "listen or make other sockets": (
        "listen,socket PACKET RAW,socket VSOCK STREAM,socket ALG SEQPACKET,socket CAN RAW,socket INET RAW,ping socket,"
        "socket UNIX STREAM,socket UNIX DGRAM,option SO_ATTACH_FILTER,option TCP_ULP"
    ),
}
NOBODY = 65534
THREADS = 8
MIB = 1 << 20
ENVIRONMENT = os.environ | {"RES_OPTIONS": "timeout:1 attempts:1"}  # a host without a name server fails fast

# Runs in the helper: prints what it could do as JSON and waits for its input to end. "ok", or the name of the error.
DRIVER = r"""
import asyncio, ctypes, errno, json, mmap, os, resource, signal, socket, sys, threading
from x07_sandbox.jail.own_limits import confine

order = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.argtypes = [ctypes.c_long] * 7
libseccomp = ctypes.CDLL("libseccomp.so.2")
found = {}

def tried(name, call, *words):
    try:
        call(*words)
        found[name] = "ok"
    except OSError as exc:
        found[name] = errno.errorcode.get(exc.errno, repr(exc))
    except RuntimeError as exc:
        found[name] = "RuntimeError"

def call(name, *words):
    number = name if isinstance(name, int) else libseccomp.seccomp_syscall_resolve_name(name.encode())
    if libc.syscall(*[number, *words, 0, 0, 0, 0, 0, 0][:7]) < 0:
        raise OSError(ctypes.get_errno(), name)

def fork():
    if os.fork() == 0:
        os._exit(0)

def thread():
    started = threading.Thread(target=int)
    started.start()
    started.join()

def listen():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

def option(*words):
    with socket.socket() as one:
        one.setsockopt(*words)

async def tcp():
    reader, writer = await asyncio.open_connection("127.0.0.1", order["port"])
    writer.write(b"x" * 300000)
    writer.write_eof()
    back = await reader.read(-1)
    writer.close()
    await writer.wait_closed()
    return len(back)

class Datagrams(asyncio.DatagramProtocol):
    def __init__(self):
        self.got = asyncio.get_running_loop().create_future()
    def datagram_received(self, data, sender):
        self.got.set_result(data)

async def udp():
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
        Datagrams, remote_addr=("127.0.0.1", order["port"]))
    transport.sendto(b"ping")
    answer = await asyncio.wait_for(protocol.got, 60)
    transport.close()
    return answer.decode()

def given():
    data, fds, _, _ = socket.recv_fds(control, 16, 1)
    with socket.socket(fileno=fds[0]) as one:
        one.sendall(b"through a given descriptor")
    return data.decode()

def look_up(name):
    try:
        return sorted({row[4][0] for row in socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)})
    except socket.gaierror as exc:
        return exc.args[0]

def look_up_in_threads(name):
    answers = []
    together = threading.Barrier(order["threads"])
    def one():
        together.wait(60)
        answers.append(look_up(name))
    threads = [threading.Thread(target=one) for _ in range(order["threads"])]
    for one_of in threads: one_of.start()
    for one_of in threads: one_of.join()
    return answers

control = socket.socket(fileno=order["control"])
log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
if order["become"] is not None:
    os.setgroups([])
    os.setresgid(*[order["become"]] * 3)
    os.setresuid(*[order["become"]] * 3)
if order["started"]:
    blocked = threading.Event()
    threading.Thread(target=blocked.wait, daemon=True).start()
    tried("confine", lambda: confine(order["kind"], uid=order["uid"]))
    blocked.set()
    print(json.dumps(found))
    sys.exit()
parent, uid = os.getppid(), os.getuid()
walls = confine(order["kind"], uid=order["uid"])

path = order["file"]
spare = ctypes.create_string_buffer(256)
tried("read /etc/passwd", os.open, "/etc/passwd", os.O_RDONLY)
tried("read /etc/resolv.conf", os.open, "/etc/resolv.conf", os.O_RDONLY)
tried("read /etc", os.listdir, "/etc")
tried("read /proc", os.open, "/proc/self/maps", os.O_RDONLY)
tried("write", os.open, path, os.O_WRONLY)
tried("write settings", os.open, "/etc/resolv.conf", os.O_RDWR)
tried("create", os.open, path + ".new", os.O_WRONLY | os.O_CREAT)
tried("create without a name", os.open, os.path.dirname(path), os.O_WRONLY | os.O_TMPFILE)
for name in ("unlink", "rmdir", "chroot", "chdir"): tried(name, getattr(os, name), path)
for name in ("rename", "link", "symlink"): tried(name, getattr(os, name), path, path + ".new")
for name, word in (("mkdir", 0o700), ("mkfifo", 0o600), ("chmod", 0o777), ("truncate", 0)):
    tried(name, getattr(os, name), path, word)
tried("chown", os.chown, path, 0, 0)
tried("statfs", os.statvfs, "/")
tried("execute", os.execv, "/bin/true", ["true"])
tried("spawn", os.posix_spawn, "/bin/true", ["true"], {})
tried("fork", fork)
tried("thread", thread)
tried("signal parent", os.kill, parent, 0)
tried("signal itself", os.kill, os.getpid(), 0)
tried("signal a thread", call, 200 if os.uname().machine == "x86_64" else 130, threading.get_native_id(), 0)
tried("pidfd", os.pidfd_open, parent)
for family, kind in (
    ("UNIX", "STREAM"), ("UNIX", "DGRAM"), ("NETLINK", "RAW"), ("PACKET", "RAW"), ("VSOCK", "STREAM"),
    ("ALG", "SEQPACKET"), ("CAN", "RAW"), ("INET", "RAW"), ("INET", "STREAM"), ("INET", "DGRAM"),
):
    tried(f"socket {family} {kind}",
        lambda: socket.socket(getattr(socket, "AF_" + family), getattr(socket, "SOCK_" + kind)).close())
tried("ping socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close())
tried("listen", listen)
tried("option TCP_NODELAY", option, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
tried("option SO_ATTACH_FILTER", option, socket.SOL_SOCKET, 26, bytes(16))
tried("option TCP_ULP", option, socket.IPPROTO_TCP, 31, b"tls")
for name in ("memfd_create", "io_uring_setup", "userfaultfd", "bpf", "perf_event_open", "keyctl", "add_key", "mount",
    "unshare", "setns", "process_vm_readv", "pidfd_getfd", "seccomp", "shmget", "io_setup", "inotify_init1", "flock"):
    tried(name, call, name, 0, ctypes.addressof(spare), 0, 0, 0)
tried("ptrace", call, "ptrace", 16, parent, 0, 0)
tried("setuid", os.setresuid, 0, 0, 0) if uid or order["uid"] else None
tried("prctl", call, "prctl", 4, 1, 0, 0, 0)
tried("limits of another", call, "prlimit64", parent, resource.RLIMIT_CORE, 0, ctypes.addressof(spare))
tried("change a limit", call, "prlimit64", 0, resource.RLIMIT_CORE, ctypes.addressof(spare))
tried("own limits", resource.getrlimit, resource.RLIMIT_CORE)
tried("writable code", lambda: mmap.mmap(-1, 4096, prot=7))
tried("log", os.write, log, b"a line\n")
tried("cut the log", os.ftruncate, log, 0)
tried("lengthen the log", os.ftruncate, log, 16 << 20)
tried("too much log", os.write, log, b"a line\n")
tried("random", os.urandom, 16)
tried("close-on-exec", os.set_inheritable, log, True)
if order["kind"] == "gate":
    found["tcp"], found["udp"] = asyncio.run(tcp()), asyncio.run(udp())
else:
    found["localhost"] = look_up_in_threads("localhost")
    found["name"] = look_up_in_threads("host.invalid")
    found["idn"] = look_up("b\u00fccher.invalid")
found["given"] = given()
print(json.dumps({"walls": walls, "found": found}), flush=True)
sys.stdin.read()
"""


# Starts a helper, prints its process id, and waits for it.
STARTER = """
import subprocess, sys
helper = subprocess.Popen(sys.argv[2:], pass_fds=[int(sys.argv[1])])
print(helper.pid, flush=True)
helper.wait()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a helper could do, and its state seen from outside.

    found: for each attempt by name, "ok" or the error. status: /proc/PID/status. limits: /proc/PID/limits. given:
    what came back through the descriptor that it was given.
    """

    kind: str
    form: str
    uid: int | None
    walls: list[str]
    found: dict[str, Any]
    status: dict[str, str]
    limits: dict[str, int | None]
    given: bytes
    errors: str

    @property
    def has_landlock(self) -> bool:
        """Whether the kernel has Landlock."""
        return any(wall.startswith("Landlock") for wall in self.walls)


# --- the helper's surroundings ---------------------------------------------------------------------------------------


class EchoStream(socketserver.StreamRequestHandler):
    """Sends a whole stream back."""

    def handle(self) -> None:
        """Serve one connection."""
        self.wfile.write(self.rfile.read())


class EchoDatagram(socketserver.DatagramRequestHandler):
    """Sends a datagram back."""

    handle = EchoStream.handle


def fields(text: str) -> dict[str, str]:
    """Return /proc/PID/status as names and values."""
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def soft_limits(text: str) -> dict[str, int | None]:
    """Return the soft limits of /proc/PID/limits that equal their hard limits."""
    rows = [(line[:26].strip(), line[26:].split()[:2]) for line in text.splitlines()[1:]]
    return {name: None if "unlimited" in words else int(words[0]) for name, words in rows if words[0] == words[1]}


def order_for(kind: str, form: str, folder: Path, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """Return the driver's argument."""
    is_root = os.geteuid() == 0
    need(is_root or form == "user", "needs root", installable=False)
    for name in ("log", "file"):
        (folder / name).write_bytes(b"")
    order = {
        "kind": kind,
        "uid": free_range() if form == "root" else None,
        "become": NOBODY if is_root and form == "user" else None,
        "log": str(folder / "log"),
        "file": str(folder / "file"),
        "threads": THREADS,
        "started": False,
        "port": 0,
    }
    return order | more


def look(order: dict[str, Any], form: str) -> Look:
    """Start a helper, have it try everything, and look at it from outside."""
    ours, theirs = socket.socketpair()
    one, other = socket.socketpair()
    with ours, theirs, one, other:
        socket.send_fds(ours, [b"take this"], [other.fileno()])
        argv = [sys.executable, "-c", DRIVER, json.dumps(order | {"control": theirs.fileno()})]
        with subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            env=ENVIRONMENT,
        ) as helper:
            assert helper.stdout is not None
            line = helper.stdout.readline()
            proc = Path(f"/proc/{helper.pid}")
            status, limits = proc.joinpath("status").read_text("utf-8"), ""
            if line and os.geteuid() == 0:  # only root sees the limits of an untraceable process
                limits = proc.joinpath("limits").read_text("utf-8")
            _, errors = helper.communicate(timeout=60)
        assert line, errors.decode()
        report = json.loads(line)
        one.settimeout(1)
        given = one.recv(64)
    return Look(
        kind=order["kind"],
        form=form,
        uid=order["uid"],
        walls=report["walls"],
        found=report["found"],
        status=fields(status),
        limits=soft_limits(limits),
        given=given,
        errors=errors.decode(),
    )


@pytest.fixture(scope="module")
def echo() -> Iterator[int]:
    """The port on which streams and datagrams are echoed."""
    with (
        socketserver.TCPServer(("127.0.0.1", 0), EchoStream) as tcp,
        socketserver.UDPServer(("127.0.0.1", tcp.server_address[1]), EchoDatagram) as udp,
    ):
        servers = (tcp, udp)
        threads = [threading.Thread(target=one.serve_forever) for one in servers]
        for one in threads:
            one.start()
        yield tcp.server_address[1]
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join(60)


@pytest.fixture(scope="module", params=HELPERS, ids="-".join)
def helper(request: pytest.FixtureRequest, echo: int, tmp_path_factory: pytest.TempPathFactory) -> Look:
    """A gate or resolver that has confined itself, in each form."""
    kind, form = request.param
    return look(order_for(kind, form, tmp_path_factory.mktemp("helper"), port=echo), form)


# --- both ------------------------------------------------------------------------------------------------------------


def test_a_helper_reports_its_confinements(helper: Look) -> None:
    """A helper reports which confinements are active, and the kernel's status of the process agrees."""
    own = ["own uid"] if helper.form == "root" else []
    assert helper.walls[: len(own) + 2] == [*own, "no capabilities", "no new privileges"]
    assert helper.walls[-1] == "seccomp"
    assert helper.errors == ""
    assert (helper.status["NoNewPrivs"], helper.status["Seccomp"]) == ("1", "2")
    assert {helper.status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}
    if os.geteuid() == 0 and helper.form != "user":
        assert helper.status["CapBnd"] == "0" * 16
    if helper.form == "root":
        assert helper.status["Uid"].split() == helper.status["Gid"].split() == [str(helper.uid)] * 4
        assert helper.status["Groups"] == ""


@pytest.mark.parametrize("what", REFUSED)
def test_a_helper_is_refused_all_that_it_does_not_need(helper: Look, what: str) -> None:
    """A helper starts no program, signals nobody, changes no file, keeps its limits, and does not listen."""
    names = REFUSED[what].split(",")
    assert {name: helper.found[name] for name in names} == dict.fromkeys(names, "EPERM")
    assert helper.found.get("setuid", "EPERM") == "EPERM"


def test_a_helper_may_do_what_it_needs(helper: Look) -> None:
    """A helper makes TCP and UDP sockets, uses a descriptor that it is sent, and writes to its log up to 16 MiB."""
    files = ("log", "cut the log", "lengthen the log", "close-on-exec", "random", "own limits")
    needed = (*files, "socket INET STREAM", "socket INET DGRAM", "option TCP_NODELAY")
    assert {helper.found[name] for name in needed} == {"ok"}
    assert helper.found["too much log"] == "EFBIG"
    assert (helper.found["given"], helper.given) == ("take this", b"through a given descriptor")


def test_a_helper_has_small_limits(helper: Look) -> None:
    """A helper's memory, files and descriptors are bounded, and a crash leaves no core file."""
    need(helper.limits, "only root sees the limits of a process that cannot be traced", installable=False)
    assert helper.limits["Max open files"] == 1024
    assert helper.limits["Max core file size"] == helper.limits["Max locked memory"] == 0
    assert helper.limits["Max file size"] == 16 * MIB
    assert helper.limits["Max address space"] == (512 * MIB if helper.kind == "gate" else 1024 * MIB)
    assert helper.kind == "resolver" or helper.limits["Max processes"] == 0


@pytest.mark.parametrize("kind", ["gate", "resolver"])
def test_a_helper_that_has_threads_refuses_to_confine_itself(kind: str, tmp_path: Path) -> None:
    """A process with a second thread, which Landlock would not confine, gets an error, not partial confinement."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        order = order_for(kind, "user", tmp_path, started=True, control=theirs.fileno(), become=None)
        argv = [sys.executable, "-c", DRIVER, json.dumps(order)]
        done = subprocess.run(
            argv, capture_output=True, pass_fds=[theirs.fileno()], check=True, timeout=60, stdin=subprocess.DEVNULL
        )
    assert json.loads(done.stdout) == {"confine": "EBUSY"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["gate", "resolver"])
def test_a_helper_ends_with_the_process_that_started_it(kind: str, form: str, echo: int, tmp_path: Path) -> None:
    """A helper is killed when the process that started it ends."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        order = order_for(kind, form, tmp_path, port=echo, control=theirs.fileno())
        socket.send_fds(ours, [b"take this"], [ours.fileno()])
        argv = [sys.executable, "-c", STARTER, str(theirs.fileno()), sys.executable, "-c", DRIVER, json.dumps(order)]
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[theirs.fileno()], env=ENVIRONMENT
        ) as starter:
            assert starter.stdout is not None
            helper = os.pidfd_open(int(starter.stdout.readline()))
            try:
                assert starter.stdout.readline().startswith(b'{"walls"')
                starter.kill()
                assert select.select([helper], [], [], 30)[0]
            finally:
                os.close(helper)


# --- the gate --------------------------------------------------------------------------------------------------------


@GATES
def test_the_gate_only_carries_connections(helper: Look) -> None:
    """The gate opens no file, starts no thread and asks the kernel for no routes, but uses TCP and UDP by asyncio."""
    names = ("read /etc/passwd", "read /etc/resolv.conf", "read /etc", "read /proc", "socket NETLINK RAW")
    assert {helper.found[name] for name in names} == {"EPERM"}
    assert helper.found["thread"] == "RuntimeError"
    assert (helper.found["tcp"], helper.found["udp"]) == (300_000, "ping")


# --- the resolver ----------------------------------------------------------------------------------------------------


@RESOLVERS
def test_the_resolver_reads_only_the_name_servers_file(helper: Look) -> None:
    """The resolver reads the name servers' file; with Landlock it cannot read the users' file, /etc or /proc."""
    if Path("/etc/resolv.conf").exists():
        assert helper.found["read /etc/resolv.conf"] == "ok"
    need(helper.has_landlock, "the kernel has no Landlock", installable=False)
    assert {helper.found[name] for name in ("read /etc/passwd", "read /etc", "read /proc")} == {"EACCES"}


@RESOLVERS
def test_the_resolver_looks_names_up_in_eight_threads(helper: Look) -> None:
    """Eight resolver threads, which may ask the kernel for routes, look up names at once: an unknown one is missing."""
    assert (helper.found["thread"], helper.found["socket NETLINK RAW"]) == ("ok", "ok")
    assert len(helper.found["localhost"]) == THREADS
    assert all("127.0.0.1" in answer or "::1" in answer for answer in helper.found["localhost"])
    assert len(helper.found["name"]) == THREADS
    assert {*helper.found["name"], helper.found["idn"]} <= {socket.EAI_NONAME, socket.EAI_AGAIN, socket.EAI_NODATA}
