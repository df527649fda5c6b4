"""A guest of which nothing can be believed: agent and kernel broken, killed or lying, in real machines.

The images are real ones, built in a cache of the tests' own; only their agent is another one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from tests.conftest import FULL, sample
from tests.vm.conftest import BEHAVE, PROGRAMS, Ran, Sandbox, wait_done
from x07_sandbox.channel.frames import WINDOW
from x07_sandbox.host import settings
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_dir
from x07_sandbox.images.build import build_image
from x07_sandbox.images.guestcode import GuestCode, read_guest_code

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

MIB = 1 << 20
# Each such boot is of an image of its own, from cold; the like is tried while the program runs, or on frames alone.
ALSO_LATER = pytest.mark.skipif(not FULL, reason="full sizes only: one more cold boot")


def hostile_code(boot: str) -> GuestCode:
    """Our own guest code with the liar in the agent's place."""
    honest = read_guest_code()
    agent = dict(honest.agent)
    agent["guest/honest.py"] = agent["guest/agent.py"]
    agent["guest/agent.py"] = (PROGRAMS / "hostile_agent.py").read_bytes()
    agent["guest/mode.py"] = f"BOOT = {boot!r}\n".encode()
    return replace(honest, agent=agent)


@pytest.fixture(scope="session")
def hostile_cache(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of images beside the user's: the packages come from there by link, the images do not go there."""
    del image  # made by now, and with it the base
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # one for all workers: saving its machine takes seconds
    cache = place / "hostile-cache"
    with file_lock(place / "hostile.lock"):
        if not cache.exists():
            made = place / "hostile-cache.new"
            (made / "images").mkdir(parents=True, mode=0o700)
            made.chmod(0o700)
            for base in (cache_dir() / "images").glob("base-*"):
                shutil.copytree(base, made / "images" / base.name, copy_function=_link_or_copy)
            if (cache_dir() / "kvm").is_dir():  # a liar is no witness to what the processor can do
                shutil.copytree(cache_dir() / "kvm", made / "kvm")
                (made / "kvm").chmod(0o700)
            made.rename(cache)
    return cache


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


Hostile = Callable[..., Ran]


@pytest.fixture
def hostile(sandbox: Sandbox, hostile_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Hostile:
    """Runs in a machine with a lying agent: boot: how it behaves from the start, else it lies when a job comes."""
    artifact = sandbox.artifacts.built(BEHAVE)
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(hostile_cache))

    def run(*args: str, boot: str = "", **options: object) -> Ran:
        image = build_image(name=f"boot-{boot or 'well'}", progress=lambda _text: None, code=hostile_code(boot))
        # By digest: an image named otherwise would be made anew with honest code.
        options = {
            "cold": bool(boot),
            "image": image.digest,
            "artifact": artifact,
            "policy": {"limits.wall_ms": 60_000},
        } | options
        return sandbox.run(BEHAVE, *args, **options)  # type: ignore[arg-type] # `run` checks them

    return run


def lost(ran: Ran, fault: str) -> str:
    """The reason of a run whose guest was lost, by whose fault."""
    assert (ran.outcome, ran.result.x07_exit_code, ran.result.fault) == ("guest-lost", 125, fault), ran.reason
    assert ran.result.exit_code is None
    assert ran.reason.isprintable()
    assert ran.reason.isascii()
    assert len(ran.reason) < 400
    return ran.reason


def test_the_same_guest_is_honest_where_it_is_not_told_to_lie(hostile: Hostile) -> None:
    """The hostile image runs a program like any other when no word tells it to lie: what follows is its lies."""
    ran = hostile("args", "plain")
    assert (ran.outcome, ran.stdout) == ("ok", b"plain\0")


# until the program runs: nothing there can be the program's doing


def test_an_agent_that_never_answers_is_lost_at_the_boot_limit(
    hostile: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that boots and stays silent is given up after the time for booting, and the reason says so."""
    monkeypatch.setattr(settings, "BOOT_S", 8.0)
    ran = hostile("nothing", boot="silent")
    assert "did not boot in time" in lost(ran, "host")
    assert 8_000 <= ran.result.phases["run"].times_ms["end"] < 28_000


@pytest.mark.parametrize(
    ("boot", "reason"),
    sample(
        [
            pytest.param("protocol", "uses protocol 2", marks=ALSO_LATER),
            pytest.param("garbage", "broke the channel's protocol while booting", marks=ALSO_LATER),
            ("nonce", "its nonce is not ours"),
            ("panic", "kernel panicked while booting"),
            pytest.param("off", "exited without an error while the guest was booting", marks=ALSO_LATER),
        ],
        3,
    ),
)
def test_a_guest_that_fails_before_the_program_is_the_hosts_fault(hostile: Hostile, boot: str, reason: str) -> None:
    """What breaks before the program runs is `guest-lost`, fault host, each with a reason of its own."""
    ran = hostile("nothing", boot=boot)
    assert reason in lost(ran, "host")
    assert "started" not in ran.result.phases["run"].times_ms


# while the program runs: it may be the program's doing, and must not pass for the host's


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("panic", "kernel panicked while running the program (kernel: sysrq triggered crash)"),
        ("exit", "agent died while running the program (kernel: Attempted to kill init! exitcode=0x00000300)"),
        ("crash", "agent died while running the program (kernel: Attempted to kill init! exitcode=0x0000000b)"),
        ("off", "switched itself off while running the program"),
        ("garbage", "broke the channel's protocol while running the program"),
        ("oversized", "broke the channel's protocol while running the program: bad frame"),
        ("frames", "STARTED while running"),
        ("credit", "more credit than the window of stream 1"),
        ("status", "a wait status that no ended program has: 4991"),
        ("failed", "the guest failed while running the program: x: ?[2J it broke"),
        ("json", "broke the channel's protocol while running the program: bad EXITED frame"),
        ("deep", "broke the channel's protocol while running the program: bad EXITED frame"),
        ("numbers", "broke the channel's protocol while running the program: bad EXITED frame"),
        ("denials", "broke the channel's protocol while running the program: bad DENIED frame: there are more than 64"),
    ],
)
def test_each_way_to_lose_a_guest_has_its_own_reason(hostile: Hostile, word: str, reason: str) -> None:
    """What breaks while the program runs is `guest-lost`, fault program, with a reason that tells the cases apart."""
    ran = hostile(word)
    assert reason in lost(ran, "program")
    assert ran.program_ms < 45_000


def test_output_without_credit_breaks_the_protocol(hostile: Hostile, state: Path, threads: ThreadPoolExecutor) -> None:
    """While nobody takes the output, a guest that sends beyond its window is `guest-lost`, and costs no more."""
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
    assert "stream 2 sent more than its window" in lost(ran, "program")
    assert ran.result.stdout.bytes <= WINDOW + 65536


def test_output_without_credit_ends_at_the_cap(hostile: Hostile) -> None:
    """While the output is taken as it comes, a guest that floods it ends at the output limit like any program."""
    ran = hostile("window", max_output_bytes=MIB)
    assert (ran.outcome, ran.result.stdout.bytes, ran.result.stdout.truncated) == ("output-limit", MIB, True)


@pytest.mark.parametrize("word", ["mute", "console"])
def test_a_guest_that_says_nothing_of_use_ends_at_the_deadline(hostile: Hostile, word: str) -> None:
    """An agent that stays silent, or floods the console, ends as `timeout` at our own deadline, and is not believed."""
    ran = hostile(word, policy={"limits.wall_ms": 3000})
    assert (ran.outcome, ran.result.x07_exit_code) == ("timeout", 124)
    assert 3000 <= ran.program_ms < 3000 + 30_000
    assert "panic" not in ran.reason


def test_a_refusal_that_was_made_up_harms_nobody(hostile: Hostile) -> None:
    """What a taken-over agent says of refusals is text: it is told, and nothing follows from it."""
    ran = hostile("denial")
    (denial,) = ran.result.denials
    assert (ran.outcome, denial.subject, denial.how_to_allow) == ("ok", "/root/\x1b[2Jx", None)
    assert denial.count == 2**62


def test_a_claim_of_success_is_only_the_programs_own(hostile: Hostile) -> None:
    """A guest that claims success without running anything is `ok` with nothing to show: it forges no more."""
    ran = hostile("ok")
    assert (ran.outcome, ran.stdout, ran.stderr) == ("ok", b"", b"")


def test_an_agent_silent_in_set_up_is_lost_at_its_limit(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that takes the files and never starts the program is given up after the time for copying in."""
    monkeypatch.setattr(settings, "COPY_IN_S", 2.0)
    ran = hostile("unready")
    assert "reached its deadline while" in lost(ran, "host")
    assert "started" not in ran.result.phases["run"].times_ms
    times = ran.result.phases["run"].times_ms
    assert 2000 <= times["end"] - times["seeded"] < 32_000


# in the build machine


@pytest.mark.parametrize(
    "case",
    [
        ("mute", "BUILD_WALL_MS", "build-failed", "time"),
        ("withheld", "CHANGES_OUT_S", "guest-lost", "reached its deadline while handing over"),
    ],
)
def test_a_silent_build_machine_ends_at_its_limit(
    hostile: Hostile, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, case: tuple[str, str, str, str]
) -> None:
    """A build machine that never ends, or keeps back what it made, is given up at the limit of that stage."""
    del hostile
    word, limit, outcome, reason = case
    monkeypatch.setattr(settings, limit, 2000 if limit.endswith("MS") else 2.0)
    image = build_image(name="boot-well", progress=lambda _text: None, code=hostile_code(""))
    ran = sandbox.run_text(f"{word}.c", "int main(void) { return 0; }\n", image=image.digest)
    assert (ran.outcome, list(ran.result.phases)) == (outcome, ["build"]), ran.reason
    assert reason in ran.reason
    assert ran.result.digests.artifact is None


@pytest.mark.parametrize(
    ("word", "outcome", "reason"),
    [
        ("longer", "guest-lost", "larger than announced"),
        ("endless", "guest-lost", "larger than announced"),
        ("shorter", "build-failed", "is incomplete"),
        ("panic", "guest-lost", "kernel panicked"),
    ],
)
def test_a_lying_build_machine_gives_no_artifact(
    hostile: Hostile, sandbox: Sandbox, hostile_cache: Path, word: str, outcome: str, reason: str
) -> None:
    """A build machine that sends another file than it announced, or dies, gives nothing that would be run."""
    del hostile
    image = build_image(name="boot-well", progress=lambda _text: None, code=hostile_code(""))
    assert image.folder.is_relative_to(hostile_cache)
    ran = sandbox.run_text(f"{word}.c", "int main(void) { return 0; }\n", image=image.digest)
    assert (ran.outcome, ran.result.fault) == (outcome, "program"), ran.reason
    assert reason in ran.reason
    assert list(ran.result.phases) == ["build"]
    assert ran.result.digests.artifact is None


# changes to files


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All that is below a folder: mode and content by name."""
    paths = [path for path in sorted(folder.rglob("*")) if not path.is_relative_to(folder / "home")]
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in paths
    }


@pytest.mark.parametrize(
    ("word", "said"),
    [
        *[(word, "the guest broke the channel's protocol") for word in ("up", "absolute", "inside", "zero", "root")],
        *[(word, "the guest broke the channel's protocol") for word in ("twice", "through", "hidden")],
        *[(word, "the guest broke the channel's protocol") for word in ("root-link", "typed")],
        *[(word, "kept: ") for word in ("device", "git", "bare", "link", "set-id")],
        *[(word, "discarded: ") for word in ("bomb", "million", "unsaid")],
        ("silent", "none: "),
    ],
)
def test_no_change_that_a_guest_makes_up_comes_to_the_host(
    hostile: Hostile, tmp_path: Path, word: str, said: str
) -> None:
    """Names that lead out, devices, links, repositories, sparse bombs, a million entries: nothing of it is applied."""
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
    told = ran.reason if ran.outcome == "guest-lost" else f"{changes.state}: {changes.reason}"
    assert told.startswith(said), (ran.outcome, told)
    assert changes.state != "applied"
