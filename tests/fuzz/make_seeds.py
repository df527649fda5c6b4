"""Writes tests/fuzz/seeds: where the fuzzer starts from, and what each test run replays.

Run: python -m tests.fuzz.make_seeds

The name of a channel's seed is the frame kind that it ends with; one a kind at least. See `fuzz_channel` for the
first byte. The seeds below "found" are inputs that once broke a promise.
"""

from __future__ import annotations

import stat
import struct
from pathlib import Path
from typing import Final

from tests.fuzz.fuzz_channel import DENIED, EXITED, NONCE, SEED, START
from tests.fuzz.fuzz_client_hello import body, extension, hello, message, records, sni
from tests.fuzz.fuzz_documents import BETWEEN, BUILT, result
from tests.fuzz.fuzz_observed import POLICIES
from tests.fuzz.fuzz_unpack import MOST_BYTES
from x07_sandbox.channel import egress
from x07_sandbox.channel.frames import PROTOCOL, WINDOW, Kind, Stream, encode, encode_body
from x07_sandbox.channel.trees import Entry, segment
from x07_sandbox.channel.trees import Kind as R
from x07_sandbox.images import cpio
from x07_sandbox.policy import default_policy, render_policy
from x07_sandbox.reports.document import render_json
from x07_sandbox.x07.runner_report import runner_report

SEEDS: Final = Path(__file__).parent / "seeds"
AS_HOST: Final = b"\x00"
AS_HOST_CUT: Final = b"\x03\x00\x06\x12"
AS_HOST_STALLED: Final = b"\x41\x63"
AS_GUEST: Final = b"\x80"
AS_GUEST_CUT: Final = b"\x82\x08\x1f"


WARM: Final[dict[str, object]] = {
    "preload": [],
    "hostname": "x07",
    "output": True,
    "network": False,
    "limits": {"fds": 256},
    "commands": [["/bin/true"]],
}


def control(kind: Kind, body: dict[str, object] | None = None) -> bytes:
    """A control frame."""
    return encode(kind, 0, encode_body(kind, body or {}))


def channel_seeds() -> dict[str, bytes]:
    """One conversation a frame kind, up to that frame, and some more for the ways that fork off."""
    greeted = control(Kind.HELLO, {"protocol": PROTOCOL})
    ready = greeted + control(Kind.SEEDED, {"nonce": NONCE})
    running = ready + control(Kind.STARTED)
    output = encode(Kind.DATA, Stream.STDOUT, b"hello\n") + encode(Kind.DATA, Stream.STDERR, b"\0\xff")
    exited = running + output + encode(Kind.EOF, Stream.STDOUT) + control(Kind.EXITED, {**EXITED, "output_bytes": 3})
    collected = exited + encode(Kind.DATA, Stream.OUTPUT_FILE, b"\x7fEL") + encode(Kind.EOF, Stream.OUTPUT_FILE)
    failed: dict[str, object] = {"stage": "prepare", "errno": 2, "message": "No such file: '/x07/in/\u00e9'"}
    seeded = control(Kind.SEED, SEED)
    started = seeded + control(Kind.START, START)
    files = encode(Kind.DATA, Stream.FIRST_FILE, b"#!/bin/sh\n") + encode(Kind.EOF, Stream.FIRST_FILE)
    return {
        "HELLO": AS_HOST + greeted,
        "WARM": AS_GUEST + control(Kind.WARM, WARM) + seeded,
        "WARMED": AS_HOST + greeted + control(Kind.WARMED),
        "SEED": AS_GUEST + seeded,
        "SEEDED": AS_HOST_CUT + ready,
        "START": AS_GUEST_CUT + started,
        "STARTED": AS_HOST + running,
        "DATA": AS_HOST_CUT + running + output,
        "DATA-files": AS_GUEST_CUT + started + files + encode(Kind.DATA, Stream.STDIN, b"in"),
        "DATA-stalled": AS_HOST_STALLED + running + output * 3,
        "EOF": AS_HOST + collected,
        "CREDIT": AS_HOST_CUT + running + encode(Kind.CREDIT, Stream.STDIN, (WINDOW // 4).to_bytes(4, "big")),
        "STOP": AS_GUEST + started + control(Kind.STOP) + control(Kind.STOP),
        "DENIED": AS_HOST + running + control(Kind.DENIED, DENIED) * 2,
        "EXITED": AS_HOST + exited,
        "FAILED": AS_HOST_CUT + ready + control(Kind.FAILED, failed),
        "FAILED-late": AS_HOST + exited + control(Kind.FAILED, failed),
        # Read in one piece, the fault took the events before it with it; cut, it did not.
        "found/fault-after-events": AS_HOST_CUT + running + output + b"\0\0\0\0\xff\0\0\0",
        # A frame that was refused for its order was gone, and the conversation went on behind it.
        "found/life-after-fault": AS_HOST_CUT + control(Kind.STARTED) + greeted,
        # The host took in 4 MiB of a START, which is not the guest's to send, before it said so.
        "found/start-from-the-guest": AS_HOST + b"\x00\x40\x00\x00\x04\x00\x00\x00" + bytes(40_000),
        "found/no-credit": AS_HOST + running + encode(Kind.CREDIT, Stream.STDIN, bytes(4)),
    }


def unpack_seeds() -> dict[str, bytes]:
    """Archives as the build makes them, and such as only an enemy makes."""
    tree = [cpio.folder("program"), cpio.file("program/main.py", b"print(1)\n"), cpio.file("program/run", b"#!", 0o755)]
    small = cpio.pack([cpio.file("f", b"12345")])
    size_at = 54
    folder = cpio.pack([cpio.folder("d"), cpio.file("f", bytes(MOST_BYTES + 1))])
    return {
        "empty": cpio.pack([]),
        "tree": cpio.pack(tree),
        "large": cpio.pack([cpio.file("zeros", bytes(MOST_BYTES))]),
        "twice": small[:-124] + small,
        "up": cpio.pack([cpio.file("../outside", b"x")]),
        "under-a-file": cpio.pack([cpio.file("f", b"x"), cpio.file("f/g", b"x")]),
        "link": cpio.pack([cpio.Entry("l", stat.S_IFLNK | 0o777, b"/etc"), cpio.file("l/passwd", b"x")]),
        "device": cpio.pack([cpio.Entry("null", stat.S_IFCHR | 0o666)]),
        "set-id": cpio.pack([cpio.file("s", b"x", 0o6777)]),
        "long-name": cpio.pack([cpio.file("x" * 256, b"")]),
        # int() took a sign: a folder of -256 MiB made room for files over the limit, a file of -1 byte was read whole.
        "found/negative-folder": folder[:size_at] + b"-FFFFFFF" + folder[size_at + 8 :],
        "found/negative-file": small[:size_at] + b"-0000001" + small[size_at + 8 :],
    }


def changes_seeds() -> dict[str, bytes]:
    """Streams as the guest sends them, and such as only an enemy sends; the first byte cuts them."""
    whole, cut = b"\xff", b"\x04"
    root, other, end = (Entry(kind, name).encoded() for kind, name in ((R.ROOT, b"0"), (R.ROOT, b"1"), (R.END, b"")))

    def file(name: bytes, content: bytes, mode: int = 0o644) -> bytes:
        head = Entry(R.FILE, name, mode=mode, mtime_ns=1, size=len(content)).encoded()
        return head + (segment(len(content)) + content if content else b"")

    sparse = Entry(R.FILE, b"sparse", mode=0o600, size=90).encoded() + segment(80, hole=True) + segment(10) + b"x" * 10
    bomb = Entry(R.FILE, b"bomb", mode=0o600, size=1 << 39).encoded() + segment(1 << 39, hole=True)
    folder, gone = Entry(R.FOLDER, b"new", mode=0o755).encoded(), Entry(R.DELETED, b"a/b").encoded()
    link = Entry(R.LINK, b"new/link", target=b"../a/b").encoded()
    return {
        "nothing": whole + root + other + end,
        "all": cut + root + file(b"a/b", b"abcd") + folder + link + sparse + other + gone + end,
        "renamed": whole + root + gone + file(b"a/c", b"abc") + end,
        "mode": whole + root + file(b"a/b", b"abc", 0o755) + end,
        "set-id": whole + root + file(b"s", b"", 0o6755) + end,
        "device": whole + root + Entry(R.UNSUPPORTED, b"null", mode=stat.S_IFCHR | 0o666).encoded() + end,
        "out": whole + root + Entry(R.LINK, b"l", target=b"/etc/passwd").encoded() + end,
        "git": whole + root + Entry(R.FOLDER, b".GIT", mode=0o755).encoded() + file(b".GIT/config", b"") + end,
        "deep": whole + root + file(b"a/b/c/d/e/f", b"x") + end,
        "many": whole + root + b"".join(file(b"%d" % number, b"") for number in range(40)) + end,
        "bomb": whole + root + bomb + end,
        "up": whole + root + file(b"../x", b"") + end,
        "absolute": whole + root + file(b"/x", b"") + end,
        "typed": whole + root + file(b"s", b"", 0o100644) + end,
        "staging": whole + root + file(b".x07-apply-0", b"") + end,
        # A link in the root's own place was a change like any other.
        "found/root-link": whole + root + gone + Entry(R.LINK, b"", target=b"a").encoded() + end,
        "found/root-gone": whole + root + Entry(R.DELETED, b"").encoded() + end,
        "twice": whole + root + file(b"x", b"1") + file(b"x", b"2") + end,
        "no-root": whole + file(b"x", b"1") + end,
        "third-root": whole + Entry(R.ROOT, b"2").encoded() + end,
        "after-end": whole + root + end + root,
    }


def name_seeds() -> dict[str, bytes]:
    """Hosts as guests write them, good and bad."""
    hosts = {
        "name": "A.Example.org.",
        "international": "xn--fa-hia.example",
        "bad-international": "xn--a.example",
        "overflow": f"xn--hoa{'4' * 53}aaa.example",
        "underscore": "_srv-1.example",
        "address": "192.0.2.7",
        "short-address": "127.1",
        "hexadecimal": "0x7f.1",
        "octal": "017700000001",
        "ipv6": "[2001:db8::1]",
        "mapped": "::ffff:127.0.0.1",
        "zone": "fe80::1%lo",
        "space": "a b",
        "zero-byte": "a\0b",
        "wildcard": "*.example.org",
        "long-label": "a" * 64,
        "long": ".".join(["a" * 63] * 4),
    }
    return {name: host.encode() for name, host in hosts.items()}


def dns_query(name: str, kind: int = 1, extra: bytes = b"", opts: int = 0) -> bytes:
    """A query of class IN; extra: what follows the question, opts: how many records that is."""
    header = struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, opts)
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return header + labels + b"\0" + struct.pack(">HH", kind, 1) + extra


def dns_seeds() -> dict[str, bytes]:
    """Queries, some of them damaged, behind a byte that is ignored."""
    opt = b"\0" + struct.pack(">HHIH", 41, 1232, 0, 0)
    listed, wildcard = dns_query("example.org"), dns_query("a.B.example.net", 28, opt, 1)
    header = struct.Struct(">HHHHHH")
    queries = {
        "listed": listed,
        "wildcard": wildcard,
        "unlisted": dns_query("evil.test", 65, opt, 1),
        "localhost": dns_query("app.localhost", 28),
        "other-class": listed[:-1] + b"\x03",
        "other-opcode": b"\0\x07\x28\0" + listed[4:],
        "an-answer": b"\0\x07\x81\x80" + listed[4:],
        "two-questions": header.pack(7, 0x0100, 2, 0, 0, 0) + listed[12:] * 2,
        "loop": header.pack(7, 0x0100, 1, 0, 0, 0) + b"\xc0\x0c\0\x01\0\x01",
        "long-name": dns_query(".".join(["a" * 63] * 4)),
        "odd-name": dns_query("a b.example.org"),
        "cut-off": listed[:-3],
    }
    return {name: b"\x00" + query for name, query in queries.items()}


def documents_seeds() -> dict[str, bytes]:
    """One of each document, which the first byte names, and what a program says that is no report."""
    manifest = b'schema_version = "x07.sandbox.project@0.1.0"\ntoolchain = "python"\nfiles = ["*.py"]\nentry = "a.py"\n'
    tables = b'policy = "p.json"\n[run]\nargs = ["--top", "10"]\ninput = "in.txt"\nenv = {A = "1"}\n'
    project = b'{"schema_version":"x07.project@0.5.0","default_profile":"os","lockfile":"x07.lock.json","profiles":'
    profiles = b'{"os":{"world":"run-os-sandboxed","policy":"p.json","input":"in.bin","solve_fuel":1}}}'
    said = render_json(runner_report(result(b"", b"", b""), BUILT))
    counted = b'talk\n{"fuel_used": 12, "heap_used": 3, "debug_stats": {"borrow_violations": 0}, "later": [1]}\n'
    return {
        "manifest": b"\x00" + manifest + tables,
        "project": b"\x01" + project + profiles,
        "policy": b"\x02" + render_policy(default_policy()),
        "report": b"\x03" + BETWEEN.join((said, b"\x02\0\0\0ok", counted)),
        "no-report": b"\x03" + BETWEEN.join((b"{}", b"ok", b"{[\n{}")),
    }


def hints_seeds() -> dict[str, bytes]:
    """What programs say of what they missed, and what looks like it; the first byte chooses the policy."""
    missing = "No such file or directory"
    return {
        "nothing": b"\x00all is well\n",
        "python": f"\x00FileNotFoundError: [Errno 2] {missing}: '/srv/in.csv'\n".encode(),
        "bytes": f'\x01FileNotFoundError: [Errno 2] {missing}: b"/srv/in\'s"\n'.encode(),
        "coreutils": f"\x02cat: '/srv/a b': {missing}\ncat: /srv/c: {missing}\n".encode(),
        "perror": f"\x03/opt/tool: error opening /srv/d: {missing}\nrun: /srv/e f: {missing}\n".encode(),
        "relative": f"\x04FileNotFoundError: [Errno 2] {missing}: 'results/a'\n".encode(),
        "hidden": f"\x05FileNotFoundError: [Errno 2] {missing}: '.cache/a'\n".encode(),
        "there": f"\x06cat: /data/x: {missing}\ncat: /usr/x: {missing}\n".encode(),
        "module": b"\x07ModuleNotFoundError: No module named 'numpy.linalg'\n",
        "library": b"\x00ImportError: ./own.so: failed to map segment from shared object\n",
        "no-text": b"\x00" + bytes(range(256)),
        "odd-names": f"\x00cat: /srv/$(id)': {missing}\ncat: /\u202e: {missing}\ncat: /a/../..: {missing}\n".encode(),
    }


def observed_seeds() -> dict[str, bytes]:
    """Bodies as a guest sends them, and such as only an enemy sends; the first byte chooses the policy."""
    refused: list[dict[str, object]] = [
        {"by": "seccomp", "call": "clone", "errno": 1, "path": ""},
        {"by": "seccomp", "call": "execve", "errno": 1, "path": ""},
        {"call": "socket", "errno": 24, "path": ""},
        {"call": "execve", "path": "/usr/bin/true"},
        {"call": "execve", "path": "/data/out/made"},
        {"call": "mkdir", "errno": 30, "path": "/data/", "write": True},
        {"call": "openat", "errno": 30, "path": "/opt/x07/in/f", "write": True},
        {"call": "openat", "errno": 30, "path": "/x07/out/", "write": True},
        {"call": "openat", "errno": 30, "path": ".../", "write": True},
        {"call": "openat", "path": "/usr/bin/true"},
    ]
    hostile: list[dict[str, object]] = [
        {"call": "\x1b[2J", "path": "/srv/$(id); '\n", "write": True, "errno": 30, "count": 2**63 - 1},
        {"by": "nobody", "call": "", "path": "\ud800/" * 500, "write": True, "errno": 4096},
        {"path": "/" * 2000, "write": True, "errno": 30},
    ]
    made = [encode_body(Kind.DENIED, {**DENIED, **body}) for body in (*refused, *hostile)]
    found = {f"policy-{number}": bytes([number]) + b"\n".join(made[: len(refused)]) for number in range(len(POLICIES))}
    found |= {f"hostile-{number}": b"\x00" + body for number, body in enumerate(made[len(refused) :])}
    return {**found, "counted": b"\x00" + b"\n".join(made[-3:] * 3), "no-body": b"\x00{}\n[]\n\xff"}


def patch_seeds() -> dict[str, bytes]:
    """Two texts, which the first byte cuts apart."""
    return {
        "nothing": b"",
        "same": b"\x80a\nb\na\nb\n",
        "made": b"\x00a\nb\n",
        "removed": b"\xffa\nb\n",
        "no-line-end": b"\x80a\nb\na\nc",
        "far-apart": b"\x80" + b"".join(b"%d\n" % line for line in range(40)) + b"x\n" + b"1\n" * 38 + b"y\n",
        "empty-lines": b"\x60" + b"\n" * 90 + b"\r\n\x0b\n",
    }


def client_hello_seeds() -> dict[str, bytes]:
    """First bytes of a connection; see `fuzz_client_hello` for the first byte."""
    tls, literal, anything = b"\x06", b"\x46", b"\x83"
    good = sni(b"a.example")
    versions = extension(43, b"\x02\x03\x04")
    return {
        "good": tls + hello(good, versions) + b"\x17\x03\x03\x00\x01x",
        "small-records": tls + records(message(body(good)), 1),
        "upper-case": tls + hello(sni(b"A.EXAMPLE.")),
        "other-name": tls + hello(sni(b"b.example")),
        "no-name": tls + hello(versions),
        "no-extensions": tls + records(message(body()[:-2])),
        "two-names": tls + hello(sni(b"a.example", b"b.example")),
        "two-extensions": tls + hello(good, good),
        "ech": tls + hello(good, extension(0xFE0D, bytes(8))),
        "too-large": tls + records(b"\x01\xff\xff\xff" + bytes(9)),
        "trailing": tls + records(message(body(good) + b"x")),
        "alert": tls + records(message(body(good)), 9)[:14] + b"\x15\x03\x01\x00\x02\x01\x00",
        "literal": literal + hello(sni(b"denied.example")),
        "literal-address": literal + hello(sni(b"192.0.2.7")),
        "any-tls": anything + hello(sni(b"b.example")),
        "any-postgres": anything + bytes.fromhex("0000000804d21630 0000000804d2162f") + hello(good),
        "any-http": anything + b"GET /x HTTP/1.1\r\nHost: a.example\r\n\r\n",
        "any-http2": anything + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "any-redis": anything + b"GET key\r\n",
        "any-ssh": anything + b"SSH-2.0-OpenSSH_9.6 x\r\n",
        "any-binary": anything + b"\x00\x00\x00\x54\x00\x03\x00\x00user\x00",
    }


def http_requests_seeds() -> dict[str, bytes]:
    """Requests as programs send them, and such as only an enemy sends; see `fuzz_http_requests` for the first byte."""
    refused, accepted, literal = b"\x06", b"\x86", b"\x46"
    host = b" HTTP/1.1\r\nHost: a.example\r\n"
    get = b"GET /x" + host + b"\r\n"
    post = b"POST /x" + host
    handshake = b"GET /w" + host + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    chunked = post + b"Transfer-Encoding: chunked\r\n\r\n"
    return {
        "get": refused + get * 3,
        "old": refused + b"GET / HTTP/1.0\r\nhost:A.example.:80\r\n\r\n",
        "absolute": refused + b"GET http://A.Example?x" + host + b"\r\n",
        "absolute-other": refused + b"GET http://b.example/" + host + b"\r\n",
        "length": refused + post + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\nabc" + get,
        "chunked": refused + chunked + b"3;x=y\r\nabc\r\n0A\r\n0123456789\r\n0\r\nDigest: x\r\n\r\n" + get,
        "chunk-footer": refused + chunked + b"3\r\nabcGET / HTTP/1.1\r\n",
        "trailer-host": refused + chunked + b"0\r\nHost: b.example\r\n\r\n",
        "both-lengths": refused + post + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "other-host": refused + get + get.replace(b"a.", b"b."),
        "two-hosts": refused + get[:-2] + b"Host: a.example\r\n\r\n",
        "folded": refused + get[:-2] + b"X: y\r\n z\r\n\r\n",
        "bare-lf": refused + get.replace(b"\r\n", b"\n"),
        "blank-before-colon": refused + b"GET / HTTP/1.1\r\nHost : a.example\r\n\r\n",
        "connect": refused + b"CONNECT a.example:443" + host + b"\r\n",
        "http2": refused + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "upgrade": refused + get[:-2] + b"Upgrade: h2c\r\nHTTP2-Settings: x\r\n\r\n",
        "websocket": accepted + handshake + b"\x81\x05hello",
        "websocket-refused": refused + handshake + get,
        "literal": literal + get.replace(b"a.example", b"[2001:db8::1]:80") + get.replace(b"a.", b"denied."),
    }


def frame(kind: int, stream: int, payload: bytes = b"", code: int = 0) -> bytes:
    """A frame of connections."""
    return egress.HEADER.pack(kind, code, 0, stream, len(payload)) + payload


def egress_seeds() -> dict[str, bytes]:
    """Frames as relay and gate send them, and such as only an enemy sends; see `fuzz_egress` for the first byte."""
    gate, gate_cut, stalled, guest = b"\x00", b"\x03\x00\x06\x12", b"\x41\x63", b"\x82\x08\x1f"

    def ask(stream: int, transport: int = egress.TCP, host: bytes = b"a.example") -> bytes:
        return frame(egress.OPEN, stream, struct.pack(">BH", transport, 443) + host)

    opened, data, fin = frame(egress.OPENED, 1), frame(egress.DATA, 1, b"hello"), frame(egress.FIN, 1)
    credit, reset = frame(egress.CREDIT, 1, struct.pack(">I", egress.WINDOW // 4)), frame(egress.RESET, 1)
    datagrams = frame(egress.DATAGRAM, 2, b"x") + frame(egress.DATAGRAM, 2)
    return {
        "talk": gate_cut + ask(1) + ask(2, egress.UDP) + data + credit + datagrams + data + fin + credit,
        "told": gate
        + frame(egress.REFUSAL, 0, b"\x06\x01\xbbunlisted.example")
        + frame(egress.REFUSAL, 1, b"\x11\0\0x"),
        "reset": gate + ask(1) + data + reset + data + ask(5) + frame(egress.DATA, 5, b"x"),
        "stalled": stalled + ask(1) + data * 8,
        "window": gate + ask(1) + frame(egress.DATA, 1, bytes(1500)) * 2,
        "guest": guest + opened + data + credit + frame(egress.OPENED, 2) + datagrams + fin + reset,
        "refused": guest + frame(egress.OPENED, 1, code=egress.POLICY) + data + frame(egress.RESET, 3, code=4),
        "before-opened": guest + data,
        "opened-twice": guest + opened * 2,
        "open-twice": gate + ask(1) * 2,
        "descending": gate + ask(7) + ask(6),
        "never-opened": gate + ask(1) + frame(egress.DATA, 2, b"x"),
        "too-much-credit": gate + ask(1) + credit * 5,
        "no-credit": gate + ask(1) + frame(egress.CREDIT, 1, bytes(4)),
        "other-transport": gate + ask(2, egress.UDP) + frame(egress.DATA, 2, b"x"),
        "no-host": gate + ask(1, host=b""),
        "long": gate + egress.HEADER.pack(egress.DATA, 0, 0, 1, 2**32 - 1) + b"x",
        "wrong-side": gate + opened,
        # What came after a fault was kept.
        "found/kept-after-fault": gate + b"\xff" * 2000,
    }


MADE: Final = {
    "changes": changes_seeds,
    "channel": channel_seeds,
    "client_hello": client_hello_seeds,
    "dns": dns_seeds,
    "names": name_seeds,
    "documents": documents_seeds,
    "egress": egress_seeds,
    "hints": hints_seeds,
    "http_requests": http_requests_seeds,
    "observed": observed_seeds,
    "patch": patch_seeds,
    "unpack": unpack_seeds,
}


def seeds() -> dict[str, bytes]:
    """All seeds: their path below tests/fuzz/seeds, and what is in them."""
    return {f"{target}/{name}": data for target, made in MADE.items() for name, data in made().items()}


def main() -> None:
    """Write them; remove what is no seed any more."""
    wanted = seeds()
    for path in SEEDS.rglob("*"):
        if path.is_file() and path.relative_to(SEEDS).as_posix() not in wanted:
            path.unlink()
    for name, data in wanted.items():
        path = SEEDS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
