"""One run from request to result: plan, build job, run job. Nothing of the host changes on the way."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from x07_sandbox.backends.qemu.backend import QemuBackend
from x07_sandbox.errors import (
    BackendError,
    Cancelled,
    HostError,
    ImageError,
    RefusedError,
    SandboxError,
    UsageError,
    shown,
)
from x07_sandbox.host import settings
from x07_sandbox.host.variables import text
from x07_sandbox.images.store import DEFAULT, find_image, image_is_current
from x07_sandbox.images.verify import OpenImage, open_image
from x07_sandbox.jobs.record import new_run_id
from x07_sandbox.plan.controls import Plan, make_plan
from x07_sandbox.plan.denials import Denial, HowToAllow
from x07_sandbox.policy import PolicyError
from x07_sandbox.programs.toolchains import OUTPUT, require_packages
from x07_sandbox.runs.folder import RunFolder
from x07_sandbox.runs.program import Program, load_program
from x07_sandbox.runs.request import (
    InForce,
    RunRequest,
    check_arguments,
    check_variables,
    need_policy,
    open_input,
    policy_in_force,
    sha256_text,
    with_framed_input,
)
from x07_sandbox.runs.result import ControlReport, Digests, Result
from x07_sandbox.runs.session import Progress, Session

if TYPE_CHECKING:
    from pathlib import Path

    from x07_sandbox.images.store import Image
    from x07_sandbox.plan.outcomes import Verdict
    from x07_sandbox.policy import Policy
    from x07_sandbox.runs.host_files import HostFiles

# By the value of their outcome: its table is loaded only while a machine comes up, or where one of these is raised.
_KNOWN_OUTCOMES: tuple[tuple[type[SandboxError], str], ...] = (
    (PolicyError, "refused"),
    (UsageError, "usage-error"),
    (RefusedError, "refused"),
    (ImageError, "refused"),
    (HostError, "refused"),
    (BackendError, "backend-error"),
)


class Read(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller has read of a request's files: it is used as it is, so that a report tells of what ran.

    program: with the request that load_program gave beside it.
    """

    program: Program | None = None
    policy: InForce | None = None


def run(request: RunRequest, read: Read = Read()) -> Result:  # noqa: B008 - it cannot be changed
    """Carry out one run. Every ending is a result; only a bug raises."""
    return attempt(request, read)[0]


def attempt(request: RunRequest, read: Read = Read()) -> tuple[Result, SandboxError | None]:  # noqa: B008 - as above
    """As `run`, and the error from which the result was made, where it was one."""
    so_far = Progress(run_id=new_run_id())
    try:
        with contextlib.ExitStack() as stack:
            folder = RunFolder(so_far.run_id, stack)
            ending = _carry_out(request, read, so_far, folder, stack)
            result = _result(so_far, ending)
            _keep(folder.path / "result.json", msgspec.json.encode(result))
            return result, None
    except SandboxError as exc:
        _add_cause(exc, so_far)
        return _result(so_far, _verdict_of(exc, request.cancel.signal)), exc
    except (OSError, MemoryError) as exc:
        from x07_sandbox.host.troubles import host_error

        if (error := host_error(exc)) is None:
            raise
        return _result(so_far, _verdict_of(error)), error


def failure(exc: Exception, signalled: int | None = None) -> Result:
    """The result of a run that never began, or that met a bug of ours. signalled: the signal that cancelled it."""
    from x07_sandbox.plan.outcomes import Outcome, verdict

    so_far = Progress(run_id=new_run_id())
    if isinstance(exc, SandboxError):
        _add_cause(exc, so_far)
        ending = _verdict_of(exc, signalled)
    else:
        ending = verdict(Outcome.INTERNAL_ERROR, f"a bug in x07-sandbox: {type(exc).__name__}: {exc}")
    return _result(so_far, ending)


def _verdict_of(exc: SandboxError, signalled: int | None = None) -> Verdict:
    from x07_sandbox.plan.outcomes import Outcome, verdict

    if isinstance(exc, Cancelled):
        return replace(verdict(Outcome.CANCELLED, exc.what), signal=signalled or signal.SIGINT)
    outcome = next(outcome for kind, outcome in _KNOWN_OUTCOMES if isinstance(exc, kind))
    ours = isinstance(exc, (ImageError, HostError, BackendError))
    return verdict(Outcome(outcome), str(exc).removesuffix("."), fault="host" if ours else None)


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """A request that nothing speaks against but its plan: all that it names was read and checked.

    image_name: as a user names it, for what is to be typed.
    """

    request: RunRequest
    program: Program
    policy: InForce
    image: OpenImage
    image_name: str
    backend: QemuBackend
    plan: Plan


def make_ready(
    request: RunRequest, read: Read, so_far: Progress, stack: contextlib.ExitStack, *, dry: bool = False
) -> Ready:
    """Read and check all that a request names, before anything is booted; *so_far* learns of it step by step.

    dry: nothing will be run, so input is not read, the image is not renewed, and no machine tries KVM.
    Raises SandboxError for everything that ends a run here.
    """
    request, program = (request, read.program) if read.program else load_program(request, stack)
    so_far.digests["source"] = program.sha256
    check_arguments(request)
    with request.cancel.waiting():  # for whoever opens the other end of a pipe
        request = replace(request, stdin_fd=open_input(request, stack, wait=not dry))
    if (protocol := program.toolchain.protocol) is not None:
        need_policy(request, protocol)
        request = request if dry else with_framed_input(request, protocol, stack)
    in_force = read.policy or policy_in_force(request)
    policy = in_force.policy
    so_far.policy = shown(in_force.base)
    so_far.digests["policy"] = sha256_text(in_force.data)
    check_variables(request, policy)
    with request.cancel.waiting():
        found = find_image(request.image)
        image = stack.enter_context(open_image(found if dry else current_image(found)))
    so_far.digests["image"] = image.manifest.digest
    image_name = request.image or text("X07_VM_GUEST_IMAGE") or DEFAULT
    require_packages(program.toolchain, image.manifest.holds(), image_name)
    check_pinned(image.manifest.digest)
    backend = QemuBackend(request.progress, request.cancel.waiting, so_far.warnings.append)
    so_far.availability = backend.probe(image, require_hardware=request.require_hardware, boot=not dry)
    so_far.warnings += so_far.availability.warnings
    so_far.plan = plan = make_plan(policy, so_far.availability.features, cpu_ms=program.cpu_ms)
    return Ready(
        request=request,
        program=program,
        policy=in_force,
        image=image,
        image_name=image_name,
        backend=backend,
        plan=plan,
    )


def _carry_out(
    request: RunRequest, read: Read, so_far: Progress, folder: RunFolder, stack: contextlib.ExitStack
) -> Verdict:
    ready = make_ready(request, read, so_far, stack)
    request, program, policy, plan = ready.request, ready.program, ready.policy.policy, ready.plan
    if request.overrides is not None:
        _keep(folder.path / "policy.json", ready.policy.data)
    _add_refusals(plan, so_far)
    plan.require(request.override_flags)
    host_files = host_files_of(request, program, policy, so_far, folder, stack)
    session = Session(request, program, so_far, folder, ready.backend, ready.image)
    artifact = request.artifact or folder.out_file(OUTPUT, settings.ARTIFACT_MAX_BYTES)
    failed = session.prepare(artifact, ready.policy.data)
    if failed is not None:
        return failed
    so_far.digests["artifact"] = f"sha256:{artifact.sha256()}"
    spec = session.run_spec(artifact, ready.policy, plan.limits, stack, host_files)
    ending = session.run(spec, ready.policy)
    return ending if host_files is None else _settled(host_files, ending, so_far)


def host_files_of(
    request: RunRequest,
    program: Program,
    policy: Policy,
    so_far: Progress,
    folder: RunFolder,
    stack: contextlib.ExitStack,
) -> HostFiles | None:
    """The host's files of a run, or None where it has none; what did not go in is noted. Raises SandboxError."""
    roots = policy.fs.enabled and (policy.fs.read_roots or policy.fs.write_roots)
    if request.out is None and not roots:
        return None
    # Not on the way of a run without files.
    from x07_sandbox.files.copy import EntriesError
    from x07_sandbox.runs.host_files import HostFiles, too_many
    from x07_sandbox.runs.kept import recover_all

    recover_all(request.progress)  # a caller of the library has no command that did it
    with request.cancel.waiting():
        try:
            host_files = HostFiles(request, program, policy, folder, stack)
        except EntriesError as exc:
            so_far.denials.append(too_many(policy, "copy", exc.why))
            raise
    so_far.denials += host_files.denials()
    return host_files


def _settled(host_files: HostFiles, ending: Verdict, so_far: Progress) -> Verdict:
    """The verdict, when it is known what became of the changes to files: what the guest says of them may undo it."""
    from x07_sandbox.errors import PeerError
    from x07_sandbox.plan.outcomes import Outcome, verdict

    well = ending.outcome in {Outcome.OK, Outcome.FAILED}
    try:
        so_far.changes, refused, warning = host_files.settle(ended_well=well)
    except PeerError as exc:
        return verdict(Outcome.GUEST_LOST, f"the guest broke the channel's protocol: {exc.why}", fault="program")
    so_far.denials += refused
    if warning:
        so_far.warnings.append(warning)
    so_far.kept_back = ending.outcome is Outcome.OK and bool(so_far.changes.reason)
    return ending


def check_pinned(digest: str) -> None:
    """Raises RefusedError if another image is the only one that may run."""
    pinned = text("X07_VM_GUEST_IMAGE_DIGEST")
    if pinned not in {None, digest}:
        raise RefusedError(
            "the guest image is not the one that may run",
            f"X07_VM_GUEST_IMAGE_DIGEST is {pinned}, and the image has {digest}",
            "Name the right image, or set the variable to the image that you trust",
        )


def _add_refusals(plan: Plan, so_far: Progress) -> None:
    so_far.denials += [_denial(refusal.field, refusal.why, refusal.how_to_allow) for refusal in plan.refusals]


def _add_cause(exc: SandboxError, so_far: Progress) -> None:
    """What a field of the policy refused, before there was a machine."""
    if exc.refused_by is None:
        return
    field, value = exc.refused_by
    how = None if value is None else HowToAllow(json_path=f"$.{field}", value=value)
    so_far.denials.append(_denial(field, f"{exc.what}: {exc.why}", how))


def _denial(field: str, why: str, how: HowToAllow | None) -> Denial:
    return Denial(
        field=field,
        action="plan",
        subject=why,
        enforced_by="plan",
        observed_by="host",
        count=1,
        how_to_allow=how,
    )


def current_image(image: Image) -> Image:
    """The image with our own guest code: the cheap part of a named image is made anew when that has changed."""
    if not image.name or image_is_current(image):
        return image
    from x07_sandbox.images.build import build_image

    return build_image(name=image.name, progress=lambda _text: None)


def _result(so_far: Progress, ending: Verdict) -> Result:
    availability, plan = so_far.availability, so_far.plan
    controls = (
        [] if plan is None else [ControlReport(field=c.field, state=c.state, by=c.by, why=c.why) for c in plan.controls]
    )
    exit_code = ending.x07_exit_code
    if so_far.kept_back:
        from x07_sandbox.plan.outcomes import REFUSED_EXIT as exit_code  # noqa: N811 - a module that is loaded late
    return Result(
        run=so_far.run_id,
        outcome=ending.outcome.value,
        fault=ending.fault,
        reason=ending.reason,
        x07_exit_code=exit_code,
        exit_code=ending.exit_code,
        signal=ending.signal,
        isolation=availability.features.isolation if availability else None,
        backend="qemu" if availability else None,
        jail=so_far.jail,
        artifact_from=so_far.artifact_from,
        build=so_far.build,
        stdout=so_far.stdout,
        stderr=so_far.stderr,
        phases=so_far.phases,
        policy=so_far.policy,
        digests=Digests(**so_far.digests),
        controls=controls,
        denials=so_far.denials,
        denials_lost=so_far.denials_lost,
        hints=so_far.hints,
        changes=so_far.changes,
        filters=so_far.filters,
        warnings=so_far.warnings,
    )


def _keep(path: Path, data: bytes) -> None:
    """A file of the run's folder, for whoever looks there; the run does not depend on it."""
    with contextlib.suppress(OSError):
        path.write_bytes(data)
        path.chmod(0o600)
