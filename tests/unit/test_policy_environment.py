"""Promises of the variables that tell a program its policy: each carries its own field, by X07's names."""

from __future__ import annotations

import msgspec
import pytest

from tests.x07_variables import EXPECTED, TOLD, policy_document
from x07_sandbox.policy.environment import program_environment
from x07_sandbox.policy.model import Policy

SWITCHES = {field: variable for variable, field, value, _ in TOLD if isinstance(value, bool)}


def told(changes: dict[str, object] | None = None) -> dict[str, str]:
    """What a program with that policy is told; whether X07's further rules let it stand is not asked."""
    return program_environment(msgspec.convert(policy_document(changes), Policy))


def test_each_variable_tells_its_own_field() -> None:
    """A policy with another value in every field is told word for word, and nothing besides."""
    assert told() == EXPECTED


@pytest.mark.parametrize("field", SWITCHES)
def test_each_switch_is_told_by_its_own_variable(field: str) -> None:
    """Turned round, a field that is true or false changes the one variable that is its own, and no other."""
    variable = SWITCHES[field]
    turned = EXPECTED[variable] == "0"
    assert told({field: turned}) == EXPECTED | {variable: "1" if turned else "0"}
