"""The list of backend behaviours: permitted gaps, and the choice of backends."""

from __future__ import annotations

import pytest

from x07_sandbox.backends.registry import BY_NAME, create
from x07_sandbox.cli.main import main
from x07_sandbox.conformance.behaviours import BEHAVIOURS
from x07_sandbox.policy.features import VM_CAPABILITIES

WITHOUT_GAPS = {"channel", "files", "outcome", "deadline", "stop"}
NAMES = [behaviour.name for behaviour in BEHAVIOURS]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_backends_gaps_are_ones_that_it_may_have(name: str) -> None:
    """Each known gap of a backend is permitted and has a reason."""
    allowed = {behaviour.name for behaviour in BEHAVIOURS if behaviour.group not in WITHOUT_GAPS}
    gaps = create(name).known_gaps
    assert gaps.keys() <= allowed
    assert all(gaps.values())


def test_each_behaviour_is_one_sentence_under_one_name() -> None:
    """Every behaviour has a unique name, a one-sentence promise and a known prerequisite."""
    assert sorted(NAMES) == sorted(set(NAMES))
    assert all(behaviour.promise.endswith(".") and behaviour.promise[0].isupper() for behaviour in BEHAVIOURS)
    assert {behaviour.needs for behaviour in BEHAVIOURS} == VM_CAPABILITIES | {""}


@pytest.mark.parametrize("name", ["os", "none"])
def test_weaker_isolation_is_not_checked_without_acceptance(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`x07 conform` starts nothing on a backend weaker than a VM without the acceptance flag."""
    assert main(["conform", "--sandbox-backend", name]) == 125
    assert "--i-accept-weaker-isolation" in capsys.readouterr().err
