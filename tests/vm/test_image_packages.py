"""Real images with additions: Python packages from wheels, modules to preload, and a JDK."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.cli.main import main
from x07_sandbox.images.build import build_image
from x07_sandbox.images.presets import PRESETS
from x07_sandbox.images.store import all_names

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.vm.conftest import Sandbox
    from x07_sandbox.images.store import Image

pytestmark = [pytest.mark.vm, pytest.mark.slow]

NAME = "of-the-tests"
MODULE = "import sys\nprint('imported', file=sys.stderr)\nanswer = 42\n\ndef main():\n    print('launched')\n"
PROGRAM = """
import importlib.metadata, os, sys
import tiny_for_tests as tiny
print(tiny.answer, tiny.__file__, os.path.isfile(tiny.__cached__), importlib.metadata.version("tiny-for-tests"))
print(os.access("/usr/local/bin/tiny", os.X_OK), open("/usr/local/bin/tiny").readline().strip())
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, the only package that pip finds."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_for_tests-1.0-py3-none-any.whl", "w") as archive:
        about = "tiny_for_tests-1.0.dist-info"
        archive.writestr("tiny_for_tests/__init__.py", MODULE)
        archive.writestr("tiny_for_tests/template.py", "this is {{ no }} Python")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-for-tests\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/entry_points.txt", "[console_scripts]\ntiny = tiny_for_tests:main\n")
        archive.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def removed(image: Image) -> Iterator[None]:
    """Remove the test's image at the end; require the ordinary one."""
    del image
    yield
    if NAME in all_names():
        assert main(["image", "rm", NAME]) == 0


@pytest.mark.usefixtures("removed")
def test_python_packages_come_from_wheels(index: Path, sandbox: Sandbox) -> None:
    """An image built with --pip has the packages, compiled and with their programs, and a rebuild keeps them."""
    built = build_image(name=NAME, pip=["tiny-for-tests>=1"], progress=print)
    assert [(wheel.name, wheel.version) for wheel in built.manifest.pip] == [("tiny-for-tests", "1.0")]
    assert str(index).encode() not in (built.folder / "manifest.json").read_bytes()
    ran = sandbox.run_text("use.py", PROGRAM, image=NAME, cold=True)  # no other run uses this image
    assert ran.outcome == "ok", ran.stderr
    assert {name: phase.start for name, phase in ran.result.phases.items()} == {"build": "cold", "run": "cold"}
    assert ran.stdout.decode().splitlines() == [
        f"42 /usr/local/lib/python{_python(built)}/dist-packages/tiny_for_tests/__init__.py True 1.0",
        "True #!/usr/bin/python3",
    ]
    (index / "tiny_for_tests-1.0-py3-none-any.whl").unlink()
    assert build_image(name=NAME, progress=print).digest == built.digest
    assert main(["image", "rm", NAME]) == 0
    assert not built.folder.exists()


def _python(image: Image) -> str:
    version = next(package.version for package in image.manifest.packages if package.name == "python3")
    return ".".join(version.split(".")[:2])


@pytest.mark.full("one more image")
@pytest.mark.usefixtures("removed")
def test_a_missing_preload_module_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """--preload of a missing module is an error that names it, and leaves no image of that name."""
    assert main(["image", "build", "--name", NAME, "--preload", "json,no_such_module"]) == 125
    said = capsys.readouterr().err
    assert "No module named 'no_such_module'" in said
    assert "--pip" in said
    assert NAME not in all_names()


@pytest.mark.full("fetches and builds an image with a JDK")
@pytest.mark.usefixtures("removed")
def test_an_image_can_have_a_jdk(sandbox: Sandbox) -> None:
    """Packages that link manual pages, which images omit, such as a JDK, can be installed."""
    build_image(name=NAME, include=["openjdk-21-jdk-headless"], progress=print)
    ran = sandbox.run_text("see.py", "import os; print(os.access('/usr/bin/javac', os.X_OK))", image=NAME)
    assert ran.stdout == b"True\n", ran.reason


TOOLS = {
    "agent": "git --version; curl --version; rg --version; jq --version; ps --version; less --version; nano --version; "
    "unzip -v; zip -v; xz --version; file --version; tree --version; patch --version; sqlite3 --version; "
    "python --version; pip --version; python3 -m venv /tmp/v; /tmp/v/bin/python -V; node --version; npm --version",
    "data": "python3 -c 'import numpy, pandas, matplotlib.pyplot, pyarrow; print(pandas.DataFrame([1]).mean()[0])'; "
    "python3 -m ipykernel --version",
}


ROOMY = {"limits.mem_bytes": 1 << 30, "limits.wall_ms": 600_000, "limits.cpu_ms": 600_000}


@pytest.mark.full("fetches and builds images with many packages")
@pytest.mark.usefixtures("removed")
@pytest.mark.parametrize("name", PRESETS)
def test_every_tool_of_a_preset_starts(sandbox: Sandbox, name: str) -> None:
    """An image built with --preset has all its tools, and each starts."""
    assert main(["image", "build", "--preset", name, "--name", NAME]) == 0
    script = "\n".join(f"{line} > /dev/null || echo 'failed: {line}'" for line in TOOLS[name].split("; "))
    if name == "data":  # its lines have quotes
        script = f"set -e\n{TOOLS[name]} > /dev/null"
    ran = sandbox.run_text("start.sh", script, image=NAME, policy=ROOMY)
    assert (ran.outcome, ran.stdout) == ("ok", b""), ran.stderr
