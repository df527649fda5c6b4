"""Jobs that start as clones of saved machines: what each clone has of its own, and unusable saved machines."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from tests.command import X07
from tests.conftest import need, overwrite, sample
from tests.vm.conftest import (
    BEHAVE,
    PROGRAMS,
    Artifacts,
    Ran,
    Sandbox,
    copy_cache,
    copy_kvm_verdict,
    copy_saved,
    left_behind,
    marked,
    owners,
    run_vm,
    usual_start,
)
from x07_sandbox import Sandbox as Library
from x07_sandbox.backends import base
from x07_sandbox.backends.qemu.hot import IMAGES, VARIABLE
from x07_sandbox.backends.qemu.instance import QemuInstance
from x07_sandbox.backends.qemu.saved import MANIFEST, SUSPENDED, Manifest, Template, sparse_sha256, templates_dir
from x07_sandbox.cli.main import main
from x07_sandbox.host import linux, settings, waiting
from x07_sandbox.host.arch import ARCHES, host_arch
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.verdicts import forget
from x07_sandbox.images.build import build_image
from x07_sandbox.images.store import find_image
from x07_sandbox.jail.forms import needed_files
from x07_sandbox.library.images import prepare_image
from x07_sandbox.library.warm import WarmMachines
from x07_sandbox.policy.guest import RAM_CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import ThreadPoolExecutor

    from x07_sandbox.images.store import Image

pytestmark = pytest.mark.vm

RANDOM = """
import ctypes, json, os, random, tempfile, time, uuid
libc = ctypes.CDLL(None)
buffer = ctypes.create_string_buffer(16)
assert libc.getrandom(buffer, 16, 0) == 16
print(json.dumps({
    "urandom": os.urandom(16).hex(),
    "getrandom": buffer.raw.hex(),
    "uuid4": str(uuid.uuid4()),
    "random": random.random(),
    "tempfile": tempfile.mktemp(),
    "boot": open("/proc/sys/kernel/random/uuid").read(),
    "machine_id": open("/etc/machine-id").read(),
    "time": time.time(),
}))
"""


def starts(ran: Ran) -> dict[str, str]:
    """Return how the machine of each phase was started."""
    return {name: phase.start for name, phase in ran.result.phases.items()}


def seen(ran: Ran) -> dict[str, object]:
    """Return the program's output."""
    assert ran.outcome == "ok", ran.reason
    found = json.loads(ran.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(params=["hot", "clone"])
def either(request: pytest.FixtureRequest, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """Runs on VMs restored from a saved process, and on clones of a saved VM."""
    if request.param == "clone":
        monkeypatch.setenv(VARIABLE, "1")
    else:
        need(usual_start() == "hot", "this host restores no processes of VMs", installable=False)
    return sandbox


def test_clones_share_no_random_values(
    either: Sandbox, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clones of one saved machine share no random value, id or name, even an hour later, and have the runner's time."""

    def run() -> dict[str, object]:
        return seen(either.run_text("random_values.py", RANDOM, alone=False, cache=True))

    began = waiting.unix_ns() / 1e9
    found = [job.result() for job in [threads.submit(run), threads.submit(run)]]
    between = waiting.unix_ns() / 1e9
    monkeypatch.setattr(base, "unix_ns", lambda: waiting.unix_ns() + 3600 * 10**9)
    found.append(run())
    *early, late = (float(str(values["time"])) for values in found)
    assert all(began - 1 < time < between + 1 for time in early)
    assert between + 3599 < late < waiting.unix_ns() / 1e9 + 3601
    assert left_behind(either.state) == []
    for name in found[0]:
        assert len({str(values[name]) for values in found}) == len(found), name


def test_a_program_cannot_change_the_saved_machine(sandbox: Sandbox, image: Image) -> None:
    """A program's writes to memory and disk never change the files of saved machines."""
    ran = sandbox.behave("hog")
    assert starts(ran) == {"run": usual_start()}
    found = [json.loads(path.read_bytes()) | {"in": path.parent} for path in templates_dir().glob(f"*/{MANIFEST}")]
    of_image = [one["made"] | {"in": one["in"]} for one in found if one["image"] == image.digest]
    of_runs = [one for one in of_image if "ram" in one and one["ram"]["bytes"] == RAM_CLASSES[0]]
    assert len(of_runs) >= 1 + (usual_start() == "hot")
    for made in of_runs:
        folder = made["in"]
        for part in filter(None, (made["ram"], made.get("state"), made["scratch"])):
            assert sha256(folder / part["file"]) == part["sha256"]
        for part in made.get("images", ()):
            assert sha256(folder / IMAGES / part["file"]) == part["sha256"]


# unusable saved machines, in a separate cache


@pytest.fixture(scope="module")
def own_cache(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache beside the user's, with the same packages and no saved machine."""
    cache = tmp_path_factory.mktemp("clones") / "cache"
    unused = shutil.ignore_patterns("templates", "verdicts", "pool", "gvisor", "tmp", "*.lock")

    def ignored(folder: str, names: list[str]) -> set[str]:
        others = {name for name in names if len(name) == 64 and name != image.folder.name}
        return {*unused(folder, names), *(others if folder == str(image.folder.parent) else ())}

    shutil.copytree(image.folder.parents[1], cache, ignore=ignored)
    copy_kvm_verdict(cache)
    for folder in (cache, *(path for path in cache.rglob("*") if path.is_dir())):
        folder.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_VM_CACHE_DIR", str(cache))
        build_image(progress=lambda _text: None)
    yield cache
    shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture
def in_own_cache(own_cache: Path, sandbox: Sandbox, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """Runs of a prebuilt program with that cache."""
    artifacts.built(BEHAVE)
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(own_cache))
    monkeypatch.setenv(VARIABLE, "1")  # test_hot.py has the tests of saved processes
    return sandbox


@pytest.fixture
def saved(image: Image, in_own_cache: Sandbox) -> Sandbox:
    """Runs with that cache and one saved machine, intact whatever earlier tests did to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_VM_CACHE_DIR", str(image.folder.parents[1]))
        usual = run_vm(image).folder
    forget(SUSPENDED)
    shutil.rmtree(templates_dir(), ignore_errors=True)
    copy_saved(usual, templates_dir() / usual.name)
    return in_own_cache


def template_folder() -> Path:
    """Return the one saved machine of the cache in use."""
    (folder,) = templates_dir().glob("[0-9a-f]" * 64)
    return folder


def sha256(path: Path) -> str:
    """Return the current digest of a part."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return sparse_sha256(fd, path.stat().st_size)
    finally:
        os.close(fd)


def replace_part(folder: Path, name: str, data: bytes, *, update_manifest: bool) -> None:
    """Overwrite the start of a part and restore its times. update_manifest: update the manifest to match."""
    path = folder / name
    overwrite(path, data)
    if update_manifest:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
        part = msgspec.structs.replace(getattr(manifest.made, name), sha256=sha256(path))
        (folder / MANIFEST).unlink()
        made = msgspec.structs.replace(manifest.made, **{name: part})
        msgspec.structs.replace(manifest, made=made).write(folder)


def test_a_damaged_machine_is_not_used(
    saved: Sandbox, image: Image, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with one changed byte is detected despite its times: a run starts cold on a full disk, and says so."""
    replace_part(template_folder(), "ram", b"\x55", update_manifest=False)
    damaged = sha256(template_folder() / "ram")
    with monkeypatch.context() as patch:
        patch.setattr(settings, "TEMPLATE_BYTES", 1 << 60)
        ran = saved.behave("nothing")
    assert (ran.outcome, starts(ran)) == ("ok", {"run": "cold"}), ran.reason
    warnings = "\n".join(ran.result.warnings)
    assert ("has changed" in warnings, "are free" in warnings, "rebuilt" in warnings) == (True, True, False)

    # A node of a cluster saves the one kind of machine that its pool needs, and waiting runs clone that one.
    node = threads.submit(prepare_image, image.digest, [], lambda _text: None)
    while not list(templates_dir().glob(".new-*")):
        assert not node.done()
        time.sleep(0.02)  # only the folder shows it
    runs = [threads.submit(saved.behave, "nothing", alone=False) for _ in range(2)]
    node.result()
    for one in runs:
        assert (one.result().outcome, starts(one.result())) == ("ok", {"run": "clone"})
    assert left_behind(saved.state) == []
    made = json.loads((template_folder() / MANIFEST).read_bytes())
    assert made["made"]["ram"]["bytes"] == RAM_CLASSES[0]
    assert sha256(template_folder() / "ram") == made["made"]["ram"]["sha256"] != damaged


@pytest.mark.full("two more starts, one of them cold")
def test_a_machine_that_cannot_be_saved_costs_a_cold_start(saved: Sandbox) -> None:
    """If no machine can be saved, a run starts cold and says why."""
    shutil.rmtree(template_folder())
    (templates_dir() / ".lock").unlink()
    (templates_dir() / ".lock").mkdir()
    ran = saved.behave("nothing")
    assert (ran.outcome, starts(ran)) == ("ok", {"run": "cold"}), ran.reason
    assert [text for text in ran.result.warnings if "/templates/.lock: Is a directory" in text]
    (templates_dir() / ".lock").rmdir()
    assert starts(saved.behave("nothing")) == {"run": "clone"}  # the saved machine stays in use


@pytest.mark.parametrize(
    ("limited", "there"),
    sample(
        [
            ('for n in $(seq 12 26); do (ulimit -n $n; "$@"); done', True),
            ('ulimit -v 1000000; "$@"', False),
            ('ulimit -t 2; "$@"', False),
        ],
        1,
    ),
)
def test_a_process_short_of_resources_keeps_saved_machines(saved: Sandbox, limited: str, *, there: bool) -> None:
    """A process short of descriptors, memory or CPU time keeps saved machines intact, and lets others save one."""
    folder = template_folder()
    if not there:
        shutil.rmtree(folder)
    command = [*X07, "run", "/bin/true"]
    subprocess.run(["/bin/sh", "-c", limited, "sh", *command], check=False, capture_output=True)
    assert [path.name for path in templates_dir().iterdir() if path.name != ".lock"] == [folder.name] * there
    assert starts(saved.behave("nothing")) == {"run": "clone"}


@pytest.mark.full("one more cold boot")
def test_a_slow_save_by_another_process_costs_a_cold_start(
    in_own_cache: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another process takes too long to save a machine, a run starts cold and says so."""
    shutil.rmtree(templates_dir(), ignore_errors=True)
    monkeypatch.setattr(settings, "TEMPLATE_S", 0.1)
    monkeypatch.setattr(settings, "PRELOAD_S", 0.1)
    with file_lock(templates_dir() / ".lock"):
        ran = in_own_cache.behave("nothing")
    assert (ran.outcome, starts(ran)) == ("ok", {"run": "cold"}), ran.reason
    assert [text for text in ran.result.warnings if "another process has held the lock" in text]


@pytest.mark.parametrize(("name", "data"), sample([("state", b"no such machine"), ("ram", bytes(96 << 20))], 1))
def test_a_clone_that_does_not_answer_is_replaced_by_a_cold_start(
    saved: Sandbox, image: Image, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes
) -> None:
    """If a clone is rejected or stays silent, the job starts cold; the result says why and how long this lasts."""
    monkeypatch.setattr(settings, "CLONE_S", 3.0)
    replace_part(template_folder(), name, data, update_manifest=True)
    ran = saved.behave("nothing")
    assert (ran.outcome, starts(ran)) == ("ok", {"run": "cold"}), ran.reason
    (warning,) = (
        text
        for text in ran.result.warnings
        if "booted without a saved VM: a clone of the saved VM did not answer" in text
    )
    assert "or until you run x07 image build" in warning
    assert run_vm(image).suspended() in warning  # the next run does not try it again


@pytest.mark.full("one more cold boot")
def test_a_pool_boots_cold_if_a_clone_does_not_answer(saved: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a clone does not answer, a pool boots its machines cold, and its start says why."""
    monkeypatch.setattr(settings, "CLONE_S", 3.0)
    replace_part(template_folder(), "state", b"no such machine", update_manifest=True)
    said: list[str] = []
    machines = WarmMachines(1, progress=said.append)
    machines.start()
    with contextlib.closing(machines):
        assert machines.wait_ready(waiting.Deadline.after(120))
    assert [
        text
        for text in said
        if text.startswith("the warm VM booted without a saved VM: a clone of the saved VM did not answer")
    ]
    assert left_behind(saved.state) == []


@pytest.mark.full("saves several VMs")
def test_leftovers_do_not_block_saving_a_machine(saved: Sandbox, own_cache: Path, state: Path) -> None:
    """A process killed while saving a machine, or a file in the machine's place, does not block the next run."""
    place = template_folder()
    env = {**os.environ, "X07_VM_CACHE_DIR": str(own_cache), "X07_VM_STATE_DIR": str(state)}
    source = saved.work / "quick.py"
    source.write_text("print(1)\n")
    for _ in range(20):  # if we were too slow it has saved one, and another is killed
        shutil.rmtree(templates_dir(), ignore_errors=True)
        with subprocess.Popen([*X07, "run", str(source)], env=env) as child:
            while child.poll() is None and not list(templates_dir().glob(".new-*/ram")):
                time.sleep(0.02)  # only the folder shows it
            child.kill()
        if not place.exists():
            break
    assert list(templates_dir().glob(".new-*")), "it was never killed while it saved a machine"
    for folder in state.iterdir():
        shutil.rmtree(folder, ignore_errors=True)
    place.write_text("no machine")
    assert starts(saved.behave("nothing")) == {"run": "clone"}
    assert place.is_dir()
    assert not list(templates_dir().glob(".new-*"))


# preloaded modules

PRELOADED = """
import sys
there = [name in sys.modules for name in ("fractions", "random", "this", "wave")]
print(there, sys.argv)
import multiprocessing, random, ssl, tempfile
key = bytes(multiprocessing.current_process().authkey)
print(random.random(), tempfile.mktemp(), key.hex(), ssl.RAND_bytes(16).hex())
"""


@pytest.fixture
def see(artifacts: Artifacts, tmp_path: Path) -> Path:
    """PRELOADED as a program, built by the ordinary image, so that the test's image saves one machine only."""
    source = tmp_path / "see.py"
    source.write_text(PRELOADED)
    artifacts.built(source)
    return source


FRESH = b"[False, False, False, False] "  # what a Python prints that has imported the modules itself


def drawn_in_a_sandbox(check: Callable[[Library], object]) -> list[bytes]:
    """Return the random values of two commands of a sandbox that start with the modules, after other checks."""
    with Library(image="preloaded", procs=50, fds=300, memory="128M") as sandbox:
        assert sandbox.exec(["true"]).ok  # which is not Python, and leaves the modules to later commands
        found = [sandbox.exec(["python3", "-c", PRELOADED, "a"], check=True).stdout.split(b"\n", 1) for _ in range(2)]
        assert [there for there, _ in found] == [b"[True, True, True, False] ['-c', 'a']"] * 2
        check(sandbox)
    return [word for _, drawn in found for word in drawn.split()]


def use_preloaded_modules(sandbox: Library) -> None:
    """Check which commands of a sandbox start with the modules, and what these see."""
    sandbox.files.write("see.py", b"import sys; print('this' in sys.modules, sys.argv, input(), __file__); exit(7)")
    ended = sandbox.exec(["python3", "see.py", "x"], input=b"given\n", cwd="/opt/x07")
    assert (ended.stdout, ended.exit_code) == (b"True ['see.py', 'x'] given see.py\n", 7)
    sandbox.files.write("sub/shown.py", b"import sys; print('this' in sys.modules, sys.path[0], __name__)")
    ended = sandbox.exec(["python3", "-m", "shown"], cwd="sub")
    assert ended.stdout == b"True /opt/x07/sub __main__\n", ended.stderr
    limits = "import resource, os; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], os.getsid(0) - os.getpid())"
    assert sandbox.exec(["python3", "-c", limits]).stdout == sandbox.shell(f'exec python3 -uc "{limits}"').stdout
    assert sandbox.exec(["python3", "-c", "while True: pass"], timeout_s=1).outcome == "timeout"
    assert sandbox.exec(["python3", "-c", "x = bytearray(200 << 20)"]).outcome == "oom"
    for argv, env in (
        (["python3", "-c", PRELOADED], {"OTHER": "1"}),  # which a module may have read
        (["python3", "-u", "-c", PRELOADED], {}),
        (["sh", "-c", 'exec python3 -c "$1"', "sh", PRELOADED], {}),
    ):
        assert sandbox.exec(argv, env=env, check=True).stdout.startswith(FRESH)
    sandbox.files.mkdir("/opt/x07/.local")  # of modules that the process has not seen
    assert sandbox.exec(["python3", "-c", PRELOADED], check=True).stdout.startswith(FRESH)
    sandbox.files.remove("/opt/x07/.local")
    assert sandbox.exec(["python3", "-c", PRELOADED], check=True).stdout.startswith(b"[True")
    # A program may kill the process that has the modules. Then Python starts as usual.
    assert sandbox.shell("kill -9 $(grep -lz 'program/[x]xx' /proc/[0-9]*/cmdline | cut -d/ -f3)").ok
    assert sandbox.exec(["python3", "-c", PRELOADED], check=True).stdout.startswith(FRESH)


def test_preloaded_modules_are_imported_and_share_no_random_values(
    see: Path, in_own_cache: Sandbox, state: Path
) -> None:
    """Programs start with preloaded modules imported, in runs and in sandboxes, and share no random values."""
    modules = ["this", "random", "fractions", "tempfile", "multiprocessing", "ssl"]
    image = build_image(name="preloaded", preload=modules, progress=lambda _text: None)
    assert build_image(name="preloaded", progress=lambda _text: None).digest == image.digest  # it keeps them
    words = []
    for _ in range(2):
        ran = in_own_cache.run(see, "a", image="preloaded", artifact=in_own_cache.artifacts.built(see))
        assert ran.outcome == "ok", ran.reason
        assert starts(ran)["run"] == "clone"
        there, drawn = ran.stdout.split(b"\n", 1)
        assert there == b"[True, True, True, False] ['/x07/in/program/see.py', 'a']"
        words += drawn.split()
    assert len(set(words)) == len(words) == 8
    for check in (use_preloaded_modules, lambda _sandbox: None):
        words += drawn_in_a_sandbox(check)
    assert len(set(words)) == len(words) == 8 + 2 * 2 * 4
    # An earlier command may have changed the process that has the modules, which would not apply this limit to a copy.
    with Library(image="preloaded", policy=in_own_cache.policy({"process.allow_spawn": False})) as limited:
        assert limited.exec(["python3", "-c", PRELOADED], check=True).stdout.startswith(FRESH)
    plain = build_image(name="preloaded", preload=[], progress=lambda _text: None)
    assert plain.digest == build_image(progress=lambda _text: None).digest != image.digest
    assert left_behind(state) == []


@pytest.mark.full("builds an image with more packages")
def test_clones_share_no_openssl_generator(in_own_cache: Sandbox) -> None:
    """A preloaded module that makes a TLS context leaves no OpenSSL generator state that clones share."""
    build_image(name="tls", include=["python3-requests"], preload=["requests"], progress=lambda _text: None)
    source = "import ssl, sys\nprint('requests' in sys.modules, ssl.RAND_bytes(16))\n"
    drawn = [in_own_cache.run_text("tls.py", source, image="tls", cache=True) for _ in range(2)]
    assert [ran.stdout.startswith(b"True ") and starts(ran)["run"] for ran in drawn] == ["clone", "clone"]
    assert drawn[0].stdout != drawn[1].stdout


@pytest.mark.full("builds one more image, and starts machines anew")
def test_a_module_that_cannot_be_preloaded_is_named(
    own_cache: Path, sandbox: Sandbox, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preload module that cannot be imported costs a cold start, or, while an image is built, changes no image."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(own_cache))
    build_image(name="wrong", preload=["no_such_module"], progress=lambda _text: None)  # which saves no VM
    ran = sandbox.run_text("see.py", PRELOADED, image="wrong")
    assert (ran.outcome, starts(ran)["run"]) == ("ok", "cold")
    assert [text for text in ran.result.warnings if "no_such_module" in text]
    before = build_image(name="right", preload=[], progress=lambda _text: None)
    assert main(["image", "build", "--name", "right", "--preload", "no_such_module"]) == 125
    assert "the image 'right' was not changed" in capsys.readouterr().err
    assert find_image("right").digest == before.digest


# hosts that change under a saved machine: simulated, as docs/explanation/performance.md says


def in_qemus_place(monkeypatch: pytest.MonkeyPatch, binary: Path, *more: str) -> None:
    """Have *binary* started as QEMU, with more files in its jail."""
    row = host_arch()
    other = msgspec.structs.replace(row, qemu_binary=str(binary), firmware=(*row.firmware, *more))
    monkeypatch.setitem(ARCHES, row.name, other)


@pytest.mark.full("saves one more VM")
def test_an_upgraded_qemu_saves_a_new_machine(saved: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a QEMU upgrade no old saved machine is resumed: a new one is saved and used."""
    assert starts(saved.behave("nothing")) == {"run": "clone"}
    before = {path.name for path in templates_dir().glob("[0-9a-f]" * 64)}
    upgraded = tmp_path / "qemu"
    upgraded.write_bytes(Path(host_arch().qemu_binary).read_bytes() + b"another version")
    upgraded.chmod(0o755)
    in_qemus_place(monkeypatch, upgraded)
    assert starts(saved.behave("nothing")) == {"run": "clone"}
    made = {path.name for path in templates_dir().glob("[0-9a-f]" * 64)} - before
    assert len(made) == 1
    for name in made:
        shutil.rmtree(templates_dir() / name)


@pytest.fixture
def silent_clones(in_own_cache: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """Runs whose clones have another processor than the saved machine, and stay silent."""
    real = host_arch().qemu_binary
    wrapper = tmp_path / "qemu"
    source = PROGRAMS / "other_processor.c"
    subprocess.run(["/usr/bin/gcc", "-static", "-O2", f'-DQEMU="{real}"', "-o", wrapper, source], check=True)
    in_qemus_place(monkeypatch, wrapper, *needed_files(real))
    monkeypatch.setattr(settings, "CLONE_S", 3.0)
    return in_own_cache


@pytest.mark.full("one more VM that is saved and does not answer")
def test_clones_that_never_answer_end_a_run(silent_clones: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a saved machine cannot be marked as unusable, a run tries one more clone of it, then ends as `guest-lost`."""
    monkeypatch.setattr(Template, "suspended", lambda _template: "")
    ran = silent_clones.behave("nothing")
    assert (ran.outcome, "did not boot in time" in ran.reason) == ("guest-lost", True), ran.reason
    forget(SUSPENDED)


@pytest.mark.full("one more cold boot")
def test_another_processor_under_a_saved_machine_costs_a_cold_start(silent_clones: Sandbox) -> None:
    """A clone on another processor than the saved machine's stays silent: the job starts cold and says why."""
    ran = silent_clones.behave("nothing")
    assert (ran.outcome, starts(ran)) == ("ok", {"run": "cold"}), ran.reason
    assert [
        text
        for text in ran.result.warnings
        if "booted without a saved VM: a clone of the saved VM did not answer" in text
    ]
    forget(SUSPENDED)


@pytest.mark.full("one more cold boot")
def test_a_killed_clone_costs_only_a_cold_start(saved: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone killed before it answers, for example by the OOM killer, costs its job only a cold start."""
    release, doomed = QemuInstance.release, [True]

    def killed(instance: QemuInstance) -> None:
        release(instance)
        if instance.start_mode == "clone" and doomed:
            doomed.clear()
            signal.pidfd_send_signal(instance.inner_pidfd, signal.SIGKILL)

    monkeypatch.setattr(QemuInstance, "release", killed)
    ran = saved.behave("nothing")
    assert (ran.outcome, starts(ran)) == ("ok", {"run": "cold"}), ran.reason
    assert [
        text
        for text in ran.result.warnings
        if "booted without a saved VM: a clone of the saved VM did not answer" in text
    ]
    assert starts(saved.behave("nothing")) == {"run": "clone"}


@pytest.mark.full("saves two VMs")
def test_a_machine_killed_while_it_is_saved_is_saved_again_later(
    saved: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the machine to save is killed, runs start cold for minutes and say so, but not until the host reboots."""
    shutil.rmtree(template_folder())

    def kill(instance: QemuInstance, _command: bytes) -> None:
        with contextlib.suppress(ProcessLookupError):  # the last command, to quit, comes too late
            signal.pidfd_send_signal(instance.inner_pidfd, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(QemuInstance, "send_qmp", kill)  # the command that saves it
        ran = saved.behave("nothing")
    assert (ran.outcome, starts(ran)) == ("ok", {"run": "cold"}), ran.reason
    (warning,) = (text for text in ran.result.warnings if "cannot save a VM" in text)
    assert "Such jobs boot a new VM for 5 minutes" in warning
    now_ms = linux.boot_ms()
    monkeypatch.setattr("x07_sandbox.host.verdicts.boot_ms", lambda: now_ms + 301_000)
    assert starts(saved.behave("nothing")) == {"run": "clone"}


# `x07`, for which the wall clock is an hour later when it continues.
SUSPENDED_COMMAND = """
import signal, sys, time
from x07_sandbox.cli.main import main
real, ahead = time.time_ns, [0]
time.time_ns = lambda: real() + ahead[0]
signal.signal(signal.SIGCONT, lambda *_: ahead.__setitem__(0, 3600 * 10**9))
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_survives_a_suspended_host(saved: Sandbox, state: Path, tmp_path: Path) -> None:
    """A run whose runner, supervisor and VMM were stopped for an hour, as by a suspended host, ends normally."""
    del saved
    report = tmp_path / "report.json"
    words = ["exec", "--report-out", str(report), "--", "/bin/sh", "-c", "echo up; read word; echo got $word"]
    argv = [sys.executable, "-c", SUSPENDED_COMMAND, *words]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        (owner,) = owners(state)
        stopped = [child.pid, *marked(str(owner["instance"]))]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3)  # the long stop is the point of the test
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        child.stdin.write(b"well\n")
        child.stdin.close()
        assert (child.stdout.read(), child.wait(60)) == (b"got well\n", 0)
    result = json.loads(report.read_bytes())
    assert result["outcome"] == "ok"
    assert max(result["phases"]["run"]["times_ms"].values()) < 3_000_000  # that hour is in no time of the run
    assert left_behind(state) == []


# the artifact cache


@pytest.fixture
def artifact_cache(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of artifacts of a cache beside the user's, with the same saved machines."""
    del sandbox
    copy_cache(tmp_path / "cache")
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache/artifacts"


def test_the_same_source_is_built_once(artifact_cache: Path, sandbox: Sandbox, threads: ThreadPoolExecutor) -> None:
    """Runs of one source build it once, also at the same time; another source or a damaged artifact is built again."""
    text = f"print('one')  # {os.urandom(8).hex()}\n"
    jobs = [threads.submit(sandbox.run_text, "one.py", text, cache=True, alone=False) for _ in range(2)]
    first, second = sorted((job.result() for job in jobs), key=lambda one: str(one.result.artifact_from))
    assert (first.result.artifact_from, second.result.artifact_from) == ("build", "cache")
    assert (list(first.result.phases), list(second.result.phases)) == (["build", "run"], ["run"])
    # Not that of the input: a program that ends before its input does has none of it.
    found = [msgspec.structs.replace(one.result.digests, input=None) for one in (first, second)]
    assert found[0] == found[1]
    # The others are those of the user's cache, by another name.
    newest = next(path for path in artifact_cache.iterdir() if path.stat().st_nlink == 1)
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    again, cached = [sandbox.run_text("one.py", text, cache=True) for _ in range(2)]
    assert (again.result.artifact_from, cached.result.artifact_from) == ("build", "cache")
    assert first.stdout == second.stdout == again.stdout == cached.stdout == b"one\n"
    assert sandbox.run_text("one.py", text.replace("one", "two"), cache=True).result.artifact_from == "build"


@pytest.mark.usefixtures("artifact_cache")
def test_a_source_that_does_not_compile_is_built_once(sandbox: Sandbox) -> None:
    """The second run of a source that does not compile reports the same errors from the cache; --no-cache builds."""
    text = f"return nothing  # {os.urandom(8).hex()}\n"
    first, second, third = [sandbox.run_text("bad.py", text, cache=cache) for cache in (True, True, False)]
    assert [one.result.artifact_from for one in (first, second, third)] == ["build", "cache", "build"]
    assert (list(first.result.phases), list(second.result.phases)) == (["build"], [])
    for name in ("outcome", "fault", "reason", "exit_code", "x07_exit_code", "stdout", "stderr", "build", "digests"):
        assert getattr(first.result, name) == getattr(second.result, name), name
    assert (second.outcome, b"SyntaxError" in second.stderr) == ("build-failed", True)
