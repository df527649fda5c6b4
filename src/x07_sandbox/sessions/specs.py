"""The description of a session: of a build, and of a run or a sandbox."""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import msgspec

from x07_sandbox.backends.base import Job, MachineKind, Needs, RootPlace
from x07_sandbox.channel.messages import (
    CWD,
    ENVIRONMENT,
    FREE,
    IN,
    PROJECT_FOLDER,
    CommandLimits,
    Confine,
    Exec,
    InputFile,
    Left,
    Mount,
    Network,
    Open,
    Room,
)
from x07_sandbox.errors import RefusedError
from x07_sandbox.host import settings
from x07_sandbox.policy.decode import program_environment
from x07_sandbox.policy.denials import GuestMount
from x07_sandbox.policy.guest import build_limits, command_limits, confinement, ram_class_bytes, tmp_bytes
from x07_sandbox.policy.model import Policy
from x07_sandbox.programs.toolchains import ARTIFACT, PROGRAM_FOLDER, build_driver
from x07_sandbox.sessions.request import in_memory
from x07_sandbox.sessions.transfers import InFile, OutFile, Receivers

if TYPE_CHECKING:
    from x07_sandbox.host.waiting import Caller
    from x07_sandbox.images.verify import OpenImage
    from x07_sandbox.records.runs import Claim
    from x07_sandbox.sessions.host_files import HostFiles
    from x07_sandbox.sessions.prepare import Prepared
    from x07_sandbox.sessions.private_files import LeftFiles
    from x07_sandbox.sessions.request import Program

_OF_ROOT: Final = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
# The variables by which OpenSSL, Python, Go, curl, git, pip, Node, cargo and others find the certificates they trust.
_CA_VARIABLES: Final = (
    *("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO", "PIP_CERT"),
    *("AWS_CA_BUNDLE", "CARGO_HTTP_CAINFO"),
)
_NO_ROOM: Final = Room(0, 0)
# For a program with a manifest, the private working folder is mounted at the folder in which relative roots appear.
_PROJECT_MOUNT: Final = Mount(tree=None, sub="", at=PROJECT_FOLDER, write=True, changes=False)


class Planned(NamedTuple):
    """What is known of a session when its machine starts. The other fields are those of `SessionSpec`.

    network: whether it has connections. describe: returns the rest, once, while the machine wakes. Raises SandboxError.
    """

    name: Literal["build", "run"]
    wall_ms: int
    ram_bytes: int
    network: bool
    describe: Callable[[], SessionSpec]

    def kind(self, image: OpenImage | None) -> MachineKind:
        """Return the kind of the session's machine."""
        return MachineKind(image=image, ram_bytes=self.ram_bytes, runtime=self.name, network=self.network)


class SessionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The description of a session. The caller owns the descriptors.

    order: the command of a build or a run; for a sandbox, what all its commands have in common.
    limits_shown: the limits that messages show.
    places: the guest folders with host files, for the backend.
    areas: the mounted host folders, for the advice in denials.
    """

    name: Literal["build", "run"]
    opening: Open
    order: Exec
    files: tuple[InFile, ...]
    receivers: Receivers
    wall_ms: int
    ram_bytes: int
    places: tuple[RootPlace, ...] = ()
    areas: tuple[GuestMount, ...] = ()
    limits_shown: Any = None

    @property
    def needs(self) -> Needs:
        """The facts about the session that a backend may need before it starts an instance."""
        opening, limits = self.opening, self.order.limits
        confine = opening.confine
        return Needs(
            mem_bytes=limits.mem_bytes,
            tmp_bytes=opening.tmp_bytes,
            tasks=limits.tasks,
            fds=limits.fds,
            files_bytes=sum(file.size for file in self.files),
            out=opening.out_writable,
            places=self.places,
            closed=not confine.execute or confine.programs is not None,
            alone=confine.alone,
        )

    def job(self, claim: Claim, image: OpenImage | None, caller: Caller, **how: Any) -> Job:  # noqa: ANN401 - fields of a job
        """Return the job in which a backend starts an instance for the session. how: further fields of `Job`."""
        return Job(claim=claim, kind=self.kind(image), caller=caller, needs=self.needs, **how)

    def planned(self) -> Planned:
        """Return what is known when the machine starts, which is all."""
        return Planned(self.name, self.wall_ms, self.ram_bytes, self.opening.network is not None, lambda: self)

    def kind(self, image: OpenImage | None) -> MachineKind:
        """Return the kind of the session's machine."""
        return self.planned().kind(image)


def input_files(files: Sequence[InFile]) -> list[InputFile]:
    """Return the descriptions of *files* for the guest."""
    return [InputFile(file.path, file.mode, file.kind, file.size) for file in files]


def run_environment(
    policy: Policy,
    named: Mapping[str, str],
    ours: Mapping[str, str],
    of_image: Mapping[str, str] = MappingProxyType({}),
    *,
    root: bool = False,
) -> dict[str, str]:
    """Return a program's environment: fixed variables, allowed host variables (*ours*), *named* ones, and X07's.

    of_image: the variables of an imported image, which replace fixed ones. root: whether the program is root inside.
    """
    env = {**ENVIRONMENT, **(_OF_ROOT if root else {}), **of_image}
    if policy.env.enabled:
        env |= {key: ours[key] for key in policy.env.allow_keys if key in ours and not key.startswith("X07_")}
    for key in policy.env.deny_keys:
        env.pop(key, None)
    return {**env, **named, **program_environment(policy)}


def build_spec(prepared: Prepared, program: Program, artifact: OutFile, stack: contextlib.ExitStack) -> SessionSpec:
    """Return the description of the build, which writes the built program to *artifact*."""
    toolchain = program.toolchain
    assert toolchain.build is not None
    files, env = [program.file], dict(ENVIRONMENT)
    if toolchain.packs:
        files.append(in_memory(build_driver(), program.source.driver, 0o644, stack))
    if toolchain.protocol is not None:
        extras = toolchain.protocol.build_extras(prepared.policy.data)
        files += [in_memory(data, path, 0o644, stack) for path, data in extras.files.items()]
        env |= extras.env
    wall_ms = prepared.request.build_wall_ms
    limits = build_limits(wall_ms)
    order = Exec(1, toolchain.build(program.source), env, CWD, command_limits(limits, settings.BUILD_TASKS))
    return SessionSpec(
        name="build",
        opening=opening(FREE, order.limits, files, out_writable=True),
        order=order,
        files=tuple(files),
        receivers=Receivers(output=artifact, is_tree=toolchain.packs),
        wall_ms=wall_ms or settings.BUILD_WALL_MS,
        ram_bytes=ram_class_bytes(limits.mem_bytes),
        limits_shown=limits,
    )


def opening(  # noqa: PLR0913 - what a session consists of
    confine: Confine,
    limits: CommandLimits,
    files: list[InFile],
    mounts: Sequence[Mount] = (),
    network: Network | None = None,
    room: Room = _NO_ROOM,
    *,
    out_writable: bool,
    root: bool = False,
) -> Open:
    """Return the description of a session. confine, limits: of its commands."""
    return Open(
        hostname=settings.GUEST_HOSTNAME,
        mem_bytes=limits.mem_bytes,
        tasks=limits.tasks,
        tmp_bytes=tmp_bytes(limits.mem_bytes),
        files=input_files(files),
        mounts=list(mounts),
        confine=confine,
        network=network,
        out_writable=out_writable,
        room=room,
        root=root,
    )


def run_plan(prepared: Prepared, describe: Callable[[], SessionSpec]) -> Planned:
    """Return what is known of a run or a sandbox before `run_spec`."""
    limits = prepared.plan.limits
    return Planned("run", limits.wall_ms, limits.ram_bytes, prepared.egress is not None, describe)


def run_spec(
    prepared: Prepared, artifact: OutFile | None, stack: contextlib.ExitStack, host_files: HostFiles | None = None
) -> SessionSpec:
    """Return the description of a run, which executes *artifact* or a command, or of a sandbox, which has neither."""
    request, program, limits = prepared.request, prepared.program, prepared.plan.limits
    policy, protocol, project = prepared.policy.policy, prepared.protocol, prepared.project
    is_tree = program is not None and program.toolchain.packs
    files = [in_memory(prepared.policy.data, f"{IN}/policy.json", 0o644, stack)]
    if artifact is not None:
        path, kind = (PROGRAM_FOLDER, "tree") if is_tree else (ARTIFACT, "file")
        files.insert(0, InFile(path=path, mode=0o755, kind=kind, fd=artifact.fd, size=artifact.size))
    if protocol is not None:
        more = protocol.run_files(prepared.whole_input)
        files += [in_memory(data, path, 0o644, stack) for path, data in more.items()]
    image = None if prepared.image is None else prepared.image.manifest.program
    of_image = {} if image is None else image.env
    env = run_environment(policy, request.env, os.environ, of_image, root=request.guest_root)
    if prepared.ca:
        from x07_sandbox.channel.egress import CA_FILE  # few runs have certificates

        files.append(in_memory(prepared.ca, CA_FILE, 0o644, stack))
        env = {**dict.fromkeys(_CA_VARIABLES, CA_FILE), **env}
    cwd = PROJECT_FOLDER if project else CWD
    if image is not None and image.workdir and not (project or request.files):
        cwd = image.workdir
    if request.workdir is not None:
        from x07_sandbox.policy.guest import WORK  # imported only for runs with files

        cwd = WORK
    left, left_files = _left(prepared, stack)
    if request.files and request.workdir is None:
        from x07_sandbox.sessions.private_files import work_files

        files.append(work_files(request.files, stack))
    mounts = [_PROJECT_MOUNT] if project else []
    places: tuple[RootPlace, ...] = ()
    if host_files is not None:
        places = host_files.places()
        mounts += host_files.mounts(len(files))
        files += host_files.files
    confine = confinement(policy, PROJECT_FOLDER if project else cwd, alone=not (is_tree or protocol))
    if confine.programs is not None and (image is not None or request.guest_root):
        # The folders without programs (guest/boot/places) are those of our own image, and root can replace programs.
        what = "cannot limit which programs are executed"
        why = f"{prepared.image_name} is an imported image" if image is not None else "the program is root inside"
        fix = "Use a policy without process.allow_execs and with process.allow_exec_prefixes"
        raise RefusedError(what, why, fix, code="execs-not-limited")
    network = None if prepared.egress is None else prepared.egress.view
    room = _NO_ROOM if host_files is None else host_files.room()
    order = Exec(1, [*_start(prepared, cwd), *request.args], env, cwd, limits.for_guest())
    return SessionSpec(
        name="run",
        opening=opening(
            confine,
            order.limits,
            files,
            mounts,
            network,
            room,
            out_writable=left_files is not None,
            root=request.guest_root,
        ),
        order=order,
        files=tuple(files),
        receivers=Receivers(
            changes=None if host_files is None else host_files.incoming, left=left_files, left_wanted=left
        ),
        wall_ms=limits.wall_ms,
        ram_bytes=limits.ram_bytes,
        places=(*([RootPlace(at=PROJECT_FOLDER, write=True)] if project else []), *places),
        areas=() if host_files is None else tuple(host_files.areas),
        limits_shown=limits,
    )


def _start(prepared: Prepared, cwd: str) -> list[str]:
    """Return the command line without the arguments of the request, or [] for a sandbox."""
    if (program := prepared.program) is not None:
        return program.toolchain.start(program.source)
    return in_folder(prepared.request.command, cwd)


def in_folder(argv: Sequence[str], cwd: str) -> list[str]:
    """Return a command line with a path to its program that does not depend on the folder in which it starts."""
    words = [*argv]
    if words and "/" in words[0]:
        words[0] = posixpath.normpath(posixpath.join(cwd, words[0]))
    return words


def _left(prepared: Prepared, stack: contextlib.ExitStack) -> tuple[Left | None, LeftFiles | None]:
    request = prepared.request
    if prepared.protocol is not None:
        return None, None
    if not request.max_files_bytes:  # only counted; with --workdir not even that
        return None if request.workdir is not None else Left(0, 0), None
    from x07_sandbox.sessions.private_files import FILES_MAX, LeftFiles

    return Left(FILES_MAX, request.max_files_bytes), LeftFiles(stack, request.max_files_bytes)
