"""`x07 policy init` and `new`: where the policy goes, what is reported, and what is never overwritten."""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from tests.command import Done, x07
from tests.unit.policy_command import policy
from x07_sandbox.policy.decode import decode_policy, render_policy
from x07_sandbox.policy.templates import TEMPLATES

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_PLACE = ".x07/policies/base/{}.sandbox.base.policy.json"


def init(where: Path, *words: str, template: str = "cli") -> Done:
    """Return the end of `x07 policy init`, started in *where*."""
    return x07(where, "policy", "init", "--template", template, *words)


def report(where: Path, *words: str, template: str = "cli") -> tuple[int, dict[str, Any]]:
    """Exit code and report of `x07 policy init`."""
    code, out, _ = init(where, "--json", *words, template=template)
    return code, json.loads(out)


@pytest.mark.parametrize("template", ["default", "worker-parallel"])
def test_the_first_call_creates_and_the_second_finds_it_unchanged(tmp_path: Path, template: str) -> None:
    """`x07 policy init` writes the template once and reports it in one line."""
    place = DEFAULT_PLACE.format(template)
    code, out, err = init(tmp_path, "--json", template=template)
    expected = (
        '{"schema_version":"x07.policy.init.report@0.1.0","template":"%s","project_root":"%s","out":"%s",'
        '"status":"created","policy_id":"sandbox.%s.base"}\n'
    )
    assert (code, out.decode(), err) == (0, expected % (template, tmp_path, place, template), "")
    assert (tmp_path / place).read_bytes() == render_policy(TEMPLATES[template])
    code, found = report(tmp_path, template=template)
    assert (code, found["status"]) == (0, "unchanged")


def test_flags_of_a_run_change_the_policy(tmp_path: Path) -> None:
    """`x07 policy init` takes the flags of `x07 policy new`, and writes the policy that `x07 policy new` prints."""
    (tmp_path / "hosts").write_text("b.example:80\n")
    words = "--template worker --memory 2G --allow-host a.example:443 --allow-host-file hosts --deny-host c.example:*"
    words += " --read . --allow-read-root in --write out --allow-hidden --max-file-size 1M"
    code, out, err = policy(tmp_path, "new", "--id", "mine", *words.split())
    assert (code, err) == (0, "")
    assert policy(tmp_path, "init", "--policy-id", "mine", "--out", "p.json", *words.split())[0] == 0
    printed, written = json.loads(out), json.loads((tmp_path / "p.json").read_bytes())
    assert printed.pop("notes").replace("policy new", "policy init") == written.pop("notes")
    assert printed == written
    assert printed["limits"]["mem_bytes"] == 2 << 30
    assert [entry["host"] for entry in printed["net"]["allow_hosts"]] == ["b.example", "a.example"]
    assert (printed["fs"]["read_roots"], printed["fs"]["write_roots"]) == (["in", "."], ["out"])
    assert (printed["fs"]["deny_hidden"], printed["fs"]["max_read_bytes"]) == (False, 1 << 20)


def test_init_prints_the_next_command(tmp_path: Path) -> None:
    """`x07 policy init` prints the path and the command that uses the policy."""
    code, out, err = init(tmp_path, "--out", "my policy.json")
    expected = f"created {tmp_path}/my policy.json\nnext: x07 run --policy 'my policy.json' PROGRAM\n"
    assert (code, out.decode(), err) == (0, expected, "")


def test_another_file_is_left_alone_until_force_overwrites_it(tmp_path: Path) -> None:
    """An existing file is kept unless --force is given, which keeps its mode."""
    report(tmp_path)
    place = tmp_path / DEFAULT_PLACE.format("cli")
    place.write_bytes(b"mine\n")
    place.chmod(0o640)
    code, out, err = init(tmp_path, "--json")
    assert (code, json.loads(out)["status"], place.read_bytes()) == (2, "exists_different", b"mine\n")
    assert "--force" in err
    code, out, _ = init(tmp_path, "--emit", "policy")
    assert (code, out, place.read_bytes()) == (2, render_policy(TEMPLATES["cli"]), b"mine\n")
    code, found = report(tmp_path, "--force")
    assert (code, found["status"], place.read_bytes()) == (0, "overwritten", render_policy(TEMPLATES["cli"]))
    assert stat.S_IMODE(place.stat().st_mode) == 0o640
    assert report(tmp_path, "--force")[1]["status"] == "unchanged"
    assert os.listdir(place.parent) == [place.name]  # noqa: PTH208 - names are wanted


def test_the_policy_can_be_printed_instead_of_the_report(tmp_path: Path) -> None:
    """--emit policy prints the policy file."""
    code, out, _ = init(tmp_path, "--emit", "policy", "--policy-id", "mine.1")
    assert code == 0
    assert out == (tmp_path / DEFAULT_PLACE.format("cli")).read_bytes()
    assert json.loads(out)["policy_id"] == "mine.1"


def test_the_project_is_found_from_below_and_by_its_file(tmp_path: Path) -> None:
    """The project is that of --project, else the nearest folder above with an x07.json."""
    (tmp_path / "x07.json").write_text("{}")
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert report(below)[1]["project_root"] == str(tmp_path)
    other = tmp_path / "a" / "other.json"
    other.write_text("{}")
    code, found = report(below, "--project", "../other.json")
    assert (code, found["project_root"]) == (0, str(tmp_path / "a"))
    assert (tmp_path / "a" / found["out"]).is_file()


def test_out_counts_from_the_project_and_its_folder_must_be_there(tmp_path: Path) -> None:
    """A relative --out lies in the project, in an existing folder or one made by --mkdir-out."""
    (tmp_path / "x07.json").write_text("{}")
    below = tmp_path / "below"
    below.mkdir()
    code, out, err = init(below, "--out", "p/q/one.json")
    assert (code, out) == (2, b"")
    assert "--mkdir-out" in err
    code, found = report(below, "--out", "p/q/one.json", "--mkdir-out")
    assert (code, found["out"], found["status"]) == (0, "p/q/one.json", "created")
    assert (tmp_path / "p/q/one.json").is_file()
    outside = tmp_path.parent / f"{tmp_path.name}-outside.json"
    assert report(below, "--out", f"../{outside.name}")[1]["out"] == str(outside)
    assert report(below, "--out", str(outside))[1]["status"] == "unchanged"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--policy-id", "no blanks"), "'no blanks'"),
        (("--policy-id", "x" * 65), "1 to 64"),
        (("--policy-id", "line\n"), "1 to 64"),
        (("--project", "missing.json"), "missing.json"),
        (("--project", "."), "not a readable file"),
        (("--out", ".."), "not the name of a file"),
        (("--out", "folder"), "not a regular file"),
        (("--out", "pipe"), "not a regular file"),
        (("--out", "link"), "is a link or not a folder"),
        (("--out", "link", "--force"), "is a link or not a folder"),
        (("--template", "nope"), "worker-parallel"),
    ],
)
def test_errors_end_with_exit_code_2(tmp_path: Path, words: tuple[str, ...], why: str) -> None:
    """Every error of `x07 policy init` ends with exit code 2 and a reason."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "target").write_bytes(b"kept")
    (tmp_path / "link").symlink_to("target")
    code, out, err = init(tmp_path, *words)
    assert (code, out) == (2, b"")
    assert why in err
    assert (tmp_path / "target").read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        (".x07", ()),
        (".x07/policies", ()),
        (".x07/policies/base", ()),
        ("policies", ("--out", "policies/cli.json")),
        ("policies", ("--out", "./policies/made/here/cli.json", "--mkdir-out")),
    ],
)
def test_a_planted_link_does_not_lead_out_of_the_project(tmp_path: Path, planted: str, words: tuple[str, ...]) -> None:
    """A symbolic link in the project never leads the policy elsewhere."""
    outside, project = tmp_path / "outside", tmp_path / "project"
    outside.mkdir()
    (project / planted).parent.mkdir(parents=True)
    (project / planted).symlink_to(outside)
    code, _, err = init(project, "--force", *words)
    assert (code, list(outside.iterdir())) == (2, [])
    assert "is a link or not a folder" in err


@pytest.mark.parametrize("template", ["cli", "worker"])
def test_a_closed_template_accepts_hosts_and_roots(tmp_path: Path, template: str) -> None:
    """Named hosts and roots are usable even if the template has none."""
    code, out, _ = policy(tmp_path, "new", "--template", template, "--allow-host", "example.org:443", "--read", ".")
    found = json.loads(out)
    assert (code, decode_policy(out.encode(), source="printed").policy_id) == (0, f"custom.{template}")
    assert found["fs"]["enabled"]
    assert found["net"]["enabled"]
    assert found["net"]["allow_tcp"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--memory", "99G"), "must be at least 1M and at most 16G"),
        (("--allow-host", "example.org"), "the port is missing"),
        (("--id", "a b"), "an id has 1 to 64 letters"),
        (("--build-timeout", "9"), "unrecognized arguments: --build-timeout"),
    ],
)
def test_invalid_values_of_new_are_refused(tmp_path: Path, words: tuple[str, ...], why: str) -> None:
    """Invalid values end with exit code 2 and print no policy."""
    code, out, err = policy(tmp_path, "new", *words)
    assert (code, out) == (2, "")
    assert why in err
