"""Forks, snapshots and checkpoints of sandboxes: what goes on in a copy of a VM, and what is new in it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from tests.command import X07
from tests.conftest import need
from tests.vm.conftest import copy_cache, left_behind
from x07_sandbox import RefusedError, Sandbox, SandboxError, Snapshot, UsageError
from x07_sandbox.backends.qemu.saved import templates_dir
from x07_sandbox.cli.main import main
from x07_sandbox.host.waiting import unix_ms
from x07_sandbox.images.store import encode_manifest, find_image, sealed, set_name
from x07_sandbox.sessions.snapshots import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image", "state")]

# One line in, one line out. Another process counts, and a listener has a connection of its own.
PROGRAM = """
import hashlib, json, os, random, socket, ssl, sys, tempfile, time, uuid
kept = os.urandom(8 << 20)
unsynced = open("unsynced", "wb")
unsynced.write(kept), unsynced.flush()
if os.fork() == 0:
    number = 0
    while True:
        number += 1
        with open("counter.new", "w") as file:
            file.write(str(number))
        os.rename("counter.new", "counter")
        time.sleep(0.02)
listener = socket.create_server(("127.0.0.1", 5000))
client = socket.create_connection(("127.0.0.1", 5000))
peer, _ = listener.accept()
random.seed(1)
print("ready", flush=True)
for line in sys.stdin:
    client.sendall(b"x")
    again, other = socket.create_connection(("127.0.0.1", 5000)), listener.accept()
    before = int(open("counter").read())
    time.sleep(0.5)
    tls = ssl.MemoryBIO()
    ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), tls, server_hostname="x.example").__class__
    session = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), tls, server_hostname="x.example")
    try:
        session.do_handshake()
    except ssl.SSLWantReadError:
        pass
    print(json.dumps({
        "urandom": os.urandom(16).hex(), "uuid": str(uuid.uuid4()), "name": tempfile.mktemp(),
        "secret": random.SystemRandom().getrandbits(64), "tls": tls.read()[11:43].hex(),
        "machine": open("/etc/machine-id").read(), "generation": open("/run/x07/generation").read(),
        "seeded": random.random(), "time": time.time(),
        "memory": hashlib.sha256(kept).hexdigest(), "file": hashlib.sha256(open("unsynced", "rb").read()).hexdigest(),
        "connection": peer.recv(1) == b"x", "counts": int(open("counter").read()) > before,
    }), flush=True)
"""
DISTINCT = ("urandom", "uuid", "name", "secret", "tls", "machine", "generation")
SAME = ("memory", "file", "seeded")


def asked(sandbox: Sandbox, number: int) -> dict[str, Any]:
    """What the program in a sandbox says about itself, and by how many seconds its clock is wrong."""
    process = sandbox.process(number)
    began = unix_ms() / 1000
    process.write(b"\n")
    *_, line = process.read_until(b"}\n", timeout_s=60).splitlines()
    ended, said = unix_ms() / 1000, json.loads(line)
    said["late_s"] = max(0.0, began - said["time"], said["time"] - ended)
    return dict(said)


@pytest.fixture
def running() -> Iterator[tuple[Sandbox, int]]:
    """A sandbox in which the program runs, and the program's number."""
    with Sandbox() as sandbox:
        process = sandbox.start(["python3", "-u", "-c", PROGRAM])
        assert process.read_until(b"\n", timeout_s=60) == b"ready\n"
        yield sandbox, process.id


def test_a_fork_goes_on_with_everything_but_what_must_be_new(running: tuple[Sandbox, int], state: Path) -> None:
    """Programs, memory, files and local connections go on; random numbers, names and clocks are a fork's own."""
    parent, number = running
    forks = parent.fork(2)
    (grandchild,) = forks[0].fork()
    family = [parent, *forks, grandchild]
    said = [asked(one, number) for one in family]
    for name in DISTINCT:
        assert len({one[name] for one in said}) == len(family), name
    for name in SAME:
        assert len({one[name] for one in said}) == 1, name
    assert all(one["connection"] and one["counts"] and one["memory"] == one["file"] for one in said)
    assert max(one["late_s"] for one in said) < 1
    results = [one.close() for one in reversed(family)]
    assert [one.reason_code for one in results] == ["closed"] * 4
    assert [one.forked_from for one in results] == [forks[0].id, parent.id, parent.id, None]
    assert [one.phases["run"].start for one in results[:3]] == ["fork"] * 3
    assert left_behind(state) == []


@pytest.mark.parametrize("place", ["fork", "rollback"])
def test_a_flood_of_output_goes_on_in_forks_and_after_a_rollback(place: str) -> None:
    """A program that writes as fast as it can is saved in the middle of it, and goes on everywhere."""
    with Sandbox() as sandbox:
        flood = sandbox.start(["yes"], detach=True)
        assert flood.read(timeout_s=60).startswith(b"y\ny\n")
        if place == "fork":
            family = [sandbox, *sandbox.fork(3)]
        else:
            sandbox.rollback(sandbox.checkpoint())
            family = [sandbox]
        for one in family:
            again = one.process(flood.id)
            for _ in range(20):
                assert set(again.read(timeout_s=60)) == set(b"y\n")
        for one in family[1:]:
            one.kill()


def test_each_fork_has_its_own_changes_on_the_same_base(tmp_path: Path) -> None:
    """The changes of the best try are applied; those of another one then conflict, and so do those of the parent."""
    (tmp_path / "work").mkdir()
    file = tmp_path / "work" / "a.txt"
    file.write_text("base\n")
    with Sandbox(workdir=tmp_path / "work") as parent:
        parent.shell("echo prepared >> a.txt", check=True)
        tries = parent.fork(3)
        for number, one in enumerate(tries):
            one.shell(f"echo {number} >> a.txt", check=True)
        assert b"+prepared\n+1\n" in tries[1].changes().patch
        assert tries[1].close().changes.state == "applied"
        assert file.read_text() == "base\nprepared\n1\n"
        assert tries[2].close().changes.state == "conflict"
        assert tries[0].kill().changes.state == "discarded"
        assert parent.close().changes.state == "conflict"


def test_a_terminal_and_root_go_on_in_a_fork() -> None:
    """A shell on a terminal of a sandbox whose programs are root goes on in a fork."""
    with Sandbox(guest_root=True) as parent:
        shell = parent.start(["sh"], tty=True)
        shell.write(b"stty -echo; x=41; id -u\n")
        assert b"0\r\n" in shell.read_until(b"0\r\n", timeout_s=60)
        (fork,) = parent.fork()
        with fork:
            for one in (fork.process(shell.id), shell):
                one.write(b"echo $((x + 1))-\n")
                assert b"42-" in one.read_until(b"42-", timeout_s=60)
            assert fork.shell("id -u; echo > /etc/new").ok
            assert not parent.files.exists("/etc/new")


def test_what_is_kept_outlives_its_sandbox(tmp_path: Path) -> None:
    """Sandboxes start from a kept snapshot, by its id or name, also after its sandbox's end, until it is removed."""
    (tmp_path / "work").mkdir()
    with Sandbox(workdir=tmp_path / "work", env={"A": "1"}) as parent:
        parent.files.write("new.txt", b"prepared\n")
        snapshot = parent.snapshot("prepared")
        assert (snapshot.name, snapshot.sandbox) == ("prepared", parent.id)
        parent.kill()
    assert snapshot.id in {one.id for one in Snapshot.list()}
    with Sandbox(snapshot="prepared") as one, Sandbox(snapshot=snapshot) as other:
        assert one.shell("cat new.txt; echo $A").stdout == b"prepared\n1\n"
        assert other.close().changes.state == "applied"
        one.kill()
    assert (tmp_path / "work" / "new.txt").read_text() == "prepared\n"
    with pytest.raises(UsageError, match="workdir cannot be given"):
        Sandbox(snapshot=snapshot, workdir=tmp_path)
    held = Sandbox.create(snapshot=snapshot.id)
    snapshot.remove()
    assert held.files.read("new.txt") == b"prepared\n"
    held.kill()
    with pytest.raises(UsageError, match="none has this id") as raised:
        Sandbox(snapshot="prepared")
    assert raised.value.code == "no-such-snapshot"


def test_a_snapshot_is_private_and_replaces_one_of_its_name() -> None:
    """Nobody else can read a snapshot, and a name stands for the newest one."""
    with Sandbox() as parent:
        first, second = parent.snapshot("again"), parent.snapshot("again")
        assert [one.id for one in Snapshot.list() if one.name == "again"] == [second.id]
        assert Snapshot.find("again").id == second.id != first.id
        (folder,) = templates_dir().glob(f"{second.id}*")
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "sandbox.json").stat().st_mode & 0o777 == 0o600
        second.remove()


def test_a_rollback_brings_back_files_programs_and_memory(running: tuple[Sandbox, int]) -> None:
    """The same sandbox goes back: later commands end as cancelled, and older ones go on under their ids."""
    sandbox, number = running
    before = asked(sandbox, number)
    old = sandbox.process(number)
    sandbox.files.write("f", b"one")
    point = sandbox.checkpoint()
    sandbox.files.write("f", b"two")
    later = sandbox.start(["sleep", "600"])
    sandbox.rollback(point)
    ended = later.wait(60)
    assert (ended.outcome, ended.reason_code, ended.x07_exit_code) == ("cancelled", "rolled-back", 143)
    assert sandbox.files.read("f") == b"one"
    with pytest.raises(SandboxError, match=r"Sandbox.process\(id\)") as raised:
        old.wait(60)
    assert raised.value.code == "rolled-back"
    after = asked(sandbox, number)
    assert (after["memory"], after["counts"], after["late_s"] < 1) == (before["memory"], True, True)
    assert after["urandom"] != before["urandom"]
    assert sandbox.exec(["true"]).id > later.id
    sandbox.rollback(point)  # as often as one likes
    assert sandbox.files.read("f") == b"one"
    with pytest.raises(UsageError, match=r"kept: 1"):
        sandbox.rollback(9)
    named = {one.name: one.outcome for one in sandbox.close().commands}
    assert named["sleep"] == "cancelled"


def test_a_held_sandbox_is_forked_and_rolled_back_through_its_holder(state: Path) -> None:
    """Forks of a held sandbox have holders of their own; another client learns that its command was rolled back."""
    first = Sandbox.create(name="parent")
    second = Sandbox.connect("parent")
    first.files.write("f", b"one")
    echo = first.start(["sh", "-c", "while read -r x; do echo got $x; done"])
    forks = first.fork(2, tags={"of": "parent"})
    for same in (Sandbox.connect(forks[0].id).process(echo.id), echo):
        same.write(b"line\n")
        assert same.read_until(b"\n", timeout_s=60) == b"got line\n"
    assert {one.id for one in Sandbox.list({"of": "parent"})} == {one.id for one in forks}
    assert [Sandbox.connect(one.id).files.read("f") for one in forks] == [b"one"] * 2
    point = first.checkpoint()
    running = second.start(["sleep", "600"])
    first.rollback(point)
    assert running.wait(60).reason_code == "rolled-back"
    with pytest.raises(SandboxError, match=r"Sandbox.process\(id\)"):
        echo.wait(60)
    assert second.files.read("f") == b"one"
    again = first.process(echo.id)
    again.write(b"more\n")
    assert again.read_until(b"more\n", timeout_s=60) == b"got more\n"
    for one in (*forks, first):
        assert one.close().ok
    assert left_behind(state) == []


def test_the_commands_of_the_shell(tmp_path: Path) -> None:
    """`x07 sandbox` saves, forks, rolls back and pauses by name; `x07 snapshot` lists, shows and removes."""

    def x07(*words: str, fails: int = 0) -> str:
        done = subprocess.run([*X07, *words], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
        assert done.returncode == fails, done.stderr
        return done.stdout if fails == 0 else done.stderr

    x07("sandbox", "create", "--name", "first")
    x07("sandbox", "exec", "--detach", "first", "--", "sleep", "1000")
    x07("sandbox", "exec", "first", "--", "sh", "-c", "echo one > f")
    forks = x07("sandbox", "fork", "first", "--count", "2", "--tag", "of=first").split()
    rows = json.loads(x07("sandbox", "list", "--tag", "of=first", "--json"))["sandboxes"]
    assert {row["id"] for row in rows} == {*forks}
    point = json.loads(x07("sandbox", "checkpoint", "first", "--json"))["checkpoint"]
    x07("sandbox", "exec", "first", "--", "rm", "f")
    x07("sandbox", "rollback", "first", str(point))
    (kept,) = json.loads(x07("sandbox", "snapshot", "first", "--name", "saved", "--json"))["snapshots"]
    assert x07("snapshot", "show", "saved").splitlines()[1].split()[:2] == [kept["id"], "saved"]
    x07("sandbox", "pause", "first")
    (row,) = [row for row in json.loads(x07("sandbox", "list", "--json"))["sandboxes"] if row["name"] == "first"]
    assert (row["paused"], row["commands"]) == (True, None)
    assert x07("sandbox", "exec", "first", "--", "cat", "f") == "one\n"  # it goes on by itself
    assert "sleep\n" in x07("sandbox", "exec", "first", "--", "sh", "-c", "cat /proc/[0-9]*/comm")
    assert "none of this number (kept: none)" in x07("sandbox", "rollback", "first", str(point), fails=2)
    x07("sandbox", "pause", "first")
    assert x07("sandbox", "resume", "first").strip() == row["id"]
    made = x07("sandbox", "create", "--snapshot", "saved").strip()
    assert x07("sandbox", "exec", made, "--", "cat", "f") == "one\n"
    result = json.loads(x07("sandbox", "close", "--json", "first"))
    assert {one["name"] for one in result["commands"]} == {"sh", "sleep", "cat", "rm"}
    for one in (*forks, made):
        x07("sandbox", "close", one)
    x07("snapshot", "rm", "saved")
    assert "none has this id" in x07("snapshot", "show", "saved", fails=2)


def test_a_paused_sandbox_has_its_past_and_its_time(tmp_path: Path) -> None:
    """A paused sandbox goes on with its id, changes, commands and the rest of its lifetime; its memory was free."""
    (tmp_path / "work").mkdir()
    sandbox = Sandbox.create(workdir=tmp_path / "work", lifetime_s=100, tags={"a": "b"})
    began = sandbox.shell("echo kept > new.txt; sleep 2", check=True)
    other = Sandbox.connect(sandbox.id)
    waiting = other.start(["sleep", "600"])
    sandbox.pause()
    with pytest.raises(SandboxError, match="was disconnected"):
        sandbox.exec(["true"])
    with pytest.raises(SandboxError, match=r"it was paused\. Connect again"):
        waiting.wait(60)
    with pytest.raises(SandboxError, match=r"it was paused\. Connect again"):
        other.exec(["true"])
    (row,) = Sandbox.list({"a": "b"})
    assert (row.id, row.paused, row.held) == (sandbox.id, True, True)
    again = Sandbox.connect(sandbox.id)
    (row,) = Sandbox.list({"a": "b"})
    assert (row.id, row.paused) == (sandbox.id, False)
    assert row.left_s is not None
    assert row.left_s < 98
    assert again.exec(["true"]).id > began.id
    result = again.close()
    assert (result.run, result.changes.state, result.reason_code) == (sandbox.id, "applied", "closed")
    assert [one.name for one in result.commands] == ["/bin/sh", "bash", "true", "sleep"]
    assert (tmp_path / "work" / "new.txt").read_text() == "kept\n"
    assert [kept for kept in Snapshot.list() if kept.sandbox == sandbox.id] == []


def test_a_paused_sandbox_has_no_result() -> None:
    """Another client of a sandbox that is paused learns that it is left, and gets no result, since it has not ended."""
    sandbox = Sandbox.create()
    other = Sandbox.connect(sandbox.id)
    sandbox.pause()
    other._open.session.until(lambda: False, 60)  # noqa: SLF001 - until its holder has ended
    assert (other.alive, other.result) == (False, None)
    Sandbox.connect(sandbox.id).close("discard")


def other_default() -> str:
    """Let the name of the default image stand for another image, as `x07 image build` does. Return its digest."""
    image = find_image(None)
    manifest = sealed(replace(image.manifest, suite="another"))
    folder = image.folder.with_name(manifest.digest.removeprefix("sha256:"))
    shutil.copytree(image.folder, folder, copy_function=os.link)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    (folder / "manifest.json").chmod(0o444)
    folder.chmod(0o700)
    set_name("default", folder.name)
    return manifest.digest


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone, without snapshots of others."""
    copy_cache(tmp_path / "cache")
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    for path in templates_dir().glob("*/sandbox.json"):
        shutil.rmtree(path.parent)
    return tmp_path / "cache"


def test_a_paused_sandbox_goes_on_with_its_image(own_cache: Path, tmp_path: Path) -> None:
    """After the image was rebuilt and the old one pruned, a paused sandbox goes on, and applies its changes."""
    (tmp_path / "work").mkdir()
    sandbox, old = Sandbox.create(workdir=tmp_path / "work"), find_image(None).digest
    sandbox.files.write("new.txt", b"of the sandbox\n")
    sandbox.pause()
    assert other_default() != old
    assert main(["prune"]) == 0
    assert main(["image", "rm", "default"]) == 0
    again = Sandbox.connect(sandbox.id)
    assert again.files.read("new.txt") == b"of the sandbox\n"
    assert again.close().changes.state == "applied"
    assert (tmp_path / "work" / "new.txt").read_text() == "of the sandbox\n"
    assert main(["prune"]) == 0
    assert not (own_cache / "images" / old.removeprefix("sha256:")).exists()


def test_a_paused_sandbox_that_cannot_go_on_gives_its_changes_back(
    own_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A paused sandbox that this version cannot resume says so, and closing it saves the changes that it had made."""
    (tmp_path / "work").mkdir()
    sandbox = Sandbox.create(workdir=tmp_path / "work", name="old")
    sandbox.files.write("new.txt", b"of the sandbox\n")
    sandbox.pause()
    (path,) = templates_dir().glob("*/sandbox.json")
    path.write_bytes(path.read_bytes().replace(SCHEMA.encode(), b"x07.sandbox.moment@9.9.9"))
    with pytest.raises(RefusedError, match="another version of x07-sandbox") as raised:
        Sandbox.connect("old")
    assert (raised.value.code, sandbox.id in str(raised.value)) == ("snapshot-outdated", True)
    assert main(["sandbox", "close", "old", "--json"]) == 125
    result = json.loads(capfd.readouterr().out)
    assert (result["run"], result["reason_code"]) == (sandbox.id, "snapshot-outdated")
    assert (result["changes"]["state"], result["changes"]["added"]) == ("kept", 1)
    assert [one.id for one in Sandbox.list()] == []
    assert main(["apply", sandbox.id]) == 0
    assert (tmp_path / "work" / "new.txt").read_text() == "of the sandbox\n"
    assert [*templates_dir().glob("*/sandbox.json")] == []
    del own_cache


def test_a_description_of_a_snapshot_executes_nothing(own_cache: Path) -> None:
    """What somebody writes into the cache in the place of a description is refused, and not executed."""
    with Sandbox() as sandbox:
        sandbox.snapshot("kept")
    (path,) = templates_dir().glob("*/sandbox.json")
    good = path.read_bytes()
    evil = pickle.dumps(Evil(own_cache / "executed"))
    for bad in (evil, b"", good[:-2], b'{"schema_version": 1}', good.replace(b'"qemu"', b"7", 1), b"[" * 100_000):
        path.write_bytes(bad)
        with pytest.raises(RefusedError, match="cannot use the snapshot") as raised:
            Sandbox(snapshot="kept")
        assert raised.value.code == "snapshot-outdated"
    assert not (own_cache / "executed").exists()


class Evil:
    """An object whose pickle makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_full_disk_is_an_error_and_the_sandbox_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot that does not fit says so, leaves no files, and holds no programs."""
    need(os.geteuid() == 0, "only root can mount a small file system", installable=False)
    with Sandbox() as sandbox:
        place = tmp_path / "templates"
        place.mkdir()
        subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "-o", "size=100m,mode=0700", "none", place], check=True)
        try:
            with monkeypatch.context() as patch:
                patch.setattr("x07_sandbox.backends.qemu.saved.templates_dir", lambda: place)
                for call in (sandbox.fork, sandbox.snapshot, sandbox.checkpoint):
                    with pytest.raises(SandboxError, match="No space left on device"):
                        call()
                assert [*place.iterdir()] == []
                sandbox.start(["sh", "-c", "head -c 60m /dev/urandom > big; sleep 600"], detach=True)
                wait_until(lambda: sandbox.shell("stat -c %s big").stdout == b"62914560\n")
                subprocess.run(["/usr/bin/mount", "-o", "remount,size=200m", place], check=True)
                with pytest.raises(SandboxError, match="No space left on device"):
                    sandbox.checkpoint()
                assert [*place.iterdir()] == []
            assert sandbox.exec(["true"]).ok
            point = sandbox.checkpoint()
            sandbox.rollback(point)
            assert sandbox.shell("stat -c %s big").stdout == b"62914560\n"
        finally:
            subprocess.run(["/usr/bin/umount", place], check=True)


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until something holds, for a minute at most."""
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_snapshot_waits_for_nobody_and_refuses_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No snapshot is taken while a file is on its way in, and no more forks start than memory can hold."""
    copy_cache(tmp_path / "cache")  # whose slots are free
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    with Sandbox() as sandbox:
        server = sandbox._open.file_server()  # noqa: SLF001 - a client that stops halfway
        server._write(b"\0\0\0\7")  # noqa: SLF001
        with pytest.raises(UsageError, match="files are being copied"):
            sandbox.snapshot()
        server.kill()
        wait_until(lambda: server.ended)
        monkeypatch.setenv("X07_VM_MAX_FORKS", "2")
        with pytest.raises(RefusedError, match="3 were asked for, and 2 may be open") as full:
            sandbox.fork(3)
        assert full.value.code == "no-slot"
        monkeypatch.setenv("X07_VM_MAX_FORKS", "1")
        (fork,) = sandbox.fork()
        with fork, pytest.raises(SandboxError, match="forks of sandboxes are open"):
            sandbox.fork(wait_s=0)
        monkeypatch.setenv("X07_VM_MAX_FORKS", "2")
        monkeypatch.setattr("x07_sandbox.sessions.snapshots.spare_bytes", lambda: 100 << 20)
        with pytest.raises(RefusedError, match=r"2 would take about \d+ MiB") as raised:
            sandbox.fork(2)
        assert raised.value.code == "no-memory"
        assert sandbox.exec(["true"]).ok


def test_a_backend_that_cannot_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a backend without snapshots, each of the calls is refused, and the sandbox goes on."""
    monkeypatch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "1")
    with Sandbox(backend="none") as sandbox:
        for call in (sandbox.fork, sandbox.snapshot, sandbox.checkpoint):
            with pytest.raises(RefusedError, match="cannot save a running sandbox") as raised:
                call()
            assert raised.value.code == "no-snapshots"
        assert sandbox.exec(["true"]).ok
