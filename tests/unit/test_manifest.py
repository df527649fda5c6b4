"""Reading x07-sandbox.toml, and its errors."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from x07_sandbox.errors import UsageError
from x07_sandbox.programs.project import MAX_BYTES, decode_manifest, find_manifest

HEAD = 'schema_version = "x07.sandbox.project@0.1.0"\n'
MAKE = HEAD + 'toolchain = "make"\nfiles = ["Makefile", "src/**"]\nartifact = "bin/prog"\n'
PYTHON = HEAD + 'toolchain = "python"\nfiles = ["*.py"]\nentry = "main.py"\n'


def test_all_keys_are_read() -> None:
    """All keys of a manifest are read."""
    more = 'policy = "p.json"\nimage = "mine"\n[build]\nargs = ["-j2"]\n'
    more += '[run]\nargs = ["a"]\ninput = "in.txt"\nenv = { A = "1" }\n'
    manifest, toolchain = decode_manifest((MAKE + more).encode(), source="m")
    assert toolchain.name == "make"
    assert (manifest.artifact, manifest.policy, manifest.image) == ("bin/prog", "p.json", "mine")
    assert (manifest.build.args, manifest.run.args, manifest.run.input) == (("-j2",), ("a",), "in.txt")
    assert manifest.run.env == {"A": "1"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "schema_version is missing"),
        ("x = [", "not valid TOML"),
        ("\xff", "not UTF-8"),
        (
            'schema_version = "x07.sandbox.project@9.0.0"',
            'this version of x07 requires schema_version = "x07.sandbox.project@0.1.0"',
        ),
        (PYTHON + 'entri = "x"', "no key entri; did you mean entry"),
        (PYTHON + '[run]\nargz = ["x"]', r"no key run.argz; did you mean run.args"),
        (PYTHON.replace("python", "pyton"), "the toolchain 'pyton'"),
        (PYTHON.replace('entry = "main.py"', ""), "need `entry`"),
        (PYTHON.replace('["*.py"]', "[]"), "files"),
        (PYTHON.replace("*.py", "../*.py"), "not a path inside"),
        (PYTHON + 'policy = "/etc/p.json"', "policy: .* not a path inside"),
        (MAKE.replace("bin/prog", "./"), "artifact: './' is not a path inside"),
        (PYTHON + '[run]\ninput = "../x"', r"run.input: .* not a path inside"),
        (PYTHON + 'artifact = "x"', "cannot have `artifact`"),
        (PYTHON + '[build]\nargs = ["x"]', r"cannot have \[build\] args"),
        (MAKE.replace('artifact = "bin/prog"', ""), "need `artifact`"),
        (MAKE + 'entry = "x"', "cannot have `entry`"),
        (MAKE + "#" * MAX_BYTES, "larger than"),
        (HEAD + "x = " + "[" * 5000, "not TOML|nested too deep"),
        (PYTHON + "[run]\nenv.A = " + "1" * 5000, "not valid TOML .*digits"),
        ("schema_version = 0x" + "f" * 63, "schema_version is int"),
    ],
)
def test_mistakes_are_reported_with_their_place(text: str, why: str) -> None:
    """Each mistake in a manifest is an error with its place, and a misspelt key gets a suggestion."""
    data = text.encode("latin-1") if text == "\xff" else text.encode()
    with pytest.raises(UsageError, match=why):
        decode_manifest(data, source="m")


@pytest.mark.parametrize(
    "text",
    [
        "[" + "a." * 6000 + "b]\n" + "\n".join(f"k{number}=1" for number in range(300)),
        "a." * 8000 + "b = 1",
        "x = {" + "a." * 8000 + "b = 1}",
        '"""\n\\' * 3000,
        'x = "' + '\\"' * 8000,
    ],
)
def test_a_hostile_manifest_is_rejected_quickly(text: str) -> None:
    """A hostile manifest is rejected in bounded time."""
    before_s = time.thread_time()
    with pytest.raises(UsageError, match="the manifest m is invalid"):
        decode_manifest((HEAD + text).encode(), source="m")
    assert time.thread_time() - before_s < 10


def test_leading_dots_of_paths_are_ignored() -> None:
    """A leading `./` in entry and artifact is ignored."""
    assert decode_manifest(PYTHON.replace('"main', '".//main').encode(), source="m")[0].entry == "main.py"
    assert decode_manifest(MAKE.replace("bin/", "./bin/./").encode(), source="m")[0].artifact == "bin/prog"


def test_a_folder_without_a_manifest_is_an_error(tmp_path: Path) -> None:
    """A folder without a manifest is an error, and a plain file is no project."""
    with pytest.raises(UsageError, match=r"it has no x07-sandbox\.toml"):
        find_manifest(tmp_path)
    (tmp_path / "x07-sandbox.toml").write_text(PYTHON)
    assert find_manifest(tmp_path) == tmp_path / "x07-sandbox.toml"
    assert find_manifest(tmp_path / "x07-sandbox.toml") == tmp_path / "x07-sandbox.toml"
    (tmp_path / "a.py").touch()
    assert find_manifest(tmp_path / "a.py") is None
