"""`x07 init`: a project file that a run accepts, made from the existing files, overwriting nothing."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.command import x07
from x07_sandbox.errors import UsageError
from x07_sandbox.files.pack import pack_tree
from x07_sandbox.programs.project import FILE, ROWS, decode_manifest, sandbox_manifest
from x07_sandbox.x07.project import decode_project, first_project

if TYPE_CHECKING:
    from x07_sandbox.programs.toolchains import Toolchain

ROOT = Path(__file__).resolve().parents[2]


def init(where: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, report and standard error of `x07 init`."""
    code, out, err = x07(where, "init", "--json", *words)
    return code, json.loads(out), err


def made(where: Path) -> dict[str, Any]:
    """The contents of x07-sandbox.toml as a run reads them, and the files that it selects."""
    manifest, toolchain = decode_manifest((where / FILE).read_bytes(), source=FILE)
    files = sorted(pack_tree(where, manifest.files).files)
    return {"toolchain": toolchain.name, "entry": manifest.entry, "artifact": manifest.artifact, "files": files}


def fill(where: Path, *names: str) -> None:
    """Empty files of these names."""
    for name in names:
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(b"")


# X07's


def test_an_x07_project_is_minimal_and_readable(tmp_path: Path) -> None:
    """`x07 init` writes X07's required keys, one profile, and a one-line report; a second run changes nothing."""
    code, out, err = x07(tmp_path, "init", "--json")
    report = '{"schema_version":"x07.sandbox.init.report@0.1.0","toolchain":"x07","project_root":"%s","out":"x07.json",'
    assert (code, out.decode()) == (0, report % tmp_path + '"status":"created"}\n')
    assert "x07 policy init --template default" in err
    data = (tmp_path / "x07.json").read_bytes()
    assert list(json.loads(data)) == [
        "schema_version",
        "world",
        "entry",
        "module_roots",
        "dependencies",
        "lockfile",
        "default_profile",
        "profiles",
    ]
    assert json.loads(data)["schema_version"] == "x07.project@0.5.0"
    assert init(tmp_path)[:2] == (0, json.loads(out) | {"status": "unchanged"})


@pytest.mark.parametrize("words", [(), ("--toolchain", "python")])
def test_init_prints_the_next_command(tmp_path: Path, words: tuple[str, ...]) -> None:
    """`x07 init` prints the written file and the next command."""
    fill(tmp_path, "main.py")
    name, following = (FILE, "x07 run .") if words else ("x07.json", "x07 policy init --template default")
    rest = f"{tmp_path / name}\nnext: {following}\n"
    assert x07(tmp_path, "init", *words) == (0, f"created {rest}".encode(), "")
    assert x07(tmp_path, "init", *words) == (0, f"already up to date: {rest}".encode(), "")


@pytest.mark.parametrize("folder", [".", "it's new", "sub/deep"])
def test_the_printed_command_creates_the_policy(tmp_path: Path, folder: str) -> None:
    """The command that `x07 init` prints creates the project's policy."""
    code, _, err = init(tmp_path, folder)
    words = shlex.split(err.partition(": x07 ")[2])
    assert (code, x07(tmp_path, *words)[0]) == (0, 0), err
    project = decode_project((tmp_path / folder / "x07.json").read_bytes(), source="x07.json")
    assert (tmp_path / folder / str(project.profiles["sandbox"].policy)).is_file()


@pytest.mark.parametrize(
    ("there", "entry", "root"),
    [
        (("main.x07.json", "other.x07.json"), "main.x07.json", "."),
        (("app/only.x07.json",), "app/only.x07.json", "app"),
        (("a.x07.json", "b.x07.json"), "src/main.x07.json", "src"),
    ],
)
def test_the_entry_is_what_is_there(there: tuple[str, ...], entry: str, root: str) -> None:
    """The entry is the conventional file, or the only X07 source."""
    document = json.loads(first_project(there, "p.json"))
    assert (document["entry"], document["module_roots"]) == (entry, [root])


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    """An existing file with other content is left unchanged, with exit code 2."""
    fill(tmp_path, "main.py")
    for name, words in (("x07.json", ()), (FILE, ("--toolchain", "python"))):
        (tmp_path / name).write_bytes(b"mine\n")
        code, report, err = init(tmp_path, *words)
        assert (code, report["status"]) == (2, "exists_different")
        assert "was not changed" in err
        assert (tmp_path / name).read_bytes() == b"mine\n"


def test_no_link_is_written_through(tmp_path: Path) -> None:
    """A symbolic link in place of the project file is refused."""
    (tmp_path / "x07.json").symlink_to(tmp_path / "elsewhere")
    code, out, err = x07(tmp_path, "init")
    assert (code, out) == (2, b"")
    assert "is a link or not a folder" in err
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_named_is_made(tmp_path: Path) -> None:
    """`x07 init DIR` creates the folder, or says why it cannot."""
    assert init(tmp_path, "new/project")[1]["project_root"] == str(tmp_path / "new" / "project")
    assert (tmp_path / "new" / "project" / "x07.json").is_file()
    code, out, err = x07(tmp_path, "init", "new/project/x07.json")
    assert (code, out) == (2, b"")
    assert "Not a directory" in err


# ours


@pytest.mark.parametrize(
    ("toolchain", "there", "expected"),
    [
        ("c", ["a.c", "a.h", "lib/b.c", "notes.txt"], {"files": ["a.c", "a.h", "lib/b.c"]}),
        ("python", ["tool.py", "pkg/__init__.py"], {"files": ["pkg/__init__.py", "tool.py"], "entry": "tool.py"}),
        ("python", ["main.py", "other.py"], {"files": ["main.py", "other.py"], "entry": "main.py"}),
        ("shell", ["run.sh", "lib/a.bash"], {"files": ["lib/a.bash", "run.sh"], "entry": "run.sh"}),
        (
            "javascript",
            ["index.mjs", "lib/a.cjs", "package.json", "data.json"],
            {"files": ["index.mjs", "lib/a.cjs", "package.json"], "entry": "index.mjs"},
        ),
        ("make", ["Makefile", "src/a.c"], {"files": ["Makefile", "src/a.c"], "artifact": "bin/p"}),
        ("c", ["odd [dir]/a*.c"], {"files": ["odd [dir]/a*.c"]}),
    ],
)
def test_a_manifest_lists_the_sources_that_are_there(
    tmp_path: Path, toolchain: str, there: list[str], expected: dict[str, object]
) -> None:
    """Each toolchain lists its own sources, without hidden files and build output."""
    fill(tmp_path, *there, ".git/x.c", ".git/x.py", "build/y.c", "__pycache__/z.py", "node_modules/w.sh")
    artifact = ["--artifact", "bin/p"] if toolchain == "make" else []
    code, report, err = init(tmp_path, "--toolchain", toolchain, *artifact)
    assert (code, report["status"], report["toolchain"], err) == (0, "created", toolchain, "")
    assert made(tmp_path) == {"entry": None, "artifact": None, "toolchain": toolchain} | expected


def test_a_make_project_includes_all_inputs(tmp_path: Path) -> None:
    """A make project includes sub-Makefiles, scripts and data, but no build output."""
    fill(tmp_path, "Makefile", "Makefile-so", "config.h.in", "words[1]", "tests/data/a", "tests/in.json", "doc/x.1")
    fill(tmp_path, "src/Makefile", "src/a.c", "src/a.d", "src/a.lo", ".hidden", "build/y.c", FILE + ".orig")
    (tmp_path / "src/a.o").write_bytes(b"\x7fELF")
    (tmp_path / "prog").write_bytes(b"\x7fELF")
    (tmp_path / "libx.so.1").write_bytes(b"\x7fELF")
    (tmp_path / "libx.a").write_bytes(b"!<arch>\n")
    assert init(tmp_path, "--toolchain", "make", "--artifact", "src/lua")[0] == 0
    found = made(tmp_path)
    assert found["artifact"] == "src/lua"
    assert set(found["files"]) == {
        *("Makefile", "Makefile-so", "config.h.in", "words[1]", "tests/data/a", "tests/in.json", "doc/x.1"),
        *("src/Makefile", "src/a.c", FILE + ".orig"),
    }


def test_a_make_project_of_many_names_is_listed_by_folders() -> None:
    """A make project with too many files is listed by folder patterns."""
    names = ["Makefile", "a.c", *(f"tests/data/{number}" for number in range(2000))]
    data = sandbox_manifest("make", names, artifact="a")
    assert decode_manifest(data, source=FILE)[0].files == ("*", "tests/data/*")


def test_flags_name_what_cannot_be_inferred(tmp_path: Path) -> None:
    """--entry and --artifact name what cannot be inferred, and are refused for other toolchains."""
    fill(tmp_path, "a.py", "b.py", "Makefile", "x.c")
    assert init(tmp_path, "--toolchain", "python", "--entry", "b.py")[0] == 0
    assert made(tmp_path)["entry"] == "b.py"
    (tmp_path / FILE).unlink()
    assert init(tmp_path, "--toolchain", "make", "--artifact", "x")[0] == 0
    assert made(tmp_path)["artifact"] == "x"
    code, _, err = x07(tmp_path, "init", "--entry", "a.py")
    assert code == 2
    assert "--toolchain python or --toolchain shell" in err
    code, _, err = x07(tmp_path, "init", "--toolchain", "c", "--template", "cli")
    assert (code, "it applies only to X07 projects" in err) == (2, True)


@pytest.mark.parametrize(
    ("toolchain", "files", "why"),
    [
        ("c", ["a.py"], r"no file ends in \.c"),
        ("make", ["a.c"], "no Makefile"),
        ("make", ["Makefile"], r"Add --artifact FILE, or .*x07 exec --workdir \. -- make test"),
        ("make", ["Makefile", "configure"], r"-- sh -c '\./configure && make'"),
        ("make", ["configure", "Makefile.in"], r"before \./configure has created it.*x07 exec --workdir"),
        ("python", ["a.py", "b.py"], "any of a.py, b.py.*--entry"),
        ("shell", ["lib/a.sh"], "no such file is in the top folder"),
        ("python", ["../a.py"], "--entry|not a path inside"),
        ("python", ["main.py", *(f"{number}/a.py" for number in range(1024))], r"length <= 1024 - at `\$\.files`"),
    ],
)
def test_an_incomplete_project_is_an_error(toolchain: str, files: list[str], why: str) -> None:
    """A folder that is no project of the toolchain is an error that says what is missing."""
    with pytest.raises(UsageError, match=why):
        sandbox_manifest(toolchain, files)


@given(
    st.sampled_from(ROWS),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), max_size=5),
    st.text(max_size=20),
)
def test_any_names_make_a_manifest_or_our_error(row: Toolchain, names: list[str], artifact: str) -> None:
    """Any file names give a valid manifest or a usage error."""
    files = [f"{name}{suffix}" for name in names for suffix in row.project_files[:2]]
    try:
        data = sandbox_manifest(row.name, ["Makefile", *files], artifact=artifact)
    except UsageError:
        return
    assert decode_manifest(data, source=FILE)[1] == row


def test_a_tree_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    """A tree that is nested too deeply is refused."""
    (tmp_path / "/".join("d" * 300)).mkdir(parents=True)
    code, out, err = x07(tmp_path, "init", "--toolchain", "python")
    assert (code, out) == (2, b"")
    assert "nested deeper than 256" in err


def test_a_tree_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """A folder with too many files is refused."""
    for number in range(101):
        (tmp_path / f"{number}").mkdir()
        for other in range(100):
            os.mknod(tmp_path / f"{number}" / f"{other}")
    code, out, err = x07(tmp_path, "init")
    assert (code, out) == (2, b"")
    assert "more than 10000 files" in err


def test_an_error_leaves_no_new_folder(tmp_path: Path) -> None:
    """A failed init leaves no new folder."""
    code, out, _ = x07(tmp_path, "init", "--toolchain", "python", "new/one")
    assert (code, out) == (2, b"")
    assert list(tmp_path.iterdir()) == []
