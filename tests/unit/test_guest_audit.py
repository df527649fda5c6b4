"""The guest's audit reader: each refused call once, by name and path, at most 64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.guest.audit import _FOLDERS, Refusal, Refusals, View
from x07_sandbox.guest.boot.filters import AUDITED

if TYPE_CHECKING:
    from collections.abc import Sequence

CALLS: Final = {
    "openat": 257,
    "mkdir": 83,
    "unlinkat": 263,
    "execve": 59,
    "mount": 165,
    "socket": 41,
    "creat": 85,
    "stat": 4,
    "lstat": 6,
    "statx": 332,
    "openat2": 437,
    "renameat2": 316,
    "symlinkat": 266,
    "symlink": 88,
    "link": 86,
    "renameat": 264,
    "fchmod": 91,
    "utimensat": 280,
    "prlimit64": 302,
    "connect": 42,
}
SYSCALL, PATH, SOCKADDR, CWD, SECCOMP = 1300, 1302, 1306, 1307, 1326
WHO: Final = (
    "ppid=137 pid=138 auid=4294967295 uid=65532 gid=65532 euid=65532 suid=65532 fsuid=65532 egid=65532 sgid=65532 "
    'fsgid=65532 tty=(none) ses=4294967295 comm="python3" exe="/usr/bin/python3.13" key=(null)'
)
Record = tuple[int, str]


def called(call: int, error: int, *, items: int, a0: str = "ffffffffffffff9c", a1: str = "7f", a2: str = "0") -> Record:
    """A SYSCALL record as Linux 6.12 writes it."""
    words = f"arch=c000003e syscall={call} success=no exit={-error} a0={a0} a1={a1} a2={a2} a3=0 items={items}"
    return SYSCALL, f"{words} {WHO}"


def path(name: str, kind: str = "NORMAL", inode: int = 67, dev: str = "fe:00") -> Record:
    """A PATH record; the kernel omits the inode if it found none."""
    found = f"inode={inode} dev={dev} mode=040755 ouid=0 ogid=0 rdev=00:00 " if inode else ""
    return PATH, f"item=0 name={name} {found}nametype={kind} cap_fp=0 cap_fi=0 cap_fe=0 cap_fver=0 cap_frootid=0"


def find(device: str, inode: int, given: str) -> str:
    """Return the path of a known inode, unless the name itself says it."""
    if given.startswith("/data"):
        return ""
    known = {("fe:10", 139268): "/data/t", ("fe:10", 139269): "/data/t/f", ("00:20", 9): "/srv/b"}
    return known.get((device, inode), "")


ROOTS: Final = ("/opt/x07/conf.json", "/data/out", "/srv/a/tmp", "/srv/b/tmp")


def read(*events: Sequence[Record]) -> dict[Refusal, int]:
    """The refusals found in the records of these calls."""
    refusals = Refusals(CALLS)
    refusals.reset(View(find, ROOTS))
    for serial, records in enumerate(events, start=40):
        for kind, text in records:
            refusals.note(kind, f"audit(1764000000.123:{serial}): {text}".encode())
    refusals.finish()
    return refusals.found


def refused(
    call: str,
    error: int,
    found: str,
    *paths: Record,
    cwd: str = "",
    write: bool = False,
    items: int | None = None,
    **arguments: str,
) -> tuple[list[Record], Refusal]:
    """The records of a refused call, and what must be found in them: the path *found*."""
    first = called(CALLS.get(call, 999), error, items=len(paths) if items is None else items, **arguments)
    folder = [(CWD, f'cwd="{cwd}"')] if cwd else []
    return [first, *folder, *paths], Refusal("kernel", call, error, found, write=write)


def parent(name: str, inode: int = 139268) -> Record:
    """The record of a folder in which an entry was to be made or removed."""
    return path(f'"{name}"', "PARENT", inode, "00:20" if inode == 9 else "fe:10")


IN_DATA: Final = path('"a"')
CASES: Final = [
    refused("openat", 13, "/root/x", path('"/root/x"', "UNKNOWN"), cwd="/opt/x07"),
    refused("prlimit64", 1, "nofile", a0="0", a1="7", a2="7f", write=True),
    refused("prlimit64", 1, "", a0="0", a1="3", a2="7f", write=True),
    refused("openat", 30, "/etc/", path('"/etc/"', "PARENT"), cwd="/", a2="80241", write=True),
    *(refused("mkdir", 30, "/", path(f'"{name}"', "PARENT"), cwd="/", write=True) for name in ("/", "//")),
    refused("mkdir", 30, "/data/a/new", path('"a/"', "PARENT"), path('"a/new"', "CREATE"), cwd="/data", write=True),
    refused("unlinkat", 13, ".../x", path('"/data"', "PARENT"), path('"x"', "DELETE"), cwd="/data", a0="5", write=True),
    refused("execve", 13, "/tmp/a é", path("2F746D702F6120C3A9"), cwd="/", a0="55"),  # noqa: S108 - the guest's
    refused("execve", 13, "/bin/bash", path('"/usr/bin/ldd"'), path('"/bin/bash"'), cwd="/"),
    refused("creat", 30, "/data/", path('"."', "PARENT"), cwd="/data", a0="7ffe00", write=True),
    *(refused(name, 13, "/data/a", IN_DATA, cwd="/data", a0="7ffe00") for name in ("stat", "lstat")),
    refused("statx", 13, ".../a", IN_DATA, cwd="/data", a0="5"),
    refused("renameat2", 30, ".../a/", path('"a/"', "PARENT"), cwd="/data", a2="5", write=True),
    # Of two names the one that is mounted, or, of a name relative to a descriptor, the only one that can be.
    *(
        refused(
            *("renameat2", 16, "/opt/x07/conf.json"),
            *(path('"/opt/x07"', "PARENT") for _ in range(2)),
            *(path(f'"{name}"', "DELETE") for name in names),
            cwd="/opt/x07",
            write=True,
        )
        for names in (("new", "conf.json"), ("conf.json", "new"))
    ),
    *(
        refused(
            *("unlinkat", 16, found, path('"/opt/x07"', "PARENT"), path(f'"{name}"', "DELETE")),
            cwd="/opt/x07",
            a0="3",
            write=True,
        )
        for name, found in (("out", "/data/out"), ("tmp", ".../tmp"))
    ),
    # The one that lies in the folder, where that is known by its inode: of one name there may be two.
    *(
        refused(
            *("unlinkat", error, "/srv/b/tmp", parent("/opt/x07", 9), path('"tmp"', "DELETE")),
            cwd="/opt/x07",
            a0="3",
            write=True,
        )
        for error in (16, 13)
    ),
    *(
        refused(
            *("renameat2", 16, "/srv/b/tmp"),
            *(path('"/opt/x07"', "PARENT", inode, "00:20") for inode in inodes),
            *(path(f'"{name}"', "DELETE") for name in names),
            cwd="/opt/x07",
            a0="3",
            a2="3",
            write=True,
        )
        for inodes, names in (((67, 9), ("new", "tmp")), ((9, 67), ("tmp", "new")))
    ),
    # As Linux 6.12 told of `cp FILE FOLDER`, rm -r, os.open(..., dir_fd=) and the like in a read root: of a name
    # without a slash, relative to a descriptor, the folder is said to be the working directory.
    refused("openat", 30, ".../", path('"/opt/x07"', "PARENT"), cwd="/opt/x07", a0="3", a2="c1", write=True),
    refused("openat", 30, "/data/t/", parent("/opt/x07"), cwd="/opt/x07", a0="3", a2="c1", write=True),
    refused("unlinkat", 30, "/data/t/", parent("/"), cwd="/", a0="4", write=True),
    refused("renameat", 30, "/data/t/", *[parent("/opt/x07")] * 2, cwd="/opt/x07", a0="3", a2="3", write=True),
    *(
        refused(call, 30, "/data/t/f", path(name, "NORMAL", 139269, "fe:10"), cwd="/opt/x07", a0="3", a2=a2, write=True)
        for call, name, a2 in (("openat", '"f"', "80001"), ("fchmod", "(null)", "0"))
    ),
    # A link of the program's own, or a name for a descriptor, says nothing of where it leads.
    refused("openat", 30, "/data/t/", parent("td/"), cwd="/tmp", a2="80241", write=True),  # noqa: S108 - the guest's
    *(
        refused("openat", 30, found, path(name, "NORMAL", 139269, "fe:10"), cwd=cwd, a2="80001", write=True)
        for name, cwd, found in (
            *((name, "/tmp", "/data/t/f") for name in ('"tf"', '"/tmp/td/f"', '"/proc/self/fd/6"')),  # noqa: S108
            ('"l"', "/data", "/data/l"),
        )
    ),
    refused("utimensat", 30, "", a0="4", write=True),
    # A path without a descriptor is the working directory's, with or without a slash in it.
    refused("openat", 30, "/data/", parent("/data"), cwd="/data", a2="80241", write=True),
    # The refused path is that of the new link, not its target.
    *(
        refused(call, 30, "/data/t/", parent("/data/t/"), target, cwd="/opt/x07", a0="7f33aa0193a0", write=True)
        for call, target in (
            ("symlink", path('"/home/me/secret"', "UNKNOWN", 0)),
            ("link", path('"/etc/hostname"', "NORMAL", 1875)),
        )
    ),
    refused("symlinkat", 30, "/data/a/", path('"a/"', "PARENT"), cwd="/data", a0="7ffe00", a1="ffffff9c", write=True),
    refused("openat2", 30, "/data/in.txt", path('"in.txt"'), cwd="/data", write=True),
    refused("openat", 13, "/root/nametype=PARENT", path('"/root/nametype=PARENT"'), cwd="/"),
    refused("execve", 13, "\\xff", path("FF2F")),
    refused("socket", 24, "", write=True),
    refused("system call 999", 1, "", write=True),
    refused("openat", 13, "/a", path('"/a"'), items=3),
    refused("openat", 13, "", path("(null)")),
    (
        [(SECCOMP, f"{WHO} sig=0 arch=c000003e syscall=165 compat=0 ip=0x7f code=0x50000")],
        Refusal("seccomp", "mount", 1, "", write=False),
    ),
]


@pytest.mark.parametrize(("records", "expected"), CASES)
def test_a_refused_call_is_reported_by_name_and_path(records: list[Record], expected: Refusal) -> None:
    """A refused call is reported by its name and its absolute, decoded path."""
    assert read(records) == {expected: 1}


def test_the_same_call_is_counted() -> None:
    """Repeated refusals are one entry with a count."""
    one = [called(257, 13, items=1), path('"/root/x"')]
    other = [called(257, 13, items=1), path('"/root/y"')]
    assert read(one, other, one, one) == {
        Refusal("kernel", "openat", 13, "/root/x", write=False): 3,
        Refusal("kernel", "openat", 13, "/root/y", write=False): 1,
    }


def test_a_successful_call_is_no_refusal() -> None:
    """Records of successful calls are no refusals."""
    words = f"arch=c000003e syscall=1 success=yes exit=2 a0=3 a1=7f a2=2 a3=0 items=0 {WHO}"
    login = "pid=138 uid=65532 old-auid=4294967295 auid=7 tty=(none) old-ses=4294967295 ses=1 res=1"
    records = [(1006, login), (SYSCALL, words), (SYSCALL, words.replace("exit=2", "exit=0"))]
    assert read(records) == {}
    # But they use up the kernel's rate limit; then the lost records are asked for.
    refusals = Refusals(CALLS)
    refusals.note(records[0][0], f"audit(1.2:3): {login}".encode())
    assert refusals.any_record


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        ("a0=0 a1=7 a2=7ffd0 a3=0", "nofile"),
        ("a0=0 a1=ffffffff00000004 a2=7ffd0 a3=0", "core"),
        ("a0=0 a1=0 a2=7ffd0 a3=0", "cpu"),
        ("a0=0 a1=6 a2=7ffd0 a3=0", ""),
        ("a0=1 a1=7 a2=7ffd0 a3=0", None),
        ("a0=0 a1=7 a2=0 a3=7ffd0", None),
    ],
)
def test_a_refused_rlimit_is_named(words: str, reported: str | None) -> None:
    """A refused increase of a program's own resource limit names the limit."""
    found = read([(SYSCALL, f"arch=c000003e syscall=302 success=no exit=-1 {words} items=0 {WHO}")])
    assert [refusal.path for refusal in found] == ([] if reported is None else [reported])


def test_records_of_several_calls_may_be_mixed() -> None:
    """Interleaved records are assigned to their calls by serial number."""
    refusals = Refusals(CALLS)
    mixed = ((7, called(257, 13, items=1)), (8, called(59, 13, items=1)), (8, path('"/b"')), (7, path('"/a"')))
    for serial, (kind, text) in mixed:
        refusals.note(kind, f"audit(1.2:{serial}): {text}".encode())
    assert [(refusal.call, refusal.path) for refusal in refusals.found] == [("execve", "/b"), ("openat", "/a")]


def test_a_flood_is_bounded() -> None:
    """At most 64 distinct refusals are reported, and the rest are counted."""
    refusals = Refusals(CALLS)
    for serial in range(5000):
        refusals.note(SYSCALL, f"audit(1.2:{serial}): {called(257, 13, items=1)[1]}".encode())
        if serial % 2:
            name = f'"/root/{serial}"'
            refusals.note(PATH, f"audit(1.2:{serial}): {path(name)[1]}".encode())
    refusals.finish()
    assert len(refusals.found) == 64
    assert sum(refusals.found.values()) + refusals.uncounted == 5000
    refusals.reset(View())
    assert (refusals.found, refusals.uncounted) == ({}, 0)


@pytest.mark.parametrize(
    ("saddr", "wanted"),
    [
        ("020001BB01010101" + "0" * 16, "1.1.1.1:443"),
        ("0A000016" + "0" * 8 + "20010DB8" + "0" * 22 + "01" + "0" * 8, "[2001:db8::1]:22"),
    ],
)
def test_a_connection_without_a_network_is_reported_by_its_address(saddr: str, wanted: str) -> None:
    """Where there is no network, a connection that a program tried is reported by address and port."""
    found = read([called(42, 101, items=0), (SOCKADDR, f"saddr={saddr}")])
    assert found == {Refusal("network", "connect", 101, wanted, write=False): 1}


@pytest.mark.parametrize("saddr", ["01002F746D702F736F636B", "0200", "", "zz", "10000000000000000000", "FFFF" * 8])
def test_only_internet_addresses_are_connections(saddr: str) -> None:
    """A call with another or a broken address is no connection, and nothing fails."""
    assert read([called(42, 101, items=0), (SOCKADDR, f"saddr={saddr}")]) == {}


def test_services_answer_for_their_own_denials() -> None:
    """A denied request about files is the answer to that request, and no denial of the next command."""
    refusals = Refusals(CALLS)
    refusals.reset(View(services=lambda: [138]))
    refusals.note(SYSCALL, f"audit(1.2:3): {called(257, 13, items=0)[1]}".encode())
    refusals.note(SYSCALL, f"audit(1.2:4): {called(257, 13, items=0)[1]}".replace("pid=138", "pid=139").encode())
    assert sum(refusals.found.values()) == 1


def test_directory_arguments_of_audited_calls_are_known() -> None:
    """The directory arguments of every audited call are known."""
    named = {name for name in AUDITED if name.endswith(("at", "at2"))} - {"creat", "stat", "lstat"}
    assert set(_FOLDERS) == named | {"statx"}


@given(
    st.lists(
        st.tuples(st.sampled_from([SYSCALL, PATH, SOCKADDR, CWD, SECCOMP, 0]), st.binary(max_size=80)), max_size=20
    )
)
def test_any_bytes_are_read_without_an_error(records: list[tuple[int, bytes]]) -> None:
    """Any bytes in a record are read without an error."""
    refusals = Refusals(CALLS)
    for kind, text in records:
        refusals.note(kind, text)
        refusals.note(kind, b"audit(1.2:3): syscall=257 items=2 name=" + text)
    refusals.finish()
    for refusal in refusals.found:
        assert len(refusal.path) <= 1025
