"""The jobs of one run: an artifact, built or kept from before, and its run, each in a machine of its own."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec.structs import replace

from x07_sandbox.backends.base import Availability, Job, MachineKind, boots
from x07_sandbox.errors import BackendError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.models import known
from x07_sandbox.jobs.admission import admitted
from x07_sandbox.jobs.record import Claim, create_record
from x07_sandbox.plan.confinement import confinement
from x07_sandbox.plan.controls import Plan, run_limits
from x07_sandbox.plan.denials import Denial, Hint
from x07_sandbox.plan.sizes import build_limits, build_limits_shown, ram_class_bytes
from x07_sandbox.policy import program_environment
from x07_sandbox.programs.artifacts import (
    HEADER_BYTES,
    artifact_key,
    cached_artifact,
    drop_artifact,
    keep_artifact,
    one_builder,
)
from x07_sandbox.programs.toolchains import ARTIFACT, PROGRAM_FOLDER, PROJECT_FOLDER, SOURCE_FOLDER, build_driver
from x07_sandbox.runs.phase import CWD, PhaseSpec, carry_out
from x07_sandbox.runs.request import InForce, in_memory, sha256_text
from x07_sandbox.runs.result import NOTHING, BuildOutput, Changes, Output, PhaseReport
from x07_sandbox.runs.streams import InFile, OutFile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from x07_sandbox.backends.base import Instance
    from x07_sandbox.backends.qemu.backend import QemuBackend
    from x07_sandbox.images.verify import OpenImage
    from x07_sandbox.plan.controls import RunLimits
    from x07_sandbox.plan.outcomes import Verdict
    from x07_sandbox.policy import Policy
    from x07_sandbox.programs.protocol import BuildExtras
    from x07_sandbox.programs.toolchains import Toolchain
    from x07_sandbox.runs.execute import PhaseFacts
    from x07_sandbox.runs.folder import RunFolder
    from x07_sandbox.runs.host_files import HostFiles
    from x07_sandbox.runs.program import Program
    from x07_sandbox.runs.request import RunRequest
    from x07_sandbox.runs.streams import Sink

_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/opt/x07", "LANG": "C.UTF-8"}
_TAIL_BYTES = 64 * 1024  # of its error output, in which a failed program may have said what it missed
_ANY_TIMER = "the {name} machine may have a timer that is late: each booted before it measured its own wrong"
# Where a program with a manifest starts: the same private folder, under the name that relative roots have.
_PROJECT_MOUNT: dict[str, Any] = {"tree": None, "sub": "", "at": PROJECT_FOLDER, "write": True, "changes": False}


class Progress(msgspec.Struct):
    """What is known so far: whatever happens next, the result is made from it."""

    run_id: str
    availability: Availability | None = None
    plan: Plan | None = None
    jail: str | None = None
    policy: str | None = None
    artifact_from: Literal["build", "cache", "caller"] | None = None
    build: BuildOutput | None = None
    phases: dict[str, PhaseReport] = msgspec.field(default_factory=dict)
    digests: dict[str, str] = msgspec.field(default_factory=dict)
    denials: list[Denial] = msgspec.field(default_factory=list)
    denials_lost: int = 0
    hints: list[Hint] = msgspec.field(default_factory=list)
    warnings: list[str] = msgspec.field(default_factory=list)
    changes: Changes = Changes()
    filters: dict[str, str] = msgspec.field(default_factory=dict)
    kept_back: bool = False  # changes that were to be applied and were not
    stdout: Output = NOTHING
    stderr: Output = NOTHING


def run_environment(policy: Policy, named: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """All variables of a program: fixed ones, those of *ours* that the policy lets in, those that were named, X07's."""
    env = dict(_ENVIRONMENT)
    if policy.env.enabled:
        env |= {key: ours[key] for key in policy.env.allow_keys if key in ours and not key.startswith("X07_")}
    for key in policy.env.deny_keys:
        env.pop(key, None)
    return {**env, **named, **program_environment(policy)}


def output_caps(request: RunRequest, toolchain: Toolchain) -> tuple[int, int]:
    """How many bytes of standard output and of standard error a run may write."""
    most = settings.OUTPUT_MAX_BYTES if request.max_output_bytes is None else request.max_output_bytes
    return (most, most) if toolchain.protocol is None else toolchain.protocol.output_caps(most)


class Session:
    """The jobs of one run: they share backend, image, folder and what is known so far."""

    def __init__(
        self,
        request: RunRequest,
        program: Program,
        so_far: Progress,
        folder: RunFolder,
        backend: QemuBackend,
        image: OpenImage,
    ) -> None:
        self.request = request
        self.program = program
        self.so_far = so_far
        self.folder = folder
        self.backend = backend
        self.image = image

    # the artifact

    def prepare(self, artifact: OutFile, policy_bytes: bytes = b"") -> Verdict | None:
        """What was built before from the same, or a build now; None if there is an artifact, else how that ended."""
        program, toolchain = self.program, self.program.toolchain
        if artifact.complete or toolchain.build is None:
            if not artifact.complete:
                artifact.complete = artifact.take(program.data)
            self.so_far.artifact_from = "caller"
            return None
        argv = toolchain.build(program.source)
        extras = None if toolchain.protocol is None else toolchain.protocol.build_extras(policy_bytes)
        more = [] if extras is None else [sha256_text(part) for part in extras.key]
        more += [sha256_text(build_driver())] if toolchain.driver else []
        key = artifact_key(self.image.manifest.digest, toolchain.name, argv, program.sha256, *more)
        if not self.request.cache:
            return self._build(argv, artifact, extras)
        if self._recalled(key, artifact):
            return None
        most_s = min(settings.BUILD_WALL_MS / 1000, self.request.queue_s)
        with one_builder(key, self._pause_for_another(), most_s) as waited:
            if waited and self._recalled(key, artifact):
                return None
            failed = self._build(argv, artifact, extras)
            if failed is None:
                notes = msgspec.json.encode(self.so_far.build)
                keep_artifact(key, artifact.fd, artifact.size, artifact.sha256(), notes)
            return failed

    def _pause_for_another(self) -> Callable[[], None]:
        """What `one_builder` does while another builds: it says so, once that takes long, and can be cancelled."""
        say_at = [Deadline.after(1.0)]

        def pause() -> None:
            self.request.cancel.pause()
            if say_at and say_at[0].passed():
                say_at.clear()
                self.request.progress("waiting: another run builds the same program")

        return pause

    def _recalled(self, key: str, artifact: OutFile) -> bool:
        """Take what was built before from the same, if it is there."""
        build = _recall(key, artifact)
        if build is not None:
            self.so_far.artifact_from, self.so_far.build = "cache", build
        return build is not None

    def _build(self, argv: list[str], artifact: OutFile, extras: BuildExtras | None) -> Verdict | None:
        """Build in a machine of its own; None if there is an artifact, else how that ended."""
        self.so_far.artifact_from = "build"
        self.request.progress(f"building {self.program.source.name or 'the project'} in a machine of its own")
        with contextlib.ExitStack() as stack:
            files = [self.program.file]
            env = dict(_ENVIRONMENT)
            if self.program.toolchain.driver:
                files.append(in_memory(build_driver(), self.program.source.driver, 0o644, stack))
            if extras is not None:
                files += [in_memory(data, path, 0o644, stack) for path, data in extras.files.items()]
                env |= extras.env
            return self._built(argv, artifact, tuple(files), env)

    def _built(
        self, argv: list[str], artifact: OutFile, files: tuple[InFile, ...], env: dict[str, str]
    ) -> Verdict | None:
        from x07_sandbox.plan.outcomes import Outcome, as_build, verdict

        limits = build_limits()
        spec = PhaseSpec(
            name="build",
            argv=argv,
            files=files,
            limits=limits,
            wall_ms=settings.BUILD_WALL_MS,
            env=env,
            ram_bytes=ram_class_bytes(limits["mem_bytes"]),
            output=artifact,
            limits_shown=build_limits_shown(),
        )
        ending, facts = self.phase(spec)
        ending = as_build(ending)
        report = self.so_far.phases["build"] = replace(self.so_far.phases["build"], reason=ending.reason)
        self.so_far.build = BuildOutput(stdout=report.stdout, stderr=report.stderr)
        if ending.outcome is Outcome.OK and artifact.complete:
            return None
        self.so_far.stdout, self.so_far.stderr = report.stdout, report.stderr
        if ending.outcome is not Outcome.OK:
            return ending
        problem = facts.usage.get("output_problem") or "did not arrive whole"
        return verdict(Outcome.BUILD_FAILED, f"the build ended well, but what it made {problem}", fault="program")

    # its run

    def run_spec(
        self,
        artifact: OutFile,
        in_force: InForce,
        limits: RunLimits,
        stack: contextlib.ExitStack,
        host_files: HostFiles | None = None,
    ) -> PhaseSpec:
        """The run of an artifact."""
        policy = in_force.policy
        toolchain = self.program.toolchain
        archive = toolchain.archive
        program = InFile(
            path=PROGRAM_FOLDER if archive else ARTIFACT,
            mode=0o755,
            kind="archive" if archive else "file",
            fd=artifact.fd,
            size=artifact.size,
        )
        files = [program, in_memory(in_force.data, f"{SOURCE_FOLDER}/policy.json", 0o644, stack)]
        if toolchain.protocol is not None:
            more = toolchain.protocol.run_files(self.request.whole_input)
            files += [in_memory(data, path, 0o644, stack) for path, data in more.items()]
        project = self.program.project
        cwd = PROJECT_FOLDER if project else CWD
        mounts = [_PROJECT_MOUNT] if project else []
        if host_files is not None:
            mounts += host_files.mounts(len(files))
            files += host_files.files
        return PhaseSpec(
            name="run",
            argv=[*toolchain.start(self.program.source), *self.request.args],
            files=tuple(files),
            limits=limits.for_guest(),
            confine=confinement(policy, cwd, alone=not (archive or toolchain.protocol)),
            wall_ms=limits.wall_ms,
            env=run_environment(policy, self.request.env, os.environ),
            ram_bytes=limits.ram_bytes,
            cwd=cwd,
            mounts=tuple(mounts),
            changes=None if host_files is None else host_files.incoming,
            areas=() if host_files is None else tuple(host_files.areas),
            limits_shown=limits,
        )

    def run(self, spec: PhaseSpec, in_force: InForce) -> Verdict:
        """Carry that out."""
        known = self.image.manifest.filters
        self.so_far.filters = {name: f"sha256:{known[name].sha256}" for name in spec.confine.filters}
        ending, facts = self.phase(spec)
        report = self.so_far.phases["run"]
        self.so_far.stdout, self.so_far.stderr = report.stdout, report.stderr
        self._note_denials(ending, facts, in_force, spec)
        ending = self._by_whose_limit(ending, in_force)
        self.so_far.phases["run"] = replace(report, reason=ending.reason)
        return ending

    def _by_whose_limit(self, ending: Verdict, in_force: InForce) -> Verdict:
        """The verdict with the flags in its reason that held the program tighter than the policy."""
        from x07_sandbox.plan.outcomes import as_limited_by

        flags = {}
        if in_force.own_wall_ms is not None:
            flags["limits.wall_ms"] = "--timeout"
        if self.program.cpu_ms is not None and self.program.cpu_ms < in_force.policy.limits.cpu_ms:
            flags["limits.cpu_ms"] = "--cpu-time-limit-seconds"
        return as_limited_by(ending, flags)

    # one phase

    def phase(self, spec: PhaseSpec) -> tuple[Verdict, PhaseFacts]:
        """Carry out one phase in a machine of its own, and report it."""
        live = spec.name == "run"
        request = self.request
        prefix = "" if live else "build-"
        caps = output_caps(request, self.program.toolchain) if live else (settings.OUTPUT_MAX_BYTES,) * 2
        stdout, stdout_fd = self.folder.sink(
            f"{prefix}stdout", live_fd=request.live_stdout if live else None, max_bytes=caps[0], raw=request.raw
        )
        stderr, stderr_fd = self.folder.sink(
            f"{prefix}stderr", live_fd=request.live_stderr if live else None, max_bytes=caps[1], raw=request.raw
        )
        with admitted(cancel_fd=request.cancel.fd, timeout_s=request.queue_s, progress=request.progress):
            instance, facts = self._answered(spec, (stdout, stderr))
        from x07_sandbox.plan.outcomes import Outcome, classify
        from x07_sandbox.runs.execute import drain
        from x07_sandbox.runs.folder import output_of

        evidence = facts.evidence
        if not drain((stdout, stderr), request.cancel):
            evidence = replace(evidence, cancelled_by=request.cancel.signal or 0)
        availability = self.so_far.availability
        emulated = availability is not None and availability.features.emulated
        ending = classify(evidence, emulated=emulated, limits=spec.limits_shown)
        if facts.input_problem:
            self.so_far.warnings.append(f"the input could not be read to its end: {facts.input_problem}")
        self.so_far.warnings += ending.warnings
        outputs = output_of(stdout, stdout_fd), output_of(stderr, stderr_fd)
        self.so_far.phases[spec.name] = _report(instance, ending, facts, outputs)
        if live:
            if ending.outcome is not Outcome.OK:
                facts.stderr_tail = _tail(stderr_fd)
            self.so_far.digests["output"] = f"sha256:{stdout.sha256()}"
            if facts.input_sha256 is not None:
                self.so_far.digests["input"] = f"sha256:{facts.input_sha256}"
        return ending, facts

    def _answered(self, spec: PhaseSpec, sinks: tuple[Sink, Sink]) -> tuple[Instance, PhaseFacts]:
        """Have a phase carried out by a warm machine, by a clone, or by a cold one: by the first that answers."""
        kind = MachineKind(image=self.image, ram_bytes=spec.ram_bytes, runtime=spec.name)
        claim = Claim(run_id=self.so_far.run_id, phase=spec.name, wall_ms=spec.wall_ms)
        machines = None if self.request.cold else self.request.machines
        if machines is not None:
            try:
                if (waiting := machines.claim(kind, claim)) is not None:
                    with waiting as instance:
                        facts = self._converse(spec, instance, sinks)
                    if not facts.unanswered:
                        return instance, facts
                    self.so_far.warnings.append(f"the {spec.name} had no warm machine: the one it took did not answer")
                    claim = replace(claim, phase=f"{spec.name}-clone")  # that job is over, and stays on record
            except BackendError as exc:
                self.so_far.warnings.append(f"the {spec.name} had no warm machine: {exc.what}: {exc.why}")
                claim = replace(claim, phase=f"{spec.name}-clone")
        if self.request.cold:
            self.request.progress(f"booting a machine for the {spec.name}")
        tries, cloned, cold = enumerate(boots(), 1), False, self.request.cold
        number, last = next(tries)
        while True:
            job = self._job(claim, kind, cold=cold, last_try=last)
            with self.backend.start(job) as instance:
                facts = self._converse(spec, instance, sinks)
            # One that is unanswered never got to hear of the program, so another machine may take its place.
            if instance.begun == "clone" and facts.unanswered and not cloned:
                cold = self._unanswered(kind, facts)
                claim, cloned = replace(claim, phase=f"{spec.name}-cold"), True
                continue
            if not facts.mistimed or last:
                if last and instance.begun == "cold":
                    self.so_far.warnings.append(_ANY_TIMER.format(name=spec.name))
                return instance, facts
            claim = replace(claim, phase=f"{spec.name}-cold{number}")
            number, last = next(tries)

    def _unanswered(self, kind: MachineKind, facts: PhaseFacts) -> bool:
        """Note that a clone did not answer; whether another might, so that the next has to be told to start cold."""
        from x07_sandbox.plan.outcomes import classify

        why = f"a clone of it did not answer: {classify(facts.evidence).reason}"
        if facts.evidence.killed:
            self.so_far.warnings.append(f"the {kind.runtime} machine started cold: {why}")
        else:
            self.backend.distrust(kind, why)
        return facts.evidence.killed

    def _job(self, claim: Claim, kind: MachineKind, *, cold: bool, last_try: bool) -> Job:
        digest = self.image.manifest.digest
        record = create_record(claim, backend=self.backend.name, image_digest=digest)
        return Job(record=record, kind=kind, deadline_s=claim.deadline_s, cold=cold, last_try=last_try)

    def _converse(self, spec: PhaseSpec, instance: Instance, sinks: tuple[Sink, Sink]) -> PhaseFacts:
        self.so_far.jail = instance.jail
        cold = f"the {spec.name} machine started cold: "
        # Where its kernel gave up booting the next one says it too, in figures of its own.
        if instance.cold_reason and not any(text.startswith(cold) for text in self.so_far.warnings):
            self.so_far.warnings.append(cold + instance.cold_reason)
        request = self.request
        return carry_out(
            spec,
            instance,
            stdin_fd=request.stdin_fd if spec.name == "run" else None,
            sinks=sinks,
            cancel=request.cancel,
            on_started=lambda: request.progress("") if spec.name == "run" else None,
        )

    def _note_denials(self, ending: Verdict, facts: PhaseFacts, in_force: InForce, spec: PhaseSpec) -> None:
        usage, so_far, policy = facts.usage, self.so_far, in_force.policy
        so_far.denials_lost = int(usage.get("denials_lost", 0))
        tasks = int(usage.get("tasks_refused", 0))
        disk, memory = usage.get("disk_full"), usage.get("memory_full")
        if ending.outcome.value == "ok" and not (facts.refused or tasks or disk or memory):
            return
        from x07_sandbox.plan import observed  # not on the way of a program that ends well

        # Before what was not copied in: what it tried comes first.
        so_far.denials[:0] = observed.denials(facts.refused, policy, spec.areas, spec.cwd)
        if tasks:
            so_far.denials.append(observed.more_tasks(policy, run_limits(policy).max_live, tasks))
        if disk:
            so_far.denials.append(observed.disk_full())
        if memory:
            so_far.denials.append(observed.memory_full(policy))
        own_ms, cpu_ms = in_force.own_wall_ms, self.program.cpu_ms
        limit = observed.limit_hit(ending.outcome.value, policy, cpu_ms=cpu_ms, own_wall_ms=own_ms)
        if limit is not None:
            so_far.denials.append(limit)
        if ending.outcome.value == "output-limit":
            stream, toolchain = str(facts.evidence.output_overflow), self.program.toolchain
            fixed = toolchain.protocol is not None and stream == "stderr"
            so_far.denials.append(
                observed.too_much_output(stream, None if fixed else output_caps(self.request, toolchain)[0])
            )
        if facts.stderr_tail:
            from x07_sandbox.runs.missed import missed  # not on the way of a program that ends well

            so_far.hints = missed(facts.stderr_tail, policy, spec, self.request, self.program)


def _tail(fd: int) -> bytes:
    """The end of what a program wrote."""
    return os.pread(fd, _TAIL_BYTES, max(0, os.fstat(fd).st_size - _TAIL_BYTES))


def _recall(key: str, artifact: OutFile) -> BuildOutput | None:
    """Copy the cached artifact *key* into *artifact*, hashing what is copied; what its build printed if it is good."""
    with cached_artifact(key) as found:
        if found is None or found.size > artifact.max_bytes:
            return None
        while artifact.size < found.size:
            data = os.pread(found.fd, min(1 << 20, found.size - artifact.size), HEADER_BYTES + artifact.size)
            if not data or not artifact.take(data):
                break
        if artifact.sha256() == found.sha256:
            with contextlib.suppress(msgspec.MsgspecError):
                build = msgspec.json.decode(found.notes, type=known(BuildOutput))
                artifact.complete = True
                return build
    artifact.clear()
    drop_artifact(key)
    return None


def _report(instance: Instance, ending: Verdict, facts: PhaseFacts, outputs: tuple[Output, Output]) -> PhaseReport:
    usage = facts.usage
    stdout, stderr = outputs
    return PhaseReport(
        job_id=instance.record.job_id,
        start=instance.begun,
        outcome=ending.outcome.value,
        reason=ending.reason,
        times_ms=facts.times_ms,
        stdout=stdout,
        stderr=stderr,
        cpu_ms=int(usage.get("cpu_us", 0)) // 1000,
        memory_peak_bytes=int(usage.get("memory_peak_bytes", 0)),
        tasks_peak=int(usage.get("tasks_peak", 0)),
    )
