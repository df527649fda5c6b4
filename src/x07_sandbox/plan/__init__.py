"""Pure answers: controls, refusals, outcomes."""

from x07_sandbox.plan.controls import Control, HowToAllow, Plan, Refusal, RunLimits, make_plan
from x07_sandbox.plan.features import VM_HOLDS, Features
from x07_sandbox.plan.outcomes import (
    OUTCOMES,
    Evidence,
    Outcome,
    Stage,
    Verdict,
    as_build,
    classify,
    exit_code,
    verdict,
)
from x07_sandbox.plan.sizes import RAM_CLASSES, ram_class_bytes

__all__ = [
    "OUTCOMES",
    "RAM_CLASSES",
    "VM_HOLDS",
    "Control",
    "Evidence",
    "Features",
    "HowToAllow",
    "Outcome",
    "Plan",
    "Refusal",
    "RunLimits",
    "Stage",
    "Verdict",
    "as_build",
    "classify",
    "exit_code",
    "make_plan",
    "ram_class_bytes",
    "verdict",
]
