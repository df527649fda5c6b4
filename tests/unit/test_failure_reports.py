"""JSON documents of all verbs, including those for errors."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
from typing import TYPE_CHECKING

import jsonschema
import pytest

from tests.command import Done
from tests.command import x07 as command
from tests.published import document
from x07_sandbox.cli import json_output, main
from x07_sandbox.errors import Cancelled, UsageError
from x07_sandbox.host.waiting import cancelled_by_signals
from x07_sandbox.images.store import check_name
from x07_sandbox.reports.schemas import schemas

if TYPE_CHECKING:
    from pathlib import Path

PLACES = ("STATE", "CACHE")
SCHEMA = json.loads(schemas()["failure.schema.json"])


def x07(where: Path, *words: str, places: str = ".") -> Done:
    """Carry out a command in *where*, with state and cache below *places*."""
    return command(where, *words, env={f"X07_VM_{name}_DIR": str(where / places / name.lower()) for name in PLACES})


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["init", "--entry", "main.py"], 2, "it applies only to --toolchain python or --toolchain shell"),
        (["init", "a\udcff/file"], 2, "Not a directory"),
        (["image", "list"], 125, "it is a link or not a folder"),
        (["image", "verify", "nothing"], 125, ""),
        (["pool", "status"], 125, "it is a link or not a folder"),
    ],
)
def test_an_error_is_one_json_object(tmp_path: Path, words: list[str], code: int, why: str) -> None:
    """With --json an error is one object of schemas/failure.schema.json, with the same exit code."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / os.fsdecode(b"a\xff")).write_bytes(b"")
    done = x07(tmp_path, *words, "--json", places="link")
    assert done.code == code
    assert done.err == ""
    found = json.loads(done.out)
    jsonschema.validate(found, SCHEMA)
    assert why in found["error"]["why"]
    assert found["error"]["fix"]


@pytest.mark.parametrize("action", ["status", "stop"])
def test_pool_commands_report_a_missing_pool(tmp_path: Path, action: str) -> None:
    """`x07 pool status` and `stop` report as JSON that no pool runs."""
    done = x07(tmp_path, "pool", action, "--json")
    assert document(done.out) == {"schema_version": "x07.sandbox.pool@0.1.0", "pool": None}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["init", "--json", "new"], "x07.sandbox.init.report@0.1.0"),
        (["policy", "init", "--json", "--template", "cli"], "x07.policy.init.report@0.1.0"),
        (["policy", "check", "--json", "built-in:cli", "nothing"], "x07.sandbox.policy.check@0.1.0"),
        (["policy", "explain", "--json", "built-in:postgres-client"], "x07.sandbox.policy.explain@0.1.0"),
        (["image", "list", "--json"], "x07.sandbox.image.list@0.1.0"),
        (["prune", "--json"], "x07.sandbox.prune@0.1.0"),
        (["doctor", "--json"], "x07.sandbox.doctor@0.1.0"),
        (["run", "--json", "--report-out", "r", "-c", "true", "--toolchain", "shell"], "x07.sandbox.result@0.1.0"),
        (["--json", "run"], "x07.sandbox.result@0.1.0"),
        (["diff", "--json"], "x07.sandbox.failure@0.1.0"),
        (["--json=pretty", "policy", "check", "built-in:cli"], "x07.sandbox.policy.check@0.1.0"),
        (["--json=off", "policy", "init", "--template", "cli", "--emit", "report"], "x07.policy.init.report@0.1.0"),
        (["--out", "p.json", "--json=canon", "policy", "init", "--template", "cli"], "x07.policy.init.report@0.1.0"),
        (["--json", "run", "nothing.py", "--", "--json=off"], "x07.sandbox.result@0.1.0"),
        (["ps", "--json", "--bogus"], "x07.sandbox.failure@0.1.0"),
        (["--json", "no-such-verb"], "x07.sandbox.failure@0.1.0"),
        (["run", "--json", "--bogus", "prog.py"], "x07.sandbox.result@0.1.0"),
    ],
)
def test_every_verb_prints_its_published_document(tmp_path: Path, words: list[str], name: str) -> None:
    """With --json every verb prints one document that matches its published schema."""
    done = x07(tmp_path, *words)
    assert document(done.out)["schema_version"] == name
    assert (tmp_path / "p.json").exists() is any("p.json" in word for word in words)


@pytest.mark.parametrize("words", [["help"], ["help", "policy", "check"], ["version"], ["-v"], ["-V"]])
def test_help_and_version_are_commands_too(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """`x07 help COMMAND`, `x07 version`, `-v` and `-V` print what --help and --version print."""
    option = "--help" if words[0] == "help" else "--version"
    for given in (words, [*words[1:], option]):
        with contextlib.suppress(SystemExit):  # argparse's, with help
            assert main.main(given) == 0
    out = capfd.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :] != ""


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "it is empty"),
        ("a" * 65, "it has 65 characters, and a name has at most 64"),
        ("aB", "'B' is not allowed in a name"),
        (".a", "'.' is not allowed at the start"),
        ("0123456789ab", "it consists of 12 or more hexadecimal digits"),
    ],
)
def test_a_bad_image_name_gets_its_own_reason(name: str, why: str) -> None:
    """Each reason why a text cannot be the name of an image has its own message."""
    with pytest.raises(UsageError, match=why):
        check_name(name)


def test_json_that_is_off_is_text(capfd: pytest.CaptureFixture[str]) -> None:
    """--json=off prints text, wherever it stands."""
    for words in (["--json=off", "policy", "check"], ["policy", "check", "--json=off"]):
        assert main.main([*words, "built-in:cli"]) == 0
        assert capfd.readouterr().out == "built-in:cli: valid (sandbox.cli.base)\n"


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    ("words", "code", "silent"),
    [
        (["policy", "init", "--template", "cli"], 0, True),
        (["policy", "init", "--template", "cli", "--emit", "policy"], 0, True),
        (["policy", "check", "built-in:cli", "nothing"], 2, False),
        (["policy", "explain", "bad.json"], 3, True),
        (["policy", "explain"], 0, False),
        (["policy", "schema"], 0, True),
        (["image", "list"], 0, True),
        (["pool", "status"], 0, False),
        (["prune"], 0, False),
        (["doctor"], 1, False),
        (["init", "new"], 0, True),
        (["diff"], 2, True),
        (["undo", "--json"], 2, True),
    ],
)
def test_report_out_writes_every_document(
    tmp_path: Path, words: list[str], code: int, place: str, *, silent: bool
) -> None:
    """--report-out writes any verb's document, errors included, and --quiet-json prints none."""
    (tmp_path / "bad.json").write_text("{}")
    flags = ["--quiet-json", "--report-out", "r"]
    done = x07(tmp_path, *([*flags, *words] if place == "before" else [*words, *flags]))
    assert done.code == code, done.err
    assert (done.out == b"") is silent
    assert done.err or code < 2
    report = (tmp_path / "r").read_bytes()
    if words != ["policy", "schema"]:
        found = document(report)
        assert ("error" in found) is (code > 1 and "check" not in words)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["policy", "check", "--report-out", "p.json", "p.json"], "names it for something else"),
        (["policy", "init", "--template", "cli", "--report-out", "new", "--out", "new"], "names it for something else"),
        (["policy", "init", "--template", "cli", "--report-out", "no/r"], "is not a folder that you can write"),
        (["--report-out", ".", "policy", "init", "--template", "cli"], "not a regular file"),
        (["--report-out", "r", "completion", "bash"], "unrecognized arguments: --report-out r"),
    ],
)
def test_a_report_that_cannot_be_written_stops_the_verb(tmp_path: Path, words: list[str], why: str) -> None:
    """An unusable --report-out file is a usage error before anything is done."""
    (tmp_path / "p.json").write_text("{}")
    done = x07(tmp_path, *words)
    assert (done.code, done.out, why in done.err) == (2, b"", True), done.err
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert (tmp_path / "p.json").read_text() == "{}"


def test_an_error_that_ends_a_verb_is_in_its_report(tmp_path: Path) -> None:
    """--report-out records an error, and a failure to write it hides no error."""
    raised = UsageError("cannot do it", "b", "c")

    def carry_out(options: argparse.Namespace) -> int:
        if options.report_out.name == "folder":
            options.report_out.mkdir()  # so that nothing can be written there
        raise raised

    for name in ("r", "folder"):
        with pytest.raises(UsageError):
            json_output.carry_out_with_report(argparse.Namespace(report_out=tmp_path / name, carry_out=carry_out))
    assert document((tmp_path / "r").read_bytes())["error"]["what"] == "cannot do it"
    assert list((tmp_path / "folder").iterdir()) == []


def test_errors_of_the_pool_process_keep_their_exit_code(tmp_path: Path) -> None:
    """Errors of the pool's own process keep their exit code."""
    for name, code, why in (("a b", 2, "' ' is not allowed in a name"), ("nothing", 125, "")):
        done = x07(tmp_path, "pool", "start", "--json", "--image", name)
        assert done.code == code
        assert why in document(done.out)["error"]["why"]


def test_quiet_json_still_prints_errors(tmp_path: Path) -> None:
    """With --quiet-json errors are still printed to standard error."""
    done = x07(tmp_path, "run", "--json", "--quiet-json", "--report-out", "r", "a.py")
    assert (done.code, done.out) == (2, b"")
    assert document((tmp_path / "r").read_bytes())["reason"] in done.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_before_there_is_a_run_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    """A run cancelled before it starts ends with 130 or 143, and --json says so."""
    with cancelled_by_signals() as cancel:
        signal.raise_signal(number)
        with pytest.raises(Cancelled) as caught:
            cancel.check()
    for json_wanted in (False, True):
        options = argparse.Namespace(json=json_wanted)
        assert main._failed(caught.value, ["run"], options) == code  # noqa: SLF001 - how main ends on any error
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["outcome"], result["signal"], result["x07_exit_code"]) == ("cancelled", number, code)
    assert "a signal was received" in captured.err


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("a b.py", "To run it: x07 run 'a b.py'"),
        ("inspct", "Did you mean x07 inspect? See x07 --help."),
        ("frobnicate", "See x07 --help."),
    ],
)
def test_an_unknown_command_gets_a_suggestion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], word: str, fix: str
) -> None:
    """An unknown command suggests the nearest one, or how to run that program."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.py").touch()
    assert main.main([word]) == 2
    assert capfd.readouterr().err == f"x07: wrong usage: there is no command {word!r}. {fix}\n"


@pytest.mark.parametrize(("word", "near"), [("--mem", "--memory"), ("--timout=3", "--timeout"), ("--zzzzzz", "")])
def test_a_mistyped_option_gets_a_suggestion(word: str, near: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A shortened or mistyped option suggests the full name."""
    assert main.main(["run", word, "prog.py"]) == 2
    errors = capfd.readouterr().err
    assert word in errors
    assert (f"Did you mean {near}?" in errors) is bool(near)
