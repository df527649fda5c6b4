"""The program of a run: a source file, a text, files in memory, or a project. It is read only once."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from x07_sandbox.errors import Flag, Text, UsageError, listed
from x07_sandbox.host import settings
from x07_sandbox.host.paths import is_folder, read_bounded
from x07_sandbox.policy.decode import MAX_BYTES as POLICY_MAX_BYTES
from x07_sandbox.programs.toolchains import (
    PROJECT_FOLDER,
    SOURCE_FOLDER,
    Source,
    Toolchain,
    check_executable,
    source_name,
    toolchain_for,
    toolchain_named,
)
from x07_sandbox.sessions.request import (
    ARGUMENTS_MAX_BYTES,
    Program,
    ProjectPolicy,
    RunCaller,
    RunRequest,
    in_memory,
    sha256_text,
)

if TYPE_CHECKING:
    from x07_sandbox.files.pack import Packed
    from x07_sandbox.programs.project import ProjectFolder

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
    file = in_memory(data, f"{SOURCE_FOLDER}/{name}", 0o644, stack)
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
    assert place is not None  # noqa: S101 - for the type checker: a folder, or that name
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
