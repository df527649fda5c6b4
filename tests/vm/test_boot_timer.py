"""Kernels that measured their timer wrong while booting, as on a host that paused the virtual CPU."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.backends.base import MachineKind
from x07_sandbox.backends.qemu import machine as machines
from x07_sandbox.backends.qemu.backend import known_verdict
from x07_sandbox.backends.qemu.saved import Template
from x07_sandbox.backends.qemu.template import make_template, template_for
from x07_sandbox.cli.main import main
from x07_sandbox.errors import BackendError
from x07_sandbox.host import settings
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.waiting import Deadline
from x07_sandbox.images.verify import open_image
from x07_sandbox.library.warm import WarmMachines

if TYPE_CHECKING:
    from pathlib import Path

    from tests.vm.conftest import Sandbox
    from x07_sandbox.backends.qemu.machine import Machine
    from x07_sandbox.images.store import Image

Boots = Callable[..., list[str]]
# What a kernel is told, and the effect. A wrong speed of the TSC, against which the timer is measured, has the same
# effect as losing the processor at that moment.
NONE, LATE, EARLY = "nolapic_timer", "too late", "too early"
# The minimum of several: a pause of the host lengthens one, and so does a late timer.
SLEEP = """
import time
def slept():
    began = time.monotonic()
    time.sleep(0.5)
    return time.monotonic() - began
print(min(slept() for _ in range(4)))
"""

pytestmark = pytest.mark.skipif(
    host_arch().machine != "microvm" or (verdict := known_verdict()) is None or verdict.works,
    reason="only an emulated x86 processor has a timer that the kernel measures",
)


@pytest.fixture
def boots(monkeypatch: pytest.MonkeyPatch) -> Boots:
    """Have the machines booted from here on measure wrong, one word each; collect the words of each that booted."""
    real = machines.kernel_command_line

    def begin(*wrong: str) -> list[str]:
        seen: list[str] = []

        def words(machine: Machine) -> str:
            line = real(machine)
            if not machine.mark or machine.origin is machines.Origin.CLONE:
                return line
            how = wrong[len(seen)] if len(seen) < len(wrong) else ""
            khz = machine.tsc_khz or 0
            factor = {LATE: 2, EARLY: 0.1}.get(how, 1)  # so early that no pause makes up for it
            line = line.replace(f"tsc_early_khz={khz}", f"tsc_early_khz={int(khz * factor)}")
            seen.append(f"{line} {how}" if how == NONE else line)
            return seen[-1]

        monkeypatch.setattr(machines, "kernel_command_line", words)
        return seen

    return begin


def test_a_machine_with_a_wrong_timer_is_booted_again(
    sandbox: Sandbox, boots: Boots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel whose timer is missing, late or far too early runs nothing: another one is booted."""
    assert sandbox.run_text("sleep.py", SLEEP, cache=True).outcome == "ok"  # it is built
    monkeypatch.setattr(Template, "suspended", lambda _template: "it is not to be used")
    booted = boots(NONE, LATE, EARLY)
    ran = sandbox.run_text("sleep.py", SLEEP, cache=True)
    assert ran.outcome == "ok", ran.reason
    assert len([text for text in ran.result.warnings if "it is not to be used" in text]) == 1
    assert 0.5 <= float(ran.stdout) < 0.6
    assert [("x07.timer=any" in words) for words in booted] == [False, False, False, True]
    assert ran.result.phases["run"].times_ms["hello"] < 1000 * settings.BOOT_S
    assert [text for text in ran.result.warnings if "timers in the run VM may run late" in text]


@pytest.mark.full("two more cold boots")
def test_the_reason_for_cold_starts_is_reported_once(
    sandbox: Sandbox, boots: Boots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no machine can be saved and the first boot fails, the result says so once."""
    booted = boots(NONE)
    words = machines.kernel_command_line
    monkeypatch.setattr(machines, "kernel_command_line", lambda machine: f"{words(machine)} x07.test=1")  # not saved
    monkeypatch.setattr(settings, "TEMPLATE_BYTES", 1 << 62)
    ran = sandbox.behave("nothing")
    assert (ran.outcome, len(booted) >= 2) == ("ok", True), ran.reason  # a busy host can have one more boot
    assert len([text for text in ran.result.warnings if "booted without a saved VM" in text]) == 1


def test_a_host_without_a_timer_is_refused(sandbox: Sandbox, boots: Boots) -> None:
    """If no booted kernel finds a timer, the run is refused within seconds with that reason."""
    booted = boots(*[NONE] * (settings.BOOTS_MAX + 1))
    ran = sandbox.behave("nothing", cold=True)
    assert ran.outcome == "refused"
    assert len(booted) - settings.BOOTS_MAX in {0, 1}  # a busy host can have one more boot
    assert "its kernel calibrated its timer wrong" in ran.reason
    assert ran.reason.endswith("; try again when the host is less busy")
    assert ran.seconds < settings.BOOTS_MAX * settings.BOOT_S


@pytest.mark.full("boots machines until one is right")
def test_a_pool_accepts_a_wrong_timer_only_on_the_last_attempt(
    image: Image, state: Path, boots: Boots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool that must boot machines accepts a wrong timer only on the last attempt, and gives up after it."""
    del image, state
    with contextlib.closing(WarmMachines(1)) as first:  # the program is built, by saved machines
        first.start()
        assert first.wait_ready(Deadline.after(120))
    monkeypatch.setattr(Template, "suspended", lambda _template: "it is not to be used")
    booted = boots(NONE, LATE, EARLY)
    with contextlib.closing(WarmMachines(1)) as warmed:
        warmed.start()
        assert warmed.wait_ready(Deadline.after(120))
    assert ["x07.timer=any" in words for words in booted[:4]] == [False, False, False, True]
    boots(*[NONE] * 100)
    with contextlib.closing(WarmMachines(1)) as hopeless:
        hopeless.start()
        with pytest.raises(BackendError, match="its kernel calibrated its timer wrong"):
            hopeless.wait_ready(Deadline.after(120))


@pytest.mark.full("more cold boots")
def test_the_doctor_reports_a_host_without_a_timer(
    state: Path, boots: Boots, capsys: pytest.CaptureFixture[str]
) -> None:
    """If no booted kernel finds a timer, the doctor reports it with advice."""
    booted = boots(*[NONE] * settings.BOOTS_MAX)
    assert main(["doctor", "--json"]) == 1
    findings = {found["subject"]: found for found in json.loads(capsys.readouterr().out)["findings"]}
    started = findings["VM start"]
    assert (started["good"], len(booted)) == (False, settings.BOOTS_MAX)
    assert "its kernel calibrated its timer wrong" in started["text"]
    assert "try again when the host is less busy" in started["text"]
    assert all((path.parent / "done").is_file() for path in state.glob("*/job.json"))


@pytest.mark.full("four more cold boots")
def test_no_machine_with_a_wrong_timer_is_saved(
    image: Image, state: Path, tmp_path: Path, boots: Boots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine is saved only from a kernel that measured right or from the last attempt."""
    monkeypatch.setattr(settings, "BOOTS_MAX", 2)
    with open_image(image) as opened:
        kind = MachineKind(image=opened, ram_bytes=512 * settings.MIB)
        template = template_for(kind, kvm=False)
        booted = boots(LATE)
        (tmp_path / "good").mkdir()
        made = make_template(template, kind, tmp_path / "good", kvm=False)
        assert (len(booted), made.key) == (2, template.key)
        booted = boots(NONE, NONE)
        (tmp_path / "bad").mkdir()
        began = time.monotonic()
        with pytest.raises(BackendError, match="the timer was measured wrong"):
            make_template(template, kind, tmp_path / "bad", kvm=False)
        assert (len(booted), time.monotonic() - began < 2 * settings.TEMPLATE_S) == (2, True)
    assert [path for path in state.glob("*/job.json") if not (path.parent / "done").is_file()] == []
