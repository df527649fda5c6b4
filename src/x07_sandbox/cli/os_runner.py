"""The command `x07-os-runner`: X07's runner interface over the same run as `x07 run`.

Standard output is one JSON object, X07's report, or nothing (exit 2); all else goes to standard error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NoReturn

import msgspec
from msgspec.structs import replace

from x07_sandbox.backends.selection import Asked, Platform, select, this_platform, working
from x07_sandbox.cli.cancel import cancelled_by_signals
from x07_sandbox.cli.console import LiveLine, say
from x07_sandbox.cli.os_runner_options import COMMAND, OPTIONS, parser, specrows
from x07_sandbox.cli.streams import fill_closed_streams, leave
from x07_sandbox.errors import RefusedError, SandboxError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.paths import private_dir, state_dir
from x07_sandbox.host.variables import SANDBOX_BACKENDS, check_environment, flag, text
from x07_sandbox.policy import Policy
from x07_sandbox.programs.toolchains import ARTIFACT, OUTPUT, PROGRAM_FOLDER, Toolchain, toolchain_for
from x07_sandbox.reports.attestation import WRITE_CODE, Attested, attest, reference
from x07_sandbox.reports.runner import (
    Built,
    CompileMode,
    CompileRunReport,
    World,
    failure_report,
    render_report,
    runner_report,
)
from x07_sandbox.runs.folder import unnamed_file
from x07_sandbox.runs.lease import PoolMachines
from x07_sandbox.runs.request import RunRequest, read_policy
from x07_sandbox.runs.run import run
from x07_sandbox.runs.streams import memory_file

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from x07_sandbox.runs.result import Result
    from x07_sandbox.runs.streams import OutFile

SETUP_EXIT: Final = 2
INPUT_MAX_BYTES: Final = 64 * settings.MIB
_X07_SOURCE: Final = ".x07.json"
_X07_PROJECT: Final = "x07.json"
_OUR_PROJECT: Final = "x07-sandbox.toml"
_WORLDS: Final[dict[str, World]] = {"run-os": "run-os", "run-os-sandboxed": "run-os-sandboxed"}
_NO_X07: Final = "this version's guest image carries no X07 toolchain"
_SANDBOXED: Final = "--world run-os-sandboxed --policy FILE"


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be built and run."""

    path: Path
    mode: CompileMode
    toolchain: Toolchain


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """A valid command line of run-os-sandboxed, and what it names, read."""

    target: Target
    policy: Policy
    policy_bytes: bytes
    policy_path: Path
    input: bytes
    max_output_bytes: int
    compiled_out: Path | None
    attest_runtime: Path | None
    accepted: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0 ok, 1 a report of a failure, 2 nothing on standard output."""
    fill_closed_streams()
    try:
        for warning in check_environment(os.environ):
            _say(warning)
        options = _parsed(argv)
        if options.cli_specrows:
            return _print(specrows().encode(), 0)
        return _carry_out(options)
    except SandboxError as exc:
        _say(str(exc))
    except KeyboardInterrupt:
        _say("cancelled before there was a run")
    except OSError as exc:
        _say(f"cannot go on: {exc}")
    except Exception:  # noqa: BLE001 - the last place that can keep the exit code's promise
        import traceback

        traceback.print_exc()
        _say("this is a bug in x07-sandbox; please report it with the lines above")
    return SETUP_EXIT


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    options, unknown = parser().parse_known_args(argv)
    if unknown:
        raise UsageError("wrong usage", f"unrecognized arguments: {' '.join(unknown)}", f"See {COMMAND} --help")
    return options


def _carry_out(options: argparse.Namespace) -> int:
    world = _world(options.world or "run-os")
    if options.compile_only:
        raise UsageError("cannot take --compile-only", "it is for X07's own runner inside a guest", "Leave it away")
    given = [option.flag for option in OPTIONS[:3] if getattr(options, option.key) is not None]
    if len(given) != 1:
        what = "none of them was" if not given else f"{' and '.join(given)} were"
        raise UsageError("wrong usage", f"{what} given", "Give exactly one of --program, --project, --artifact")
    _check_policy_flag(world, options)
    accepted = options.i_accept_weaker_isolation or flag("X07_I_ACCEPT_WEAKER_ISOLATION")
    _check_backend(this_platform(), world, options.sandbox_backend, accepted=accepted)
    target = _target(options)
    if world == "run-os":
        # Only with --sandbox-backend vm does it come here; X07's runner has a report for that, not a usage error.
        message = "the sandbox backend vm runs run-os-sandboxed only"
        report = failure_report(message, mode=target.mode, world=world, lang_id=target.toolchain.name)
        _say(f"{message}. Use {_SANDBOXED}")
        return _print(render_report(report), report.exit_code)
    order = _order(options, target, accepted=accepted)
    _note_unused(options, target)
    return _run(order)


# the command line


def _world(name: str) -> World:
    if name in _WORLDS:
        return _WORLDS[name]
    why = "X07's deterministic worlds have runners of their own" if name.startswith("solve-") else "no such world"
    raise UsageError(f"cannot run in the world {name!r}", why, f"Use {_SANDBOXED}")


def _check_policy_flag(world: World, options: argparse.Namespace) -> None:
    if world == "run-os":
        for name, value in (("--policy", options.policy), ("--attest-runtime", options.attest_runtime)):
            if value is not None:
                raise UsageError(f"{name} does not go with run-os", "that world has no policy", f"Use {_SANDBOXED}")
    elif options.policy is None:
        raise UsageError("no policy", f"{world} runs nothing without one", "Name it with --policy FILE")


def _check_backend(platform: Platform, world: World, named: str | None, *, accepted: bool) -> None:
    """Raises UsageError or RefusedError where the wall that was asked for cannot be had, or was not accepted."""
    auto: Literal["vm", "none"] = "vm" if world == "run-os-sandboxed" else "none"
    asked = Asked(
        sandbox_flag=SANDBOX_BACKENDS[named] if named else None,
        sandbox_variable=text("X07_SANDBOX_BACKEND"),
        backend_variable=text("X07_VM_BACKEND"),
        accepted=accepted,
        auto=auto,
    )
    try:
        select(platform, asked)
    except RefusedError as exc:
        # This command has no --backend, and in run-os not even a virtual machine would do.
        _, sandbox_class, _, backend = working(platform) or working(Platform(system="linux"))
        fix = f"Use {_SANDBOXED} --sandbox-backend {sandbox_class}, with X07_VM_BACKEND={backend} or unset"
        raise RefusedError(exc.what, exc.why, fix if working(platform) else f"{fix}, on Linux") from exc


def _target(options: argparse.Namespace) -> Target:
    """What the flags name. Raises UsageError for what this version cannot build."""
    if options.artifact is not None:
        why = "an artifact of X07 speaks X07's own protocol, and only its runner inside a guest may be given one"
        raise UsageError(
            f"cannot run the artifact {options.artifact}", why, "Give its source with --program, or x07 run"
        )
    if options.project is not None:
        return _project(Path(options.project))
    path = Path(options.program)
    if path.name.endswith(_X07_SOURCE):
        raise UsageError(f"cannot run {path}", _NO_X07, "Give a program of another language, as x07 run --help lists")
    return Target(path=path, mode="compile-run", toolchain=toolchain_for(str(path)))


def _project(path: Path) -> Target:
    """A project by its manifest: the one place where manifests come in."""
    if path.name == _X07_PROJECT:
        why, fix = _NO_X07, "Give a program of another language with --program"
    elif path.name == _OUR_PROJECT:
        why, fix = "this version reads no manifests yet", "Give the program itself with --program"
    else:
        why, fix = f"a manifest is called {_X07_PROJECT} or {_OUR_PROJECT}", "Name one, or give --program"
    raise UsageError(f"cannot run the project {path}", why, fix)


def _order(options: argparse.Namespace, target: Target, *, accepted: bool) -> Order:
    """Read and check what the flags name, before anything starts. Raises UsageError."""
    policy_path = Path(options.policy)
    policy, policy_bytes = read_policy(policy_path)
    compiled_out = None if options.compiled_out is None else Path(options.compiled_out)
    attest_runtime = None if options.attest_runtime is None else Path(options.attest_runtime)
    if compiled_out is not None and target.toolchain.archive:
        raise UsageError(
            f"cannot write {compiled_out}", f"{target.toolchain.name} makes no executable", "Leave --compiled-out away"
        )
    for name, place in (("--compiled-out", compiled_out), ("--attest-runtime", attest_runtime)):
        if place is not None:
            _check_place(name, place)
    return Order(
        target=target,
        policy=policy,
        policy_bytes=policy_bytes,
        policy_path=policy_path,
        input=b"" if options.input is None else _read_input(Path(options.input)),
        max_output_bytes=settings.MIB if options.max_output_bytes is None else options.max_output_bytes,
        compiled_out=compiled_out,
        attest_runtime=attest_runtime,
        accepted=accepted,
    )


def _read_input(path: Path) -> bytes:
    """All of it, since its length is attested. Raises UsageError."""
    try:
        with path.open("rb") as file:
            data = file.read(INPUT_MAX_BYTES + 1)
    except OSError as exc:
        raise UsageError(f"cannot read the input {path}", exc.strerror or str(exc), "Name a readable file") from exc
    if len(data) > INPUT_MAX_BYTES:
        why = f"it has more than {INPUT_MAX_BYTES} bytes"
        raise UsageError(f"cannot read the input {path}", why, "Stream it with x07 run --input")
    return data


def _check_place(name: str, path: Path) -> None:
    """Raises UsageError where a file cannot be written. It is replaced as a whole, so only the folder matters."""
    what = f"cannot write {path} ({name})"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(what, "something that is no file lies there", "Name another place")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(what, f"{path.parent} is no folder that you can write", "Name another place")


def _note_unused(options: argparse.Namespace, target: Target) -> None:
    """Nothing that was asked for is passed over in silence."""
    values = {option.flag: getattr(options, option.key) for option in OPTIONS if option.x07_only}
    unused = [name for name, value in values.items() if value is not None and value is not False]
    if unused:
        _say(f"{', '.join(unused)}: for X07 programs only; {target.toolchain.name} programs have the policy's limits")


# the run


def _run(order: Order) -> int:
    with contextlib.ExitStack() as stack:
        artifact = unnamed_file(private_dir(state_dir()), OUTPUT, settings.ARTIFACT_MAX_BYTES, stack)
        if order.attest_runtime is not None:
            order.attest_runtime.unlink(missing_ok=True)  # what lies there attests another run
        cancel = stack.enter_context(cancelled_by_signals())
        progress = LiveLine()
        stack.callback(progress, "")
        result = run(
            RunRequest(
                program=order.target.path,
                policy=order.policy_path,
                stdin_fd=memory_file(order.input, stack),
                live_stderr=2,
                max_output_bytes=order.max_output_bytes,
                artifact=artifact,
                machines=PoolMachines(),
                progress=progress,
                cancel=cancel,
            )
        )
        progress("")
        if result.outcome == "usage-error":
            _say(result.reason)
            return SETUP_EXIT
        report = _report(order, result, artifact)
    if report.exit_code:
        _say(f"{result.outcome}: {result.reason}")
    return _print(render_report(report), report.exit_code)


def _report(order: Order, result: Result, artifact: OutFile) -> CompileRunReport:
    """The report, and the files that were asked for with it. Raises RefusedError where one cannot be written."""
    built = Built(
        mode=order.target.mode,
        world="run-os-sandboxed",
        lang_id=order.target.toolchain.name,
        path=OUTPUT,
        size=artifact.size,
    )
    report = runner_report(result, built)
    if order.compiled_out is not None and report.compile.ok:
        _write(order.compiled_out, lambda fd: _copy(artifact, fd), mode=0o777)
    if order.attest_runtime is None:
        return report
    if report.solve is None or "run" not in result.phases:
        _say("nothing was run, so nothing is attested")
        return report
    given = Attested(
        policy=order.policy,
        policy_bytes=order.policy_bytes,
        policy_path=str(order.policy_path),
        artifact_path=PROGRAM_FOLDER if order.target.toolchain.archive else ARTIFACT,
        input_len_bytes=len(order.input),
        weaker_isolation=order.accepted,
    )
    made = attest(result, report.solve, given)
    text = render_report(made)
    _write(order.attest_runtime, lambda fd: _write_all(fd, text), mode=0o666, code=f"{WRITE_CODE}: ")
    return replace(report, runtime_attestation=reference(str(order.attest_runtime), made))


def _write(path: Path, fill: Callable[[int], None], *, mode: int, code: str = "") -> None:
    """Write *path* as a whole or not at all; mode: as for open(2), so that the user's umask holds."""
    temporary = path.with_name(f".{path.name[:64]}.{os.urandom(8).hex()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            fill(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        why = exc.strerror or str(exc)
        raise RefusedError(f"{code}cannot write {path}", why, "Name another place, or free space there") from exc


def _copy(artifact: OutFile, fd: int) -> None:
    position = 0
    while position < artifact.size and (count := os.sendfile(fd, artifact.fd, position, artifact.size - position)):
        position += count


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _print(data: bytes, code: int) -> int:
    """Write to standard output past Python's buffer, which would be written once more at the end of the process."""
    _write_all(1, data)
    return code


def _say(line: str) -> None:
    say(line, COMMAND)


def entry() -> NoReturn:
    """The command itself: run and end with exactly that code."""
    try:
        code = main()
    except SystemExit as exc:  # argparse's, after --help
        code = exc.code if isinstance(exc.code, int) else 0
    leave(code)


if __name__ == "__main__":
    sys.exit(entry())
