"""What a run is asked to do, and reading what it names: each once, so that what is digested is what is used."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec
from msgspec.structs import replace

from x07_sandbox.backends.base import Machines
from x07_sandbox.backends.selection import Choice
from x07_sandbox.errors import RefusedError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.cancel import Cancel
from x07_sandbox.host.paths import read_bounded
from x07_sandbox.policy import Policy, decode_policy, default_policy, render_policy
from x07_sandbox.policy.decode import MAX_BYTES
from x07_sandbox.runs.streams import InFile, OutFile, memory_file, read_all

if TYPE_CHECKING:
    import contextlib

    from x07_sandbox.policy.limits import LimitChanges, Reach
    from x07_sandbox.policy.model import Limits
    from x07_sandbox.policy.overrides import Overrides
    from x07_sandbox.programs.protocol import Protocol
    from x07_sandbox.runs.program import Program

    Loader = Callable[["RunRequest", Path, contextlib.ExitStack], tuple["RunRequest", Program] | None]
else:
    LimitChanges = Overrides = Loader = Program = (
        object  # msgspec reads annotations; their modules are loaded where needed
    )

# MAX_ARG_STRLEN: 32 pages, NUL included. All arguments share a quarter of the stack's 8 MiB with the environment.
_ARGUMENT_MAX_BYTES = 131_072
ARGUMENTS_MAX_BYTES = 1 << 20
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")


class ProjectPolicy(msgspec.Struct, frozen=True):
    """A project's own policy, as read with the project. base: the project's real folder; it grants nothing outside."""

    path: Path
    data: bytes
    base: str

    def __str__(self) -> str:
        return str(self.path)


class EffectivePolicy(NamedTuple):
    """The policy that holds for a run.

    base: names what it was made from. denied: ports by host, as `--deny-host` has them; None stands for all ports.
    own: the policy's limits before the request's `limits` changed them; None where they did not.
    may_raise: whether the request may raise limits above the policy's.
    """

    policy: Policy
    data: bytes
    base: str
    denied: Mapping[str, set[int] | None] = MappingProxyType({})
    own: Limits | None = None
    may_raise: bool = False

    def reach(self) -> Reach:
        """How far flags can raise the limits."""
        from x07_sandbox.policy.limits import flag_reach  # for advice, which few runs need

        return flag_reach(self.own, self.policy.limits, may_raise=self.may_raise)


class RunRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for.

    program: path of a source, a project's folder, or its manifest. command: a command of the image and its arguments
    instead. source: a text instead, in the language of
    toolchain, which for a file overrides its name. files: more files beside it, and in its private working folder, by
    relative name. workdir: a folder whose copy it starts in; workdir_read: it cannot be changed.
    max_files_bytes: of what it leaves in its private folders and is handed over as `Result.files`; 0 for none.
    policy: as read_policy takes it; None leaves it to the project. overrides: hosts and roots that flags add or remove;
    override_flags: these flags, for advice. limits: what the caller set of the policy's limits. build_wall_ms: time for
    the build, None for the usual. scale_limits: whether time and CPU limits grow with the slowness of an emulated
    machine (runs/scaling); None leaves it to the user's settings. env: variables besides the fixed ones.
    input: path of the program's input; else stdin_fd, lent; None for none. stdin_default: a project's own input goes
    before stdin_fd. raw: a terminal gets control sequences too. live_*: where output is streamed as it comes, or None.
    max_output_bytes: of each stream; None for the project's limit, else the default.
    artifact: where the built program goes, lent; a complete one is run without a build. executable: it is kept for
    others to run, so it has to be an executable. cold: boot machines instead of cloning saved ones.
    cache: use and keep what was built from the same source. queue_s: how long each machine may wait for others.
    machines: warm ones, or None. choice: the backend, None for the environment's. require_hardware: refuse emulation.
    loaded, effective_policy: the program and the policy, where the caller has read them already.
    profile: of an X07 project, None for its own choice. loaders: read programs of other kinds than our own; each gets
    the path and returns None for what is not of its kind. whole_input: of a program with a protocol, set when read.
    changes: what becomes of the program's changes to files when it has ended by itself. out: a folder for its /x07/out.
    allow_protected: patterns of names that may change (files/protected). hide, reveal: more patterns of names not to
    copy in, and exceptions from them. progress: told of what takes seconds; "" when that is over.
    """

    program: Path | None = None
    command: tuple[str, ...] = ()
    source: bytes | None = None
    toolchain: str | None = None
    files: Mapping[str, bytes] = {}
    workdir: Path | None = None
    workdir_read: bool = False
    max_files_bytes: int = 0
    args: tuple[str, ...] = ()
    policy: str | Path | Policy | ProjectPolicy | None = None
    overrides: Overrides | None = None
    override_flags: tuple[str, ...] = ()
    limits: LimitChanges | None = None
    build_wall_ms: int | None = None
    scale_limits: bool | None = None
    image: str | None = None
    env: Mapping[str, str] = {}
    input: Path | None = None
    stdin_fd: int | None = None
    stdin_default: bool = False
    live_stdout: int | None = None
    live_stderr: int | None = None
    raw: bool = False
    max_output_bytes: int | None = None
    artifact: OutFile | None = None
    executable: bool = False
    cold: bool = False
    cache: bool = True
    queue_s: float = settings.QUEUE_S
    machines: Machines | None = None
    choice: Choice | None = None
    loaded: Program | None = None
    effective_policy: EffectivePolicy | None = None
    require_hardware: bool = False
    profile: str | None = None
    loaders: tuple[Loader, ...] = ()
    whole_input: bytes = b""
    changes: Literal["apply", "all-or-nothing", "keep", "discard"] = "apply"
    out: Path | None = None
    allow_protected: tuple[str, ...] = ()
    hide: tuple[str, ...] = ()
    reveal: tuple[str, ...] = ()
    progress: Callable[[str], None] = lambda _text: None
    cancel: Cancel


def check_arguments(request: RunRequest) -> None:
    """Refuse what no program could be started with (execve(2)), before anything is built. Raises UsageError."""
    what = f"cannot run {request.program or ''.join(request.command[:1]) or 'the source'} with these arguments"
    total = 0
    for number, arg in enumerate((*request.command[:1], *request.args), start=0 if request.command else 1):
        if not isinstance(arg, str):
            raise UsageError(what, f"number {number} is no text", "Give texts")
        size = len(os.fsencode(arg)) + 1
        total += size
        if "\0" in arg:
            raise UsageError(what, f"number {number} holds a zero byte", "Pass such data by standard input")
        if size > _ARGUMENT_MAX_BYTES or total > ARGUMENTS_MAX_BYTES:
            why = f"one has more than {_ARGUMENT_MAX_BYTES} bytes, or all together more than {ARGUMENTS_MAX_BYTES}"
            raise UsageError(what, why, "Pass long data by standard input")
    _check_environment(request, what, total)
    if request.max_output_bytes is not None and request.max_output_bytes < 0:
        raise UsageError(what, f"the output limit of {request.max_output_bytes} bytes is negative", "Give 0 or more")


def _check_environment(request: RunRequest, what: str, total: int) -> None:
    """Check the variables. total: bytes of the arguments, with which they share their room. Raises UsageError."""
    for name, value in request.env.items():
        if not isinstance(value, str):
            raise UsageError(what, f"the variable {name} is {type(value).__name__}, not text", "Give texts")
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise UsageError(what, f"{name!r} is no name of a variable", "Use letters, digits and '_'")
        if name.startswith("X07_"):
            raise UsageError(what, f"{name} is X07's own", "Use another name")
        total += len(name) + len(os.fsencode(value)) + 2
        if "\0" in value or total > ARGUMENTS_MAX_BYTES or len(value) > _ARGUMENT_MAX_BYTES - len(name) - 2:
            why = f"the variable {name} is too long, or holds a zero byte"
            raise UsageError(what, why, "Pass it by standard input")


def is_built_in(given: str | Path | Policy | ProjectPolicy | None) -> bool:
    """Whether read_policy takes one of our own policies, which the user's flags may change freely."""
    return given is None or (isinstance(given, str) and given.startswith("built-in:"))


def read_policy(given: str | Path | Policy | ProjectPolicy | None) -> tuple[Policy, bytes]:
    """A policy and its bytes; None is the default. A text is `built-in:TEMPLATE` or a path. Raises SandboxError."""
    if isinstance(given, str) and given.startswith("built-in:"):
        from x07_sandbox.policy.templates import built_in

        given = built_in(given)
    if isinstance(given, str | Path):
        data = _policy_file(given)
        return decode_policy(data, source=str(given)), data
    if isinstance(given, ProjectPolicy):
        policy = decode_policy(given.data, source=str(given))
        _check_own(policy, given)
        return policy, given.data
    if given is None:
        policy = default_policy()
        return policy, render_policy(policy)
    try:
        data = render_policy(given)
    except (TypeError, ValueError, RecursionError) as exc:
        raise UsageError("cannot use the policy", f"no document can hold it: {exc}", "Correct its values") from exc
    return decode_policy(data, source=str(given.policy_id)), data


def _policy_file(given: str | Path) -> bytes:
    """The bytes of a policy's file. Raises UsageError, which tells a template's mere name with what would name it."""
    if given == "":  # what an unset variable of a shell makes
        raise UsageError("cannot read the policy", "its name is empty", "Name a file")
    try:
        return read_bounded(Path(given), "policy", MAX_BYTES)
    except UsageError as exc:
        from x07_sandbox.policy.templates import BUILT_IN, TEMPLATES

        if not isinstance(given, str) or given not in TEMPLATES:
            raise
        raise UsageError(exc.what, exc.why, f"Name a readable file, or {BUILT_IN}{given}") from exc


def _check_own(policy: Policy, given: ProjectPolicy) -> None:
    """Raise RefusedError where a project's own policy, written by the program's author, grants what is the user's."""
    by_name = f"Read it, and if you grant that, name it yourself: --policy {given.path.absolute()}"
    if policy.net.enabled and policy.net.allow_hosts:
        raise RefusedError("cannot use the project's own policy", f"{given} asks for connections", by_name)
    for root in (*policy.fs.read_roots, *policy.fs.write_roots) if policy.fs.enabled else ():
        if root.startswith("/") and not f"{os.path.normpath(root)}/".startswith(f"{given.base.rstrip('/')}/"):
            why = f"{given} asks for {root[:256]}, which is outside the project"
            raise RefusedError("cannot use the project's own policy", why, by_name)


def effective_policy_of(request: RunRequest) -> EffectivePolicy:
    """The policy with overrides and the caller's limits. Raises UsageError, PolicyError, RefusedError."""
    policy, data = read_policy(request.policy)
    base = name_of_policy(request.policy)
    denied: Mapping[str, set[int] | None] = {}
    if request.overrides is not None:
        from x07_sandbox.policy.overrides import check_grants, derive_policy

        check_grants(policy, request.overrides, built_in=is_built_in(request.policy))
        derived = derive_policy(policy, data, base, request.overrides, read_spec_file=read_spec_file, gate=True)
        policy, data, denied = derived.policy, derived.data, derived.denied
    may_raise = is_built_in(request.policy)
    if request.limits is None:
        return EffectivePolicy(policy, data, base, denied, may_raise=may_raise)
    from x07_sandbox.policy.limits import change_limits

    if request.limits.may_raise is not None:
        may_raise = request.limits.may_raise
    own = policy.limits
    changed = change_limits(policy, request.limits, may_raise=may_raise, source=base)
    if changed == policy:
        return EffectivePolicy(policy, data, base, denied, may_raise=may_raise)
    data = render_policy(changed)
    return EffectivePolicy(decode_policy(data, source="with changed limits"), data, base, denied, own, may_raise)


def name_of_policy(given: str | Path | Policy | ProjectPolicy | None) -> str:
    """What read_policy takes, as a user names it; a value by its id."""
    if isinstance(given, Policy):
        return given.policy_id
    return "built-in:default" if given is None else str(given)


def read_spec_file(name: str) -> bytes:
    """A file of host specs. Raises UsageError."""
    return read_bounded(Path(name), "list of hosts", MAX_BYTES)


def check_variables(request: RunRequest, policy: Policy) -> None:
    """Refuse variables that the policy forbids. Raises RefusedError."""
    if request.env and not policy.env.enabled:
        why = "the policy has env.enabled false"
        fix = "Set env.enabled to true, or leave them out"
        raise RefusedError("the program cannot be given variables", why, fix).by("env.enabled", value=True)
    for name in request.env:
        if name in policy.env.deny_keys:
            why = "the policy's env.deny_keys names it"
            fix = "Take it off the list, or leave it out"
            left = [key for key in policy.env.deny_keys if key != name]
            raise RefusedError(f"the program cannot be given {name}", why, fix).by("env.deny_keys", left)


def open_input(request: RunRequest, stack: contextlib.ExitStack, *, wait: bool = True) -> int | None:
    """The descriptor of the program's input, or None. wait: else a pipe is not opened. Raises UsageError."""
    path = request.input
    if path is None:
        return request.stdin_fd
    what = f"cannot read the input {path}"
    fix = "Name a readable file" + ", or /dev/stdin" * (path == Path("-"))  # as many commands call standard input
    try:
        if not wait and stat.S_ISFIFO(path.stat().st_mode):
            return None
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise UsageError(what, exc.strerror or str(exc), fix) from exc
    stack.callback(os.close, fd)
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise UsageError(what, "it is a folder", fix)
    try:
        if stat.S_ISREG(mode):
            os.pread(fd, 1, 0)  # some can be opened and not be read
    except OSError as exc:
        raise UsageError(what, exc.strerror or str(exc), fix) from exc
    return fd


def need_policy(request: RunRequest, protocol: Protocol) -> None:
    """Raise UsageError if there is no policy and *protocol* needs one. Overrides go on from the built-in one."""
    protocol.require_policy(given=request.policy is not None or request.overrides is not None)


def with_framed_input(request: RunRequest, protocol: Protocol, stack: contextlib.ExitStack) -> RunRequest:
    """The request with its whole input, which goes to the program as *protocol* frames it. Raises UsageError."""
    with request.cancel.waiting():
        data = read_whole(request.stdin_fd, protocol.input_max_bytes)
    return replace(request, whole_input=data, stdin_fd=memory_file(protocol.frame_input(data), stack))


def read_whole(fd: int | None, most: int) -> bytes:
    """All of an input whose length has to be known. Raises UsageError."""
    try:
        data = b"" if fd is None else read_all(fd, most)
    except OSError as exc:
        raise UsageError("cannot read the input", exc.strerror or str(exc), "Name a file with --input") from exc
    if len(data) > most:
        raise UsageError("cannot read the input", f"it has more than {most} bytes", "Give less")
    return data


def in_memory(data: bytes, path: str, mode: int, stack: contextlib.ExitStack) -> InFile:
    """A file for the guest that holds *data*; *stack* closes it."""
    return InFile(path=path, mode=mode, kind="file", fd=memory_file(data, stack), size=len(data))


def sha256_text(data: bytes) -> str:
    """A digest as results show it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
