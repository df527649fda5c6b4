"""The installed commands import and execute nothing of the current folder, whatever the caller's variables are."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.command import X07
from tests.conftest import sample
from tests.hostile_folder import BIN, HostileFolder
from x07_sandbox.cli.parser import VERBS, actions, parser_for

ROOT: Final = Path(__file__).resolve().parents[2]
POLICY: Final = str(ROOT / "examples" / "policy.json")
SHELLS: Final = ("/bin/sh", "/bin/bash")
# Words that bring a command further than to a message about a missing argument.
WORDS: Final[dict[tuple[str, ...], tuple[str, ...]]] = {
    ("run",): ("--sandbox-backend", "none", "--i-accept-weaker-isolation", "--toolchain", "python", "-c", "print(1)"),
    ("exec",): ("--dry-run", "--workdir", ".", "--", "make"),
    ("inspect",): ("x",),
    ("logs",): ("x",),
    ("kill",): ("x",),
    ("init",): ("--toolchain", "python", "--entry", "json.py"),
    ("policy", "new"): ("--allow-host", "example.org:443"),
    ("policy", "init"): ("--template", "worker"),
    ("policy", "check"): (POLICY,),
    ("policy", "explain"): (POLICY,),
    ("image", "rm"): ("x",),
    ("completion",): ("bash",),
}


def commands() -> list[tuple[str, ...]]:
    """Every verb, and for a verb with actions each of these."""
    found: list[tuple[str, ...]] = []
    for verb in VERBS:
        inner = [
            name
            for action in list(actions(parser_for([verb])))[1:]
            if isinstance(action, argparse._SubParsersAction)  # noqa: SLF001 - argparse has no other way
            for name in action.choices
            if name != verb
        ]
        found += [(verb, name) for name in inner] or [(verb,)]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> HostileFolder:
    """One hostile folder for all tests of this file."""
    return HostileFolder(tmp_path_factory.mktemp("hostile") / "folder")


def start(folder: HostileFolder, *argv: str, shell: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Start a command in the hostile folder. shell: the program that reads the launcher as `sh`."""
    return subprocess.run(
        ["sh", *argv] if shell else argv,
        executable=shell or None,
        cwd=folder.path,
        env=folder.variables() | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_folder_notices_a_start_without_isolation(folder: HostileFolder) -> None:
    """Without isolation, a module of the hostile folder is executed."""
    start(folder, *X07, "--version")
    assert "module encodings" in folder.executed()


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["x07", "x07-sandbox", "x07-os-runner"])
def test_installed_commands_start_isolated(folder: HostileFolder, tmp_path: Path, name: str, shell: str) -> None:
    """Each installed command starts isolated, directly and through links, with dash and with bash as /bin/sh."""
    (tmp_path / "link").symlink_to(BIN / name)
    (tmp_path / "link to link").symlink_to("link")
    for launcher in (BIN / name, tmp_path / "link to link"):
        done = start(folder, str(launcher), "--help", shell=shell)
        assert (done.returncode, done.stderr, folder.executed()) == (0, "", "")
        assert done.stdout.startswith(f"usage: {'x07-os-runner' if name == 'x07-os-runner' else 'x07'} ")


def test_a_launcher_that_cannot_find_its_folder_executes_nothing(tmp_path: Path) -> None:
    """A launcher that bash finds on PATH refuses, because it would start the python3 of the current folder."""
    python = tmp_path / "python3"
    python.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "x07", "--version"],
        cwd=tmp_path,
        env={"PATH": f"{BIN}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, sorted(tmp_path.iterdir())) == (125, [python])
    assert "its folder is unknown" in done.stderr


def test_processes_have_the_name_of_their_command() -> None:
    """The process of a command has the command's name, by which pkill finds it."""
    code = (
        "from x07_sandbox.cli.main import end_with; end_with(lambda: print(open('/proc/self/comm').read()) or 0, 'x07')"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "x07", "")


@pytest.mark.parametrize("words", sample(commands(), 6), ids=" ".join)
def test_every_command_imports_nothing_of_the_folder(
    folder: HostileFolder, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Every command of x07 imports and executes nothing of the current folder."""
    cache = tmp_path / "cache"
    (cache / "pool" / "socket").mkdir(parents=True)  # the process of `pool start` starts, but cannot listen
    if words == ("image", "build"):
        (cache / "images").touch(mode=0o600)  # else it would build an image
    for private in (cache, cache / "pool"):
        private.chmod(0o700)
    env = {"X07_VM_CACHE_DIR": str(cache), "X07_VM_STATE_DIR": str(tmp_path / "state")}
    done = start(folder, str(BIN / "x07"), *words, *WORDS.get(words, ()), **env)
    assert folder.executed() == ""
    assert "Traceback" not in done.stderr
    assert done.returncode in {0, 1, 2, 125}, done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_a_launcher_without_its_python_says_how_to_install(folder: HostileFolder, tmp_path: Path, shell: str) -> None:
    """A launcher with no Python beside it says that x07-sandbox belongs into a virtual environment."""
    for name, code in (("x07", 125), ("x07-os-runner", 2)):
        launcher = tmp_path / name
        launcher.write_bytes((BIN / name).read_bytes())
        done = start(folder, str(launcher), "--version", shell=shell)
        assert (done.returncode, done.stdout, folder.executed()) == (code, "", "")
        assert done.stderr.endswith(
            f"{name}: cannot start: there is no {tmp_path}/python3. Install x07-sandbox into a virtual environment,"
            " and start this command there or through a link to it\n"
        )


def test_every_python_is_started_isolated() -> None:
    """Every Python process that the sources start gets -I."""
    for path in (ROOT / "src" / "x07_sandbox").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r'sys\.executable, "(?!-I")', line) and "sys.orig_argv" not in line:
                pytest.fail(f"{path.name}: {line.strip()}")


@pytest.mark.parametrize("name", ["setup.sh", "quickstart.sh", "build_guest_runner_image.sh"])
def test_scripts_execute_nothing_of_the_current_folder(folder: HostileFolder, name: str) -> None:
    """The scripts for users execute nothing of the current folder."""
    done = start(folder, str(ROOT / "scripts" / name), "--unknown")
    assert folder.executed() == ""
    assert done.returncode in {1, 2}
    assert "sage: scripts/" in done.stderr or "usage: " in done.stderr
