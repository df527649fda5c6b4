"""State, cache and project in unusual places: a run works or is refused with a fix, and no data is lost."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.command import X07
from tests.conftest import need
from x07_sandbox.host.paths import cache_dir

if TYPE_CHECKING:
    from tests.vm.conftest import Sandbox

ROOT = Path(__file__).resolve().parents[2]
HELLO = ["run", "--json", "-c", "print('hello')", "--toolchain", "python"]
NOBODY = 65534
VARIABLES = ("X07_VM_STATE_DIR", "X07_VM_CACHE_DIR")
# Mounts "$1" read-only, then executes the remaining words.
READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
SMALL = 'mount -t tmpfs -o size=16k,mode=0700 none "$1" && shift && exec "$@"'

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image")]


def mounted(script: str, place: Path) -> list[str]:
    """Return a command prefix that runs *script*, which mounts at *place*, in a mount namespace of its own."""
    need(os.geteuid() == 0, "needs root, to mount", installable=False)
    return ["unshare", "--mount", "/bin/bash", "-c", script, "mounted", str(place)]


def x07(
    *words: str, env: dict[str, str] | None = None, before: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `x07` with *env* added to the environment, started by the command *before*."""
    done = subprocess.run(
        [*(before or []), *X07, *words],
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Assert that the run was refused as the host's fault, and return the reason."""
    result: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode, result["outcome"], result["fault"]) == (125, "refused", "host"), result["reason"]
    return str(result["reason"])


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_folder_of_another_user_is_refused(tmp_path: Path, variable: str) -> None:
    """A state or cache folder of another user is refused with its owner named, and nothing is written to it."""
    need(os.geteuid() == 0, "needs root to make a folder that is another user's", installable=False)
    place = tmp_path / "theirs"
    place.mkdir(mode=0o700)
    os.chown(place, NOBODY, NOBODY)
    reason = refused(x07(*HELLO, env={"X07_VM_STATE_DIR": str(tmp_path / "state"), variable: str(place)}))
    assert f"uid {NOBODY}" in reason
    assert variable in reason
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("words", [("image", "build"), ("image", "list"), ("pool", "start"), HELLO])
def test_a_cache_that_others_may_read_is_refused(tmp_path: Path, words: list[str]) -> None:
    """Every command refuses a cache folder that others may read, before it writes anything."""
    place = tmp_path / "cache"
    place.mkdir()
    place.chmod(0o755)
    done = x07(*words, env={"X07_VM_STATE_DIR": str(tmp_path / "state"), "X07_VM_CACHE_DIR": str(place)})
    assert done.returncode == 125
    assert "it must belong to you and have mode 0700" in done.stdout + done.stderr
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("below", ["", "jobs"])
def test_a_planted_link_is_refused(tmp_path: Path, variable: str, below: str) -> None:
    """A symbolic link at or above the state or cache folder is refused, and nothing is written through it."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    place = tmp_path / "link" / below
    reason = refused(x07(*HELLO, env={"X07_VM_STATE_DIR": str(tmp_path / "state"), variable: str(place)}))
    assert "it is a link or not a folder" in reason
    assert list((tmp_path / "real").iterdir()) == []


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, variable: str) -> None:
    """A state or cache folder on a read-only file system is refused, and the reason names the variable to set."""
    place = tmp_path / "readonly"
    place.mkdir(mode=0o700)
    env = {"X07_VM_STATE_DIR": str(tmp_path / "state"), variable: str(place)}
    reason = refused(x07(*HELLO, env=env, before=mounted(READ_ONLY, place)))
    assert "Read-only file system" in reason
    assert variable in reason


@pytest.mark.parametrize("name", [b"plain", b"two words", b"tab\tand\\", b"no utf-8 \xff"])
def test_cleanup_never_removes_a_mounted_folder(tmp_path: Path, name: bytes) -> None:
    """Cleanup after a killed build removes no folder with something mounted in it, whatever the cache's name."""
    cache = tmp_path / os.fsdecode(name)
    place = cache / "tmp" / "image-left" / "tree"
    for folder in (cache, cache / "tmp", cache / "tmp/image-left", place):
        folder.mkdir(mode=0o700)
    (place / "kept").touch()
    env = {"X07_VM_STATE_DIR": str(tmp_path / "state"), "X07_VM_CACHE_DIR": str(cache)}
    done = x07("image", "build", env=env, before=mounted('mount --bind "$1" "$1" && shift && exec "$@"', place))
    assert done.returncode == 125
    assert "a file system is mounted below it" in done.stderr
    assert (place / "kept").exists()


def test_a_read_only_run_folder_is_named(tmp_path: Path) -> None:
    """A read-only /run is named as the cause, and no unrelated variable is suggested."""
    reason = refused(x07(*HELLO, env={"X07_VM_STATE_DIR": str(tmp_path)}, before=mounted(READ_ONLY, Path("/run"))))
    assert "Read-only file system (/run/x07-sandbox/uids). Make /run writable for root" in reason
    assert "X07_VM_STATE_DIR" not in reason


@pytest.mark.usefixtures("under_os")
def test_without_home_the_variables_to_set_are_named(tmp_path: Path) -> None:
    """Without HOME a run is refused and names the variables to set; with them set, it works."""
    bare = ["/usr/bin/env", "-u", "HOME", "-u", "XDG_CACHE_HOME"]
    reason = refused(x07(*HELLO, before=[*bare, "-u", "X07_VM_STATE_DIR", "-u", "X07_VM_CACHE_DIR"]))
    assert "HOME is not set" in reason
    assert all(variable in reason for variable in VARIABLES)
    env = {"X07_VM_STATE_DIR": str(tmp_path / "state"), "X07_VM_CACHE_DIR": str(cache_dir())}
    done = x07(*HELLO, before=bare, env=env)
    assert json.loads(done.stdout)["stdout"]["text"] == "hello\n"


@pytest.mark.usefixtures("under_os")
def test_a_read_only_checkout_is_enough(tmp_path: Path) -> None:
    """Runs work from a read-only checkout, and commands that write there fail with a clear error."""
    env = {"X07_VM_STATE_DIR": str(tmp_path / "state"), "X07_VM_CACHE_DIR": str(cache_dir())}
    checkout = mounted(READ_ONLY, ROOT)
    inside = ["/bin/bash", "-c", f'cd "{ROOT}/examples" && exec "$@"', "inside"]
    done = x07("run", "--input", "orders.jsonl", "jsonl_to_csv.py", env=env, before=[*checkout, *inside])
    assert (done.returncode, done.stdout.splitlines()[0][:3]) == (0, "id,"), done.stderr
    for words in (["init"], ["policy", "init", "--template", "cli"]):
        done = x07(*words, env=env, before=[*checkout, *inside])
        assert (done.returncode, done.stdout) == (2, "")
        assert "Read-only file system" in done.stderr


def test_a_clock_in_1970_changes_no_verdict(sandbox: Sandbox, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program runs normally on a host whose clock is in 1970, and its records are complete."""
    real = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: 5_000_000_000)
    ran = sandbox.run_text("clock.py", "import time\nprint(int(time.time()))\n")
    assert ran.outcome == "ok", ran.reason
    assert 5 <= int(ran.stdout) < 3600  # a guest's clock cannot be before its own boot
    for path in state.glob("*/job.json"):
        job = json.loads(path.read_bytes())
        assert job["created_unix_ms"] == 5_000
        assert 5_000 < job["deadline_unix_ms"] < real // 1_000_000
        assert (path.parent / "done").is_file()


def test_a_full_disk_under_the_cache_costs_only_the_cache(tmp_path: Path) -> None:
    """A program still runs if the cache's disk is full; the next run builds it again."""
    artifacts = cache_dir() / "artifacts"
    artifacts.mkdir(mode=0o700, exist_ok=True)
    program = tmp_path / "hello.c"
    program.write_text(f'#include <stdio.h>\nint main(void) {{ puts("hello {os.urandom(4).hex()}"); return 0; }}\n')
    env = {"X07_VM_STATE_DIR": str(tmp_path / "state")}
    for _ in range(2):
        done = x07("run", "--json", str(program), env=env, before=mounted(SMALL, artifacts))
        result = json.loads(done.stdout)
        assert (done.returncode, result["outcome"], result["artifact_from"]) == (0, "ok", "build"), result["reason"]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("doctor",), marks=pytest.mark.full("starts two machines")),
        ("image", "list"),
        ("policy", "schema"),
    ],
)
def test_a_failed_write_to_stdout_exits_with_125(tmp_path: Path, words: tuple[str, ...]) -> None:
    """A command ignores a closed stdout; if writing fails, it reports the error and exits with 125."""
    env = {"X07_VM_STATE_DIR": str(tmp_path / "state")}
    closed = x07(*words, env=env, before=["/bin/sh", "-c", 'exec "$@" >&-', "closed"])
    assert (closed.returncode, closed.stderr) == (0, "")
    for output, why in ((">/dev/full", "No space left on device"), ("1</dev/null", "Bad file descriptor")):
        done = x07(*words, env=env, before=["/bin/sh", "-c", f'exec "$@" {output}', "sh"])
        assert (done.returncode, done.stderr) == (125, f"x07: cannot write the output: {why}\n")
