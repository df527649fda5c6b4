"""Scaling of time and CPU limits by the slowdown of an emulated VM, if the user (not a policy) asked for it.

The factor is measured once per boot of the host: the same kinds of CPU work, in Python and in C, run in a guest and on
the host, and the median of their slowdowns counts.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from x07_sandbox.errors import BackendError, Command, HostError, SandboxError
from x07_sandbox.host import settings
from x07_sandbox.host.arch import Arch, host_arch
from x07_sandbox.host.linux import processor
from x07_sandbox.host.verdicts import Verdict, file_state
from x07_sandbox.policy.controls import RunLimits, make_plan
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.policy.model import EffectivePolicy
from x07_sandbox.policy.schema import largest
from x07_sandbox.programs.toolchains import OUTPUT
from x07_sandbox.records.runs import new_run_id
from x07_sandbox.sessions.job import run_job
from x07_sandbox.sessions.request import RunCaller, RunRequest, load_program
from x07_sandbox.sessions.result import Scaling
from x07_sandbox.sessions.specs import run_spec
from x07_sandbox.sessions.transfers import RunFolder, output_of

if TYPE_CHECKING:
    from x07_sandbox.sessions.prepare import Prepared

# Prints, for each kind of work, the time of its fastest round in nanoseconds. A round is so short that some rounds are
# not interrupted by other processes of the host. CPU time would not do: a guest counts it in ticks, and with the
# interruptions.
_WORK: Final = b"""#!/usr/bin/python3 -I
import json, re, time, zlib
numbers = [(i * 7919) % 10007 for i in range(500)]
text = json.dumps(numbers)
def integers():
    total = 0
    for number in numbers: total += number * number % 97
def floats():
    total = 0.5
    for number in numbers: total = total * 0.5 + number / (total + 1.0)
def objects():
    found = {}
    for number in numbers: found[number % 50] = found.get(number % 50, 0) + 1
def calls(n=10):
    return n if n < 2 else calls(n - 1) + calls(n - 2)
kinds = [integers, floats, objects, calls]
kinds += [lambda: "".join(sorted(map(str, numbers))), lambda: re.findall("[0-9]+", text)]  # in C, as the next
kinds += [lambda: json.loads(text), lambda: sorted(numbers), lambda: zlib.compress(text.encode(), 6)]
for work in kinds:
    times = []
    for _ in range(200):
        start = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - start)
    print(min(times))
"""
_KINDS: Final = 9
_FACTOR_MAX: Final = 64
_WORK_S: Final = 60
_PRINTED_MAX: Final = 256


def scale(prepared: Prepared, factor: int) -> tuple[Prepared, Scaling, tuple[str, ...]]:
    """Return the run with its time and CPU limits multiplied, the scaled limits, and warnings."""
    limits, scaling, warnings = scaled_limits(prepared.plan.limits, factor)
    return replace(prepared, plan=replace(prepared.plan, limits=limits)), scaling, warnings


def scaled_limits(limits: RunLimits, factor: int) -> tuple[RunLimits, Scaling, tuple[str, ...]]:
    """Return the multiplied limits, the scaling, and warnings. No limit exceeds the largest that a policy can hold."""
    wanted = {field: getattr(limits, field) * factor for field in ("wall_ms", "cpu_ms")}
    given = {field: min(value, largest(f"limits.{field}")) for field, value in wanted.items()}
    warnings = tuple(
        f"limits.{field} was scaled to {given[field] / 1000:g} s, the largest value, instead of {value / 1000:g} s"
        for field, value in wanted.items()
        if given[field] < value
    )
    return replace(limits, **given), Scaling(factor=factor, **given), warnings


def measured_factor(prepared: Prepared) -> int:
    """Return the slowdown of the VM compared to this host. Measure it if it is unknown. Raises SandboxError."""
    if (known := known_factor(prepared.arch)) is not None:
        return known
    prepared.caller.progress("measuring how much slower the emulated VM is than this host")
    ratios = [guest / host for guest, host in zip(_guest_times(prepared), _host_times(), strict=True)]
    factor = min(_FACTOR_MAX, max(1, math.ceil(statistics.median(ratios))))
    _verdict(prepared.arch).write({"factor": factor})
    return factor


def known_factor(arch: Arch | None = None) -> int | None:
    """Return the factor that was measured since this host booted, or None if there is none.

    arch: the guest's architecture, by default this host's.
    """
    with contextlib.suppress(OSError, SandboxError):
        factor = _verdict(arch or host_arch()).read().get("factor")
        if type(factor) is int and 1 <= factor <= _FACTOR_MAX:
            return factor
    return None


def _verdict(arch: Arch) -> Verdict:
    return Verdict("slowdown", file_state(arch.qemu_binary), processor("model name", "CPU part"))


def _guest_times(prepared: Prepared) -> list[float]:
    policy = default_policy()
    caller = RunCaller(cancel=prepared.caller.cancel, progress=prepared.caller.progress)
    with contextlib.ExitStack() as stack:
        request = RunRequest(source=_WORK, toolchain="executable", queue_s=prepared.request.queue_s)
        request, program = load_program(request, caller, stack)
        work = replace(
            prepared,
            request=request,
            caller=caller,
            program=program,
            policy=EffectivePolicy(policy, render_policy(policy), "built-in:default"),
            plan=make_plan(policy, prepared.availability.features),
            stdin_fd=None,
            egress=None,
        )
        folder = RunFolder(new_run_id(), stack)
        stack.callback(shutil.rmtree, folder.path, ignore_errors=True)
        artifact = folder.out_file(OUTPUT, settings.ARTIFACT_MAX_BYTES)
        artifact.complete = artifact.take(program.data)
        end = run_job(work, run_spec(work, artifact, stack), folder)
        stdout = output_of(end.streams[0], end.fds[0])
    caller.cancel.check()
    if end.ending.outcome == "ok" and (found := _printed(stdout.data)) is not None:
        return found
    why = f"the test program ended as {end.ending.outcome}: {end.ending.reason}"
    fix = ("To check this host: ", Command("x07 doctor"))
    raise BackendError("cannot measure the speed of the emulated VM", why, fix)


def _host_times() -> list[float]:
    what, fix = "cannot measure the speed of this host", "Try again"
    argv = [sys.executable, "-I", "-"]
    try:
        done = subprocess.run(argv, input=_WORK, capture_output=True, check=True, timeout=_WORK_S, env={})
    except (OSError, subprocess.SubprocessError) as exc:
        raise HostError(what, f"{sys.executable} did not run the test program: {exc}", fix) from exc
    if (found := _printed(done.stdout)) is None:
        raise HostError(what, f"{sys.executable} printed no times", fix)
    return found


def _printed(output: bytes) -> list[float] | None:
    """Return the printed times, or None for invalid output. A guest's output is hostile data."""
    try:
        times = [float(word) for word in output[:_PRINTED_MAX].split()]
    except ValueError:
        return None
    valid = len(times) == _KINDS and all(0 < value < 1e9 * _WORK_S for value in times)  # also for NaN
    return times if valid else None
