"""One run from request to result: plan, build job, run job. Nothing of the host changes on the way."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from x07_sandbox.backends.base import Job, MachineKind
from x07_sandbox.backends.qemu.backend import QemuBackend
from x07_sandbox.errors import BackendError, Cancelled, HostError, ImageError, RefusedError, SandboxError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.images.store import find_image, image_is_current
from x07_sandbox.images.verify import open_image
from x07_sandbox.jobs.admission import admitted
from x07_sandbox.jobs.record import create_record, new_run_id
from x07_sandbox.plan.controls import GUEST_VARIABLES, Plan, make_plan
from x07_sandbox.plan.outcomes import Outcome, Verdict, as_build, classify, verdict
from x07_sandbox.plan.sizes import build_limits, ram_class_bytes
from x07_sandbox.policy import program_environment
from x07_sandbox.programs.artifacts import HEADER_BYTES, artifact_key, cached_artifact, drop_artifact, keep_artifact
from x07_sandbox.programs.toolchains import (
    ARTIFACT,
    OUTPUT,
    PROGRAM_FOLDER,
    SOURCE_FOLDER,
    Toolchain,
    source_name,
    toolchain_for,
)
from x07_sandbox.runs.execute import Phase, PhaseFacts, PhaseRequest, drain
from x07_sandbox.runs.folder import RunFolder, output_of
from x07_sandbox.runs.request import RunRequest, in_memory, read_policy, read_source, sha256_text
from x07_sandbox.runs.result import NOTHING, ControlReport, Denial, Digests, HowToAllow, Output, PhaseReport, Result
from x07_sandbox.runs.streams import InFile, OutFile

if TYPE_CHECKING:
    from x07_sandbox.backends.base import Availability, Instance
    from x07_sandbox.images.store import Image
    from x07_sandbox.images.verify import OpenImage
    from x07_sandbox.plan.controls import RunLimits
    from x07_sandbox.policy import Policy

_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/opt/x07", "LANG": "C.UTF-8"}
_CWD = "/opt/x07"
_KNOWN_OUTCOMES: tuple[tuple[type[SandboxError], Outcome], ...] = (
    (UsageError, Outcome.USAGE_ERROR),
    (RefusedError, Outcome.REFUSED),
    (ImageError, Outcome.REFUSED),
    (HostError, Outcome.REFUSED),
    (BackendError, Outcome.BACKEND_ERROR),
)


@dataclass(slots=True)
class _Progress:
    """What is known so far: whatever happens next, the result is made from it."""

    run_id: str
    availability: Availability | None = None
    plan: Plan | None = None
    jail: str | None = None
    artifact_from: Literal["build", "cache", "caller"] | None = None
    phases: dict[str, PhaseReport] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    denials: list[Denial] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stdout: Output = NOTHING
    stderr: Output = NOTHING


def run(request: RunRequest) -> Result:
    """Carry out one run. Every ending is a result; only a bug raises."""
    so_far = _Progress(run_id=new_run_id())
    try:
        with contextlib.ExitStack() as stack:
            folder = RunFolder(so_far.run_id, stack)
            ending = _carry_out(request, so_far, folder, stack)
            result = _result(so_far, ending)
            _write_result(folder.path / "result.json", result)
            return result
    except SandboxError as exc:
        return _result(so_far, _verdict_of(exc, request.cancel.signal))


def failure(exc: Exception) -> Result:
    """The result of a run that never began, or that met a bug of ours."""
    if isinstance(exc, SandboxError):
        ending = _verdict_of(exc)
    else:
        ending = verdict(Outcome.INTERNAL_ERROR, f"a bug in x07-sandbox: {type(exc).__name__}: {exc}")
    return _result(_Progress(run_id=new_run_id()), ending)


def _verdict_of(exc: SandboxError, signalled: int | None = None) -> Verdict:
    if isinstance(exc, Cancelled):
        return replace(verdict(Outcome.CANCELLED, exc.what), signal=signalled or signal.SIGINT)
    outcome = next(outcome for kind, outcome in _KNOWN_OUTCOMES if isinstance(exc, kind))
    ours = isinstance(exc, (ImageError, HostError, BackendError))
    return verdict(outcome, str(exc).removesuffix("."), fault="host" if ours else None)


def _carry_out(request: RunRequest, so_far: _Progress, folder: RunFolder, stack: contextlib.ExitStack) -> Verdict:
    toolchain = toolchain_for(str(request.program))
    source, so_far.digests["source"] = read_source(request.program, stack)
    policy, policy_bytes = read_policy(request.policy)
    so_far.digests["policy"] = sha256_text(policy_bytes)
    with request.cancel.waiting():
        image = stack.enter_context(open_image(_current(find_image(request.image))))
    so_far.digests["image"] = image.manifest.digest
    backend = QemuBackend(request.progress, request.cancel.waiting)
    so_far.availability = availability = backend.probe(image)
    so_far.warnings += availability.warnings
    so_far.plan = plan = make_plan(policy, availability.features, guest_variables=GUEST_VARIABLES)
    _add_refusals(plan, so_far)
    plan.require()
    session = _Session(request, so_far, folder, backend, image)
    artifact = request.artifact or folder.out_file(OUTPUT, settings.ARTIFACT_MAX_BYTES)
    so_far.artifact_from = "caller"
    if not artifact.complete:
        failed = session.build_or_recall(toolchain, source, artifact)
        if failed is not None:
            return failed
    so_far.digests["artifact"] = f"sha256:{artifact.sha256()}"
    return session.run(toolchain, artifact, policy, policy_bytes, plan.limits, stack)


class _Session:
    """The jobs of one run: they share backend, image, folder and what is known so far."""

    def __init__(
        self, request: RunRequest, so_far: _Progress, folder: RunFolder, backend: QemuBackend, image: OpenImage
    ) -> None:
        self.request = request
        self.so_far = so_far
        self.folder = folder
        self.backend = backend
        self.image = image

    def build_or_recall(self, toolchain: Toolchain, source: InFile, artifact: OutFile) -> Verdict | None:
        """What was built before from the same, or a build now; None if there is an artifact, else how that ended."""
        name = Path(source.path).name
        argv = toolchain.build(source.path, name)
        key = artifact_key(self.image.manifest.digest, toolchain.name, argv, self.so_far.digests["source"])
        if self.request.cache and _recall(key, artifact):
            self.so_far.artifact_from = "cache"
            return None
        self.so_far.artifact_from = "build"
        failed = self.build(toolchain, source, artifact)
        if failed is None and self.request.cache:
            keep_artifact(key, artifact.fd, artifact.size, artifact.sha256())
        return failed

    def build(self, toolchain: Toolchain, source: InFile, artifact: OutFile) -> Verdict | None:
        """Build in a machine of its own; None if there is an artifact, else how that ended."""
        name = Path(source.path).name
        argv = toolchain.build(source.path, name)
        spec = _PhaseSpec(
            "build", argv, (source,), build_limits(), settings.BUILD_WALL_MS, dict(_ENVIRONMENT), output=artifact
        )
        ending, facts = self._phase(spec)
        ending = as_build(ending)
        report = self.so_far.phases["build"]
        if ending.outcome is not Outcome.OK:
            self.so_far.stdout, self.so_far.stderr = report.stdout, report.stderr
            return ending
        if not artifact.complete:
            problem = facts.usage.get("output_problem") or "did not arrive whole"
            return verdict(Outcome.BUILD_FAILED, f"the build ended well, but what it made {problem}", fault="program")
        return None

    def run(
        self,
        toolchain: Toolchain,
        artifact: OutFile,
        policy: Policy,
        policy_bytes: bytes,
        plan: RunLimits,
        stack: contextlib.ExitStack,
    ) -> Verdict:
        """Run the artifact in a fresh machine."""
        name = source_name(str(self.request.program))
        program = InFile(
            path=PROGRAM_FOLDER if toolchain.archive else ARTIFACT,
            mode=0o755,
            kind="archive" if toolchain.archive else "file",
            fd=artifact.fd,
            size=artifact.size,
        )
        policy_file = in_memory(policy_bytes, f"{SOURCE_FOLDER}/policy.json", 0o644, stack)
        argv = [*toolchain.start(name), *self.request.args]
        environment = _ENVIRONMENT | program_environment(policy)
        spec = _PhaseSpec(
            "run",
            argv,
            (program, policy_file),
            plan.for_guest(),
            plan.wall_ms,
            environment,
            ram_bytes=plan.ram_bytes,
            limits_shown=policy.limits,
        )
        ending, facts = self._phase(spec)
        report = self.so_far.phases["run"]
        self.so_far.stdout, self.so_far.stderr = report.stdout, report.stderr
        self._note_denials(facts, policy)
        return ending

    def _phase(self, spec: _PhaseSpec) -> tuple[Verdict, PhaseFacts]:
        live = spec.name == "run"
        request = self.request
        prefix = "" if live else "build-"
        cap = request.max_output_bytes if live else settings.OUTPUT_MAX_BYTES
        stdout, stdout_fd = self.folder.sink(
            f"{prefix}stdout", live_fd=request.live_stdout if live else None, max_bytes=cap
        )
        stderr, stderr_fd = self.folder.sink(
            f"{prefix}stderr", live_fd=request.live_stderr if live else None, max_bytes=cap
        )
        ram_bytes = spec.ram_bytes or ram_class_bytes(spec.limits["mem_bytes"])
        phase_request = PhaseRequest(
            job_id=f"{self.so_far.run_id}-{spec.name}",
            phase=spec.name,
            argv=spec.argv,
            env=spec.env,
            cwd=_CWD,
            files=spec.files,
            limits=spec.limits,
            wall_ms=spec.wall_ms,
            stdin_fd=request.stdin_fd if live else None,
            stdout=stdout,
            stderr=stderr,
            output=spec.output,
            cancel=request.cancel,
        )
        with admitted(cancel_fd=request.cancel.fd, timeout_s=request.queue_s, progress=request.progress):
            job = self._job(spec, spec.name, ram_bytes, cold=request.cold)
            with self.backend.start(job) as instance:
                facts = self._converse(phase_request, instance)
            if instance.cloned and facts.unanswered:
                # It never got to hear of the program, so another machine may take its place.
                self.backend.distrust(job.kind, f"a clone of it did not answer: {classify(facts.evidence).reason}")
                job = self._job(spec, f"{spec.name}-cold", ram_bytes, cold=False)
                with self.backend.start(job) as instance:
                    facts = self._converse(phase_request, instance)
        delivered = drain((stdout, stderr), request.cancel)
        availability = self.so_far.availability
        emulated = availability is not None and availability.features.emulated
        evidence = facts.evidence
        if not delivered:
            evidence = replace(evidence, cancelled_by=request.cancel.signal or 0)
        ending = classify(evidence, emulated=emulated, limits=spec.limits_shown)
        if facts.input_problem:
            self.so_far.warnings.append(f"the input could not be read to its end: {facts.input_problem}")
        self.so_far.warnings += ending.warnings
        self.so_far.phases[spec.name] = _report(
            job,
            instance,
            ending,
            facts,
            output_of(stdout, stdout_fd),
            output_of(stderr, stderr_fd),
        )
        if live:
            self.so_far.digests["output"] = f"sha256:{stdout.sha256()}"
            if facts.input_sha256 is not None:
                self.so_far.digests["input"] = f"sha256:{facts.input_sha256}"
        return ending, facts

    def _job(self, spec: _PhaseSpec, name: str, ram_bytes: int, *, cold: bool) -> Job:
        record = create_record(
            run_id=self.so_far.run_id,
            phase=name,
            backend=self.backend.name,
            wall_ms=spec.wall_ms,
            image_digest=self.image.manifest.digest,
        )
        seconds = (settings.allowance_ms() + spec.wall_ms) // 1000 + 1
        kind = MachineKind(image=self.image, ram_bytes=ram_bytes, runtime=spec.name)
        return Job(record=record, kind=kind, deadline_s=seconds, cold=cold)

    def _converse(self, request: PhaseRequest, instance: Instance) -> PhaseFacts:
        self.so_far.jail = instance.jail
        if instance.cold_reason:
            self.so_far.warnings.append(f"the {request.phase} machine started cold: {instance.cold_reason}")
        return Phase(request, instance).run()

    def _note_denials(self, facts: PhaseFacts, policy: Policy) -> None:
        refused = int(facts.usage.get("tasks_refused", 0))
        if refused:
            how = HowToAllow(json_path="$.limits.procs", value=min(1024, policy.limits.procs * 2 + 1))
            self.so_far.denials.append(
                _denial("limits.procs", "fork", "a new task", "guest control group", refused, how)
            )
        if facts.usage.get("disk_full"):
            how = HowToAllow(json_path="$.fs", value="a smaller output: the scratch disk has 8 GiB")
            self.so_far.denials.append(
                _denial("scratch", "write", "the scratch disk is full", "size of the disk", 1, how)
            )


@dataclass(frozen=True, slots=True)
class _PhaseSpec:
    name: str
    argv: list[str]
    files: tuple[InFile, ...]
    limits: dict[str, int]
    wall_ms: int
    env: dict[str, str]
    output: OutFile | None = None
    ram_bytes: int = 0
    limits_shown: Any = None


def _denial(field_name: str, action: str, subject: str, by: str, count: int, how: HowToAllow) -> Denial:
    return Denial(
        field=field_name,
        action=action,
        subject=subject,
        enforced_by=by,
        observed_by="guest",
        count=count,
        how_to_allow=how,
    )


def _add_refusals(plan: Plan, so_far: _Progress) -> None:
    for refusal in plan.refusals:
        how = HowToAllow(
            json_path=refusal.how_to_allow.json_path, value=refusal.how_to_allow.value, flag=refusal.how_to_allow.flag
        )
        so_far.denials.append(
            Denial(
                field=refusal.field,
                action="plan",
                subject=refusal.why,
                enforced_by="plan",
                observed_by="host",
                count=1,
                how_to_allow=how,
            )
        )


def _current(image: Image) -> Image:
    """The image with our own guest code: the cheap part of a named image is made anew when that has changed."""
    if not image.name or image_is_current(image):
        return image
    from x07_sandbox.images.build import build_image

    return build_image(name=image.name, include=image.manifest.include, progress=lambda _text: None)


def _recall(key: str, artifact: OutFile) -> bool:
    """Copy the cached artifact *key* into *artifact*, hashing what is copied; whether there was a good one."""
    with cached_artifact(key) as found:
        if found is None or found.size > artifact.max_bytes:
            return False
        while artifact.size < found.size:
            data = os.pread(found.fd, min(1 << 20, found.size - artifact.size), HEADER_BYTES + artifact.size)
            if not data or not artifact.take(data):
                break
        if artifact.sha256() == found.sha256:
            artifact.complete = True
            return True
    artifact.clear()
    drop_artifact(key)
    return False


def _report(
    job: Job, instance: Instance, ending: Verdict, facts: PhaseFacts, stdout: Output, stderr: Output
) -> PhaseReport:
    usage = facts.usage
    return PhaseReport(
        job_id=job.record.job_id,
        start="clone" if instance.cloned else "cold",
        outcome=ending.outcome.value,
        reason=ending.reason,
        times_ms=facts.times_ms,
        stdout=stdout,
        stderr=stderr,
        cpu_ms=int(usage.get("cpu_us", 0)) // 1000,
        memory_peak_bytes=int(usage.get("memory_peak_bytes", 0)),
        tasks_peak=int(usage.get("tasks_peak", 0)),
    )


def _result(so_far: _Progress, ending: Verdict) -> Result:
    availability, plan = so_far.availability, so_far.plan
    controls = (
        [] if plan is None else [ControlReport(field=c.field, state=c.state, by=c.by, why=c.why) for c in plan.controls]
    )
    return Result(
        run=so_far.run_id,
        outcome=ending.outcome.value,
        fault=ending.fault,
        reason=ending.reason,
        x07_exit_code=ending.x07_exit_code,
        exit_code=ending.exit_code,
        signal=ending.signal,
        isolation=availability.features.isolation if availability else None,
        backend="qemu" if availability else None,
        jail=so_far.jail,
        artifact_from=so_far.artifact_from,
        stdout=so_far.stdout,
        stderr=so_far.stderr,
        phases=so_far.phases,
        digests=Digests(**so_far.digests),
        controls=controls,
        denials=so_far.denials,
        warnings=so_far.warnings,
    )


def _write_result(path: Path, result: Result) -> None:
    import msgspec

    with contextlib.suppress(OSError):  # the run is over, and its result is on its way to the caller
        path.write_bytes(msgspec.json.encode(result))
        path.chmod(0o600)
