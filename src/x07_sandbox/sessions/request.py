"""The request for a run, and its program. Each file is read only once, so its digest is right."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from x07_sandbox.channel.messages import IN, PROJECT_FOLDER
from x07_sandbox.errors import Flag, RefusedError, Text, UsageError, listed
from x07_sandbox.host import settings
from x07_sandbox.host.documents import encodable
from x07_sandbox.host.paths import is_folder, read_bounded
from x07_sandbox.host.waiting import Caller
from x07_sandbox.policy.decode import MAX_BYTES, decode_policy, default_policy, render_policy
from x07_sandbox.policy.decode import MAX_BYTES as POLICY_MAX_BYTES
from x07_sandbox.policy.model import EffectivePolicy, Policy
from x07_sandbox.programs.toolchains import (
    Protocol,
    Source,
    Toolchain,
    check_executable,
    source_name,
    toolchain_for,
    toolchain_named,
)
from x07_sandbox.sessions.result import ChangesChoice
from x07_sandbox.sessions.transfers import InFile, OutFile, memory_file, read_all

if TYPE_CHECKING:
    from x07_sandbox.backends.base import MachineSource
    from x07_sandbox.backends.registry import Choice
    from x07_sandbox.options import Option
    from x07_sandbox.policy.changes import FlagReach, LimitChanges, Overrides

    Loader = Callable[["RunRequest", "RunCaller", Path, contextlib.ExitStack], tuple["RunRequest", "Program"] | None]
    from x07_sandbox.files.pack import Packed
    from x07_sandbox.programs.project import ProjectFolder
else:
    LimitChanges = Overrides = object  # msgspec reads annotations; their modules are loaded where needed

# MAX_ARG_STRLEN is 32 pages, NUL included. All arguments and the environment, with their pointers, share a quarter of
# the 8 MiB stack; we allow three quarters of that.
_ARGUMENT_MAX_BYTES = 131_072
ARGUMENTS_MAX_BYTES = 3 << 19
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")


class ProjectPolicy(msgspec.Struct, frozen=True):
    """A project's own policy. It may grant nothing outside *base*, the real path of the project's folder."""

    path: Path
    data: bytes
    base: str

    def __str__(self) -> str:
        return str(self.path)


class RunRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for in one run. The table in x07_sandbox/options describes the fields of options.

    command: a command installed in the image, instead of a program.
    source: source text, instead of a program.
    policy: a path, `built-in:TEMPLATE` or a policy; None stands for the project's policy, else for the default one.
    overrides, limits: changes to the policy.
    scale_limits: whether to scale limits (sessions/scaling); None follows the user's settings.
    input: the program's input, or the path of a file with it; None stands for the project's input, else the caller's.
    stdin: whether the caller's standard input replaces the project's input.
    max_files_bytes: limit for `Result.files`; 0 to collect no files.
    executable: whether the built program is saved.
    cache: whether a program that was built before is not built again.
    queue_s: how long each VM may wait for its start, in seconds.
    """

    program: Path | None = None
    command: tuple[str, ...] = ()
    source: bytes | None = None
    toolchain: str | None = None
    files: Mapping[str, bytes] = {}
    workdir: Path | None = None
    read_only: bool = False
    max_files_bytes: int = 0
    args: tuple[str, ...] = ()
    policy: str | Path | Policy | ProjectPolicy | None = None
    overrides: Overrides | None = None
    limits: LimitChanges | None = None
    build_wall_ms: int | None = None
    scale_limits: bool | None = None
    image: str | None = None
    ca: Path | None = None
    env: Mapping[str, str] = {}
    input: Path | bytes | None = None
    stdin: bool = False
    raw: bool = False
    max_output_bytes: int | None = None
    executable: bool = False
    cold: bool = False
    cache: bool = True
    queue_s: float = settings.QUEUE_S
    require_hardware: bool = False
    guest_root: bool = False
    profile: str | None = None
    changes: ChangesChoice = "apply"
    out: Path | None = None
    git: bool = False
    allow_protected: tuple[str, ...] = ()
    hide: tuple[str, ...] = ()
    reveal: tuple[str, ...] = ()


def make_request(given: Iterable[tuple[Option, Any]], **fields: Any) -> RunRequest:  # noqa: ANN401 - of many types
    """Return the request that *given* options describe, which have a value other than None. fields: of the request."""
    parts: dict[str, dict[str, Any]] = {"": {}, "limits": {}, "overrides": {}}
    for row, value in given:
        part, _, field = row.sets.rpartition(".")
        parts[part][field] = value
    asked = parts[""]
    if limits := parts["limits"]:
        from x07_sandbox.policy.changes import LimitChanges  # few requests change the policy

        asked["limits"] = LimitChanges(**limits)
    if any((overrides := parts["overrides"]).values()):
        from x07_sandbox.policy.changes import Overrides

        asked["overrides"] = Overrides(**overrides)
    return RunRequest(**(asked | fields))


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """A program that was read.

    data: the source's bytes; a tree for a project.
    file: the same bytes as a file for the build VM.
    project: whether the program has a manifest.
    lockfile: name of the lock file of an X07 project.
    cpu_ms: CPU time limit from the program's own options.
    input_fd: the input for a request that has none: that of the project, else that of the caller.
    read: the program's files on the host, which the run must not overwrite.
    """

    toolchain: Toolchain
    source: Source
    data: bytes
    file: InFile
    sha256: str
    project: bool = False
    lockfile: str | None = None
    cpu_ms: int | None = None
    input_fd: int | None = None
    read: tuple[Path, ...] = ()


class RunCaller(Caller, frozen=True, kw_only=True):
    """The caller of a run: what it provides besides the request. It owns the descriptors.

    choice: the backend; None stands for the one that the environment selects.
    loaders: readers of special programs; each returns None for a program of another kind.
    machines: the source of ready VMs.
    stdin_fd: the standard input for programs without another input.
    live_stdout, live_stderr: where the program's output goes while it runs.
    artifact: the file for the built program; a complete file is not built again.
    image_digest: the only guest image that may be used; None for any.
    program, policy: those of the request, if the caller has read them.
    word: returns the name of an option, for the reader of the result (`errors.worded`).
    """

    choice: Choice | None = None
    loaders: tuple[Loader, ...] = ()
    machines: MachineSource | None = None
    stdin_fd: int | None = None
    live_stdout: int | None = None
    live_stderr: int | None = None
    artifact: OutFile | None = None
    image_digest: str | None = None
    program: Program | None = None
    policy: EffectivePolicy | None = None
    word: Callable[[Flag], str] = str


def check_arguments(request: RunRequest) -> None:
    """Raise UsageError for arguments and variables that execve(2) would reject."""
    name = request.command[0] if request.command else "make"
    if not isinstance(name, str) or not name or "\0" in name:
        why = "its name is empty, contains a NUL byte or is not a string"
        raise UsageError("cannot run the command", why, "Use a name such as make")
    shown = encodable(str(request.program or "".join(request.command[:1]) or "the source"))
    what = f"cannot run {shown} with these arguments"
    total = 0
    for number, arg in enumerate((*request.command, *request.args), start=0 if request.command else 1):
        if not isinstance(arg, str):
            raise UsageError(what, f"argument {number} is not a string", "Pass strings")
        size = len(encoded(arg, what, f"argument {number}")) + 1
        total += size
        if "\0" in arg:
            raise UsageError(what, f"argument {number} contains a NUL byte", "Pass such data on standard input")
        if size > _ARGUMENT_MAX_BYTES or total > ARGUMENTS_MAX_BYTES:
            why = f"one is over {_ARGUMENT_MAX_BYTES} bytes, or all together are over {ARGUMENTS_MAX_BYTES} bytes"
            raise UsageError(what, why, "Pass long data on standard input")
    _check_environment(request, total)


def encoded(text: str, what: Text, which: str) -> bytes:
    """Return the bytes of a text for system calls. Raises UsageError for a surrogate that stands for no byte."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        raise UsageError(what, f"{which} contains a lone surrogate", "Pass text or os.fsdecode(BYTES)") from None


def _check_environment(request: RunRequest, total: int) -> None:
    for name, value in request.env.items():
        what = ("cannot use ", Flag("--env"), f" {name!r}")
        if not name:
            what = ("cannot use ", Flag("--env"), f" {f'={value}'!r}")
            raise UsageError(what, "the variable name is empty", "Add a name before '='")
        if not isinstance(value, str):
            raise UsageError(what, f"the value is {type(value).__name__}, not a string", "Pass strings")
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise UsageError(what, "it is not a valid variable name", "Use letters, digits and '_'")
        if name.startswith("X07_"):
            raise UsageError(what, "names that start with X07_ are reserved", "Use another name")
        total += len(name) + len(encoded(value, what, "the value")) + 2
        if "\0" in value or total > ARGUMENTS_MAX_BYTES or len(value) > _ARGUMENT_MAX_BYTES - len(name) - 2:
            why = "the value is too long or contains a NUL byte"
            raise UsageError(what, why, "Pass the value on standard input")


def is_built_in(given: str | Path | Policy | ProjectPolicy | None) -> bool:
    """Return whether the value selects a built-in policy, which flags may change freely."""
    return given is None or (isinstance(given, str) and given.startswith("built-in:"))


def read_policy(given: str | Path | Policy | ProjectPolicy | None) -> tuple[Policy, bytes]:
    """Return a policy and its bytes. given: as in `RunRequest`; None means the default policy. Raises SandboxError."""
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
        fix = "Correct the values of the policy"
        raise UsageError("cannot use the policy", f"it cannot be encoded ({exc})", fix) from exc
    return decode_policy(data, source=str(given.policy_id)), data


def _policy_file(given: str | Path) -> bytes:
    if given == "":  # from an unset shell variable
        raise UsageError("cannot read the policy", "the path is empty", "Use the path of a policy file")
    try:
        return read_bounded(Path(given), "policy", MAX_BYTES)
    except UsageError as exc:
        from x07_sandbox.policy.templates import BUILT_IN, TEMPLATES

        if not isinstance(given, str) or given not in TEMPLATES:
            raise
        raise UsageError(exc.what, exc.why, f"Use the path of a policy file, or {BUILT_IN}{given}") from exc


def _check_own(policy: Policy, given: ProjectPolicy) -> None:
    """Raise RefusedError if a project's own policy asks for network access or for folders outside the project."""
    what = "cannot use the project's own policy"
    by_name = ("Read the policy. To accept it, add ", Flag(f"--policy {given.path.absolute()}"))
    if policy.may_connect:
        raise RefusedError(what, f"{given} asks for network access", by_name, code="own-policy")
    for root in (*policy.fs.read_roots, *policy.fs.write_roots) if policy.fs.enabled else ():
        if root.startswith("/") and not f"{os.path.normpath(root)}/".startswith(f"{given.base.rstrip('/')}/"):
            why = f"{given} asks for {root[:256]}, which is outside the project"
            raise RefusedError(what, why, by_name, code="own-policy")


def effective_policy_of(request: RunRequest) -> EffectivePolicy:
    """Return the policy with all changes of the request applied. Raises UsageError, PolicyError, RefusedError."""
    return with_limits(derived_policy(request, gate=True), request.limits)


def derived_policy(request: RunRequest, *, gate: bool) -> EffectivePolicy:
    """Return the policy with the grants of the request. gate: see `derive_policy`.

    Raises UsageError, PolicyError, RefusedError.
    """
    policy, data = read_policy(request.policy)
    base, built_in = name_of_policy(request.policy), is_built_in(request.policy)
    if request.overrides is None:
        return EffectivePolicy(policy, data, base, may_raise=built_in)
    from x07_sandbox.policy.changes import derive_policy

    return derive_policy(
        policy, data, base, request.overrides, read_spec_file=read_spec_file, may_relax=built_in, gate=gate
    )


def reach_of(found: EffectivePolicy) -> FlagReach:
    """Return how far flags can raise the limits."""
    from x07_sandbox.policy.changes import flag_reach  # few runs need it

    return flag_reach(found.own, found.policy.limits, may_raise=found.may_raise)


def with_limits(found: EffectivePolicy, limits: LimitChanges | None) -> EffectivePolicy:
    """Return a policy with other limits. Raises UsageError."""
    if limits is None:
        return found
    from x07_sandbox.policy.changes import change_limits

    changed = change_limits(found.policy, limits, may_raise=found.may_raise, source=found.base)
    if changed == found.policy:
        return found
    return found._replace(policy=changed, data=render_policy(changed), own=found.policy.limits)


def name_of_policy(given: str | Path | Policy | ProjectPolicy | None) -> str:
    """Return the name of a policy for messages and results: its path, `built-in:TEMPLATE` or id."""
    if isinstance(given, Policy):
        return given.policy_id
    return "built-in:default" if given is None else str(given)


def read_spec_file(name: str) -> bytes:
    """Return the content of a file that lists hosts. Raises UsageError."""
    return read_bounded(Path(name), "list of hosts", MAX_BYTES)


def check_variables(request: RunRequest, policy: Policy) -> None:
    """Raise RefusedError if the request sets variables that the policy forbids."""
    if request.env and not policy.env.enabled:
        why = "env.enabled is false in the policy"
        fix = "Set env.enabled to true in the policy, or remove the variables"
        what = "cannot set variables for the program"
        raise RefusedError(what, why, fix, code="no-variables").caused_by("env.enabled", value=True)
    for name in request.env:
        if name in policy.env.deny_keys:
            why = "env.deny_keys in the policy contains its name"
            fix = "Remove the name from env.deny_keys, or do not set the variable"
            left = [key for key in policy.env.deny_keys if key != name]
            what = f"cannot set the variable {name}"
            raise RefusedError(what, why, fix, code="variable-denied").caused_by("env.deny_keys", left)


def open_input(
    request: RunRequest, other_fd: int | None, stack: contextlib.ExitStack, *, wait: bool = True
) -> int | None:
    """Return a descriptor of the program's input, if any. Raises UsageError.

    other_fd: the input if the request has none. wait: also open a named pipe and wait.
    """
    path = request.input
    if path is None:
        return other_fd
    if isinstance(path, bytes):
        return memory_file(path, stack)
    what = f"cannot read the input {path}"
    fix = "Check the path and its permissions" + ", or use /dev/stdin" * (path == Path("-"))
    try:
        if not wait and stat.S_ISFIFO(path.stat().st_mode):
            return None
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise UsageError(what, exc.strerror or str(exc), fix) from exc
    stack.callback(os.close, fd)
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        raise UsageError(what, "it is a folder", fix)
    return fd


def need_policy(request: RunRequest, protocol: Protocol) -> None:
    """Raise UsageError if *protocol* requires a policy, and the request neither names nor changes a policy."""
    protocol.require_policy(given=request.policy is not None or request.overrides is not None)


def read_whole(fd: int | None, most: int) -> bytes:
    """Return the whole input. Raises UsageError if it is unreadable or has more than *most* bytes."""
    try:
        data = b"" if fd is None else read_all(fd, most)
    except OSError as exc:
        raise UsageError(
            "cannot read the input", exc.strerror or str(exc), ("Use ", Flag("--input"), " with a file")
        ) from exc
    if len(data) > most:
        raise UsageError("cannot read the input", f"it has more than {most} bytes", "Shorten the input")
    return data


def in_memory(data: bytes, path: str, mode: int, stack: contextlib.ExitStack) -> InFile:
    """Return a file for the guest with the content *data*. *stack* closes it."""
    return InFile(path=path, mode=mode, kind="file", fd=memory_file(data, stack), size=len(data))


def sha256_text(data: bytes) -> str:
    """Return the digest of *data* in the form that results use, `sha256:<hex>`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


_HEAD_BYTES = 256


def loaded(request: RunRequest, caller: RunCaller, stack: contextlib.ExitStack) -> tuple[RunRequest, Program | None]:
    """Return the request with the settings of its project, and its program; None for a command of the image."""
    if caller.program is not None or request.command:
        return request, caller.program
    return load_program(request, caller, stack)


def load_program(request: RunRequest, caller: RunCaller, stack: contextlib.ExitStack) -> tuple[RunRequest, Program]:
    """Read the program. Return the request, with the settings of a manifest, and the program. Raises UsageError."""
    request, program = _load(request, caller, stack)
    program.toolchain.start(program.source)  # rejects a script for an unknown shell
    if request.executable and program.toolchain.packs:
        what = f"cannot save the compiled program of {request.program or 'the source'}"
        why = f"the toolchain {program.toolchain.name} makes no executable"
        raise UsageError(what, why, "Remove --compiled-out")
    return request, program if program.input_fd is not None else replace(program, input_fd=caller.stdin_fd)


def _load(request: RunRequest, caller: RunCaller, stack: contextlib.ExitStack) -> tuple[RunRequest, Program]:
    if request.source is not None:
        reject_profile(request, "the source")
        return request, _from_text(request, request.source, stack)
    path = request.program
    if path is None:
        raise UsageError("there is no program to run", "neither a program nor a source is given", "Add a program")
    for loader in caller.loaders:
        if (loaded := loader(request, caller, path, stack)) is not None:
            return loaded
    reject_profile(request, str(path))
    if path.name == "x07-sandbox.toml" or is_folder(path):
        return _from_project(request, caller, path, stack)
    name = source_name(str(path))
    data = read_bounded(path, "program", settings.ARTIFACT_MAX_BYTES)
    head = data[:_HEAD_BYTES]
    toolchain = toolchain_named(request.toolchain) if request.toolchain else toolchain_for(str(path), head)
    if toolchain.build is not None and len(data) > settings.SOURCE_MAX_BYTES:
        why = f"it has more than {settings.SOURCE_MAX_BYTES} bytes"
        raise UsageError(f"cannot run {path}", why, "Use a smaller source file")
    return request, single_file(toolchain, name, data, request, stack)


def reject_profile(request: RunRequest, what: str) -> None:
    """Raise UsageError if --profile is used with a program that has no profiles. what: the program, for the error."""
    if request.profile is not None:
        raise UsageError(f"cannot run {what} with --profile", "only an x07.json has profiles", "Remove --profile")


def reject_overridden_options(request: RunRequest, what: str, why: Text) -> None:
    """Raise UsageError if the request has options that the program's own manifest sets. what, why: for the message."""
    given = [name for name, value in ((Flag("--toolchain"), request.toolchain), ("`files`", request.files)) if value]
    if given:
        raise UsageError(f"cannot run {what}", why, ("Remove ", *listed(given, " and ")))


def toolchain_of_text(name: str | None) -> Toolchain:
    """Return the toolchain for a program that is given as text. Raises UsageError."""
    if not name:
        fix = ("Add ", Flag("--toolchain"), ", such as ", Flag("--toolchain python"))
        raise UsageError("cannot run the source", "its language is unknown", fix)
    return toolchain_named(name)


def _from_text(request: RunRequest, text: bytes, stack: contextlib.ExitStack) -> Program:
    toolchain = toolchain_of_text(request.toolchain)
    if len(text) > settings.SOURCE_MAX_BYTES:
        raise UsageError("cannot run the source", f"it has more than {settings.SOURCE_MAX_BYTES} bytes", "Shorten it")
    return single_file(toolchain, f"main{''.join(toolchain.suffixes[:1])}", text, request, stack)


def single_file(
    toolchain: Toolchain, name: str, data: bytes, request: RunRequest, stack: contextlib.ExitStack
) -> Program:
    """Return a program that consists of one file and the request's other files. Raises UsageError."""
    if toolchain.artifact:
        what = "the source" if request.program is None else name
        why = f"the toolchain {toolchain.name} needs a project"
        raise UsageError(f"cannot run {what}", why, "Use the path of a folder with a manifest")
    if toolchain.build is None:
        from x07_sandbox.images.store import arch_of  # only for executables

        arch = arch_of(request.image)
        check_executable(name, data[:_HEAD_BYTES], arch.name, arch.elf_machine)
    source = Source(name=name, head=data[:_HEAD_BYTES])
    if request.files and toolchain.build is not None:
        from x07_sandbox.files.pack import pack_files

        if name in request.files:
            raise UsageError(f"cannot run {name}", "`files` contains a file of the same name", "Rename that file")
        packed = pack_files({**request.files, name: data}, "the files beside the program")
        return _tree(toolchain, source, packed, stack)
    file = in_memory(data, f"{IN}/{name}", 0o644, stack)
    return Program(toolchain=toolchain, source=source, data=data, file=file, sha256=sha256_text(data))


def _tree(toolchain: Toolchain, source: Source, packed: Packed, stack: contextlib.ExitStack) -> Program:
    source = replace(source, folder=PROJECT_FOLDER, files=tuple(packed.files))
    words = [] if toolchain.build is None else toolchain.build(source)
    if sum(len(os.fsencode(word)) + 1 for word in words) > ARGUMENTS_MAX_BYTES:
        why = f"the names of the project's {len(packed.files)} files do not fit on a command line"
        fix = "List fewer files, or use the toolchain make"
        raise UsageError(f"cannot build the project with {toolchain.name}", why, fix)
    data = packed.tree
    file = replace(in_memory(packed.timed or data, PROJECT_FOLDER, 0o755, stack), kind="tree")
    return Program(toolchain=toolchain, source=source, data=data, file=file, sha256=sha256_text(data))


def _from_project(
    request: RunRequest, caller: RunCaller, path: Path, stack: contextlib.ExitStack
) -> tuple[RunRequest, Program]:
    from x07_sandbox.files.pack import pack_tree
    from x07_sandbox.programs.project import MAX_BYTES, ProjectFolder, decode_manifest, find_manifest

    reject_overridden_options(request, f"the project {path}", "its manifest sets these options")
    place = find_manifest(path)
    assert place is not None  # a folder, or that name
    folder = ProjectFolder(place.parent)
    if place == path:  # the user named it, and may name a link
        data = read_bounded(place, "manifest", MAX_BYTES)
    else:
        data = folder.read(place.name, place.name, MAX_BYTES)
    manifest, toolchain = decode_manifest(data, source=str(place))
    packed = pack_tree(place.parent, manifest.files, check=caller.cancel.check, mtimes=toolchain.artifact)
    entry = manifest.entry or ""
    if entry and entry not in packed.files:
        why = f"its entry {entry} is not one of its files"
        raise UsageError(f"cannot run the project {path}", why, "Add the entry to `files` in the manifest")
    request, input_fd = with_project_files(request, folder, stack, policy=manifest.policy, stdin=manifest.run.input)
    args, env = request.args or manifest.run.args, {**manifest.run.env, **request.env}
    merged = replace(request, args=args, image=request.image or manifest.image, env=env)
    # The manifest's policy and input belong to the project even if a flag replaces them.
    own = (*packed.files, *filter(None, (manifest.policy, manifest.run.input)))
    read = (place, *(place.parent / name for name in own))
    head = packed.files.get(entry, b"")[:_HEAD_BYTES]
    if toolchain.build is None:
        single = single_file(toolchain, source_name(entry), packed.files[entry], request, stack)
        return merged, replace(single, project=True, read=read, input_fd=input_fd)
    source = Source(name=entry, head=head, args=manifest.build.args, artifact=manifest.artifact or "")
    program = _tree(toolchain, source, packed, stack)
    if not entry and toolchain.suffixes and not program.source.with_suffixes(toolchain.suffixes):
        why = f"none of its files ends in {' or '.join(toolchain.suffixes)}"
        raise UsageError(f"cannot run the project {path}", why, "Add source files to `files` in the manifest")
    return merged, replace(program, project=True, read=read, input_fd=input_fd)


def with_project_files(
    request: RunRequest, folder: ProjectFolder, stack: contextlib.ExitStack, *, policy: str | None, stdin: str | None
) -> tuple[RunRequest, int | None]:
    """Return the request with the project's policy, and a descriptor of the project's input. Raises UsageError.

    A policy and an input of the request replace those of the project. policy, stdin: names of files, or None. Opening
    them checks that they are in *folder*. *stack* closes them.
    """
    if request.policy is None and policy is not None:
        data = folder.read(policy, f"its policy {policy}", POLICY_MAX_BYTES)
        request = replace(request, policy=ProjectPolicy(folder.root / policy, data, folder.base))
    if request.input is not None or request.stdin or stdin is None:
        return request, None
    fd = folder.open(stdin, f"its input {stdin}")
    stack.callback(os.close, fd)
    return request, fd
