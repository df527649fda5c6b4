"""Helpers that run `x07 policy` as a user does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.command import x07
from tests.published import document

if TYPE_CHECKING:
    from pathlib import Path


def policy(where: Path, *words: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of `x07 policy`, started in *where*."""
    done = x07(where, "policy", *words)
    return done.code, done.out.decode(), done.err


def as_json(where: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the JSON document of `x07 policy --json`, checked against its schema."""
    code, out, err = policy(where, *words, "--json")
    assert err == ""
    return code, document(out)
