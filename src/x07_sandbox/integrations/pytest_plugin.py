"""pytest: fixtures that run programs in sandboxes, and how these ended in the report of a failed test.

The entry point `x07` of the group `pytest11` loads this module in every run of pytest in an environment that has this
package. So it imports nothing but pytest, and does nothing until a test asks for a fixture.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator, Iterator, Sequence

    from x07_sandbox import Ended, Result, Sandbox

_SHOWN: Final = 3  # the last runs of a test
_LINES: Final = 20  # the last lines of each stream
_LINE_CHARS: Final = 400
_DENIALS: Final = 20


class HostFaultError(Exception):
    """The host could not run the program. It is no `SandboxError`, so that no test takes it for a refusal."""


class _Record:
    """What the sandboxes of one test did."""

    def __init__(self) -> None:
        self.ended: deque[Result | Ended] = deque(maxlen=_SHOWN)
        self.sandbox: Sandbox | None = None


_RECORD: Final = pytest.StashKey[_Record]()


@pytest.fixture
def x07_run(request: pytest.FixtureRequest) -> Callable[..., Result]:
    """Return `x07_sandbox.run_program` with the options of the marker x07, which options of the call replace.

    If the host is at fault, the call raises HostFaultError, and the test ends as an error.
    """
    from x07_sandbox import SandboxError, run_program

    record, defaults = _record(request.node), _marked(request.node)

    def run(program: str | os.PathLike[str] | None = None, args: Sequence[str] = (), **options: Any) -> Result:  # noqa: ANN401 - run_program checks them
        __tracebackhide__ = True
        try:
            result = run_program(program, args, **(defaults | options))
        except SandboxError as exc:
            if exc.result is not None:
                record.ended.append(exc.result)
                if exc.result.fault == "host":
                    raise HostFaultError(str(exc)) from None
            raise
        record.ended.append(result)
        if result.fault == "host":
            raise HostFaultError(result.reason)
        return result

    return run


@pytest.fixture
def x07_sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Open a `Sandbox` with the options of the marker x07, and close it after the test.

    The marker's timeout_s is its lifetime_s. Changes to folders of the host are discarded unless the test closes it.
    """
    from x07_sandbox import Sandbox

    record, options = _record(request.node), _marked(request.node)
    if "timeout_s" in options:
        options.setdefault("lifetime_s", options.pop("timeout_s"))

    class Recorded(Sandbox):
        def exec(self, *args: Any, **options: Any) -> Ended:  # noqa: ANN401 - those of the base
            __tracebackhide__ = True
            ended = super().exec(*args, **options)
            record.ended.append(ended)
            return ended

    record.sandbox = Recorded(**options)
    yield record.sandbox
    result = record.sandbox.close("discard")
    if result.fault == "host":
        raise HostFaultError(result.reason)


def _record(item: pytest.Item) -> _Record:
    return item.stash.setdefault(_RECORD, _Record())


def _marked(item: pytest.Item) -> dict[str, Any]:
    """Return the options of the markers x07 of a test, its class and its module; the nearest one decides."""
    options: dict[str, Any] = {}
    for mark in reversed(list(item.iter_markers("x07"))):
        if mark.args:
            pytest.fail("The marker x07 takes only keywords, such as x07(timeout_s=10).", pytrace=False)
        options |= mark.kwargs
    return options


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers", "x07(policy=..., timeout_s=..., ...): options of x07_sandbox.run_program for x07_run and x07_sandbox"
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a failed test how its last runs ended, and mark faults of the host."""
    report = yield
    record = item.stash.get(_RECORD, None)
    if record is None or call.when != "call":
        return report
    if call.excinfo is not None and _host_fault(call.excinfo.value, record.sandbox):
        report.outcome = "failed"
        vars(report).pop("wasxfail", None)  # an expected failure is one of the program
        vars(report)["x07_host_fault"] = True  # it survives the way from a worker of pytest-xdist
    if report.failed:
        report.sections += [("x07", _described(ended)) for ended in record.ended]
    return report


def _host_fault(error: BaseException, sandbox: Sandbox | None) -> bool:
    if isinstance(error, HostFaultError):
        return True
    return sandbox is not None and not sandbox.alive and sandbox.close("discard").fault == "host"


def pytest_report_teststatus(report: pytest.CollectReport | pytest.TestReport) -> tuple[str, str, str] | None:
    """Count a fault of the host as an error, not as a failure, of the test."""
    return ("error", "E", "ERROR") if hasattr(report, "x07_host_fault") else None


def _described(ended: Result | Ended) -> str:
    """Return how a run ended, its denials, and its last lines. They are escaped, since programs may write anything."""
    from x07_sandbox.errors import printable

    lines = [f"{ended.outcome}: {ended.reason}"]
    for denial in list(ended.denials)[:_DENIALS]:
        how = denial.how_to_allow
        field = "" if how is None or how.json_path is None else how.json_path.removeprefix("$.")
        advice = f"; to allow it, set {field} in the policy" if field else ""
        lines.append(f"denied: {denial.action} {denial.subject} ({denial.field}{advice})")
    for name, stream in (("stdout", ended.stdout), ("stderr", ended.stderr)):
        data = stream if isinstance(stream, bytes) else stream.data
        last = data.decode(errors="backslashreplace").rstrip("\n").split("\n")[-_LINES:]
        lines += [f"{name}: {line[-_LINE_CHARS:]}" for line in last if data]
    return "\n".join(map(printable, lines))
