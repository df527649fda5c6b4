"""Check a backend for all behaviours, and report the outcomes."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import msgspec

from x07_sandbox.conformance.behaviours import BEHAVIOURS, Behaviour
from x07_sandbox.conformance.harness import RUNNER, Bench, BrokenError, open_bench
from x07_sandbox.errors import printable
from x07_sandbox.policy.features import Isolation


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The outcome of checking one behaviour. reason: empty if it passed. seconds: duration of the check."""

    name: str
    group: str
    promise: str
    verdict: Literal["passed", "failed", "gap", "skipped"]
    reason: str = ""
    seconds: float = 0.0


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The outcomes of all behaviours of one backend."""

    backend: str
    isolation: Isolation
    verdicts: tuple[Verdict, ...]


def conform(
    name: str, *, runner: Sequence[str] = RUNNER, on_verdict: Callable[[Verdict], object] = lambda _verdict: None
) -> Report:
    """Check all behaviours of the backend *name*. Raises SandboxError if it cannot run here. runner: see Bench."""
    verdicts = []
    with open_bench(name, runner) as bench:
        for behaviour in BEHAVIOURS:
            verdicts.append(check_behaviour(behaviour, bench))
            on_verdict(verdicts[-1])
        return Report(backend=name, isolation=bench.features.isolation, verdicts=tuple(verdicts))


def check_behaviour(behaviour: Behaviour, bench: Bench) -> Verdict:
    """Check one behaviour, unless it is a known gap of the backend or this host lacks a requirement."""
    known = Verdict(name=behaviour.name, group=behaviour.group, promise=behaviour.promise, verdict="passed")
    verdict = partial(msgspec.structs.replace, known)
    if reason := bench.backend.known_gaps.get(behaviour.name):
        return verdict(verdict="gap", reason=reason)
    if behaviour.needs and behaviour.needs not in bench.features.can_enforce:
        return verdict(verdict="skipped", reason=f"the backend cannot enforce {behaviour.needs} on this host")
    started = time.monotonic()
    failed = {}
    try:
        behaviour.check(bench)
    except BrokenError as exc:
        failed = {"verdict": "failed", "reason": printable(str(exc))}
    except Exception as exc:  # noqa: BLE001 - whatever a backend does wrong is a verdict on it
        failed = {"verdict": "failed", "reason": printable(f"{type(exc).__name__}: {exc}")}
    return verdict(seconds=round(time.monotonic() - started, 2), **failed)
