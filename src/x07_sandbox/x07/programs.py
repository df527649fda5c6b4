"""Read a program or project in the X07 language for its compiler."""

import contextlib
from pathlib import Path

from msgspec.structs import replace

from x07_sandbox.channel.messages import IN, PROJECT_FOLDER
from x07_sandbox.errors import Flag, UsageError
from x07_sandbox.files.pack import Packed, pack_files, pack_tree
from x07_sandbox.host import settings
from x07_sandbox.host.paths import is_folder, read_bounded
from x07_sandbox.host.variables import number, text
from x07_sandbox.programs.project import ProjectFolder
from x07_sandbox.programs.toolchains import Source, source_name
from x07_sandbox.sessions.request import (
    Program,
    RunCaller,
    RunRequest,
    in_memory,
    reject_overridden_options,
    reject_profile,
    sha256_text,
    single_file,
    with_project_files,
)
from x07_sandbox.x07 import project as x07
from x07_sandbox.x07.project import X07, X07_ARTIFACT


def load_x07(
    request: RunRequest,
    caller: RunCaller,
    path: Path,
    stack: contextlib.ExitStack,
    *,
    options: x07.Options = x07.Options(),  # noqa: B008 - it cannot be changed
    profiles: bool = True,
) -> tuple[RunRequest, Program] | None:
    """Return the request with the settings of the project's profile, and the program at *path*. Raises UsageError.

    Return None for a program in another language. options: options for the compiler. profiles: whether to use a
    project's profiles.
    """
    if not x07.is_x07(path):
        return None
    reject_overridden_options(request, str(path), ("an X07 program needs no ", Flag("--toolchain")))
    request = _with_arguments_as_input(request, path)
    given = replace(
        options,
        max_output_bytes=request.max_output_bytes,
        compat=options.compat if options.compat is not None else text("X07_COMPAT"),
        max_c_bytes=options.max_c_bytes if options.max_c_bytes is not None else number("X07_MAX_C_BYTES"),
    )
    if path.name.endswith(x07.SOURCE_SUFFIX) and path.name != x07.PROJECT_FILE:
        if request.profile is not None:
            raise UsageError(
                "cannot use --profile", "a single program has no profiles", "Remove --profile, or run a project"
            )
        options = x07.merged(given, None)
        request = replace(request, max_output_bytes=options.max_output_bytes)
        return request, _program(caller, path, options, stack)
    return _project(request, caller, path, given, stack, profiles=profiles)


def load_artifact(
    request: RunRequest, _caller: RunCaller, path: Path, stack: contextlib.ExitStack, *, options: x07.Options
) -> tuple[RunRequest, Program]:
    """Return *request* adapted to the executable at *path*, which X07's compiler made, and the executable as a program.

    Raises UsageError.
    """
    reject_profile(request, str(path))
    data = read_bounded(path, "artifact", settings.ARTIFACT_MAX_BYTES)
    program = single_file(X07_ARTIFACT, source_name(str(path)), data, request, stack)
    request = _with_arguments_as_input(request, path)
    options = x07.merged(replace(options, max_output_bytes=request.max_output_bytes), None)
    request = replace(request, max_output_bytes=options.max_output_bytes)
    return request, replace(program, cpu_ms=_cpu_ms(options))


def _with_arguments_as_input(request: RunRequest, path: Path) -> RunRequest:
    """Return the request with its arguments, if any, encoded as the program's whole input. Raises UsageError."""
    if not request.args:
        return request
    if request.input is not None or request.stdin:
        why = "an X07 program receives its arguments as input"
        raise UsageError(f"cannot run {path} with arguments and input", why, "Remove the arguments or the input")
    return replace(request, args=(), input=x07.arguments_as_input(request.args))


def _program(caller: RunCaller, path: Path, options: x07.Options, stack: contextlib.ExitStack) -> Program:
    files = {"main.x07.json": read_bounded(path, "program", settings.SOURCE_MAX_BYTES)}
    words = ["--program", f"{IN}/{x07.PROGRAM}"]
    read: list[Path] = []
    for index, root in enumerate(options.module_roots):
        packed = pack_tree(Path(root), ["**"], what=f"cannot use the module root {root}", check=caller.cancel.check)
        files |= {f"module_roots/{index}/{name}": data for name, data in packed.files.items()}
        read += [Path(root) / name for name in packed.files]
        words += ["--module-root", f"{IN}/program/module_roots/{index}"]
    program = _loaded(pack_files(files, "the program"), f"{IN}/program", words, options, stack)
    return replace(program, read=tuple(read))


def _project(
    request: RunRequest,
    caller: RunCaller,
    path: Path,
    given: x07.Options,
    stack: contextlib.ExitStack,
    *,
    profiles: bool,
) -> tuple[RunRequest, Program]:
    if is_folder(path):
        folder = ProjectFolder(path)
        path /= x07.PROJECT_FILE
        data = folder.read(x07.PROJECT_FILE, x07.PROJECT_FILE, x07.MAX_BYTES)
    else:  # the named file itself may be a link
        folder = ProjectFolder(path.parent)
        data = read_bounded(path, "project", x07.MAX_BYTES)
    project = x07.decode_project(data, source=str(path))
    lock = project.lockfile or x07.LOCK_FILE
    if not folder.has_file(lock):
        why = f"its lock file {lock[:80]} is missing"
        raise UsageError(f"cannot run the project {path}", why, "Create it with `x07 pkg lock` of the X07 toolchain")
    input_fd = None
    profile = x07.choose_profile(project, request.profile, source=str(path)) if profiles else None
    if profile is not None:
        if profile.world != x07.WORLD and request.policy is None:
            why = f"its profile is for the world {profile.world[:80]}; only {x07.WORLD} is supported"
            fix = ("Use another --profile, or add ", Flag("--policy"))
            raise UsageError(f"cannot run the project {path}", why, fix)
        request, input_fd = with_project_files(request, folder, stack, policy=profile.policy, stdin=profile.input)
    options = x07.merged(given, profile)
    if given.max_output_bytes is None:  # a project may lower the limit, not raise it
        most = min(options.max_output_bytes or 0, settings.OUTPUT_MAX_BYTES)
        options = replace(options, max_output_bytes=most)
    request = replace(request, max_output_bytes=options.max_output_bytes)
    words = ["--project", f"{PROJECT_FOLDER}/{path.name}"]
    packed = pack_tree(folder.root, ["**"], check=caller.cancel.check)
    # Output files of an earlier run are packed too. They are not sources, so the next run may overwrite them.
    sources = (name for name in packed.files if name.endswith(x07.SOURCE_SUFFIX))
    named = (name for each in project.profiles.values() for name in (each.policy, each.input) if name is not None)
    read = (path, *(folder.root / name for name in (lock, *sources, *named)))
    program = _loaded(packed, PROJECT_FOLDER, words, options, stack)
    return request, replace(program, project=True, lockfile=lock, read=read, input_fd=input_fd)


def _loaded(
    packed: Packed, folder: str, words: list[str], options: x07.Options, stack: contextlib.ExitStack
) -> Program:
    argv = tuple(x07.compile_argv(options, words))
    return Program(
        toolchain=X07,
        source=Source(name="", folder=folder, files=tuple(packed.files), args=argv),
        data=packed.tree,
        file=replace(in_memory(packed.tree, folder, 0o755, stack), kind="tree"),
        sha256=sha256_text(packed.tree),
        cpu_ms=_cpu_ms(options),
    )


def _cpu_ms(options: x07.Options) -> int | None:
    return 1000 * options.cpu_time_limit_seconds if options.cpu_time_limit_seconds else None
