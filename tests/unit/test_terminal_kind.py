"""The kind of terminal, TERM, that a command of a sandbox gets."""

from __future__ import annotations

import pytest

from x07_sandbox.sessions.execution import terminal_kind


@pytest.mark.parametrize("kind", ["xterm-kitty", "tmux-256color", "dumb", "rxvt-unicode", "screen.xterm-new", "vt100+"])
def test_a_client_passes_its_own_kind(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command gets the TERM of its client."""
    monkeypatch.setenv("TERM", kind)
    assert terminal_kind() == kind


@pytest.mark.parametrize("kind", ["", "x" * 65, "../../etc/passwd", "a b", "x\n", "-v", "x\x1b[2J", "\u00e9", "\udc9b"])
def test_a_kind_that_is_no_plain_name_is_replaced(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a TERM, or with one that is no short plain name, the kind is xterm-256color."""
    monkeypatch.setenv("TERM", kind)
    assert terminal_kind() == "xterm-256color"
    monkeypatch.delenv("TERM")
    assert terminal_kind() == "xterm-256color"
