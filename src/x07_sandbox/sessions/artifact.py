"""The artifact of a run: given by the caller, taken from the cache, or built now."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import msgspec

from x07_sandbox.host import settings
from x07_sandbox.host.decoding import prepared as prepared_model
from x07_sandbox.programs import artifacts
from x07_sandbox.programs.toolchains import build_driver
from x07_sandbox.sessions.job import JobEnd, run_job
from x07_sandbox.sessions.request import sha256_text
from x07_sandbox.sessions.result import BuildOutput
from x07_sandbox.sessions.specs import build_spec

if TYPE_CHECKING:
    from x07_sandbox.policy.outcomes import Verdict
    from x07_sandbox.sessions.folder import RunFolder
    from x07_sandbox.sessions.prepare import Prepared
    from x07_sandbox.sessions.request import Program
    from x07_sandbox.sessions.result import Draft
    from x07_sandbox.sessions.transfers import OutFile


class _CachedBuild(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The notes in the cache about a build. status: the compiler's exit status; without an artifact unless it is 0."""

    status: int
    output: BuildOutput


def obtain_artifact(
    prepared: Prepared, program: Program, draft: Draft, folder: RunFolder, artifact: OutFile
) -> Verdict | None:
    """Fill *artifact* with the file that the run executes, and *draft* with the facts about the build.

    Return the verdict if the build failed, else None. Raises SandboxError.
    """
    if artifact.complete or program.toolchain.build is None:
        if not artifact.complete:
            artifact.complete = artifact.take(program.data)
        draft.set(artifact_from="caller")
        return None
    # The compiler is unknown without an image, so nothing is cached.
    if prepared.image is None or not prepared.request.cache:
        return _build(prepared, program, draft, folder, artifact)
    key = _key(prepared, program, prepared.image.manifest.digest)
    if (known := _recall(key, artifact)) is not None:
        return _from_cache(prepared, program, draft, known)
    most_s = min((prepared.request.build_wall_ms or settings.BUILD_WALL_MS) / 1000, prepared.request.queue_s)
    with artifacts.build_lock(key, prepared.caller.cancel.pause, most_s, prepared.caller.progress) as mostly_waited:
        if mostly_waited and (known := _recall(key, artifact)) is not None:
            return _from_cache(prepared, program, draft, known)
        return _build(prepared, program, draft, folder, artifact, key)


def _key(prepared: Prepared, program: Program, image_digest: str) -> str:
    toolchain = program.toolchain
    assert toolchain.build is not None  # noqa: S101 - for the type checker
    extras = None if toolchain.protocol is None else toolchain.protocol.build_extras(prepared.policy.data)
    more = [] if extras is None else [sha256_text(part) for part in extras.key]
    more += [sha256_text(build_driver())] if toolchain.packs else []
    return artifacts.artifact_key(image_digest, toolchain.name, toolchain.build(program.source), program.sha256, *more)


def _from_cache(prepared: Prepared, program: Program, draft: Draft, known: _CachedBuild) -> Verdict | None:
    draft.set(artifact_from="cache", build=known.output)
    if known.status == 0:
        return None
    from x07_sandbox.policy.outcomes import Evidence, Stage, classify

    ending = classify(Evidence(stage=Stage.COLLECT, wait_status=known.status << 8))
    draft.set(stdout=known.output.stdout, stderr=known.output.stderr)
    return _verdict(prepared, program, ending)


def _verdict(prepared: Prepared, program: Program, found: Verdict) -> Verdict:
    from x07_sandbox.policy.outcomes import build_verdict

    subject = "check of the source" if program.toolchain.packs else "compiler"
    return build_verdict(found, prepared.request.build_wall_ms or settings.BUILD_WALL_MS, subject)


def _failed_by_itself(end: JobEnd) -> bool:
    """Return whether the compiler rejected the source, and so would again: it exited and met no limit."""
    exited = end.facts.exited
    if end.ending.outcome != "failed" or exited is None or end.facts.denied:
        return False
    limits = (exited.oom_kills, exited.tasks_refused, exited.disk_full, exited.memory_full, exited.denials_lost)
    return not any(limits)


def _build(
    prepared: Prepared, program: Program, draft: Draft, folder: RunFolder, artifact: OutFile, key: str | None = None
) -> Verdict | None:
    """Build the program, and store what a later build would repeat under *key*, if there is one."""
    from x07_sandbox.policy.outcomes import verdict

    draft.set(artifact_from="build")
    prepared.caller.progress(f"building {program.source.name or 'the project'} in a separate VM")
    with contextlib.ExitStack() as stack:
        end = run_job(prepared, build_spec(prepared, program, artifact, stack), folder)
    ending = _verdict(prepared, program, end.ending)
    report = end.report(ending, prepared.caller.word)
    build = BuildOutput(stdout=report.stdout, stderr=report.stderr)
    draft.set_phase("build", report)
    draft.set(build=build, jail=end.job.instance.jail)
    draft.warn(*end.job.warnings)
    built = ending.outcome == "ok" and artifact.complete
    if key is not None and (built or _failed_by_itself(end)):
        notes = msgspec.json.encode(_CachedBuild(ending.exit_code or 0, build))
        artifacts.store_artifact(key, artifact.fd, artifact.size, artifact.sha256(), notes)
    if built:
        return None
    draft.set(stdout=report.stdout, stderr=report.stderr)
    if ending.outcome != "ok":
        return ending
    problem = (end.facts.closed and end.facts.closed.output_problem) or "is incomplete"
    return verdict("build-failed", "not-built", {"problem": problem}, fault="program")


def _recall(key: str, artifact: OutFile) -> _CachedBuild | None:
    with artifacts.cached_artifact(key) as found:
        if found is None or found.size > artifact.max_bytes:
            return None
        while artifact.size < found.size:
            data = os.pread(found.fd, min(1 << 20, found.size - artifact.size), artifacts.HEADER_BYTES + artifact.size)
            if not data or not artifact.take(data):
                break
        if artifact.sha256() == found.sha256:
            with contextlib.suppress(msgspec.MsgspecError):
                known = msgspec.json.decode(found.notes, type=prepared_model(_CachedBuild))
                artifact.complete = known.status == 0
                return known
    artifact.clear()
    artifacts.remove_artifact(key)
    return None
