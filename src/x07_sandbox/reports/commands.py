"""The documents of `x07 init`, `policy`, `image`, `pool` and `doctor`, and of an error of any command but `run`."""

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from x07_sandbox.errors import SandboxError
from x07_sandbox.images.store import ProgramRoot
from x07_sandbox.policy.controls import Refusal
from x07_sandbox.policy.denials import Control, HowToAllow
from x07_sandbox.policy.model import PolicyError, Problem
from x07_sandbox.policy.templates import TEMPLATES
from x07_sandbox.programs.project import ROWS, Status

_TOOLCHAINS: Final = sorted([*(row.name for row in ROWS), "x07"])


class Error(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What failed, why, and what to do. code: the kind of error (docs/reference/codes.md)."""

    code: str
    what: str
    why: str
    fix: str


class FailureReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of a command with `--json` that failed. problems: errors in the policy, if they are the cause."""

    schema_version: Literal["x07.sandbox.failure@0.1.0"] = "x07.sandbox.failure@0.1.0"
    ok: Literal[False] = False
    error: Error
    problems: tuple[Problem, ...] = ()


def failure_report(exc: Exception) -> FailureReport:
    """Return the document for an error."""
    if not isinstance(exc, SandboxError):
        bug = Error(code="bug", what="a bug in x07-sandbox", why=f"{type(exc).__name__}: {exc}", fix="Report this bug")
        return FailureReport(error=bug)
    problems = exc.problems if isinstance(exc, PolicyError) else ()
    return FailureReport(error=Error(code=exc.code, what=exc.what, why=exc.why, fix=exc.fix), problems=problems)


class InitReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 init --json`: one line, with its keys in this order.

    out: the name of the file in the project's folder.
    """

    schema_version: Literal["x07.sandbox.init.report@0.1.0"] = "x07.sandbox.init.report@0.1.0"
    toolchain: Annotated[str, Meta(extra_json_schema={"enum": _TOOLCHAINS})]
    project_root: str
    out: str
    status: Status


class PolicyInitReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The report of `x07 policy init`: one line, with its keys in this order.

    out: the policy's path, relative to the project's folder if it is inside that folder.
    """

    schema_version: Literal["x07.policy.init.report@0.1.0"] = "x07.policy.init.report@0.1.0"
    template: Annotated[str, Meta(extra_json_schema={"enum": sorted(TEMPLATES)})]
    project_root: str
    out: str
    status: Status
    policy_id: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]


class BuildReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The image that was built."""

    schema_version: Literal["x07.sandbox.image.build@0.1.0"] = "x07.sandbox.image.build@0.1.0"
    name: str
    digest: str


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The image that was loaded, and the container engines that have it now.

    digest: the image id in the engines. image: the digest in `x07 image list`. archive: the file written, or null.
    """

    schema_version: Literal["x07.sandbox.image.load@0.1.0"] = "x07.sandbox.image.load@0.1.0"
    reference: str
    digest: str
    image: str
    engines: tuple[str, ...]
    archive: str | None


class ImageRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One image.

    name: empty if the image has no name.
    suite: the Debian suite of its packages; null if its manifest cannot be read.
    arch: its architecture, as uname -m prints it; null as above.
    include: Debian packages beyond the usual ones (`--include`).
    pip: Python packages that were installed from wheels, as "NAME==VERSION".
    program: what a container image says about its programs, if the image was imported; else null.
    current: whether this version of x07 built the image.
    problem, fix: null if the image can be used.
    bytes: the disk space of the files that only this image has. saved_bytes: that of its saved VMs.
    """

    name: str
    digest: str
    suite: str | None
    arch: str | None
    include: tuple[str, ...]
    pip: tuple[str, ...]
    program: ProgramRoot | None
    current: bool
    problem: str | None
    fix: str | None
    bytes: int = 0
    saved_bytes: int = 0


class ListReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The images of this user. bytes: the disk space of all images and saved VMs, with the files that images share."""

    schema_version: Literal["x07.sandbox.image.list@0.1.0"] = "x07.sandbox.image.list@0.1.0"
    images: tuple[ImageRow, ...]
    bytes: int


class PresetRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A preset. include: Debian packages. pip: Python packages. preload: modules that are imported beforehand."""

    name: str
    about: str
    include: tuple[str, ...]
    pip: tuple[str, ...]
    preload: tuple[str, ...]


class PresetsReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The presets of `x07 image build`."""

    schema_version: Literal["x07.sandbox.image.presets@0.1.0"] = "x07.sandbox.image.presets@0.1.0"
    presets: tuple[PresetRow, ...]


class RemovedName(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A removed name, and the digest of the image that had this name."""

    name: str
    digest: str


class RemoveReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The removed images. bytes: freed disk space. kept: files that could not be removed, each with the reason."""

    schema_version: Literal["x07.sandbox.image.rm@0.1.0"] = "x07.sandbox.image.rm@0.1.0"
    images: tuple[RemovedName, ...]
    bytes: int
    kept: tuple[str, ...]


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether an image matches its manifest. problems: the differences as sentences. fix: null if the image is good."""

    schema_version: Literal["x07.sandbox.image.verify@0.1.0"] = "x07.sandbox.image.verify@0.1.0"
    digest: str
    good: bool
    problems: tuple[str, ...]
    fix: str | None


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The status that the pool reports.

    front: pid of the process that carries out command lines, or null if there is none.
    size: how many VMs should be ready.
    ready, running: how many VMs are ready and how many run a program now.
    claimed: how many VMs have been used since the pool started.
    image: digest of the image.
    idle_s: the pool ends after this many seconds without use.
    unused_s: seconds since the last use.
    problem: why no VM can be started now, or null.
    """

    pid: int
    front: int | None
    size: int
    ready: int
    running: int
    claimed: int
    image: str
    idle_s: float
    unused_s: float
    problem: str | None


class PoolReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 pool ACTION --json`. pool: null if no pool is running."""

    schema_version: Literal["x07.sandbox.pool@0.1.0"] = "x07.sandbox.pool@0.1.0"
    pool: PoolStatus | None


class CheckedFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of checking one policy.

    file: the path or name that the user gave. policy_id, digest: only for a valid policy. problems, text: the errors.
    """

    file: str
    status: Literal["valid", "invalid", "unreadable"]
    policy_id: str | UnsetType = UNSET
    digest: str | UnsetType = UNSET
    problems: tuple[Problem, ...] | UnsetType = UNSET
    text: str | UnsetType = UNSET


class CheckReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The results for all policies, in the order in which the user gave them. ok: whether all policies are valid."""

    schema_version: Literal["x07.sandbox.policy.check@0.1.0"] = "x07.sandbox.policy.check@0.1.0"
    ok: bool
    files: tuple[CheckedFile, ...]


class HostReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether a connection is allowed.

    policy: the path or name that the user gave. host: the host in its normal form.
    rule: the rule that decides, such as `net.allow_hosts[2]` or `deny-floor:private`.
    how_to_allow: null if the connection is allowed or nothing can allow it.
    resolved_later: whether the addresses of the host are checked when a program connects.
    """

    schema_version: Literal["x07.sandbox.policy.host@0.1.0"] = "x07.sandbox.policy.host@0.1.0"
    policy: str
    policy_id: str
    host: str
    port: int
    transport: Literal["tcp", "udp"]
    allowed: bool
    rule: str
    reason: str
    how_to_allow: HowToAllow | None
    resolved_later: bool


class ExplainedControl(Control, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One field of the policy, its value, and what enforces it.

    in_sandbox: with --sandbox, what the field means in a sandbox, if that differs from a run; else empty.
    """

    value: Any
    in_sandbox: str = ""


IN_SANDBOX: Final = {
    "limits.wall_ms": "of each command, if you name the policy",
    "limits.cpu_ms": "of each command, if you name the policy",
    "limits.mem_bytes": "of all commands together",
    "limits.procs": "of all commands together",
    "limits.fds": "of each process of each command",
    "fs.read_roots": "copied in when the sandbox is opened",
    "fs.write_roots": "copied in when the sandbox is opened, and changes come back when it is closed",
    "net.allow_hosts": "for all commands, until the sandbox ends",
}
"""What policy fields mean in a sandbox, where that differs from a run."""


class NeverReached(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry of net.allow_hosts that is blocked completely or in part. field: the entry's path in the policy."""

    field: str
    host: str
    why: str


class ExplainReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The plan of a run.

    policy: the path or name that the user gave. carried_out: whether a run would start.
    isolation: classes of isolation that the backend may provide, best first.
    filters: names of the image's seccomp filters that would apply.
    never_reached: allowed hosts that the egress gate blocks unless the user's settings allow them.
    """

    schema_version: Literal["x07.sandbox.policy.explain@0.1.0"] = "x07.sandbox.policy.explain@0.1.0"
    policy: str
    policy_id: str
    digest: str
    backend: str
    isolation: tuple[str, ...]
    toolchain: str | None
    carried_out: bool
    filters: tuple[str, ...]
    controls: tuple[ExplainedControl, ...]
    refusals: tuple[Refusal, ...]
    never_reached: tuple[NeverReached, ...] = ()


State = Literal["proven", "untried", "failed", "not-here"]


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of one check.

    code: the kind of finding, or of the error that was found (docs/reference/codes.md).
    good: null if it is neither good nor bad. fix: empty if nothing needs to be fixed.
    """

    code: str
    subject: str
    good: bool | None
    text: str
    fix: str = ""


class Look(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One prerequisite on this host.

    good: null if the prerequisite is missing but optional.
    """

    what: str
    good: bool | None
    text: str


class BackendState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One backend on this host.

    state: "proven" (it has started a VM here), "untried" (its prerequisites are met), "failed" or
    "not-here" (not for this platform).
    needs_acceptance: whether its isolation is weaker than that of a virtual machine.
    looks: its prerequisites.
    remedies: what to do; empty if the state is "proven" or "untried".
    """

    name: str
    sandbox_backend: str
    isolation: tuple[str, ...]
    needs_acceptance: bool
    state: State
    text: str
    looks: tuple[Look, ...]
    remedies: tuple[str, ...]


class DoctorReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 doctor --json`. good: whether no finding is bad; the exit code is then 0, else 1."""

    schema_version: Literal["x07.sandbox.doctor@0.1.0"] = "x07.sandbox.doctor@0.1.0"
    good: bool
    findings: tuple[Finding, ...]
    backends: tuple[BackendState, ...]
