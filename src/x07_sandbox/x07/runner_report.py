"""X07's runner report of a run, its wrapped form, and X07's attestation of the run. No I/O.

X07 defines the keys of the report, `x07-os-runner.report@0.5.0`: a report has all keys of its mode, and no others.
Counters that only X07 programs have (fuel, calls, statistics) are null for programs of other toolchains.

The report of an X07 program is made from the compiler's report in the build VM and the program's frames. The
program's output is a frame: a length of four bytes, little-endian, then the data. The counters of the X07 runtime are
in the last line of standard error that is a JSON object with a counter. All of this is hostile data.
"""

import hashlib
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from msgspec.structs import replace

from x07_sandbox.errors import Command, Flag, RefusedError, SandboxError, Text
from x07_sandbox.host.documents import encodable, prepared
from x07_sandbox.host.paths import is_folder
from x07_sandbox.policy.model import Policy
from x07_sandbox.policy.outcomes import ending_line
from x07_sandbox.programs.toolchains import OUTPUT
from x07_sandbox.sessions.request import Program
from x07_sandbox.sessions.result import EMPTY_OUTPUT, Result
from x07_sandbox.x07.project import HEAD_BYTES

SCHEMA: Final = "x07-os-runner.report@0.5.0"
WRAPPED_SCHEMA: Final = "x07.run.report@0.3.0"
ATTESTATION_SCHEMA: Final = "x07.runtime.attest@0.2.0"
FAILED_EXIT: Final = 1  # of the command and in the report, unless everything succeeded
_TRAP_CHARS: Final = 1000
_WORLD: Final = "run-os-sandboxed"  # the only one in which programs run
POLICY_CODE: Final = "X07RA_EPOLICY_DIGEST"
GUEST_CODE: Final = "X07RA_EGUEST_DIGEST"
WRITE_CODE: Final = "X07RA_EWRITE"
Digest = Annotated[str, Meta(pattern="^sha256:[0-9a-f]{64}$")]
NetworkMode = Literal["none", "disabled", "allowlist"]
Enforcement = Literal["none", "vm_boundary_allowlist", "guest_allowlist", "unsupported"]
World = Literal["run-os", "run-os-sandboxed"]
CompileMode = Literal["compile-run", "project-compile-run"]
SandboxBackend = Literal["vm", "os"]
Count = Annotated[int, Meta(ge=0)]
ExitCode = Annotated[int, Meta(ge=0, le=255)]


class NativeRequirement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One native library that a compiled X07 program needs."""

    backend_id: str
    abi_major: Annotated[int, Meta(ge=1)]
    features: list[str] | UnsetType = UNSET


class NativeRequires(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The native libraries that a program needs; empty for all programs except X07 programs."""

    schema_version: Literal["x07.native-requires@0.1.0"] = "x07.native-requires@0.1.0"
    world: World | UnsetType = UNSET
    requires: list[NativeRequirement]


class CompileReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of the build.

    c_source_size: size of the C code that X07's compiler generates; 0 for all programs except X07 programs.
    compiled_exe: path in the build VM.
    """

    ok: bool
    exit_status: int
    lang_id: str
    native_requires: NativeRequires
    c_source_size: Count
    compiled_exe: str | None
    compiled_exe_size: Count | None
    compile_error: str | None
    stdout_b64: bytes
    stderr_b64: bytes
    fuel_used: Count | None
    trap: str | None
    diagnostics: list[dict[str, Any]] | UnsetType = UNSET


_NOT_BUILT: Final = CompileReport(
    ok=False,
    exit_status=FAILED_EXIT,
    lang_id="",
    native_requires=NativeRequires(requires=[]),
    c_source_size=0,
    compiled_exe=None,
    compiled_exe_size=None,
    compile_error=None,
    stdout_b64=b"",
    stderr_b64=b"",
    fuel_used=None,
    trap=None,
)


class SchedStats(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Counters of X07's scheduler."""

    tasks_spawned: Count
    spawn_calls: Count
    join_calls: Count
    yield_calls: Count
    sleep_calls: Count
    chan_send_calls: Count
    chan_recv_calls: Count
    ctx_switches: Count
    wake_events: Count
    blocked_waits: Count
    virtual_time_end: Count
    sched_trace_hash: str


class MemStats(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Counters of X07's allocator."""

    alloc_calls: Count
    realloc_calls: Count
    free_calls: Count
    bytes_alloc_total: Count
    bytes_freed_total: Count
    live_bytes: Count
    peak_live_bytes: Count
    live_allocs: Count
    peak_live_allocs: Count
    memcpy_bytes: Count


class DebugStats(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Counters of X07's run-time checks."""

    borrow_violations: Count


class SolveReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of the program's run."""

    ok: bool
    exit_status: int
    solve_output_b64: bytes
    stdout_b64: bytes
    stderr_b64: bytes
    fuel_used: Count | None
    heap_used: Count | None
    fs_read_file_calls: Count | None
    fs_list_dir_calls: Count | None
    rr_open_calls: Count | None
    rr_close_calls: Count | None
    rr_stats_calls: Count | None
    rr_next_calls: Count | None
    rr_next_miss_calls: Count | None
    rr_append_calls: Count | None
    kv_get_calls: Count | None
    kv_set_calls: Count | None
    sched_stats: SchedStats | None
    mem_stats: MemStats | None
    debug_stats: DebugStats | None
    trap: str | None
    trap_help: str | UnsetType | None = UNSET


COUNTERS: Final = SolveReport.__struct_fields__[5:-2]  # the fields between the outputs and the trap


class AttestationReference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The path and the main fields of the run's attestation."""

    path: str
    sandbox_backend: SandboxBackend
    weaker_isolation: bool
    network_mode: NetworkMode
    network_enforcement: Enforcement


class CompileRunReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The report of a program that was built and run. solve: null if the program was not run."""

    schema_version: Literal["x07-os-runner.report@0.5.0"] = SCHEMA
    mode: CompileMode
    world: World
    sandbox_backend: SandboxBackend | UnsetType = UNSET
    exit_code: ExitCode
    compile: CompileReport
    solve: SolveReport | None
    runtime_attestation: AttestationReference | UnsetType = UNSET


class RunOsReport(SolveReport, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The report of an artifact that was run. The fields of the run's result are at the top level."""

    schema_version: Literal["x07-os-runner.report@0.5.0"] = SCHEMA
    mode: Literal["run-os"]
    world: World
    sandbox_backend: SandboxBackend | UnsetType = UNSET
    exit_code: ExitCode
    runtime_attestation: AttestationReference | UnsetType = UNSET


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """Facts for a report that the result lacks. lang_id: the toolchain. size: that of the artifact."""

    mode: CompileMode
    lang_id: str
    size: int


def runner_report(result: Result, built: Built) -> CompileRunReport:
    """Return the report of a run. A usage error has no report; it ends the command with exit code 2."""
    if result.outcome == "build-failed":
        compiled, solve = _failed_build(result, built.lang_id), None
    elif result.digests.artifact is None:
        return failure_report(result.reason, mode=built.mode, world=_WORLD, lang_id=built.lang_id)
    else:
        compiled, solve = _compiled(result, built), _solved(result)
    good = compiled.ok and solve is not None and solve.ok and solve.exit_status == 0
    return CompileRunReport(
        mode=built.mode,
        world=_WORLD,
        sandbox_backend=sandbox_backend_of(result),
        exit_code=0 if good else FAILED_EXIT,
        compile=compiled,
        solve=solve,
    )


def sandbox_backend_of(result: Result) -> SandboxBackend | UnsetType:
    """Return X07's name for the isolation of a run. X07's reports omit it for a run without isolation."""
    if result.isolation == "none":
        return UNSET
    return "os" if result.isolation == "process" else "vm"


def failure_report(message: str, *, mode: CompileMode, world: World, lang_id: str) -> CompileRunReport:
    """Return the report for a build VM that could not be started, or that was lost."""
    stderr = encodable(message).encode()
    compiled = replace(_NOT_BUILT, lang_id=lang_id, compile_error=message, stderr_b64=stderr, trap=_lost(message))
    return CompileRunReport(
        mode=mode, world=world, sandbox_backend="vm", exit_code=FAILED_EXIT, compile=compiled, solve=None
    )


def flat_report(report: CompileRunReport) -> RunOsReport:
    """Return the report in the form for artifacts (mode run-os). If no program ran, `trap` says why."""
    compiled = report.compile
    solve = report.solve or _uncounted(
        ok=False,
        exit_status=compiled.exit_status or FAILED_EXIT,
        stdout=compiled.stdout_b64,
        stderr=compiled.stderr_b64,
        trap=compiled.trap or compiled.compile_error,
    )
    return RunOsReport(
        mode="run-os",
        world=report.world,
        sandbox_backend=report.sandbox_backend,
        exit_code=report.exit_code,
        runtime_attestation=report.runtime_attestation,
        **msgspec.structs.asdict(solve),
    )


def _compiled(result: Result, built: Built) -> CompileReport:
    """Return the report of a successful build, including a cached one."""
    return replace(
        _NOT_BUILT,
        ok=True,
        exit_status=0,
        lang_id=built.lang_id,
        compiled_exe=OUTPUT,
        compiled_exe_size=built.size,
        stdout_b64=(result.build.stdout if result.build else EMPTY_OUTPUT).data,
        stderr_b64=(result.build.stderr if result.build else EMPTY_OUTPUT).data,
    )


def _failed_build(result: Result, lang_id: str) -> CompileReport:
    return replace(
        _NOT_BUILT,
        exit_status=result.exit_code or FAILED_EXIT,
        lang_id=lang_id,
        compile_error=result.reason,
        stdout_b64=result.stdout.data,
        stderr_b64=result.stderr.data,
        # A compiler that exited by itself has printed its errors. For a killed compiler only the reason is known.
        trap=None if result.exit_code else result.reason,
    )


def _solved(result: Result) -> SolveReport:
    stdout, stderr = result.stdout.data, result.stderr.data
    trap = _trap(result, stderr)
    ok = result.outcome == "ok" and trap is None
    # The program's own status if the program exited by itself. Otherwise the exit code of `x07 run`, which is not 0.
    own = result.exit_code if result.outcome in {"ok", "failed"} else None
    status = (result.x07_exit_code or FAILED_EXIT) if own is None else own
    return _uncounted(ok=ok, exit_status=status, stdout=stdout, stderr=stderr, trap=trap)


def _uncounted(*, ok: bool, exit_status: int, stdout: bytes, stderr: bytes, trap: str | None) -> SolveReport:
    """Return the report of a run without X07's counters."""
    return SolveReport(
        ok=ok,
        exit_status=exit_status,
        solve_output_b64=stdout,
        stdout_b64=stdout,
        stderr_b64=stderr,
        trap=trap,
        **dict.fromkeys(COUNTERS),
    )


def _trap(result: Result, stderr: bytes) -> str | None:
    """Return the reason why the program ended, in X07's words if X07 has any for this reason, or None for success."""
    words = {
        # The program succeeded, but not all its changes were applied, so the run is no success for the caller.
        "ok": f"its changes to files were not applied: {result.changes.reason}" if result.x07_exit_code else None,
        "failed": _last_words(stderr) if result.program_started else result.reason,
        "timeout": "timed out",
        "output-limit": f"{'stdout' if result.stdout.truncated else 'stderr'} exceeded cap",
        "signalled": f"terminated by signal {result.signal}",
        "oom": result.reason,
        "cpu-limit": result.reason,
        "cancelled": result.reason,
    }
    return words[result.outcome] if result.outcome in words else _lost(result.reason)


def _last_words(stderr: bytes) -> str | None:
    """Return the last line of standard error that is not JSON. X07 uses that line as the trap of a failed program."""
    for line in reversed(stderr.decode(errors="replace").splitlines()):
        words = line.strip()
        if words and not _is_json(words):
            return words[:_TRAP_CHARS]
    return None


def _is_json(words: str) -> bool:
    if not words.startswith(("{", "[")):
        return False
    try:
        msgspec.json.decode(words)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return False
    return True


def _lost(message: str) -> str:
    return f"vm backend failure: {message}"


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The program that was run. resolved_module_roots: empty for all programs except X07 programs."""

    kind: Literal["project", "program", "artifact"]
    path: str
    project_root: str | None
    lockfile: str | None
    resolved_module_roots: list[str]


class WrappedReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The report in the form of `x07 run --report wrapped`. report: the unchanged runner report."""

    schema_version: Literal["x07.run.report@0.3.0"] = WRAPPED_SCHEMA
    runner: Literal["os", "host"]
    world: World
    target: Target
    repair: dict[str, Any] | UnsetType = UNSET
    report: dict[str, Any]


def wrap(report: CompileRunReport | RunOsReport, target: Target) -> WrappedReport:
    """Return a runner report in the form of `x07 run --report wrapped`."""
    return WrappedReport(runner="os", world=report.world, target=target, report=msgspec.to_builtins(report))


def target_of(program: Program, path: Path | None, report: CompileRunReport | RunOsReport) -> Target:
    """Return the target of a run. path: path of the program, or None for source text, for which the report has `-`."""
    root = None if path is None or not program.project else path if is_folder(path) else path.parent
    return Target(
        kind="artifact" if isinstance(report, RunOsReport) else "project" if program.project else "program",
        path="-" if path is None else str(path),
        project_root=None if root is None else str(root),
        lockfile=None if root is None or program.lockfile is None else str(root / program.lockfile),
        resolved_module_roots=[],
    )


UNREADABLE: Final = "the compiler's report cannot be read"
NOT_FRAMED: Final = "stdout is not one complete frame"
NO_METRICS: Final = "stderr has no line of metrics"


# The counters of the X07 runtime; None if missing. Other keys are ignored.
Metrics: Final = msgspec.defstruct(
    "Metrics",
    [(field.name, field.type, None) for field in msgspec.structs.fields(SolveReport) if field.name in COUNTERS],
    frozen=True,
)


def framed_output(stdout: bytes) -> bytes | None:
    """Return the program's output, or None if standard output is not exactly one frame."""
    if len(stdout) < HEAD_BYTES or struct.unpack_from("<I", stdout)[0] != len(stdout) - HEAD_BYTES:
        return None
    return stdout[HEAD_BYTES:]


def find_metrics(stderr: bytes) -> dict[str, Any] | None:
    """Return the counters from the last line of standard error that has counters, or None without such a line."""
    for line in reversed(stderr.splitlines()):
        if not line.lstrip().startswith(b"{"):
            continue
        try:
            found = msgspec.json.decode(line, type=prepared(Metrics))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if found != Metrics():
            return msgspec.structs.asdict(found)
    return None


def read_protocol(report: CompileRunReport) -> CompileRunReport:
    """Return the report with the program's output and counters. A program that broke the protocol counts as failed."""
    solve = report.solve
    if solve is None:
        return report
    output, metrics, trap = framed_output(solve.stdout_b64), find_metrics(solve.stderr_b64), solve.trap
    if trap is None and solve.ok:
        trap = NOT_FRAMED if output is None else NO_METRICS if metrics is None else None
    solve = replace(solve, ok=solve.ok and trap is None, solve_output_b64=output or b"", trap=trap, **(metrics or {}))
    good = report.compile.ok and solve.ok and solve.exit_status == 0
    return replace(report, solve=solve, exit_code=0 if good else FAILED_EXIT)


class _CompilerReport(msgspec.Struct, frozen=True):
    """The part of the compiler's report that is used. Every field is checked, because the report comes from a guest."""

    compile: CompileReport


def x07_report(result: Result, built: Built) -> CompileRunReport:
    """Return the report of a run of an X07 program."""
    report = runner_report(result, built)
    if result.outcome != "build-failed" and result.digests.artifact is None:
        return report  # nothing was compiled
    if result.artifact_from == "caller":
        return read_protocol(report)  # compiled earlier, so there is no compiler's report
    output = result.build.stdout.data if result.build is not None else b""
    try:
        compiled = msgspec.json.decode(output, type=prepared(_CompilerReport)).compile
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        compiled = replace(report.compile, ok=False, exit_status=report.compile.exit_status or FAILED_EXIT)
        compiled = replace(compiled, compile_error=UNREADABLE, trap=f"{UNREADABLE}: {exc}", compiled_exe=None)
        return replace(report, compile=replace(compiled, compiled_exe_size=None), solve=None, exit_code=FAILED_EXIT)
    if result.outcome == "build-failed" and compiled.ok:  # the compiler reports success without an executable
        compiled = replace(compiled, ok=False, exit_status=FAILED_EXIT, compile_error=result.reason, trap=result.reason)
    return read_protocol(replace(report, compile=compiled))


def report_of(result: Result, program: Program, size: int) -> CompileRunReport:
    """Return X07's report of a run of any program. size: that of the artifact."""
    built = Built(mode=mode_of(program), lang_id=program.toolchain.name, size=size)
    return runner_report(result, built) if program.toolchain.protocol is None else x07_report(result, built)


def mode_of(program: Program) -> CompileMode:
    """Return the mode in X07's report: how a program is built and run."""
    return "project-compile-run" if program.project else "compile-run"


def describe_ending(result: Result, report: CompileRunReport, error: SandboxError | None) -> list[str]:
    """Return a message about the failure, if there is one. Changes that were not applied have their own messages.

    error: the error that ended the run, if any.
    """
    if not report.exit_code or (result.ok and result.x07_exit_code):
        return []
    if not result.ok:
        return [ending_line(result.outcome, result.reason_code, result.reason, error)]
    # The program exited with 0, but it or its compiler broke X07's protocol.
    trap = report.compile.trap if report.solve is None else report.solve.trap
    return [f"failed: {result.reason}, but {trap}."]


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A host and its ports. A denied host without ports is denied on all ports."""

    host: str
    ports: list[Annotated[int, Meta(ge=1, le=65535)]]


class AttestedOutcome(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the program ended."""

    ok: bool
    exit_status: int
    trap: str | UnsetType | None = UNSET


class Attestation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The attestation.

    effective_policy_digest: digest of the policy in the guest. weaker_isolation: whether the user accepted it.
    """

    schema_version: Literal["x07.runtime.attest@0.2.0"] = ATTESTATION_SCHEMA
    world: World
    sandbox_backend: SandboxBackend
    weaker_isolation: bool
    artifact_path: str
    input_len_bytes: Annotated[int, Meta(ge=0)]
    guest_image_digest: Digest | None
    effective_policy_digest: Digest
    network_mode: NetworkMode
    network_enforcement: Enforcement
    allow_dns: bool
    allow_tcp: bool
    allow_udp: bool
    effective_allow_hosts: list[Host]
    effective_deny_hosts: list[Host]
    bundled_binary_digest: Digest | None
    compile_attestation_digest: Digest | None
    capsule_attestation_digests: list[Digest]
    effect_log_digests: list[Digest]
    outcome: AttestedOutcome
    policy_path: str | UnsetType = UNSET
    run_dir: str | UnsetType = UNSET


class Attested(msgspec.Struct, frozen=True, kw_only=True):
    """Facts for the attestation that the result does not contain. denied: ports by host; None stands for all ports."""

    policy: Policy
    policy_bytes: bytes
    policy_path: str | None
    artifact_path: str
    input_len_bytes: int
    weaker_isolation: bool
    denied: Mapping[str, Collection[int] | None] = MappingProxyType({})


def attest(result: Result, solve: SolveReport, given: Attested) -> Attestation:
    """Return the attestation of a run. Raises RefusedError if the run cannot be attested."""
    policy_digest = f"sha256:{hashlib.sha256(given.policy_bytes).hexdigest()}"
    if result.digests.policy != policy_digest:
        raise _cannot(
            POLICY_CODE, f"{given.policy_path} changed while the run started", "Try again without changing that file"
        )
    backend = sandbox_backend_of(result)
    if isinstance(backend, UnsetType):
        raise _cannot(WRITE_CODE, "the program was not isolated", ("Use ", Flag("--sandbox-backend vm")))
    if result.digests.image is None and backend == "vm":
        fix = ("To rebuild the image: ", Command("x07 image build"))
        raise _cannot(GUEST_CODE, "the digest of the guest image is unknown", fix)
    net = given.policy.net
    mode = network_mode(given.policy)
    return Attestation(
        world="run-os-sandboxed",
        sandbox_backend=backend,
        weaker_isolation=given.weaker_isolation,
        artifact_path=given.artifact_path,
        input_len_bytes=given.input_len_bytes,
        guest_image_digest=result.digests.image,
        effective_policy_digest=policy_digest,
        network_mode=mode,
        # A run with allowed hosts starts only if the host enforces the list.
        network_enforcement="vm_boundary_allowlist" if mode == "allowlist" else "none",
        allow_dns=net.allow_dns,
        allow_tcp=net.allow_tcp,
        allow_udp=net.allow_udp,
        effective_allow_hosts=[Host(host=entry.host, ports=list(entry.ports)) for entry in net.allow_hosts],
        effective_deny_hosts=[Host(host=host, ports=sorted(ports or ())) for host, ports in given.denied.items()],
        bundled_binary_digest=result.digests.artifact,
        compile_attestation_digest=None,
        capsule_attestation_digests=[],
        effect_log_digests=[],
        outcome=AttestedOutcome(
            ok=solve.ok, exit_status=solve.exit_status, trap=UNSET if solve.trap is None else solve.trap
        ),
        policy_path=UNSET if given.policy_path is None else given.policy_path,
    )


def network_mode(policy: Policy) -> NetworkMode:
    """Return the policy's network mode, as X07's attestation calls it."""
    if not policy.net.enabled:
        return "none"
    return "allowlist" if policy.may_connect else "disabled"


def reference(path: str, made: Attestation) -> AttestationReference:
    """Return the entry in the runner report that refers to the attestation at *path*."""
    _, *names = AttestationReference.__struct_fields__
    return AttestationReference(path=path, **{name: getattr(made, name) for name in names})


def _cannot(code: str, why: str, fix: Text) -> RefusedError:
    return RefusedError(f"{code}: cannot attest this run", why, fix, code="no-attestation")
