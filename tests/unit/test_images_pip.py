"""Python packages of an image: allowed requirements, unpacking of wheels, and refusals."""

from __future__ import annotations

import base64
import hashlib
import tarfile
import zipfile
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.errors import HostError, ImageError, UsageError
from x07_sandbox.images import pip

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SITE = "usr/local/lib/python3.13/dist-packages"
PYTHON = pip.GuestPython(version="3.13", glibc=41, machine="x86_64")


def _wheel(folder: Path, files: Mapping[str, bytes], *, name: str = "tiny-1.0") -> Path:
    """A wheel with *files*, and a valid RECORD if *record* is None."""
    made = folder / f"{name}-py3-none-any.whl"
    everything = {f"{name}.dist-info/METADATA": b"Name: tiny\n", **files}
    rows = [f"{file},sha256={_digest(data)},{len(data)}" for file, data in everything.items()]
    record = "\n".join([*rows, f"{name}.dist-info/RECORD,,"])
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, data in everything.items():
            archive.writestr(file, data)
        archive.writestr(f"{name}.dist-info/RECORD", record)
    return made


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def _unpack(folder: Path, *made: Path) -> Path:
    root = folder / "root"
    unpacker = pip.Unpacker(root, "3.13")
    for wheel in made:
        unpacker.unpack(wheel)
    return root


@pytest.mark.parametrize(
    "text",
    ["numpy", "NumPy", "ruamel.yaml", "pandas[excel, test]>=2,<3", "a==1.*", "b ~= 1.0", "c; python_version>'3'"],
)
def test_requirements_are_accepted(text: str) -> None:
    """A requirement is a name with optional extras, versions and a condition."""
    assert pip.check_requirements([text]) == (text,)


@pytest.mark.parametrize(
    "text",
    [
        *("", "-e .", "-r more.txt", "--index-url=http://x", "--pre", "numpy --pre", "numpy --global-option=x"),
        *("./numpy", "/numpy", "a/b", "numpy @ https://x/y.whl", "git+https://x/y", "file.whl/"),
        *("$(id)", "a b", "a\nb"),
        *("numpy --hash=sha256:00", "numpy==1 # x", "numpy>=", "[x]", "numpy;\nos"),
    ],
)
def test_options_addresses_and_paths_never_reach_pip(text: str) -> None:
    """Options, URLs and paths are refused before anything is fetched."""
    with pytest.raises(UsageError, match="cannot add"):
        pip.check_requirements([text])


def test_commas_part_names_but_not_versions_and_extras() -> None:
    """A list of requirements may contain version ranges and extras."""
    asked = pip.split_list("numpy, pandas[excel,test]>=2,<3,,six==1.*, !=1.5,file:req.txt")
    assert asked == ["numpy", "pandas[excel,test]>=2,<3", "six==1.*, !=1.5", "file:req.txt"]


def test_a_requirements_file_gives_names_and_hashes(tmp_path: Path) -> None:
    """A requirements file may have comments, continued lines and hashes."""
    digest = "sha256:" + "ab" * 32
    file = tmp_path / "requirements.txt"
    file.write_text(
        f"# pinned\n\nsix==1.16.0 \\\n    --hash={digest} \\\n    --hash={digest}\n    # via x\nidna  # a name\n"
    )
    assert pip.check_requirements([f"file:{file}", "h11"]) == (
        "h11",
        "idna",
        f"six==1.16.0 --hash={digest} --hash={digest}",
    )


@pytest.mark.parametrize("line", ["-r other.txt", "-e .", "--index-url http://x", "x @ http://y", "./x.whl"])
def test_a_refused_line_of_a_file_is_named(tmp_path: Path, line: str) -> None:
    """A forbidden or unreadable line of a requirements file is refused with its number, and so is a missing file."""
    file = tmp_path / "requirements.txt"
    file.write_text(f"six\n# x\n{line}\n")
    with pytest.raises(UsageError, match="line 3"):
        pip.check_requirements([f"file:{file}"])
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"requirements\.txt, line 1\): it is not a Python requirement"):
        pip.check_requirements([f"file:{file}"])
    with pytest.raises(UsageError, match=r"none\.txt"):
        pip.check_requirements([f"file:{tmp_path}/none.txt"])


def test_wheels_fit_the_guest_and_not_the_host() -> None:
    """Pip selects wheels for the image's Python, C library and architecture, not the host's."""
    versions = {"python3": "3.11.2-1+b1", "libc6": "2.36-9+deb12u4"}
    python = pip.guest_python(versions, "aarch64")
    assert python == pip.GuestPython(version="3.11", glibc=36, machine="aarch64")
    options = " ".join(python.options())
    assert "--python-version 3.11 --implementation cp --abi cp311" in options
    assert "--platform manylinux_2_36_aarch64" in options
    assert "manylinux_2_37" not in options
    assert "x86" not in options
    with pytest.raises(HostError, match="no package lists"):
        pip.guest_python({}, "x86_64")


def test_a_wheel_is_unpacked_where_python_looks(tmp_path: Path) -> None:
    """Modules, data and scripts of a wheel are installed where Debian's Python and the shell find them."""
    made = _wheel(
        tmp_path,
        {
            "tiny/__init__.py": b"x = 1\n",
            "tiny-1.0.data/purelib/pure.py": b"",
            "tiny-1.0.data/platlib/plat.so": b"\x7fELF",
            "tiny-1.0.data/scripts/run-it": b"#!python\nprint(1)\n",
            "tiny-1.0.data/data/share/tiny/x.txt": b"x",
            "tiny-1.0.data/headers/tiny.h": b"",
            "tiny-1.0.dist-info/entry_points.txt": b"[console_scripts]\nTiny = tiny.main:App.go [x]\n[other]\nx=y\n",
        },
    )
    root = _unpack(tmp_path, made)
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert files == {
        *(f"{SITE}/{name}" for name in ("tiny/__init__.py", "pure.py", "plat.so")),
        *(f"{SITE}/tiny-1.0.dist-info/{name}" for name in ("METADATA", "RECORD", "entry_points.txt")),
        *("usr/local/bin/run-it", "usr/local/bin/Tiny", "usr/local/share/tiny/x.txt"),
    }
    assert (root / "usr/local/bin/run-it").read_bytes() == b"#!/usr/bin/python3\nprint(1)\n"
    launcher = (root / "usr/local/bin/Tiny").read_text()
    assert launcher.startswith("#!/usr/bin/python3\n")
    assert "from tiny.main import App\n" in launcher
    assert "sys.exit(App.go())" in launcher
    assert (root / "usr/local/bin/Tiny").stat().st_mode & 0o100


@pytest.mark.parametrize(
    "name", ["../x.py", "/etc/x", "a/../../x", "a//b", "./a", "a\\b", "a\x01b", "x" * 300, "tiny-1.0.data/odd/x"]
)
def test_no_file_of_a_wheel_leaves_its_folder(tmp_path: Path, name: str) -> None:
    """A wheel with an absolute path, `..` or unknown data is refused, and nothing is written outside."""
    with pytest.raises(ImageError, match="cannot use the wheel tiny"):
        _unpack(tmp_path, _wheel(tmp_path, {name: b"x"}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "tiny-1.0-py3-none-any.whl"]


def test_an_invalid_wheel_is_refused(tmp_path: Path) -> None:
    """A file that is no valid wheel is an error that names it."""
    garbage = tmp_path / "bad-1.0-py3-none-any.whl"
    garbage.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ImageError, match="the archive is damaged"):
        _unpack(tmp_path / "a", garbage)
    with zipfile.ZipFile(garbage, "w") as archive:
        archive.writestr("x.py", b"")
    with pytest.raises(ImageError, match=r"\.dist-info"):
        _unpack(tmp_path / "b", garbage)
    odd = {"tiny-1.0.dist-info/entry_points.txt": b"[console_scripts]\n../x = a:b\n"}
    with pytest.raises(ImageError, match="entry_points"):
        _unpack(tmp_path / "c", _wheel(tmp_path, odd))
    with pytest.raises(ImageError, match="not a wheel"):
        pip.wheel_of(tmp_path / "tiny-1.0.tar.gz")


def test_the_unpacked_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unpacked size of all wheels is bounded."""
    monkeypatch.setattr(pip, "MAX_BYTES", 100_000)
    with pytest.raises(ImageError, match="in total"):
        _unpack(tmp_path, _wheel(tmp_path, {"tiny.py": bytes(200_000)}))


def test_a_file_in_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    """Two wheels with a file and a folder of the same name are refused."""
    first = _wheel(tmp_path, {"both": b"x"})
    second = _wheel(tmp_path, {"both/x.py": b"x"}, name="other-1.0")
    with pytest.raises(ImageError, match="folder in another wheel"):
        _unpack(tmp_path, first, second)


def test_the_layer_of_an_image_depends_on_the_wheels_alone(tmp_path: Path) -> None:
    """The layer of Python packages is reproducible."""
    made = _wheel(tmp_path, {"tiny/__init__.py": b"x = 1\n", "tiny-1.0.data/scripts/go": b"#!/bin/sh\n"})
    root = _unpack(tmp_path, made)
    tars = [tmp_path / "one.tar", tmp_path / "two.tar"]
    for tar in tars:
        pip.pack(root, tar)
        for path in root.rglob("*.py"):
            path.touch()
    assert tars[0].read_bytes() == tars[1].read_bytes()
    with tarfile.open(tars[0]) as archive:
        rows = {member.name: (member.uid, member.mtime, oct(member.mode)) for member in archive}
    assert rows[f"{SITE}/tiny/__init__.py"] == (0, 1735689600, "0o644")
    assert rows["usr/local/bin/go"] == (0, 1735689600, "0o755")
    assert rows["usr/local/lib"] == (0, 1735689600, "0o755")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("ERROR: No matching distribution found for nunpy", "no wheel with this name for Python 3.13"),
        (
            (
                "ERROR: Could not find a version that satisfies the requirement six==99 (from versions: 1.0, 1.16.0)\n"
                "ERROR: No matching distribution found for six==99"
            ),
            "the newest is 1.16.0",
        ),
        ("WARNING: Retrying (Retry(total=0\nERROR: No matching distribution found for six", "does not answer"),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM\n    six==1.0 from https://x/y:\n        Expected",
            "the file of six==1.0 in the package index does not match its hash",
        ),
        ("ERROR: Cannot install a and b because they conflict", "conflict"),
    ],
)
def test_pip_errors_become_one_line(tmp_path: Path, output: str, expected: str) -> None:
    """Pip's errors become one line each: unknown name, unknown version, wrong hash, no network."""
    (tmp_path / "build.sources").write_text("")
    problem = pip.failure(output.splitlines(), PYTHON, tmp_path / "build.sources")
    assert problem is not None
    assert expected in problem.why
    assert pip.failure(["Collecting six"], PYTHON, tmp_path / "build.sources") is None


def _index(folder: Path, monkeypatch: pytest.MonkeyPatch, **needs: str) -> Path:
    """Make pip take wheels from a folder only; needs: for each wheel what it requires. Return a file of sources."""
    index, sources = folder / "index", folder / "sources.list"
    index.mkdir()
    sources.touch()
    for name, needed in needs.items():
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        inside = {
            "METADATA": about + (f"Requires-Dist: {needed}\n" if needed else ""),
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        files = {f"{name}-1.0.dist-info/{file}": text.encode() for file, text in inside.items()}
        _wheel(index, files, name=f"{name}-1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return sources


def test_no_package_is_built_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel whose dependency would be built from source is refused, and nothing runs on the host."""
    ran = tmp_path / "ran"
    source, evil = tmp_path / "evil-1.0", tmp_path / "evil.tar.gz"
    source.mkdir()
    (source / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]\n')
    (source / "b.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    with tarfile.open(evil, "w:gz") as archive:
        archive.add(source, "evil-1.0")
    sources = _index(tmp_path, monkeypatch, good=f"evil @ {evil.as_uri()}")
    with pytest.raises(ImageError, match="source packages are not built on this host"):
        pip.download(tmp_path / "wheels", ("good",), PYTHON, lambda _text: None, sources_file=sources)
    assert not ran.exists()


def test_pip_fetches_a_wheel_and_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels of a package and its dependencies come from pip's configured index."""
    sources = _index(tmp_path, monkeypatch, good="other", other="")
    found = pip.download(tmp_path / "wheels", ("good",), PYTHON, lambda _text: None, sources_file=sources)
    assert [wheel.name for wheel in found] == ["good", "other"]
