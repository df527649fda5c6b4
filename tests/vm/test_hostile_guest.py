"""Hostile guests: agent and kernel broken, killed or lying, in real machines.

The images are real ones, built in a separate cache; only their agent is another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from tests.conftest import sample
from tests.guest import lies
from tests.vm.conftest import BEHAVE, PROGRAMS, Ran, Sandbox, cache_with_base, wait_done
from x07_sandbox.backends.qemu import machine as machines
from x07_sandbox.backends.qemu.hot import VARIABLE
from x07_sandbox.channel.link import WINDOW
from x07_sandbox.host import settings
from x07_sandbox.host.locks import file_lock
from x07_sandbox.images.build import build_image
from x07_sandbox.images.store import GuestCode, read_guest_code

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

pytestmark = pytest.mark.vm

MIB = 1 << 20
# Each such boot is cold; similar cases are tested at run time, or on frames alone.
ALSO_LATER = pytest.mark.full("one more cold boot")


def hostile_code() -> GuestCode:
    """Return our guest code with the lying agent."""
    honest = read_guest_code()
    agent = dict(honest.agent)
    agent["guest/honest.py"] = agent["guest/agent.py"]
    agent["guest/agent.py"] = (PROGRAMS / "hostile_agent.py").read_bytes()
    agent["guest/lies.py"] = Path(lies.__file__).read_bytes()
    return replace(honest, agent=agent)


@pytest.fixture(scope="session")
def hostile_cache(image: Image, shared: Path) -> Path:
    """A cache of images beside the user's: packages are linked from there, images stay here."""
    del image  # the image and its base exist by now
    cache = shared / "hostile-cache"
    with file_lock(shared / "hostile.lock"):
        if not cache.exists():
            cache_with_base(shared / "hostile-cache.new").rename(cache)
    return cache


Hostile = Callable[..., Ran]


@pytest.fixture
def hostile(sandbox: Sandbox, hostile_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Hostile:
    """Runs in a machine with a lying agent. boot: its behaviour from the start; otherwise it lies when a job comes."""
    artifact = sandbox.artifacts.built(BEHAVE)
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(hostile_cache))
    monkeypatch.setenv(VARIABLE, "1")  # saving a process of each kind takes more than the runs save

    def run(*args: str, boot: str = "", **options: object) -> Ran:
        image = build_image(name="hostile", progress=lambda _text: None, code=hostile_code())
        words = machines.kernel_command_line
        if boot:
            monkeypatch.setattr(machines, "kernel_command_line", lambda machine: f"{words(machine)} x07.lie={boot}")
        # By digest: an image with another name would be rebuilt with honest code.
        options = {
            "cold": bool(boot),
            "image": image.digest,
            "artifact": artifact,
            "policy": {"limits.wall_ms": 60_000},
        } | options
        return sandbox.run(BEHAVE, *args, **options)  # type: ignore[arg-type] # `run` checks them

    return run


def lost(ran: Ran, fault: str) -> str:
    """Return the reason of a run whose guest was lost, by whose fault."""
    assert (ran.outcome, ran.result.x07_exit_code, ran.result.fault) == ("guest-lost", 125, fault), ran.reason
    assert ran.result.exit_code is None
    assert ran.reason.isprintable()
    assert ran.reason.isascii()
    assert len(ran.reason) < 400
    return ran.reason


def test_the_hostile_image_is_honest_by_default(hostile: Hostile) -> None:
    """The hostile image runs an ordinary program correctly unless it is instructed to lie."""
    ran = hostile("args", "plain")
    assert (ran.outcome, ran.stdout) == ("ok", b"plain\0")


# until the program runs: nothing there can be the program's fault


def test_an_agent_that_never_answers_is_lost_at_the_boot_limit(
    hostile: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that boots and stays silent is given up at the boot limit, and the reason says so."""
    monkeypatch.setattr(settings, "BOOT_S", 8.0)
    ran = hostile("nothing", boot="silent")
    assert "did not boot in time" in lost(ran, "host")
    assert 8_000 <= ran.result.phases["run"].times_ms["end"] < 28_000


@pytest.mark.parametrize(
    ("boot", "reason"),
    [
        pytest.param("protocol", "uses protocol 3", marks=ALSO_LATER),
        pytest.param("garbage", "violated the channel protocol while booting", marks=ALSO_LATER),
        ("nonce", "its nonce is not the one that was sent"),
        ("panic", "kernel panicked while booting"),
        pytest.param("off", "exited without an error while the guest was booting", marks=ALSO_LATER),
    ],
)
def test_a_guest_that_fails_before_the_program_is_the_hosts_fault(hostile: Hostile, boot: str, reason: str) -> None:
    """A failure before the program runs is `guest-lost`, fault host, with a specific reason."""
    ran = hostile("nothing", boot=boot)
    assert reason in lost(ran, "host")
    assert "started" not in ran.result.phases["run"].times_ms


# While the program runs: the program may have caused it, so the fault must not be the host's. Each lie over the channel
# is told in tests/unit/test_session.py, without a VM.


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("panic", "kernel panicked while running the program (kernel: sysrq triggered crash)"),
        ("exit", "agent died while running the program (kernel: Attempted to kill init! exitcode=0x00000300)"),
        ("crash", "agent died while running the program (kernel: Attempted to kill init! exitcode=0x0000000b)"),
        ("off", "powered off while running the program"),
        ("garbage", "violated the channel protocol while running the program"),
    ],
)
def test_each_way_to_lose_a_guest_has_its_own_reason(hostile: Hostile, word: str, reason: str) -> None:
    """A failure while the program runs is `guest-lost`, fault program, with a specific reason."""
    ran = hostile(word)
    assert reason in lost(ran, "program")
    assert ran.program_ms < 45_000


def test_output_without_credit_breaks_the_protocol(hostile: Hostile, state: Path, threads: ThreadPoolExecutor) -> None:
    """A guest that sends beyond its window while nobody reads is `guest-lost`, and no more is buffered."""
    heard, out = os.pipe()
    try:
        running = threads.submit(hostile, "window", live_stdout=out)
        try:
            wait_done(state, 60)
        finally:
            os.close(heard)  # the run itself waits for its reader, as any program does
        ran = running.result(60)
    finally:
        os.close(out)
    assert "stream 1 exceeds its window" in lost(ran, "program")
    assert ran.result.stdout.bytes <= WINDOW + 65536


def test_output_without_credit_ends_at_the_cap(hostile: Hostile) -> None:
    """A guest that floods the output is stopped at the output limit, as any program is."""
    ran = hostile("window", max_output_bytes=MIB)
    assert (ran.outcome, ran.result.stdout.bytes, ran.result.stdout.truncated) == ("output-limit", MIB, True)


@pytest.mark.parametrize("word", sample(["console", "mute"], 1))
def test_a_silent_or_flooding_guest_ends_at_the_deadline(hostile: Hostile, word: str) -> None:
    """A guest whose agent stays silent or floods the console ends as `timeout` at the host's deadline."""
    ran = hostile(word, policy={"limits.wall_ms": 1500})
    assert (ran.outcome, ran.result.x07_exit_code) == ("timeout", 124)
    assert 1500 <= ran.program_ms < 1500 + 30_000
    assert "panic" not in ran.reason


def test_invented_denials_have_no_effect(hostile: Hostile) -> None:
    """Denials that a compromised agent reports are shown as text, and have no other effect."""
    ran = hostile("denial")
    (denial,) = ran.result.denials
    assert (ran.outcome, denial.subject, denial.how_to_allow) == ("ok", "/root/\x1b[2Jx", None)
    assert denial.count == 2**62


def test_a_claim_of_success_proves_nothing(hostile: Hostile) -> None:
    """A guest that claims success without running anything gets `ok` with empty output, and can forge no more."""
    ran = hostile("ok")
    assert (ran.outcome, ran.stdout, ran.stderr) == ("ok", b"", b"")


def test_frames_that_change_nothing_are_ignored(hostile: Hostile) -> None:
    """The end of every stream, twice, loses and adds nothing."""
    ran = hostile("abort", "input", stdin=b"x" * MIB)
    assert (ran.outcome, ran.stdout, ran.stderr) == ("ok", b"out", b""), ran.reason
    assert ran.result.files_discarded.count == 0


def test_a_program_that_was_not_started_says_nothing(hostile: Hostile) -> None:
    """Output before the program was started is `guest-lost`, fault host."""
    ran = hostile("early")
    assert "bad frame: STDOUT 1 cannot be opened" in lost(ran, "host")
    assert "started" not in ran.result.phases["run"].times_ms


def test_an_agent_silent_during_set_up_is_lost_at_its_limit(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that takes the files and never starts the program is given up at the set-up limit."""
    monkeypatch.setattr(settings, "COPY_IN_S", 2.0)
    ran = hostile("unready")
    assert "reached its deadline while" in lost(ran, "host")
    assert "started" not in ran.result.phases["run"].times_ms
    times = ran.result.phases["run"].times_ms
    assert 2000 <= times["end"] - times["seeded"] < 32_000


# in the build machine


@pytest.mark.parametrize(
    "case",
    sample(
        [
            ("withheld", "CHANGES_OUT_S", "guest-lost", "reached its deadline while returning the built program"),
            ("mute", "BUILD_WALL_MS", "build-failed", "time"),
        ],
        1,
    ),
)
def test_a_silent_build_machine_ends_at_its_limit(
    hostile: Hostile, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, case: tuple[str, str, str, str]
) -> None:
    """A build machine that never ends, or withholds its artifact, is given up at the limit of that stage."""
    del hostile
    word, limit, outcome, reason = case
    monkeypatch.setattr(settings, limit, 2000 if limit.endswith("MS") else 2.0)
    image = build_image(name="hostile", progress=lambda _text: None, code=hostile_code())
    ran = sandbox.run_text(f"{word}.c", "int main(void) { return 0; }\n", image=image.digest, cold=True)
    assert (ran.outcome, list(ran.result.phases)) == (outcome, ["build"]), ran.reason
    assert reason in ran.reason
    assert ran.result.digests.artifact is None


@pytest.mark.parametrize(
    "case",
    sample(
        [
            ("longer", "build-failed", "is incomplete"),
            ("shorter", "build-failed", "is incomplete"),
            ("endless", "guest-lost", "larger than was asked for"),
            ("unsent", "build-failed", "is incomplete"),
            ("panic", "guest-lost", "kernel panicked"),
        ],
        1,
    ),
)
def test_a_lying_build_machine_gives_no_artifact(
    hostile: Hostile,
    sandbox: Sandbox,
    hostile_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[str, str, str],
) -> None:
    """A build machine that dies, or sends another file than it states or than was asked for, produces no artifact."""
    del hostile
    word, outcome, reason = case
    monkeypatch.setattr(settings, "ARTIFACT_MAX_BYTES", MIB)
    image = build_image(name="hostile", progress=lambda _text: None, code=hostile_code())
    assert image.folder.is_relative_to(hostile_cache)
    ran = sandbox.run_text(f"{word}.c", "int main(void) { return 0; }\n", image=image.digest, cold=True)
    assert (ran.outcome, ran.result.fault) == (outcome, "program"), ran.reason
    assert reason in ran.reason
    assert list(ran.result.phases) == ["build"]
    assert ran.result.digests.artifact is None


# changes to files


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return everything below a folder: mode and content by name."""
    paths = [path for path in sorted(folder.rglob("*")) if not path.is_relative_to(folder / "home")]
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in paths
    }


@pytest.mark.parametrize(
    ("word", "said"),
    sample(
        [
            *[
                (word, "the guest violated the channel protocol")
                for word in ("up", "absolute", "inside", "zero", "root")
            ],
            *[(word, "the guest violated the channel protocol") for word in ("twice", "through", "hidden")],
            *[(word, "the guest violated the channel protocol") for word in ("root-link", "typed")],
            *[(word, "kept: ") for word in ("device", "git", "bare", "link", "set-id")],
            *[(word, "discarded: ") for word in ("bomb", "million", "unsaid")],
            ("silent", "none: "),
        ],
        6,
    ),
)
def test_hostile_changes_are_never_applied(hostile: Hostile, tmp_path: Path, word: str, said: str) -> None:
    """Hostile changes are never applied: escaping names, devices, links, repositories, sparse bombs, huge lists."""
    root = tmp_path / "root"
    root.mkdir()
    (root / ".kept-back").write_text("hidden")
    (root / "a").write_text("as it was")
    rules = {"fs.allow_mkdir": True, "fs.allow_remove": True, "fs.allow_symlinks": True, "fs.max_entries": 200}
    policy = {"fs.write_roots": [str(root)], **rules}
    before = everything(root)
    ran = hostile(f"changes-{word}", policy=policy)
    changes = ran.result.changes
    assert everything(root) == before
    ending = ran.reason if ran.outcome == "guest-lost" else f"{changes.state}: {changes.reason}"
    assert ending.startswith(said), (ran.outcome, ending)
    assert changes.state != "applied"
