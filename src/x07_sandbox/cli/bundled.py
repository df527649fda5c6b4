"""The start of a bundle by its launcher: check the files, then run the program with the code of `x07 run`."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from x07_sandbox.backends.selection import backend_request, select, this_platform
from x07_sandbox.cli.atomic_output import artifact_file
from x07_sandbox.cli.console import say, write_stdout
from x07_sandbox.cli.run import make_caller, need_image, report_run, stdin_of
from x07_sandbox.errors import RefusedError, UsageError
from x07_sandbox.host.variables import text
from x07_sandbox.images.store import DEFAULT
from x07_sandbox.library.requests import carry_out
from x07_sandbox.policy.decode import decode_policy
from x07_sandbox.programs.toolchains import SOURCE_FOLDER, toolchain_named
from x07_sandbox.sessions.request import EffectivePolicy, Program, RunRequest, in_memory, sha256_text
from x07_sandbox.x07.bundle import POLICY, Bundle, folder_of, read_bundle
from x07_sandbox.x07.project import X07_ARTIFACT, arguments_as_input
from x07_sandbox.x07.runner_report import FAILED_EXIT, NOT_FRAMED, framed_output

if TYPE_CHECKING:
    from x07_sandbox.backends.selection import Choice

_WORDS = 3  # the launcher's path, the digest and --


def start_options(words: list[str]) -> argparse.Namespace:
    """Return the options of a start. words: the launcher's path, the digest in it, --, and the program's arguments."""
    none = dict.fromkeys(("artifact", "attest_runtime", "code", "report", "report_out", "stdin"))
    return argparse.Namespace(carry_out=_start, words=words, json=False, no_pool=False, quiet_json=False, **none)


def _start(options: argparse.Namespace) -> int:
    """Check the bundle, run its program, and return the exit code of `x07 run`. Raises SandboxError."""
    if len(options.words) < _WORDS:
        raise UsageError(
            "wrong usage", "only the launcher of a bundle uses this command", "Start the bundle by its path"
        )
    launcher, args = Path(options.words[0]), tuple(options.words[_WORDS:])
    bundle = read_bundle(launcher, options.words[1])
    choice = _choice(bundle)
    request = _request(launcher, bundle, args)
    with contextlib.ExitStack() as stack:
        need_image(choice, request.image)
        artifact = artifact_file(stack)
        artifact.complete = artifact.take(bundle.payload)
        program = _program(bundle, stack)
        framed = program.toolchain.protocol is not None
        policy_path = folder_of(launcher) / POLICY
        policy = decode_policy(bundle.policy, source=str(policy_path))
        caller = replace(
            make_caller(options, stack, choice, for_x07=False),
            program=program,
            policy=EffectivePolicy(policy, bundle.policy, str(policy_path), bundle.facts.denied),
            artifact=artifact,
            image_digest=bundle.manifest.guest_digest if bundle.facts.pinned else None,
        )
        if framed:
            caller = replace(caller, live_stdout=None)
        else:
            program = replace(program, input_fd=stdin_of(options, request, for_x07=False))
            caller = replace(caller, program=program)
        result, error = carry_out(request, caller, say)
    code = report_run(result, error, [])
    if not framed or result.outcome not in {"ok", "failed"}:
        return code
    output = framed_output(result.stdout.data)
    write_stdout(output or b"")
    if output is None and not code:
        say(f"failed: {NOT_FRAMED}")
        return FAILED_EXIT
    return code


def _choice(bundle: Bundle) -> Choice:
    """Return the backend that variables select, else the one of the bundle. Raises UsageError, RefusedError."""
    by_variable = text("X07_VM_BACKEND") or text("X07_SANDBOX_BACKEND") not in {None, "auto"}
    named = None if by_variable else bundle.manifest.backend
    choice = select(this_platform(), backend_request(backend=named, flags=()))
    fix = "Unset X07_SANDBOX_BACKEND and X07_VM_BACKEND, or select a virtual machine"
    require_images(choice, "cannot start the bundle", fix)
    return choice


def require_images(choice: Choice, what: str, fix: str) -> None:
    """Raise RefusedError if the backend uses no guest image. what, fix: for the message."""
    if not choice.made.uses_image:
        why = f"a bundle runs in a guest image, and the backend {choice.backend} uses none"
        raise RefusedError(what, why, fix, code="no-image-used")


def _request(launcher: Path, bundle: Bundle, args: tuple[str, ...]) -> RunRequest:
    """Return the request for the run; relative folders of the policy are below the current folder."""
    facts, manifest = bundle.facts, bundle.manifest
    if text("X07_VM_GUEST_IMAGE") not in {None, manifest.guest_image}:
        why = f"X07_VM_GUEST_IMAGE names another guest image than the bundle, which uses {manifest.guest_image}"
        raise RefusedError("cannot start the bundle", why, "Unset X07_VM_GUEST_IMAGE", code="image-not-pinned")
    image = None if manifest.guest_image == DEFAULT else manifest.guest_image
    request = RunRequest(
        program=None if facts.project else launcher,  # of a project, it would be the base of relative folders
        policy=folder_of(launcher) / POLICY,
        args=args or facts.args,
        env=facts.env,
        image=manifest.guest_digest if facts.pinned else image,
        max_output_bytes=facts.max_output_bytes,
    )
    if facts.toolchain != X07_ARTIFACT.name:
        return request
    name = launcher.name  # X07's programs see it as their first argument
    return replace(request, args=(), input=arguments_as_input((name, *request.args)))


def _program(bundle: Bundle, stack: contextlib.ExitStack) -> Program:
    facts = bundle.facts
    return Program(
        toolchain=X07_ARTIFACT if facts.toolchain == X07_ARTIFACT.name else toolchain_named(facts.toolchain),
        source=facts.source,
        data=b"",
        file=in_memory(b"", f"{SOURCE_FOLDER}/none", 0o644, stack),  # for a build VM, which no start has
        sha256=sha256_text(bundle.payload),
        project=facts.project,
        cpu_ms=facts.cpu_ms,
    )
