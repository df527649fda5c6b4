"""The package as pip installs it, from the archive of its sources and editable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from x07_sandbox import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT: Final = Path(__file__).resolve().parents[2]
PARTS: Final = ("LICENSE", "README.md", "launchers", "pyproject.toml", "src")
NAMES: Final = ("x07", "x07-os-runner", "x07-sandbox")
CLIENT: Final = ROOT / "src" / "x07_sandbox" / "cli" / "x07_front_client.py"
BUILD: Final = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def ran(argv: Sequence[str | Path], cwd: Path) -> str:
    """Run a command successfully and return its output."""
    done = subprocess.run(argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """Build an archive in *target* with the build backend of pyproject.toml."""
    return target / ran([sys.executable, "-I", "-c", BUILD, f"build_{kind}", str(target)], source).split()[-1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources, since building writes into them."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def installed(wheel: Path, folder: Path) -> Path:
    """Install a wheel into a new virtual environment and return the folder of its commands.

    The packages that it needs are those of this environment, without x07-sandbox itself.
    """
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python3"
    pip = [sys.executable, "-I", "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--no-input"]
    ran([*pip, "install", "--quiet", "--no-index", "--no-deps", wheel], folder)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def check_client(commands: Path, cwd: Path) -> None:
    """Check that the commands start the client beside them, and start without it, too. The client is removed."""
    client = commands / CLIENT.name
    assert client.read_bytes() == CLIENT.read_bytes()
    client.write_text("def start(): print('started')", encoding="ascii")
    assert [ran([commands / name], cwd) for name in NAMES] == ["started\n"] * len(NAMES)
    client.unlink()
    assert [ran([commands / name, "--help"], cwd).split()[1] for name in NAMES] == ["x07", "x07-os-runner", "x07"]


def test_installed_commands_start_through_any_path(source: Path, tmp_path: Path) -> None:
    """The commands of the wheel made from the source archive start by path, through links, and from PATH."""
    sdist = build("sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    wheel = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path)
    commands = installed(wheel, tmp_path / "a folder" / "venv")
    links = tmp_path / "links"
    links.mkdir()
    for name in NAMES:
        assert (commands / name).read_bytes() == (ROOT / "launchers" / "x07").read_bytes()
        (links / name).symlink_to(commands / name)
    (tmp_path / "other-name").symlink_to("links/x07-os-runner")
    for argv, cwd in (
        ([commands / "x07"], tmp_path),
        (["./x07"], commands),
        ([links / "x07-sandbox"], tmp_path),
        (["/usr/bin/env", f"PATH={os.path.relpath(links, tmp_path)}", "x07"], tmp_path),
    ):
        assert ran([*argv, "--version"], cwd) == f"x07-sandbox {__version__}\n"
    for runner in (commands / "x07-os-runner", tmp_path / "other-name"):
        assert ran([runner, "--cli-specrows"], tmp_path).startswith('{"schema_version":"x07cli.specrows@')
    python = ran([commands / "python3", "-I", "-c", "import x07_sandbox; print(x07_sandbox.__file__)"], tmp_path)
    assert python.startswith(str(tmp_path))
    check_client(commands, tmp_path)


def test_an_editable_install_has_the_same_commands(source: Path, tmp_path: Path) -> None:
    """An editable install has the same commands, and they use the sources in their folder."""
    commands = installed(build("editable", source, tmp_path), tmp_path / "venv")
    for name in NAMES:
        assert (commands / name).read_bytes() == (ROOT / "launchers" / name).read_bytes()
    version = source / "src" / "x07_sandbox" / "host" / "settings.py"
    version.write_text(version.read_text().replace(__version__, "9.9"))
    assert ran([commands / "x07", "--version"], tmp_path) == "x07-sandbox 9.9\n"
    check_client(commands, tmp_path)
