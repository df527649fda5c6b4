"""Runs in the guest: attacks by root through the guest's own network stack and relay."""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import random
import socket
import struct
import subprocess
from typing import TYPE_CHECKING, Any, Final

from tests.lab.attacks.guest_port import asking, mount, port_path

if TYPE_CHECKING:
    from collections.abc import Iterator

State = dict[str, Any]
_NLM_REQUEST_ACK: Final = 5
_NLM_CREATE: Final = 0x400
_NLM_REPLACE: Final = 0x100
_RTM_NEWLINK, _RTM_NEWADDR, _RTM_NEWROUTE, _RTM_DELROUTE = 16, 20, 24, 25
RELAY_DNS: Final = ("127.0.0.53", 53)


@contextlib.contextmanager
def _in_namespace(which: str) -> Iterator[None]:
    """Run in the network namespace of the program ("self") or of the machine ("1")."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    other = os.open(f"/proc/{which}/ns/net", os.O_RDONLY)
    os.setns(other, os.CLONE_NEWNET)
    try:
        yield
    finally:
        os.setns(own, os.CLONE_NEWNET)
        os.close(own)
        os.close(other)


def _name_of(number: int) -> str:
    return errno.errorcode.get(number, str(number)) if number else "OK"


# ---------------------------------------------------------------------------------------------------- as any program


def tcp(_state: State, *, host: str, port: int, say: str = "", wait_s: float = 5.0) -> dict[str, Any]:
    """Connect as any program would, send bytes (hexadecimal), and read the answer."""
    try:
        where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as exc:
        return {"said": str(exc.args[1])}
    with socket.socket(where[0], socket.SOCK_STREAM) as sock:
        sock.settimeout(wait_s)
        if number := sock.connect_ex(where[4]):
            return {"said": _name_of(number)}
        if not say:
            return {"said": "OK"}
        try:
            sock.sendall(bytes.fromhex(say))
            return {"said": "OK", "data": sock.recv(300).decode("latin-1")}
        except OSError as exc:
            return {"said": _name_of(exc.errno or 0)}


def udp(_state: State, *, host: str, port: int, say: str, wait_s: float = 0.3) -> dict[str, Any]:
    """Send a datagram, unconnected, and wait for an answer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(wait_s)
        try:
            sock.sendmsg([bytes.fromhex(say)], [], 0, (host, port))
            return {"said": "OK", "data": sock.recv(300).decode("latin-1")}
        except OSError as exc:
            return {"said": _name_of(exc.errno or 0) if exc.errno else "silence"}


def dns(_state: State, *, query: str) -> dict[str, Any]:
    """Send a query in wire format (hexadecimal) to the guest's DNS server."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect(RELAY_DNS)
        sock.send(bytes.fromhex(query))
        return {"code": sock.recv(65535)[3] & 15}


# ------------------------------------------------------------------------------------------------- routes and devices


def _netlink(kind: int, flags: int, body: bytes) -> str:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(1)
        sock.send(struct.pack("=IHHII", 16 + len(body), kind, _NLM_REQUEST_ACK | flags, 1, 0) + body)
        answer = sock.recv(4096)
    return _name_of(-struct.unpack_from("=i", answer, 16)[0])


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _default_route(device: int) -> str:
    """Replace any route by a default route."""
    for table in (254, 255, 100, 200):
        head = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, table, 0, 255, 0, 0)
        for _ in range(3):
            _netlink(_RTM_DELROUTE, 0, head)
    head = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 254, 4, 253, 1, 0)
    return _netlink(_RTM_NEWROUTE, _NLM_CREATE | _NLM_REPLACE, head + _attribute(4, struct.pack("=I", device)))


def _try_all(targets: list[list[Any]]) -> list[str]:
    said = []
    for host, port in targets:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            try:
                with socket.socket(family, kind) as sock:
                    sock.settimeout(0.2)
                    sock.connect((host, port))
                    sock.send(b"attack")
                    said.append("OK")
            except OSError as exc:
                said.append(_name_of(exc.errno or 0) if exc.errno else "silence")
    return said


def _flush_rules() -> int:
    return subprocess.run(["/usr/sbin/nft", "flush", "ruleset"], capture_output=True, check=False).returncode


def without_rules(_state: State, *, targets: list[list[Any]]) -> dict[str, Any]:
    """Flush the rules and set a default route by the loopback device, in the program's and the machine's namespace."""
    said = {}
    for namespace in ("self", "1"):
        with _in_namespace(namespace):
            flushed = _flush_rules()
            _up(socket.if_nametoindex("lo"))
            routed = _default_route(socket.if_nametoindex("lo"))
            said[namespace] = [str(flushed), routed, *_try_all(targets)]
    return {"said": said}


def _up(device: int) -> None:
    _netlink(_RTM_NEWLINK, 0, struct.pack("=BxHiII", 0, 0, device, 1, 1))


def devices(_state: State, *, targets: list[list[Any]]) -> dict[str, Any]:
    """List network hardware; then create virtual devices, each with an address and the default route."""
    if not os.path.isdir("/sys/bus"):  # noqa: PTH112
        mount("sysfs", "/sys", "sysfs")
    kinds = []
    for name in os.listdir("/sys/bus/virtio/devices"):  # noqa: PTH208
        with open(f"/sys/bus/virtio/devices/{name}/device", encoding="ascii") as file:  # noqa: PTH123
            kinds.append(int(file.read(), 16))
    classes = []
    for name in os.listdir("/sys/bus/pci/devices") if os.path.isdir("/sys/bus/pci/devices") else []:  # noqa: PTH112, PTH208
        with open(f"/sys/bus/pci/devices/{name}/class", encoding="ascii") as file:  # noqa: PTH123
            classes.append(int(file.read(), 16) >> 16)
    with _in_namespace("1"):
        at_start = sorted(name for _, name in socket.if_nameindex())
        made = _make_devices(targets)
    cards = sum(kind in {1, 19} for kind in kinds) + classes.count(2)  # virtio: network card, vsock; PCI: network
    return {"virtio": sorted(kinds), "pci": sorted(classes), "cards": cards, "at_start": at_start, "made": made}


def _make_devices(targets: list[list[Any]]) -> dict[str, str]:
    made = {}
    for number, kind in enumerate(("veth", "dummy", "bridge", "vlan", "macvlan", "vxlan", "gre", "sit", "wireguard")):
        name = f"x{number}"
        body = struct.pack("=BxHiII", 0, 0, 0, 1, 1) + _attribute(3, name.encode() + b"\0")
        body += _attribute(18, _attribute(1, kind.encode()))
        made[kind] = _netlink(_RTM_NEWLINK, _NLM_CREATE, body)
        if made[kind] == "OK":
            device = socket.if_nametoindex(name)
            head = struct.pack("=BBBBI", socket.AF_INET, 24, 0, 0, device)
            _netlink(_RTM_NEWADDR, _NLM_CREATE, head + _attribute(2, socket.inet_aton(f"45.45.45.{100 + number}")))
            _up(device)
            _default_route(device)
            _try_all(targets)
    return made


def load_modules(_state: State, *, targets: list[list[Any]]) -> dict[str, Any]:
    """Load every kernel module of the image, network drivers first; then list network devices."""
    loaded = failed = 0
    found = []
    for folder in ("/usr/lib/modules", "/lib/modules", "/proc/1/root/run/x07/modules", "/proc/1/root/lib/modules"):
        for place, _, names in os.walk(folder):
            found += [f"{place}/{name}" for name in names if ".ko" in name]
    wanted = sorted(found, key=lambda path: not any(word in path for word in ("virtio_net", "usbnet", "vsock")))
    call = ctypes.CDLL(None, use_errno=True).syscall
    for path in wanted:
        with open(path, "rb") as file:  # noqa: PTH123
            number = {"x86_64": 313, "aarch64": 273}[os.uname().machine]
            if call(number, file.fileno(), b"", 0) == 0:
                loaded += 1
            else:
                failed += 1
    with _in_namespace("1"):
        names = sorted(name for _, name in socket.if_nameindex())
        _try_all(targets)
    return {"loaded": loaded, "failed": failed, "devices": names}


# ------------------------------------------------------------------------------------------------------------ packets


def _checksum(data: bytes) -> int:
    """Return the checksum of an even number of bytes."""
    total: int = sum(map(int, struct.unpack(f">{len(data) // 2}H", data)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _syn(source: str, source_port: int, target: str, port: int) -> bytes:
    """Return a whole IPv4 packet that asks for a connection."""
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    segment = struct.pack(">HHIIBBHHH", source_port, port, random.getrandbits(32), 0, 0x50, 2, 64240, 0, 0)
    check = _checksum(ends + struct.pack(">BBH", 0, 6, len(segment)) + segment)
    segment = segment[:16] + struct.pack(">H", check) + segment[18:]
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0, 64, 6, 0) + ends
    head = head[:10] + struct.pack(">H", _checksum(head)) + head[12:]
    return head + segment


def raw_packets(_state: State, *, targets: list[list[Any]]) -> dict[str, Any]:
    """Send crafted packets on every device, below the kernel's rules, and by raw sockets."""
    sent = 0
    for namespace in ("self", "1"):
        with _in_namespace(namespace):
            sent += sum(_send_raw(host, port) for host, port in targets)
    return {"sent": sent}


def _send_raw(host: str, port: int) -> int:
    packet, sent = _syn("45.45.45.1", 40000, host, port), 0
    for _, device in socket.if_nameindex():
        with contextlib.suppress(OSError), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0800) as sock:
            sock.bind((device, 0x0800))
            sent += sock.send(bytes(12) + b"\x08\x00" + packet) > 0
    for kind, data in ((255, packet), (1, b"\x08\x00\xf7\xff\0\0\0\0")):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_RAW, kind) as sock:
            sent += sock.sendto(data, (host, 0)) > 0
    return sent


def vsock(_state: State, *, ports: int) -> dict[str, Any]:
    """Connect to the host by the machine's own socket family."""
    said: dict[str, int] = {}
    for cid in (2, 1, 0):
        for port in range(ports):
            try:
                with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
                    sock.settimeout(0.05)
                    number = sock.connect_ex((cid, port))
            except OSError as exc:
                number = exc.errno or 0
            name = f"{cid} {_name_of(number)}"
            said[name] = said.get(name, 0) + 1
            if number == errno.EAFNOSUPPORT:  # a kernel without such sockets fails in the same way for every port
                break
    return {"said": said}


# ---------------------------------------------------------------------------------------------------------- the relay


def _relay() -> tuple[int, int]:
    """Return the relay's process id and its descriptor of the stream to the gate."""
    path = port_path()
    assert path is not None
    device = os.stat(path).st_rdev  # noqa: PTH116
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):  # noqa: PTH208
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
                with contextlib.suppress(OSError):
                    if os.stat(f"/proc/{pid}/fd/{fd}").st_rdev == device and pid != os.getpid():  # noqa: PTH116
                        return pid, int(fd)
    raise ProcessLookupError("no relay")


def kill_relay(_state: State, *, targets: list[list[Any]]) -> dict[str, Any]:
    """Kill the relay at once, then connect to everything."""
    pid, _ = _relay()
    os.kill(pid, 9)
    _flush_rules()
    return {"killed": True, "said": _try_all(targets)}


def second_writer(_state: State, *, host: str, port: int) -> dict[str, Any]:
    """Write to the relay's own stream: streams with other numbers, and the middle of a frame."""
    pid, fd = _relay()
    pidfd = os.pidfd_open(pid)
    number = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, fd, 0)  # pidfd_getfd
    if number < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    os.set_blocking(number, True)
    os.write(number, asking(5, host.encode(), port)[:9])
    # The relay's own frame is inserted into it, and its numbers are lower than ours.
    said = tcp({}, host=host, port=port, wait_s=2)["said"]
    rest = array.array("B", asking(5, host.encode(), port)[9:])
    with contextlib.suppress(OSError):
        os.write(number, rest)
    return {"said": said}
