"""The plan of a job: one control per field of the policy, the effective limits, and refusals. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.errors import Flag, RefusedError, Text, listed
from x07_sandbox.policy.control_table import TABLE, Answer, PlanInput, State
from x07_sandbox.policy.default import VARIABLES, program_environment
from x07_sandbox.policy.denials import HowToAllow
from x07_sandbox.policy.model import Limits, Policy, leaf_values
from x07_sandbox.policy.sizes import command_limits, ram_class_bytes

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import CommandLimits
    from x07_sandbox.policy.features import Features

# MAX_ARG_STRLEN: execve(2) rejects a longer variable, counting name, '=' and NUL.
VARIABLE_MAX_BYTES: Final = 131_072
# Flags of x07 run that add to a field.
_FLAGS: Final = {
    "fs.read_roots": ("--allow-read-root",),
    "fs.write_roots": ("--allow-write-root",),
    "net.allow_hosts": ("--allow-host", "--allow-host-file"),
}


class Control(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the plan handles one field.

    field: the field's path, such as "limits.wall_ms". by: the component that enforces the field, or that gets the value
    of an advisory field.
    """

    field: str
    state: State
    by: str
    why: str


class Refusal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a policy cannot be enforced here. field: the path of the field that is refused, such as "fs.read_roots"."""

    field: str
    why: str
    how_to_allow: HowToAllow


class RunLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of the run job: the policy's limits, and the VM's RAM, which x07 derives from them."""

    ram_bytes: int
    max_live: int | None = None  # if it is less than procs, and children are allowed

    @property
    def tasks(self) -> int:
        """Maximum number of processes and threads, including the program's first thread."""
        return (self.procs if self.max_live is None else self.max_live) + 1

    def of_policy(self) -> Limits:
        """Return the limits in the form that a policy has."""
        return Limits(**{field: getattr(self, field) for field in Limits.__struct_fields__})

    def for_guest(self) -> CommandLimits:
        """Return the limits of the program's command."""
        return command_limits(self, self.tasks)


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The plan of a job, which may start only if the plan contains no refusals."""

    controls: tuple[Control, ...]
    refusals: tuple[Refusal, ...]
    limits: RunLimits

    def require(self, given: Collection[str] = ()) -> None:
        """Raise RefusedError with all refusals, if there are any. given: the flags that changed the policy."""
        if self.refusals:
            why = "; ".join(refusal.why for refusal in self.refusals)
            fields = dict.fromkeys(refusal.field for refusal in self.refusals)
            changed = dict.fromkeys(str(refusal.how_to_allow.json_path)[2:] for refusal in self.refusals)
            fix: Text = f"Change {', '.join(changed)} in the policy"
            if flags := [flag for field in fields for flag in _FLAGS.get(field, ()) if flag in given]:
                named = listed(list(map(Flag, flags)), ", ")
                fix = ("Omit ", *named, f", or change {', '.join(changed)} in the policy")
            raise RefusedError("the policy cannot be enforced", why, fix, code="policy-not-enforced")


def make_plan(policy: Policy, features: Features, *, cpu_ms: int | None = None, proxy_resolves: bool = False) -> Plan:
    """Return the plan for *policy* on a backend with *features*. cpu_ms: an additional limit on CPU time.

    proxy_resolves: whether the user's proxy resolves the names.
    """
    given = PlanInput(policy=policy, values=leaf_values(policy), features=features, proxy_resolves=proxy_resolves)
    answers = {field: TABLE[field](given, field) for field in given.values}
    controls = tuple(Control(field=field, state=to.state, by=to.by, why=to.why) for field, to in answers.items())
    refusals = (*_refusals(answers, given.values), *_too_long(policy))
    return Plan(controls=controls, refusals=refusals, limits=run_limits(policy, cpu_ms))


def run_limits(policy: Policy, cpu_ms: int | None = None) -> RunLimits:
    """Return the limits of a run with *policy*. cpu_ms: an additional limit on CPU time."""
    limits, process = policy.limits, policy.process
    if cpu_ms is not None:
        limits = msgspec.structs.replace(limits, cpu_ms=min(limits.cpu_ms, cpu_ms))
    return RunLimits(
        **msgspec.structs.asdict(limits),
        ram_bytes=ram_class_bytes(limits.mem_bytes),
        max_live=process.max_live if process.may_spawn and process.max_live < limits.procs else None,
    )


def _refusals(answers: Mapping[str, Answer], values: Mapping[str, object]) -> Iterator[Refusal]:
    for field, answer in answers.items():
        if answer.state == "refused":
            value = values[field]
            # A number stays as it is: only another backend can enforce it.
            without: object = [] if isinstance(value, tuple) else not value if isinstance(value, bool) else value
            path, value = (field, without) if answer.instead is None else answer.instead
            how = HowToAllow(json_path=f"$.{path}", value=value)
            yield Refusal(field=field, why=f"{answer.why} ({field})", how_to_allow=how)


def _too_long(policy: Policy) -> Iterator[Refusal]:
    environment = program_environment(policy)
    for variable, field in VARIABLES:
        size = len(variable) + len(environment[variable].encode()) + 2
        if size > VARIABLE_MAX_BYTES:
            why = f"{field} makes {variable} {size} bytes long; Linux allows at most {VARIABLE_MAX_BYTES}"
            yield Refusal(field=field, why=why, how_to_allow=HowToAllow(json_path=f"$.{field}", value=[]))
