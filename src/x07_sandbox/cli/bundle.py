"""`x07 bundle`, which makes an executable that runs a program in a throw-away VM, and the start of such a bundle.

The policy is part of the bundle. Its launcher starts it here: the files are checked, then the program runs with the
code of `x07 run`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from x07_sandbox.backends.registry import backend_request, select, this_platform
from x07_sandbox.channel.messages import IN, OUT
from x07_sandbox.cli.console import say, show, write_stdout
from x07_sandbox.cli.json_output import print_document, shell_path
from x07_sandbox.cli.outputs import artifact_file, check_outputs, files_read, write_bytes
from x07_sandbox.cli.parser import add_document_flags, add_row, file_path, folder_path, option, switch
from x07_sandbox.cli.run import (
    choose_backend,
    is_x07_program,
    make_caller,
    named_program,
    need_image,
    report_run,
    request_of,
    stdin_of,
)
from x07_sandbox.cli.run_report import from_project
from x07_sandbox.errors import Command, RefusedError, UsageError, escaped
from x07_sandbox.host.documents import render_json
from x07_sandbox.host.paths import closing_fd, raised_as
from x07_sandbox.host.variables import text
from x07_sandbox.host.waiting import write_all
from x07_sandbox.images.store import DEFAULT, arch_of
from x07_sandbox.options import COPIED, FILE_SIZE, GRANTS, GROUPS, LIMITS, OF_X07
from x07_sandbox.policy.decode import decode_policy
from x07_sandbox.policy.model import EffectivePolicy
from x07_sandbox.programs.toolchains import toolchain_named
from x07_sandbox.sessions.request import Program, RunRequest, effective_policy_of, in_memory, load_program, sha256_text
from x07_sandbox.sessions.run import attempt, carry_out, sweep_before_start
from x07_sandbox.x07 import bundle
from x07_sandbox.x07.bundle import POLICY, Bundle, folder_of, read_bundle
from x07_sandbox.x07.project import X07_ARTIFACT, arguments_as_input
from x07_sandbox.x07.runner_report import FAILED_EXIT, NOT_FRAMED, framed_output, report_of, target_of

if TYPE_CHECKING:
    from x07_sandbox.backends.registry import Choice
    from x07_sandbox.sessions.request import RunCaller
    from x07_sandbox.sessions.result import Result
    from x07_sandbox.x07.runner_report import CompileRunReport

_FLAGS: Final = frozenset(
    {
        *("--toolchain", "--policy", "--build-timeout", "--env", "--image", "--backend", "--sandbox-backend"),
        *("--i-accept-weaker-isolation", "--queue-timeout", "--no-cache", "--max-output-bytes", "--program"),
        *("--project", "--world", "--profile"),
        *(row.flag for row in (*LIMITS, FILE_SIZE, *GRANTS, *COPIED, *OF_X07)),
    }
)
"""The flags of `x07 run` that this command has, too."""
_EPILOG: Final = """\
x07 bundle builds PROGRAM once. PATH runs it in a new VM each time, under the policy of the bundle, with
the arguments, streams and exit codes of x07 run. Each start needs x07-sandbox and a guest image on its host, and is
refused if a file of the bundle was changed. Relative folders of the policy are below the folder in which PATH is
started. See docs/how-to/bundle-a-program.md.

examples:
  x07 bundle --out dist/report report.py
  dist/report --verbose < data.txt
  x07 bundle --policy strict.json --pin-image --out prog prog.c
  x07 bundle --force --json --out dist/tool project/

exit code: 0 the bundle was written; 2 wrong usage; 125 refused, or the program could not be built
"""
_WORDS = 3  # the launcher's path, the digest and --


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 bundle`."""
    parser.epilog = _EPILOG
    parser.usage = "x07 bundle [OPTIONS] --out PATH PROGRAM"
    parser.add_argument("program", metavar="PROGRAM", nargs="?", help="source file, executable or project folder")
    out_help = "the executable to write, beside the folder PATH.vm"
    option(parser, "--out", "PATH", out_help, type=file_path, dest="launcher")
    switch(parser, "--force", "replace an existing bundle")
    switch(parser, "--pin-image", "let the program run only in the guest image that it is bundled with")
    emit_help = "also write the report and the policy to this folder"
    option(parser, "--emit-dir", "DIR", emit_help, type=folder_path)
    add_document_flags(parser)
    for title, rows in GROUPS.items():
        mine = [row for row in rows if row.flag in _FLAGS]
        group = parser.add_argument_group(title) if mine else parser
        for row in mine:
            add_row(group, row)
        others = {row.name: row.default for row in rows if row not in mine}
        known = {action.dest for action in parser._actions}  # noqa: SLF001 - argparse has no other way
        parser.set_defaults(**{name: value for name, value in others.items() if name not in known})
    parser.set_defaults(command=[], args=[], carry_out=_bundle)


class _Made(NamedTuple):
    """What a bundle consists of. report: X07's report of the build."""

    request: RunRequest
    program: Program
    policy: EffectivePolicy
    result: Result
    report: CompileRunReport
    payload: bytes

    @property
    def image(self) -> tuple[str, str]:
        """The name and the digest of the guest image."""
        return self.request.image or text("X07_VM_GUEST_IMAGE") or DEFAULT, str(self.result.digests.image)


def _bundle(options: argparse.Namespace) -> int:
    """Build the program and write the bundle. Raises SandboxError."""
    out: Path | None = options.launcher
    program, words = named_program(options)
    if out is None or program is None or program == "-":
        why = "--out is missing" if out is None else "PROGRAM must be a file or a folder"
        raise UsageError("wrong usage", why, ("For example: ", Command("x07 bundle --out dist/prog prog.py")))
    for_x07 = is_x07_program(Path(program))
    if for_x07:
        from_project(options, Path(program))
    _check_place(out, force=options.force)
    for path in _emitted(options.emit_dir):
        if os.path.lexists(path) and not options.force:
            fix = "Name another folder for --emit-dir, or add --force to replace it"
            raise UsageError(f"cannot write {path}", "it exists", fix)
    choice = choose_backend(options)
    require_images(choice, "cannot make a bundle", "Use --sandbox-backend vm")
    with contextlib.ExitStack() as stack:
        need_image(choice, options.image or text("X07_VM_GUEST_IMAGE"))
        caller = make_caller(options, stack, choice, for_x07=for_x07)
        # An empty input: that of a bundle comes from its start.
        request = replace(request_of(options, (program, words), caller.cancel), input=b"")
        made = _build(options, request, caller, stack)
        report = _report(options, made)
        launcher, files = _render(made, pinned=options.pin_image)
        caller.progress("")
        publish(out, launcher, files, force=options.force)
        if options.emit_dir is not None:
            report_file, policy_file = _emitted(options.emit_dir)
            with raised_as(UsageError, f"cannot write to {options.emit_dir}", "Name another folder"):
                options.emit_dir.mkdir(parents=True, exist_ok=True)
            write_bytes(report_file, render_json(report))
            write_bytes(policy_file, made.policy.data)
    if not print_document(report, options, always=for_x07):
        show(f"created {out} and {bundle.folder_of(out)}")
        show(f"next: {shell_path(out) if '/' in shell_path(out) else f'./{shell_path(out)}'}")
    return 0


def _build(options: argparse.Namespace, request: RunRequest, caller: RunCaller, stack: contextlib.ExitStack) -> _Made:
    """Read and build the program. Raises SandboxError; if the build failed, after the compiler's output."""
    path = request.program
    request, program = load_program(request, caller, stack)
    read = [path, *(Path(name) for name in [options.policy] if name), *files_read(request, program)]
    outputs = {"--out": options.launcher, "--report-out": options.report_out}
    outputs |= {f"--emit-dir: {one.name}": one for one in _emitted(options.emit_dir) if one.parent.is_dir()}
    check_outputs(outputs, read, why="the bundle is made from it")
    policy, artifact = effective_policy_of(request), artifact_file(stack)
    caller = replace(caller, program=program, policy=policy, artifact=artifact)
    sweep_before_start()
    result, error = attempt(request, caller, build_only=True)
    caller.cancel.check()
    if error is not None:
        raise error
    report = report_of(result, program, artifact.size)
    if result.outcome != "ok" or not report.compile.ok:
        for output in (result.stdout.data, result.stderr.data):
            sys.stderr.write(escaped(output.decode("utf-8", "surrogateescape"), kept="\n\t"))
        what = f"cannot bundle {program.source.name or path}"
        fix = "Try again" if result.outcome not in {"ok", "build-failed"} else "Correct the program"
        raise RefusedError(what, report.compile.compile_error or result.reason, fix, code="not-bundled")
    payload = os.pread(artifact.fd, artifact.size, 0)
    return _Made(request, program, policy, result, replace(report, solve=None, exit_code=0), payload)


def _emitted(folder: Path | None) -> tuple[Path, ...]:
    """Return the files that --emit-dir asks for: the report and the policy."""
    return () if folder is None else (folder / "report.json", folder / "policy.used.json")


def _check_place(out: Path, *, force: bool) -> None:
    """Raise UsageError if PATH or PATH.vm exists, unless *force* is true and these are a bundle."""
    check_outputs({"--out": out}, [])
    folder = bundle.folder_of(out)
    there = [path for path in (out, folder) if os.path.lexists(path)]
    if there and not force:
        raise UsageError(f"cannot write {out}", f"{there[0]} exists", "Name another file, or add --force to replace it")
    with raised_as(UsageError, f"cannot replace {out}", "Remove it, or name another file"):
        if there and not bundle.is_bundle(out):
            fix = "Remove it, or name another file"
            raise UsageError(f"cannot replace {out}", f"it and {folder} are not a bundle", fix)


def _report(options: argparse.Namespace, made: _Made) -> bundle.BundleReport:
    out, (name, digest) = options.launcher, made.image
    section = bundle.BundleSection(
        out=str(out),
        name=out.name,
        abi={"kind": "argv_v1"},
        policy=bundle.BundledPolicy(
            base_policy=made.policy.base,
            effective_policy=str(bundle.folder_of(out) / bundle.POLICY),
            embedded_env_keys=tuple(sorted(made.request.env)),
        ),
        emit_dir=None if options.emit_dir is None else str(options.emit_dir),
        guest=bundle.Guest(
            platform={"os": "linux", "arch": arch_of(digest).deb},
            image={"digest": digest, "ref": name},
            mounts={"job_in": IN, "job_out": OUT},
        ),
    )
    target = target_of(made.program, made.request.program, made.report)
    return bundle.BundleReport(target=target, bundle=section, report=made.report)


def _render(made: _Made, *, pinned: bool) -> tuple[bytes, bundle.Files]:
    """Return the launcher, and the files of the folder by name. Raises UsageError."""
    request, program, (image, digest) = made.request, made.program, made.image
    manifest = bundle.VmManifest(
        backend=str(made.result.backend),
        guest_image=image,
        guest_digest=digest,
        payload="payload",
        workdir="/x07/work",
        policy="policy.json",
    )
    facts = bundle.BundleFacts(
        pinned=pinned,
        toolchain=program.toolchain.name,
        source=program.source,
        project=program.project,
        args=request.args,
        env=dict(request.env),
        denied=dict(made.policy.denied),
        cpu_ms=program.cpu_ms,
        max_output_bytes=request.max_output_bytes,
    )
    return bundle.render_bundle(manifest, facts, made.policy.data, made.payload)


def publish(out: Path, launcher: bytes, files: Mapping[str, bytes], *, force: bool) -> None:
    """Write the bundle under a temporary name, then rename it, so that an error leaves nothing. Raises RefusedError.

    Between the two renames, a start finds digests that do not match, and is refused.
    """
    folder, temporary = bundle.folder_of(out), out.with_name(f".x07-{os.urandom(8).hex()}")
    old, new, start = (temporary / name for name in ("old", "new", "launcher"))
    try:
        new.mkdir(parents=True)
        for path, data in ((start, launcher), *((new / name, data) for name, data in files.items())):
            mode = 0o777 if path == start else 0o666
            with closing_fd(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)) as fd:
                write_all(fd, data)
        if force and os.path.lexists(folder):
            folder.rename(old)
        try:
            new.rename(folder)
            if force:
                start.replace(out)
            else:
                out.hardlink_to(start)  # does not replace a file that appeared meanwhile
        except OSError:
            if not new.exists():
                folder.rename(new)
            if old.exists():
                old.rename(folder)
            raise
    except OSError as exc:
        why, fix = exc.strerror or str(exc), "Name another file, or free space there"
        raise RefusedError(f"cannot write {out}", why, fix, code="output-not-written") from exc
    finally:
        from shutil import rmtree  # a start of a bundle does not need it

        rmtree(temporary, ignore_errors=True)


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
        file=in_memory(b"", f"{IN}/none", 0o644, stack),  # for a build VM, which no start has
        sha256=sha256_text(bundle.payload),
        project=facts.project,
        cpu_ms=facts.cpu_ms,
    )
