"""The plan of a job: one control for every field of the policy, and either limits to run with or refusals.

Pure: policy, backend features and settings in; nothing is looked up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.errors import RefusedError
from x07_sandbox.plan.control_table import TABLE, Asked, State
from x07_sandbox.plan.denials import HowToAllow
from x07_sandbox.plan.sizes import guest_limits, ram_class_bytes
from x07_sandbox.policy.environment import VARIABLES, program_environment
from x07_sandbox.policy.model import Limits, leaf_values

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from x07_sandbox.plan.features import Features
    from x07_sandbox.policy.model import Policy

# Linux refuses to start a program with one longer variable (MAX_ARG_STRLEN: 32 pages, name, '=' and NUL included).
VARIABLE_MAX_BYTES: Final = 131_072
# Those of x07 run that add to a field.
_FLAGS: Final = {
    "fs.read_roots": ("--allow-read-root",),
    "fs.write_roots": ("--allow-write-root",),
    "net.allow_hosts": ("--allow-host", "--allow-host-file"),
}


class Control(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One field in the plan.

    field: its path, like "limits.wall_ms".
    by: who holds it; for advisory fields who is told.
    """

    field: str
    state: State
    by: str
    why: str


class Refusal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a policy cannot be carried out here. field: its path, like "fs.read_roots"."""

    field: str
    why: str
    how_to_allow: HowToAllow


class RunLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the run job is held to: the policy's limits, and the machine's RAM that follows from them."""

    wall_ms: int
    cpu_ms: int
    mem_bytes: int
    fds: int
    procs: int
    core_dumps: bool
    ram_bytes: int
    max_live: int | None = None  # where it is less than procs, and children are allowed

    @property
    def tasks(self) -> int:
        """Most processes and threads together, the program's first thread among them."""
        return (self.procs if self.max_live is None else self.max_live) + 1

    def of_policy(self) -> Limits:
        """The same as a policy says them."""
        return Limits(
            cpu_ms=self.cpu_ms,
            wall_ms=self.wall_ms,
            mem_bytes=self.mem_bytes,
            fds=self.fds,
            procs=self.procs,
            core_dumps=self.core_dumps,
        )

    def for_guest(self) -> dict[str, int]:
        """What START carries as `limits`. procs counts tasks beyond the program's first thread."""
        return guest_limits(
            mem_bytes=self.mem_bytes, tasks=self.tasks, cpu_ms=self.cpu_ms, fds=self.fds, core_dumps=self.core_dumps
        )


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answer: it may be carried out only if there are no refusals."""

    controls: tuple[Control, ...]
    refusals: tuple[Refusal, ...]
    limits: RunLimits

    def require(self, given: Collection[str] = ()) -> None:
        """Raise RefusedError, naming every refusal, if there is one. given: the flags that changed the policy."""
        if self.refusals:
            why = "; ".join(refusal.why for refusal in self.refusals)
            fields = dict.fromkeys(refusal.field for refusal in self.refusals)
            changed = dict.fromkeys(str(refusal.how_to_allow.json_path)[2:] for refusal in self.refusals)
            fix = f"Change {', '.join(changed)} in the policy"
            if flags := [flag for field in fields for flag in _FLAGS.get(field, ()) if flag in given]:
                fix += f", or leave out {', '.join(flags)}"
            raise RefusedError("the policy cannot be carried out", why, fix)


def make_plan(policy: Policy, features: Features, *, cpu_ms: int | None = None) -> Plan:
    """The plan for *policy* on a backend with *features*. cpu_ms: a tighter limit than the policy's, from elsewhere."""
    asked = Asked(policy=policy, values=leaf_values(policy), features=features)
    answers = {field: TABLE[field](asked, field) for field in asked.values}
    controls = tuple(Control(field=field, state=to.state, by=to.by, why=to.why) for field, to in answers.items())
    return Plan(
        controls=controls, refusals=(*_refusals(controls, asked), *_too_long(policy)), limits=run_limits(policy, cpu_ms)
    )


def run_limits(policy: Policy, cpu_ms: int | None = None) -> RunLimits:
    """What *policy* holds a run to. cpu_ms: as in make_plan."""
    limits, process = policy.limits, policy.process
    if cpu_ms is not None:
        limits = msgspec.structs.replace(limits, cpu_ms=min(limits.cpu_ms, cpu_ms))
    return RunLimits(
        **msgspec.structs.asdict(limits),
        ram_bytes=ram_class_bytes(limits.mem_bytes),
        max_live=process.max_live if process.may_spawn and process.max_live < limits.procs else None,
    )


def _refusals(controls: tuple[Control, ...], asked: Asked) -> Iterator[Refusal]:
    for control in controls:
        if control.state == "refused":
            value = asked.values[control.field]
            # Of a number nothing is to be dropped: another backend must hold it.
            without: object = [] if isinstance(value, tuple) else not value if isinstance(value, bool) else value
            instead = TABLE[control.field](asked, control.field).instead
            field, value = (control.field, without) if instead is None else instead
            how = HowToAllow(json_path=f"$.{field}", value=value)
            yield Refusal(field=control.field, why=f"{control.why}: {control.field}", how_to_allow=how)


def _too_long(policy: Policy) -> Iterator[Refusal]:
    environment = program_environment(policy)
    for variable, field in VARIABLES:
        size = len(variable) + len(environment[variable].encode()) + 2
        if size > VARIABLE_MAX_BYTES:
            why = f"{field} makes {variable} {size} bytes long, and Linux takes at most {VARIABLE_MAX_BYTES}"
            yield Refusal(field=field, why=why, how_to_allow=HowToAllow(json_path=f"$.{field}", value=[]))
