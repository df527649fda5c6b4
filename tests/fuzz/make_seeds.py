"""Writes tests/fuzz/seeds: the fuzzer's starting inputs, which each test run replays.

Run: python -m tests.fuzz.make_seeds

A channel seed is named after the message or the type of frame that it is about; each has at least one. See
`fuzz_channel` for the first byte. The seeds below "found" are inputs that once broke an invariant.
"""

from __future__ import annotations

import json
import re
import stat
import struct
from pathlib import Path
from typing import Final

from tests import hostile_images as hostile
from tests.fuzz.fuzz_client_hello import body, extension, hello, message, records, sni
from tests.fuzz.fuzz_documents import BETWEEN, BUILT, result
from tests.fuzz.fuzz_images import DOCUMENTS, OUTER, SUMMED, TWICE, ZIPPED, archive, manifest
from tests.fuzz.fuzz_observed import POLICIES
from tests.fuzz.fuzz_ttrpc import failed, field
from tests.fuzz.fuzz_ttrpc import frame as response
from tests.fuzz.fuzz_unpack import MOST_BYTES, ON_HOST
from tests.guest.lies import DENIED, EXITED
from tests.guest.messages import MESSAGES, NONCE, OPEN, frame, opening
from tests.guest.messages import message as control
from x07_sandbox.channel import egress, streams
from x07_sandbox.channel.link import WINDOW, Stream
from x07_sandbox.channel.messages import (
    Changes,
    Close,
    Closed,
    Exec,
    Failed,
    Hello,
    Output,
    Resize,
    Seed,
    Seeded,
    Started,
    Stop,
    Warm,
    Warmed,
    encode,
)
from x07_sandbox.channel.trees import Entry, file_record, segment
from x07_sandbox.channel.trees import Kind as R
from x07_sandbox.host.documents import render_json
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.x07.runner_report import runner_report

SEEDS: Final = Path(__file__).parent / "seeds"
AS_HOST: Final = b"\x00"
AS_HOST_CUT: Final = b"\x03\x00\x06\x12"
AS_HOST_STALLED: Final = b"\x41\x63"
AS_GUEST: Final = b"\x80"
AS_GUEST_CUT: Final = b"\x82\x08\x1f"


def channel_seeds() -> dict[str, bytes]:
    """Return one conversation for each message and type of frame, and some more for branches."""
    greeted = control(MESSAGES[Hello])
    ready = greeted + control(Seeded(NONCE))
    running = ready + control(Started(1))
    output = opening(1, Stream.STDOUT, 1) + frame(streams.DATA, 1, b"hello\n")
    output += opening(3, Stream.STDERR, 1) + frame(streams.DATA, 3, b"\0\xff")
    ended = frame(streams.FIN, 1) + frame(streams.FIN, 3)
    exited = running + output + ended + control(EXITED)
    collected = opening(5, Stream.OUTPUT) + frame(streams.DATA, 5, b"\x7fEL") + frame(streams.FIN, 5)
    changes = opening(7, Stream.CHANGES) + frame(streams.DATA, 7, b"\7\0\0") + frame(streams.FIN, 7)
    failed = control(Failed(0, "prepare", 2, "No such file: '/x07/in/\u00e9'"))
    seeded = control(MESSAGES[Seed])
    opened = seeded + control(OPEN)
    command, more = control(MESSAGES[Exec]), control(Exec(2, ["b"], {}, "/", MESSAGES[Exec].limits))  # type: ignore[union-attr]
    started = opened + command
    files = opening(2, Stream.INPUT) + frame(streams.DATA, 2, b"#!/bin/sh\n") + frame(streams.FIN, 2)
    stdin = opening(4, Stream.STDIN, 1) + frame(streams.DATA, 4, b"in")
    close, at_once = control(Close(1, Output("/x07/out/a", 9), None)), control(Close(0, None, None))
    credit = frame(streams.CREDIT, 4, (WINDOW // 4).to_bytes(4, "big"))
    return {
        "HELLO": AS_HOST + greeted,
        "WARM": AS_GUEST + control(MESSAGES[Warm]) + seeded,
        "WARM-again": AS_GUEST + started + at_once + control(MESSAGES[Warm]) + opened + command,
        "WARMED": AS_HOST + greeted + control(Warmed()),
        "SEED": AS_GUEST + seeded,
        "SEEDED": AS_HOST_CUT + ready,
        "OPEN": AS_GUEST_CUT + opened + files,
        "OPEN-stream": AS_HOST + running + opening(1, Stream.STDOUT, 1),
        "EXEC": AS_GUEST_CUT + started,
        "EXEC-two": AS_GUEST + opened + command + more + control(Stop(1, 9)) + control(Stop(2, 9)),
        "STARTED": AS_HOST + running,
        "DATA": AS_HOST_CUT + running + output,
        "DATA-files": AS_GUEST_CUT + started + files + stdin,
        "DATA-stalled": AS_HOST_STALLED + running + output + frame(streams.DATA, 1, b"hello") * 3,
        "FIN": AS_HOST + exited + collected,
        "CREDIT": AS_HOST_CUT + running + credit,
        "RESET": AS_HOST + running + frame(streams.RESET, 4) + credit + output + frame(streams.RESET, 1),
        "ANSWER": AS_HOST + running + frame(streams.ANSWER, 4),
        "DATAGRAM": AS_HOST + running + opening(1, Stream.STDOUT, 1) + frame(streams.DATAGRAM, 1),
        "STOP-skipped": AS_GUEST + opened + more + stdin + control(Stop(1, 9)),
        "STOP": AS_GUEST + started + control(Stop(1, 9)) * 2,
        "RESIZE": AS_GUEST + started + control(MESSAGES[Resize]) * 2,
        "CHANGES": AS_GUEST_CUT + started + control(Changes()) * 2 + close,
        "CHANGES-twice": AS_HOST + running + changes + changes,
        "STDIN-late": AS_GUEST + started + control(Stop(1, 9)) + stdin,
        "DENIED": AS_HOST + running + control(DENIED) * 2,
        "EXITED": AS_HOST + exited,
        "EXITED-early": AS_HOST + running + output + control(EXITED),
        "EXITED-two": AS_HOST + exited + control(Started(2)) + opening(5, Stream.STDOUT, 2),
        "CLOSE": AS_GUEST + started + close + control(Stop(1, 9)),
        "CLOSED": AS_HOST_CUT + exited + collected + changes + control(Closed(3, None, 0, 0)),
        "FAILED": AS_HOST_CUT + ready + failed,
        "FAILED-command": AS_HOST + ready + control(Failed(1, "exec", 2, "no")) + control(Started(2)),
        "FAILED-late": AS_HOST + exited + failed,
        # In one piece, the fault hid the events before it; cut, it did not.
        "found/fault-after-events": AS_HOST_CUT + running + output + b"\xff" + bytes(11),
        # A message rejected for its order was dropped, and the conversation continued after it.
        "found/life-after-fault": AS_HOST_CUT + control(Started(1)) + greeted,
        # The host buffered 4 MiB of a message that the guest must not send, before it rejected it.
        "found/large-message-from-the-guest": AS_HOST
        + streams.HEADER.pack(streams.MESSAGE, encode(OPEN)[0], 0, 0, 4 << 20)
        + bytes(40_000),
        "found/no-credit": AS_HOST + running + frame(streams.CREDIT, 4, bytes(4)),
        # The guest raised ValueError, TypeError, or (for the id) TypeError in its table of commands.
        "found/short-open": AS_GUEST + seeded + frame(streams.MESSAGE, 0, b"[]", encode(OPEN)[0]),
        # The target's guest ended a command after it had closed the session.
        "found/stop-after-closed": AS_GUEST
        + started
        + control(Close(0, Output("/x07/out/a", 9), None))
        + control(Stop(1, 9)),
        "found/no-limits": AS_GUEST
        + opened
        + frame(streams.MESSAGE, 0, b'[1,[],{},"",0,"",false,null,false]', encode(MESSAGES[Exec])[0]),
        "found/text-as-id": AS_GUEST
        + opened
        + frame(streams.MESSAGE, 0, b'["1",[],{},"",[0,0,0,0,0],"",false,null,false]', encode(MESSAGES[Exec])[0]),
    }


def unpack_seeds() -> dict[str, bytes]:
    """Return streams as the build makes them, and hostile ones. The first byte says where they are unpacked."""
    end, host = Entry(R.END, b"").encoded(), bytes([ON_HOST])
    small, folder = file_record(b"f", b"12345"), Entry(R.FOLDER, b"program", mode=0o755).encoded()
    main, run = file_record(b"program/main.py", b"print(1)\n"), file_record(b"program/run", b"#!", 0o755)
    link = Entry(R.LINK, b"l", target=b"/etc").encoded()
    large = Entry(R.FILE, b"f", mode=0o644, size=MOST_BYTES + 1).encoded()
    head = Entry(R.FILE, b"f", mode=0o644, size=5).encoded()
    streams_ = {
        "empty": end,
        "tree": folder + main + run + end,
        "large": file_record(b"zeros", bytes(MOST_BYTES)) + end,
        "twice": small + small + end,
        "up": file_record(b"../outside", b"x") + end,
        "under-a-file": small + file_record(b"f/g", b"x") + end,
        "link": link + file_record(b"l/passwd", b"x") + end,
        "link-replaced": Entry(R.LINK, b"f", target=b"../../../outside").encoded() + small + end,
        "device": Entry(R.UNSUPPORTED, b"null", mode=stat.S_IFCHR | 0o666).encoded() + end,
        "set-id": file_record(b"s", b"x", 0o6777) + end,
        "long-name": file_record(b"x" * 256, b"") + end,
        "hole": large + segment(MOST_BYTES + 1, hole=True) + end,
        "bomb": Entry(R.FILE, b"f", size=1 << 40).encoded() + segment(1 << 40, hole=True) + end,
        # Of the format that was used before, where a signed number made room for files over the limit.
        "found/negative-folder": Entry(R.FOLDER, b"d", mode=0xFFFF).encoded() + large + segment((1 << 63) - 1),
        "found/negative-file": head + segment((1 << 63) - 1, hole=True) + small,
    }
    cut = bytes([7])
    return {
        **{name: cut + data for name, data in streams_.items()},
        **{f"{name}-host": host + data for name, data in streams_.items() if not name.startswith("found/")},
    }


def images_seeds() -> dict[str, bytes]:
    """Return layers, archives and documents of images; the first byte says which (see fuzz_images)."""
    low = hostile.file(b"1", "a/b") + hostile.header("d/", kind=b"5") + hostile.header("l", kind=b"2", link="a")
    whiteouts = (
        hostile.file(b"", "a/.wh.b") + hostile.file(b"", "d/.wh..wh..opq") + hostile.header("h", kind=b"1", link="a/b")
    )
    long = hostile.header("L", 200, b"L") + hostile.padded(b"n" * 200)
    keys = ("path", "linkpath", "size", "uid", "gid", "mtime", "SCHILY.xattr.user.a", "GNU.sparse.realsize")
    small = {re.sub(r"\W", "-", name): data for name, data in hostile.HOSTILE.items() if len(data) <= 1 << 13}
    return {
        **{name: bytes([SUMMED]) + data for name, data in small.items()},
        "layer": bytes([SUMMED]) + low + whiteouts + long + low + hostile.END,
        "twice": bytes([SUMMED | TWICE | ZIPPED]) + low + whiteouts + hostile.END,
        **{key: bytes([SUMMED]) + hostile.extended(hostile.record(key, "1")) + low + hostile.END for key in keys},
        "archive": bytes([SUMMED | OUTER]) + archive(low + hostile.END, manifest("0/layer.tar")),
        "archive-up": bytes([SUMMED | OUTER]) + archive(low + hostile.END, manifest("../kept")),
        "documents": bytes([DOCUMENTS]) + b'{"manifests": []}',
        "documents-up": bytes([DOCUMENTS]) + b"\0" + manifest("0/layer.tar", config="../kept"),
    }


def changes_seeds() -> dict[str, bytes]:
    """Return streams as the guest sends them, and hostile ones; the first byte cuts them."""
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
        # A link in place of the root was accepted as a change.
        "found/root-link": whole + root + gone + Entry(R.LINK, b"", target=b"a").encoded() + end,
        "found/root-gone": whole + root + Entry(R.DELETED, b"").encoded() + end,
        "twice": whole + root + file(b"x", b"1") + file(b"x", b"2") + end,
        "no-root": whole + file(b"x", b"1") + end,
        "third-root": whole + Entry(R.ROOT, b"2").encoded() + end,
        "after-end": whole + root + end + root,
    }


def name_seeds() -> dict[str, bytes]:
    """Return hosts as guests write them, valid and invalid."""
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
    """Return a query of class IN; extra: what follows the question; opts: the number of such records."""
    header = struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, opts)
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return header + labels + b"\0" + struct.pack(">HH", kind, 1) + extra


def dns_seeds() -> dict[str, bytes]:
    """Return queries, some of them damaged, behind an ignored byte."""
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
    """Return one of each document, which the first byte selects, and program output that is no report."""
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
    """Return programs' messages about missing files, and similar text; the first byte chooses the policy."""
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
    """Return bodies as a guest sends them, and hostile ones; the first byte chooses the policy."""
    refused = [
        DENIED._replace(by="seccomp", call="clone", errno=1, path=""),
        DENIED._replace(by="seccomp", call="execve", errno=1, path=""),
        DENIED._replace(call="socket", errno=24, path=""),
        DENIED._replace(call="execve", path="/usr/bin/true"),
        DENIED._replace(call="execve", path="/data/out/made"),
        DENIED._replace(call="mkdir", errno=30, path="/data/", write=True),
        DENIED._replace(call="openat", errno=30, path="/opt/x07/in/f", write=True),
        DENIED._replace(call="openat", errno=30, path="/x07/out/", write=True),
        DENIED._replace(call="openat", errno=30, path=".../", write=True),
        DENIED._replace(call="openat", path="/usr/bin/true"),
    ]
    hostile = [
        DENIED._replace(call="\x1b[2J", path="/srv/$(id); '\n", write=True, errno=30, times=2**63 - 1),
        DENIED._replace(by="nobody", call="", path="\ud800/" * 500, write=True, errno=4096),
        DENIED._replace(path="/" * 2000, write=True, errno=30),
    ]
    # With lone surrogates, which no agent sends.
    made = [json.dumps(denied).encode() for denied in (*refused, *hostile)]
    found = {f"policy-{number}": bytes([number]) + b"\n".join(made[: len(refused)]) for number in range(len(POLICIES))}
    found |= {f"hostile-{number}": b"\x00" + body for number, body in enumerate(made[len(refused) :])}
    return {**found, "counted": b"\x00" + b"\n".join(made[-3:] * 3), "no-fields": b"\x00{}\n[]\n\xff"}


def patch_seeds() -> dict[str, bytes]:
    """Return two texts, which the first byte cuts apart."""
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
    """Return first bytes of a connection; see `fuzz_client_hello` for the first byte."""
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
    """Return requests as programs send them, and hostile ones; see `fuzz_http_requests` for the first byte."""
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


def egress_seeds() -> dict[str, bytes]:
    """Return frames as relay and gate send them, and hostile ones; see `fuzz_egress` for the first byte."""
    gate, gate_cut, stalled, guest = b"\x00", b"\x03\x00\x06\x12", b"\x41\x63", b"\x82\x08\x1f"

    def ask(stream: int, transport: int = egress.TCP, host: bytes = b"a.example") -> bytes:
        return frame(streams.OPEN, stream, struct.pack(">H", 443) + host, transport)

    opened, data, fin = frame(streams.ANSWER, 1), frame(streams.DATA, 1, b"hello"), frame(streams.FIN, 1)
    credit, reset = frame(streams.CREDIT, 1, struct.pack(">I", egress.WINDOW // 4)), frame(streams.RESET, 1)
    datagrams = frame(streams.DATAGRAM, 3, b"x") + frame(streams.DATAGRAM, 3)
    return {
        "talk": gate_cut + ask(1) + ask(3, egress.UDP) + data + credit + datagrams + data + fin + credit,
        "told": gate
        + frame(streams.MESSAGE, 0, b"\x06\x01\xbbunlisted.example", egress.REFUSAL)
        + frame(streams.MESSAGE, 1, b"\x11\0\0x", egress.REFUSAL),
        "told-other-transport": gate + frame(streams.MESSAGE, 0, b"\x01\x01\xbbx", egress.REFUSAL),
        "reset": gate + ask(1) + data + reset + data + ask(5) + frame(streams.DATA, 5, b"x"),
        "stalled": stalled + ask(1) + data * 8,
        "window": gate + ask(1) + frame(streams.DATA, 1, bytes(1500)) * 2,
        "guest": guest + opened + data + credit + frame(streams.ANSWER, 3) + datagrams + fin + reset,
        "refused": guest + frame(streams.ANSWER, 1, code=egress.POLICY) + data + frame(streams.RESET, 5, code=4),
        "before-answer": guest + data,
        "answered-twice": guest + opened * 2,
        "open-twice": gate + ask(1) * 2,
        "descending": gate + ask(7) + ask(5),
        "even": gate + ask(2),
        "never-opened": gate + ask(1) + frame(streams.DATA, 3, b"x"),
        "too-much-credit": gate + ask(1) + credit * 5,
        "no-credit": gate + ask(1) + frame(streams.CREDIT, 1, bytes(4)),
        "datagram-on-tcp": gate + ask(1) + frame(streams.DATAGRAM, 1, b"x"),
        "data-on-udp": gate + ask(3, egress.UDP) + frame(streams.DATA, 3, b"x"),
        "other-transport": gate + ask(1, 1),
        "no-host": gate + ask(1, host=b""),
        "long": gate + streams.HEADER.pack(streams.DATA, 0, 0, 1, 2**32 - 1) + b"x",
        "wrong-side": gate + opened,
        # Input after a fault was kept.
        "found/kept-after-fault": gate + b"\xff" * 2000,
    }


def ttrpc_seeds() -> dict[str, bytes]:
    """Return answers of a daemon, valid and hostile."""
    made = field(1, b"vm-1") + field(2, b"/run/x.sock")
    return {
        "empty": response(b""),
        "made": response(field(2, made)),
        "ok-status": response(field(1, field(1, 0)) + field(2, made)),
        "unimplemented": failed(12, b"service Firecracker"),
        "negative-status": failed(-1, b""),
        "odd-text": failed(2, b"\x1b[2J\xff\n  x07: ok " + "\u202e".encode() * 200),
        "details": response(field(1, field(1, 5) + field(3, b"\x0a\x01x")) + field(9, 1)),
        "fixed": response(b"\x4d1234\x511234567" + b"8" + field(2, made)),
        "two-answers": response(field(2, b"a") + field(2, b"b")),
        "number-as-status": response(field(1, 12)),
        "cut-off": response(field(2, made)[:-1]),
        "long-integer": response(b"\x10" + b"\xff" * 10 + b"\x01"),
        "group": response(b"\x0b\x0c"),
        "other-stream": response(b"", stream=3),
        "data": response(b"", kind=3, flags=1),
        "too-large": (b"\xff" * 4) + response(b"")[4:],
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
    "images": images_seeds,
    "http_requests": http_requests_seeds,
    "observed": observed_seeds,
    "patch": patch_seeds,
    "ttrpc": ttrpc_seeds,
    "unpack": unpack_seeds,
}


def seeds() -> dict[str, bytes]:
    """Return all seeds: their path below tests/fuzz/seeds, and their content."""
    return {f"{target}/{name}": data for target, made in MADE.items() for name, data in made().items()}


def main() -> None:
    """Write the seeds; remove files that are no seeds any more."""
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
