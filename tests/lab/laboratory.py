"""A test network: a fake internet in network namespaces, whose log is the only evidence of what was reached.

Two namespaces: ``gate`` stands for the host, with one public address and a loopback with a secret; ``inet`` is the rest
of the world, and has no way out. The host's own network is never touched.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from x07_sandbox.host.processes import Identity, identify, is_alive, own_identity, wait_gone

_PREFIX: Final = "x07lab-"
_NETNS: Final = Path("/run/netns")
_ETC_NETNS: Final = Path("/etc/netns")
_ANSWER_S: Final = 15.0
GATE_ADDRESS: Final = "45.45.45.1"
DNS_ADDRESS: Final = "45.45.45.53"
SITE: Final = "46.46.46.46"
OTHER_SITE: Final = "46.46.46.47"
METADATA: Final = "169.254.169.254"
LAN: Final = "192.168.77.5"
ROUTER: Final = "45.45.45.2"
ADDRESSES: Final = (DNS_ADDRESS, SITE, OTHER_SITE, METADATA, LAN, "10.7.7.7", "100.100.100.200", "168.63.129.16")
"""Addresses of the outside, besides its router."""
GATE_ADDRESS_6: Final = "2a0f:45::1"
ROUTER_6: Final = "2a0f:45::2"
SITE_6: Final = "2a0f:45::46"
METADATA_6: Final = "fd00:ec2::254"
SECRET_PORT: Final = 8600

# Unlike `ip netns exec`, this does not mount a fresh /sys, which would hide the control groups.
_ENTER: Final = """
for file in resolv.conf hosts nsswitch.conf; do
    mount --bind -- "/etc/netns/$0/$file" "/etc/$file" || exit 125
done
exec nsenter --net="/run/netns/$0" -- "$@"
"""
_FILE_SERVER: Final = """
import functools, http.server, ssl, sys
folder, address, port, *certificate = sys.argv[1:]
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
server = http.server.ThreadingHTTPServer((address, int(port)), handler)
if certificate:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
print("ready", flush=True)
server.serve_forever()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """One contact with a server of the laboratory.

    at: seconds, time.monotonic. where: address and port. proto: tcp, udp, dns, tls, http; for packets also icmp, ip-N.
    event: connect, bytes, request, query, packet. data: escaped, at most 200 characters; of a request its first line,
    of a query its type. name: SNI, Host or name asked for. size: total bytes, also if data is cut.
    """

    at: float
    where: str
    proto: str
    event: str
    data: str
    name: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer of the DNS server. rcode: as in DNS, or SILENT for no answer. ttl: seconds."""

    addresses: tuple[str, ...] = ()
    cname: str | None = None
    rcode: str = "NOERROR"
    ttl: int = 60


Script = Sequence[str] | Answer | Sequence[Answer]
"""Addresses, one answer, or successive answers of which the last stays; counted per type of question."""

DEFAULT_NAMES: Final[Mapping[str, Script]] = {
    "web.lab.example": [SITE],
    "raw.lab.example": [SITE],
    "other.lab.example": [OTHER_SITE],
    "private.lab.example": [LAN],
    "own.lab.example": [GATE_ADDRESS],
    "ipv4only.arpa": ["2a0f:64::c000:aa", "2a0f:64:0:1:c0:0:ab00:0"],
    "only.search.example.searched.example": [SITE],
    "web6.lab.example": [SITE_6],
    "unlisted-public.example": [SITE],
    "x.private.example": ["10.7.7.7"],
    "*.wild.lab.example": [SITE],
}
CERTIFIED: Final = ("lab.example", "*.lab.example", "*.wild.lab.example", SITE)
"""What the TLS servers' one certificate is for."""


def _tool(name: str) -> str | None:
    return shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")


def _ip(*arguments: str) -> None:
    done = subprocess.run([_tool("ip") or "ip", *arguments], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Laboratory:
    """The fake internet; a context manager that removes all of it on exit.

    log: the file of contacts. ca_file: the certificate (PEM) that clients must trust. ipv6: whether IPv6 works.
    """

    _count = itertools.count(1)

    def __init__(self) -> None:
        me = own_identity()
        self.name = f"{_PREFIX}{me.pid}-{me.start_ticks}-{next(self._count)}"
        self.gate = f"{self.name}-gate"
        self.inet = f"{self.name}-inet"
        self.ipv6 = False
        self.folder = Path(tempfile.gettempdir(), self.name)
        self.log = self.folder / "contacts.jsonl"
        self.ca_file = self.folder / "ca.pem"
        self._zone = self.folder / "zone.json"
        self._entries: dict[str, object] = {}
        self._serial = itertools.count(1)
        self._servers: list[subprocess.Popen[bytes]] = []

    @staticmethod
    @functools.cache
    def why_not() -> str | None:
        """Return why this machine cannot have a laboratory, or None. Tries it once per process."""
        if os.geteuid() != 0:
            return "a laboratory of network namespaces needs root"
        if missing := [name for name in ("ip", "mount", "nsenter", "unshare") if _tool(name) is None]:
            return f"a laboratory needs the command {missing[0]} (Debian packages iproute2, mount, util-linux)"
        lab = Laboratory()
        try:
            lab._connect()
        except OSError as error:
            return f"network namespaces cannot be made here: {error}"
        finally:
            lab._remove()
        return None

    def __enter__(self) -> Self:
        remove_dead()
        try:
            self._connect()
            self._write_etc()
            self.folder.mkdir(mode=0o755)
            self.log.touch()
            self._certify()
            self.reset_names()
            self._start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    # ------------------------------------------------------------------------------------------------- what tests use

    @property
    def gate_prefix(self) -> list[str]:
        """The words that run a command in the namespace ``gate`` with the laboratory's resolver."""
        return [_tool("unshare") or "unshare", "--mount", "--propagation=slave", "--", "sh", "-c", _ENTER, self.gate]

    def run(self, argv: Sequence[str], *, timeout_s: float = 30) -> subprocess.CompletedProcess[bytes]:
        """Run a command in ``gate`` to its end. Raises subprocess.TimeoutExpired."""
        return subprocess.run(
            [*self.gate_prefix, *argv], stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=timeout_s
        )

    def python(self, code: str, *args: str, timeout_s: float = 30) -> str:
        """Return the output of *code*, run by this Python in ``gate``. Raises AssertionError if it fails."""
        done = self.run([sys.executable, "-I", "-c", code, *args], timeout_s=timeout_s)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout.decode()

    def mark(self) -> int:
        """Wait until the log is quiet, and return its end for `contacts` and `packets`."""
        self.wait_quiet()
        return self.log.stat().st_size

    def contacts(self, since: int = 0) -> list[Contact]:
        """Return the contacts after *since*, in order, without waiting (see `wait_quiet`)."""
        return [contact for contact in self._lines(since) if contact.event != "packet"]

    def packets(self, since: int = 0) -> list[Contact]:
        """Return the packets that left ``gate`` for any address: SYNs of TCP, all of other protocols."""
        return [contact for contact in self._lines(since) if contact.event == "packet"]

    def wait_quiet(self, quiet_s: float = 0.1, most_s: float = 3.0) -> None:
        """Wait until no contact has come for *quiet_s* and the servers are idle; at most *most_s*."""
        end = time.monotonic() + most_s
        size, since = -1, 0.0
        while time.monotonic() < end:
            self._sync()
            now = self.log.stat().st_size
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since >= quiet_s:
                return
            time.sleep(0.01)  # the log is a file on purpose: there is nothing to wait on

    def names(self, names: Mapping[str, Script | None]) -> None:
        """Add or replace names with fresh scripts; None removes one. "*.x.example": all below x.example."""
        for name, script in names.items():
            if script is None:
                self._entries.pop(name.lower(), None)
            else:
                answers = [asdict(answer) for answer in _answers(script)]
                self._entries[name.lower()] = {"serial": next(self._serial), "answers": answers}
        temporary = self._zone.with_suffix(".new")
        temporary.write_text(json.dumps(self._entries), encoding="utf-8")
        temporary.replace(self._zone)

    def reset_names(self) -> None:
        """Restore exactly the names of DEFAULT_NAMES, with fresh scripts."""
        self._entries.clear()
        self.names(DEFAULT_NAMES)

    @contextlib.contextmanager
    def serving(self, folder: Path, port: int, *, tls: bool = False) -> Iterator[None]:
        """Serve the files of a folder at SITE by HTTP. tls: with the laboratory's certificate."""
        certificate = [str(self.folder / "server.pem")] if tls else []
        argv = [
            "ip",
            "netns",
            "exec",
            self.inet,
            sys.executable,
            "-I",
            "-c",
            _FILE_SERVER,
            str(folder),
            SITE,
            str(port),
        ]
        with subprocess.Popen([*argv, *certificate], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
            try:
                assert server.stdout is not None
                assert server.stdout.readline() == b"ready\n"
                yield
            finally:
                server.kill()

    # ------------------------------------------------------------------------------------------------------ its parts

    def _connect(self) -> None:
        """Create the namespaces and the link between them."""
        for name in (self.gate, self.inet):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", self.gate, "link", "add", "wan", "type", "veth", "peer", "name", "wan", "netns", self.inet)
        _ip("-n", self.gate, "addr", "add", f"{GATE_ADDRESS}/24", "dev", "wan")
        _ip("-n", self.inet, "addr", "add", f"{ROUTER}/24", "dev", "wan")
        for address in ADDRESSES:
            _ip("-n", self.inet, "addr", "add", f"{address}/32", "dev", "wan")
        for name in (self.gate, self.inet):
            _ip("-n", name, "link", "set", "wan", "up")
        _ip("-n", self.gate, "route", "add", "default", "via", ROUTER)
        with contextlib.suppress(OSError):  # a kernel without IPv6
            _ip("-n", self.gate, "addr", "add", f"{GATE_ADDRESS_6}/64", "dev", "wan", "nodad")
            for address in (f"{ROUTER_6}/64", f"{SITE_6}/128", f"{METADATA_6}/128"):
                _ip("-n", self.inet, "addr", "add", address, "dev", "wan", "nodad")
            _ip("-n", self.gate, "route", "add", "default", "via", ROUTER_6)
            self.ipv6 = True

    def _write_etc(self) -> None:
        folder = _ETC_NETNS / self.gate
        folder.mkdir(mode=0o755, parents=True)
        resolver = f"nameserver {DNS_ADDRESS}\nsearch searched.example\noptions timeout:1 attempts:1\n"
        (folder / "resolv.conf").write_text(resolver, encoding="utf-8")
        hosts = "127.0.0.1 localhost\n::1 localhost\n10.7.7.7 hosts-file.example\n"
        hosts += f"{SITE} public.hosts-file.example\n"
        (folder / "hosts").write_text(hosts, encoding="utf-8")
        # Without the other sources that this machine may use for names.
        (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n", encoding="utf-8")

    def _certify(self) -> None:
        import trustme  # imported here because it takes a quarter of a second

        authority = trustme.CA(organization_name="x07 laboratory")
        authority.cert_pem.write_to_path(self.ca_file)
        (self.folder / "server.pem").write_bytes(
            authority.issue_cert(*CERTIFIED).private_key_and_cert_chain_pem.bytes()
        )

    def _start(self) -> None:
        outside = [ROUTER, *ADDRESSES, *((ROUTER_6, SITE_6, METADATA_6) if self.ipv6 else ())]
        inside = ["127.0.0.1", GATE_ADDRESS, *(("::1", GATE_ADDRESS_6) if self.ipv6 else ())]
        certificate, zone = str(self.folder / "server.pem"), str(self._zone)
        self._start_server(
            self.inet, role="internet", addresses=outside, zone=zone, certificate=certificate, device="wan"
        )
        self._start_server(self.gate, role="host", addresses=inside)
        for server in self._servers:
            self._expect(server, b"ready\n")

    def _start_server(self, namespace: str, **setting: object) -> None:
        argument = json.dumps({"log": str(self.log), **setting})
        script = str(Path(__file__).with_name("internet.py"))
        with (self.folder / "errors.txt").open("ab") as errors:
            self._servers.append(
                subprocess.Popen(
                    [_tool("ip") or "ip", "netns", "exec", namespace, sys.executable, "-I", script, argument],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    bufsize=0,
                )
            )

    def _expect(self, server: subprocess.Popen[bytes], word: bytes) -> None:
        assert server.stdout is not None
        readable, _, _ = select.select([server.stdout], [], [], _ANSWER_S)
        got = server.stdout.read(len(word)) if readable else None
        if got != word:
            errors = (self.folder / "errors.txt").read_text(encoding="utf-8", errors="replace")
            raise OSError(f"a server of the laboratory did not answer: {got!r}\n{errors}")

    def _sync(self) -> None:
        """Have every server log what has reached its kernel by now."""
        for server in self._servers:
            assert server.stdin is not None
            server.stdin.write(b"\n")
        for server in self._servers:
            self._expect(server, b"synced\n")

    def _lines(self, since: int) -> Iterator[Contact]:
        with self.log.open("rb") as file:
            file.seek(since)
            for line in file:
                if line.endswith(b"\n"):
                    fields: dict[str, Any] = json.loads(line)
                    yield Contact(**fields)

    def _remove(self) -> None:
        for server in self._servers:
            server.kill()
            server.wait()
            for pipe in (server.stdin, server.stdout):
                if pipe is not None:
                    pipe.close()
        self._servers.clear()
        _remove_named(self.name)


def _answers(script: Script) -> list[Answer]:
    if isinstance(script, Answer):
        return [script]
    addresses = tuple(item for item in script if isinstance(item, str))
    return [item for item in script if isinstance(item, Answer)] or [Answer(addresses=addresses)]


# ------------------------------------------------------------------------------------------------------------- removal


def leftovers() -> set[str]:
    """Return the names of all laboratories with remains on this machine, live ones too."""
    found = set()
    for folder in (_NETNS, _ETC_NETNS, Path(tempfile.gettempdir())):
        if folder.is_dir():
            names = (path.name for path in folder.glob(f"{_PREFIX}*"))
            found |= {name.removesuffix("-gate").removesuffix("-inet") for name in names}
    return found


def remove_dead() -> None:
    """Remove the remains of laboratories whose process is gone, for example after SIGKILL."""
    for name in leftovers():
        match name.removeprefix(_PREFIX).split("-"):
            case [pid, ticks, _] if pid.isdigit() and ticks.isdigit():
                if not _lives(int(pid), int(ticks)):
                    _remove_named(name)
            case _:
                continue  # not one of ours


def _lives(pid: int, start_ticks: int) -> bool:
    identity: Identity | None = identify(pid)
    return identity is not None and identity.start_ticks == start_ticks and is_alive(identity)


def _remove_named(name: str) -> None:
    """Remove all of one laboratory. Another process may be doing the same."""
    for namespace in (f"{name}-gate", f"{name}-inet"):
        if (_NETNS / namespace).exists():
            _end_processes(namespace)
            with contextlib.suppress(OSError):
                _ip("netns", "del", namespace)
        shutil.rmtree(_ETC_NETNS / namespace, ignore_errors=True)
    with contextlib.suppress(OSError):  # processes of others are in it
        _ETC_NETNS.rmdir()
    shutil.rmtree(Path(tempfile.gettempdir(), name), ignore_errors=True)


def _end_processes(namespace: str) -> None:
    """Kill what still runs in a namespace, such as a client of a failed test, and wait until it is gone."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        done = subprocess.run(
            [_tool("ip") or "ip", "netns", "pids", namespace], capture_output=True, check=False, timeout=30
        )
        pids = [int(pid) for pid in done.stdout.split()]
        if not pids:
            return
        for pid in pids:
            identity = identify(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            if identity is not None:
                wait_gone(identity, 5)
