"""Errors are printable whatever the names in them contain."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.command import x07
from x07_sandbox.errors import Command, Flag, SandboxError, Text, UsageError, printable
from x07_sandbox.policy.decode import render_policy
from x07_sandbox.policy.templates import TEMPLATES

if TYPE_CHECKING:
    from pathlib import Path


@given(st.text(), st.text(), st.text())
def test_an_error_can_be_printed_anywhere(what: str, why: str, fix: str) -> None:
    """An error's text has no control characters or lone surrogates and survives pickling."""
    error = UsageError(what, why, fix)
    for text in (error.what, error.why, error.fix, str(error)):
        assert all(char.isprintable() or char == "\n" for char in text)
        assert text.count("\n") == text.count("\n  ")
        text.encode()
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (type(again), str(again), again.args) == (UsageError, str(error), (what, why, fix))


def test_plain_texts_are_shown_as_they_are() -> None:
    """Letters of any language and indented lines are kept; unprintable characters are escaped."""
    assert printable("no Zoë\n  and 木\n  end") == "no Zoë\n  and 木\n  end"
    assert printable("a\nx07: ok\t\x1b[31m\0\ud800\x9b") == r"a\nx07: ok\t\x1b[31m\x00\ud800\x9b"
    assert str(SandboxError("a\n", "b", "c")) == r"a\n: b. c."


@pytest.mark.parametrize(
    ("fix", "end"),
    [
        ("Use another name", "."),
        ("Did you mean it?", ""),
        (Command("x07 run a.py"), ""),
        (("To create it: ", Command("mkdir -p a")), ""),
        (("Use ", Flag("--memory 1G")), "."),
        (("Run ", Command("x07 doctor"), ", or set X07_VM_PODMAN_BIN"), "."),
    ],
)
def test_a_message_ends_with_a_full_stop_or_a_command(fix: Text, end: str) -> None:
    """A message ends with a full stop, unless it ends with a command: that can be pasted."""
    error = UsageError("a", "b", fix, code="c")
    assert str(error) == f"a: b. {''.join(fix)}{end}"
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (str(again), again.args, again.code) == (str(error), error.args, "c")


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["policy", "check", "NAME"], "stdout"),
        (["policy", "explain", "NAME"], "stdout"),
        (["run", "--policy", "NAME.x", "-c", "true", "--toolchain", "shell"], "stderr"),
        (["run", "--diff", "NAME/x", "NAME"], "stderr"),
        (["doctor", "NAME"], "stderr"),
    ],
)
def test_a_name_makes_no_line_and_no_control_sequence(tmp_path: Path, words: list[str], where: str) -> None:
    """A name with a newline and a control sequence is escaped wherever it is printed."""
    name = "a\nx07: b\x1b[31m"
    (tmp_path / name).write_bytes(render_policy(TEMPLATES["cli"]))
    env = {"X07_VM_STATE_DIR": str(tmp_path / "jobs"), "X07_VM_CACHE_DIR": str(tmp_path / "cache")}
    done = x07(tmp_path, *(word.replace("NAME", name) for word in words), env=env)
    out = done.out.decode()
    assert "\x1b" not in out + done.err
    assert "\nx07: b" not in out + done.err
    assert r"a\nx07: b\x1b[31m" in (out if where == "stdout" else done.err)
