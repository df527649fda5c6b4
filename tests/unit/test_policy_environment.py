"""The environment variables that tell a program its policy, by X07's names."""

from __future__ import annotations

import msgspec
import pytest

from tests.x07_variables import EXPECTED, TOLD, policy_document
from x07_sandbox.policy.decode import program_environment
from x07_sandbox.policy.model import Policy

SWITCHES = {field: variable for variable, field, value, _ in TOLD if isinstance(value, bool)}


def environment(changes: dict[str, object] | None = None) -> dict[str, str]:
    """The environment of a program under that policy, which may break X07's extra rules."""
    return program_environment(msgspec.convert(policy_document(changes), Policy))


def test_each_variable_carries_its_field() -> None:
    """Each variable carries exactly its own policy field."""
    assert environment() == EXPECTED


@pytest.mark.parametrize("field", SWITCHES)
def test_each_switch_has_its_own_variable(field: str) -> None:
    """Changing one boolean field changes exactly one variable."""
    variable = SWITCHES[field]
    turned = EXPECTED[variable] == "0"
    assert environment({field: turned}) == EXPECTED | {variable: "1" if turned else "0"}
