"""Preparation of a run: everything in the request is read, checked and planned.

No job is started; only a probe of the backend may boot a VM.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.backends.base import Availability, Backend
from x07_sandbox.backends.registry import Choice, choice_from_environment
from x07_sandbox.errors import Flag, HostError, RefusedError, Text, UsageError, printable
from x07_sandbox.host import settings
from x07_sandbox.host.arch import Arch, host_arch, is_foreign
from x07_sandbox.host.paths import settings_file
from x07_sandbox.host.variables import flag, text
from x07_sandbox.images.store import DEFAULT, Image, find_image, image_is_current
from x07_sandbox.images.verify import OpenImage, open_image
from x07_sandbox.options import BY_FLAG
from x07_sandbox.policy.controls import Plan, make_plan
from x07_sandbox.policy.model import EffectivePolicy
from x07_sandbox.programs.toolchains import Protocol, require_packages
from x07_sandbox.sessions.request import (
    Program,
    RunCaller,
    RunRequest,
    check_arguments,
    check_variables,
    effective_policy_of,
    need_policy,
    open_input,
    read_whole,
    sha256_text,
)
from x07_sandbox.sessions.result import Draft
from x07_sandbox.sessions.transfers import memory_file

if TYPE_CHECKING:
    from x07_sandbox.policy.hints import ImageInUse
    from x07_sandbox.sessions.egress import Egress
else:
    Egress = object  # msgspec reads annotations; its module is loaded where it is needed

_A_VM: Final = Flag("--sandbox-backend vm")


class Prepared(msgspec.Struct, frozen=True):
    """A checked request. Its plan may still contain refusals.

    request: what the user asked for, with the settings of the project's manifest.
    program: None for a command of the image, and for a sandbox.
    image, egress: None if the run uses none.
    stdin_fd: the program's input, if any.
    whole_input: the input of a program with a protocol, before it was framed.
    ca: certificates that the program trusts besides those of the image, or b"".
    """

    request: RunRequest
    caller: RunCaller
    program: Program | None
    policy: EffectivePolicy
    image: OpenImage | None
    backend: Backend
    availability: Availability
    plan: Plan
    stdin_fd: int | None = None
    whole_input: bytes = b""
    egress: Egress | None = None
    ca: bytes = b""

    @property
    def arch(self) -> Arch:
        """The guest's architecture."""
        return host_arch() if self.image is None else self.image.arch

    @property
    def image_name(self) -> str:
        """The name by which the user selected the image."""
        return _image_name(self.request)

    @property
    def protocol(self) -> Protocol | None:
        """The conventions of the program, if it has any."""
        return None if self.program is None else self.program.toolchain.protocol

    @property
    def project(self) -> bool:
        """Whether the program has a manifest."""
        return self.program is not None and self.program.project

    @property
    def cpu_ms(self) -> int | None:
        """The CPU time limit from the program's own options, if there is one."""
        return None if self.program is None else self.program.cpu_ms


def output_caps(request: RunRequest, protocol: Protocol | None) -> tuple[int, int]:
    """Return the limits in bytes for a run's standard output and standard error."""
    most = settings.OUTPUT_MAX_BYTES if request.max_output_bytes is None else request.max_output_bytes
    return (most, most) if protocol is None else protocol.output_caps(most)


def prepare(
    request: RunRequest,
    program: Program | None,
    caller: RunCaller,
    draft: Draft,
    stack: contextlib.ExitStack,
    *,
    dry: bool = False,
) -> Prepared:
    """Read and check the whole request. Raises SandboxError. dry: read no input, update no image and boot no guest."""
    if program is not None:
        draft.set_digests(source=program.sha256)
    check_arguments(request)
    stdin_fd, whole_input = _input(request, program, caller, stack, dry=dry)
    effective_policy = caller.policy or effective_policy_of(request)
    _check_cpu_time(request, program)
    draft.set(policy=printable(effective_policy.base))
    draft.set_digests(policy=sha256_text(effective_policy.data))
    check_variables(request, effective_policy.policy)
    choice = caller.choice or choice_from_environment()
    backend = choice.made
    image = None
    if backend.uses_image:
        with caller.cancel.waiting():
            image = _image(request, backend, stack, dry=dry)
        draft.set_digests(image=image.manifest.digest)
        if program is not None:
            own, name = image, _image_name(request)
            require_packages(program.toolchain, own.manifest.holds(), lambda: image_in_use(own, name))
        check_pinned(image.manifest.digest)
        check_own_image(image.manifest.digest, caller.image_digest)
    else:
        _refuse_image(request, choice)
        if program is not None:
            _require_programs(program, choice)
    availability = backend.probe(image, boot=not dry)
    _require_own_architecture(request, image, availability, backend)
    _require_hardware(request, availability)
    _require_host_files(request, availability, backend)
    _require_guest_root(request, availability, backend)
    cpu_ms = None if program is None else program.cpu_ms
    by_proxy = effective_policy.policy.may_connect and _proxy_resolves()
    plan = make_plan(effective_policy.policy, availability.features, cpu_ms=cpu_ms, proxy_resolves=by_proxy)
    draft.set(
        isolation=availability.features.isolation,
        backend=backend.name,
        controls=list(plan.controls),
    )
    draft.warn(*availability.warnings)
    egress = None if plan.refusals else _egress(effective_policy)
    return Prepared(
        request=request,
        caller=caller,
        program=program,
        policy=effective_policy,
        image=image,
        backend=backend,
        availability=availability,
        plan=plan,
        stdin_fd=stdin_fd,
        whole_input=whole_input,
        egress=egress,
        ca=_certificates(request, egress),
    )


def _input(
    request: RunRequest, program: Program | None, caller: RunCaller, stack: contextlib.ExitStack, *, dry: bool
) -> tuple[int | None, bytes]:
    """Return a descriptor of the program's input, and the whole input of a program with a protocol."""
    own_fd = caller.stdin_fd if program is None else program.input_fd
    with caller.cancel.waiting():  # opening a pipe may block
        stdin_fd = open_input(request, own_fd, stack, wait=not dry)
    if program is None or (protocol := program.toolchain.protocol) is None:
        return stdin_fd, b""
    need_policy(request, protocol)
    if dry:
        return stdin_fd, b""
    with caller.cancel.waiting():
        data = read_whole(stdin_fd, protocol.input_max_bytes)
    return memory_file(protocol.frame_input(data), stack), data


def _require_own_architecture(
    request: RunRequest, image: OpenImage | None, availability: Availability, backend: Backend
) -> None:
    """Raise RefusedError if the image is of another architecture and the guest's processor is not emulated."""
    if image is None or not is_foreign(image.arch) or availability.features.emulated:
        return
    why = f"it is for {image.arch.deb}, and the backend {backend.name} runs only programs for this host's processor"
    fix = (f"Use an image for {host_arch().deb}, or use ", _A_VM)
    raise RefusedError(f"cannot use the image {_image_name(request)}", why, fix, code="foreign-image")


def _require_host_files(request: RunRequest, availability: Availability, backend: Backend) -> None:
    for name, folder in ((Flag("--out"), request.out), (Flag("--workdir"), request.workdir)):
        if folder is not None and "host-files" not in availability.features.can_enforce:
            why = f"the backend {backend.name} cannot copy files back"
            fix = ("Remove ", name, ", or use ", _A_VM)
            raise RefusedError(("cannot use ", name), why, fix, code="no-host-files")


def _require_guest_root(request: RunRequest, availability: Availability, backend: Backend) -> None:
    if request.guest_root and not availability.features.own_kernel:
        what = ("cannot use ", Flag("--guest-root"))
        why = f"the backend {backend.name} has no kernel of its own, on which a program could be root"
        raise RefusedError(what, why, ("Remove it, or use ", _A_VM), code="no-guest-root")


def _egress(policy: EffectivePolicy) -> Egress | None:
    if not policy.policy.may_connect:
        return None
    from x07_sandbox.sessions.egress import egress_of  # imported only for runs with connections

    return egress_of(policy)


def _certificates(request: RunRequest, egress: Egress | None) -> bytes:
    """Return the certificates of --ca, or else those of the settings for connections."""
    path = request.ca or (None if egress is None else egress.config.settings.ca)
    if path is None:
        return b""
    from x07_sandbox.network.settings import read_certificates  # few runs have certificates

    return read_certificates(path)


def _proxy_resolves() -> bool:
    from x07_sandbox.network.settings import read_settings  # imported only for runs with connections

    return read_settings().proxy_resolves


def _check_cpu_time(request: RunRequest, program: Program | None) -> None:
    """Raise UsageError if the requested CPU limit is above the X07 program's own limit, which would still apply."""
    limits, own_ms = request.limits, None if program is None else program.cpu_ms
    if limits is not None and limits.cpu_ms is not None and own_ms is not None and own_ms < limits.cpu_ms:
        why = f"the X07 program's own limit is {own_ms / 1000:g} s"
        fix = f"Add --cpu-time-limit-seconds {-(-limits.cpu_ms // 1000)}, or raise the limit in the program's profile"
        raise UsageError(("cannot use ", Flag(BY_FLAG["--cpu-time"].flag_text(limits.cpu_ms))), why, fix)


def wants_scaling(prepared: Prepared) -> bool:
    """Return whether the VM is emulated and the user wants scaled limits. Raises SandboxError for invalid settings."""
    asked = prepared.request.scale_limits
    if not prepared.availability.features.emulated or asked is False:
        return False
    if asked:
        return True
    try:
        if not os.path.lexists(settings_file()):
            return False
    except HostError:  # without a home there are no settings
        return False
    from x07_sandbox.host.user_settings import scale_when_emulated  # few users have settings

    return scale_when_emulated()


def _image(request: RunRequest, backend: Backend, stack: contextlib.ExitStack, *, dry: bool) -> OpenImage:
    if (images := backend.engine_images) is not None:
        return images.find(request.image)
    found = find_image(request.image)
    return stack.enter_context(open_image(found if dry else current_image(found)))


def image_in_use(image: OpenImage | None, name: str) -> ImageInUse:
    """Return the image of a run, called *name* by the user, for advice on what it lacks."""
    from x07_sandbox.policy.hints import ImageInUse  # most runs need no advice

    if image is None:
        return ImageInUse(on_host=True)
    held = image.manifest
    return ImageInUse(name, tuple(held.include), tuple(wheel.name for wheel in held.pip), tuple(held.preload))


def _image_name(request: RunRequest) -> str:
    return request.image or text("X07_VM_GUEST_IMAGE") or DEFAULT


def _refuse_image(request: RunRequest, choice: Choice) -> None:
    why = f"the backend {choice.backend} uses no guest image"
    if request.image is not None:
        fix: Text = ("Remove ", Flag("--image"), ", or use ", _A_VM)
        raise RefusedError(f"cannot use the image {request.image}", why, fix, code="no-image-used")
    if text("X07_VM_GUEST_IMAGE_DIGEST") is not None:
        fix = ("Unset X07_VM_GUEST_IMAGE_DIGEST, or use ", _A_VM)
        raise RefusedError("this guest image is not allowed to run", why, fix, code="image-not-pinned")


def _require_programs(program: Program, choice: Choice) -> None:
    toolchain, source = program.toolchain, program.source
    argvs = [toolchain.start(source), *([] if toolchain.build is None else [toolchain.build(source)])]
    for path in (argv[0] for argv in argvs):
        if not path.startswith("/x07/") and not os.access(path, os.X_OK):
            why = f"it uses this host's programs, and {path} does not exist"
            fix = (f"Run apt-get install {' '.join(toolchain.needs)}, or use ", _A_VM)
            what = f"the backend {choice.backend} cannot run {toolchain.name} programs"
            raise RefusedError(what, why, fix, code="no-toolchain")


def _require_hardware(request: RunRequest, availability: Availability) -> None:
    by_variable = flag("X07_VM_REQUIRE_HARDWARE")
    if not (by_variable or request.require_hardware) or not availability.known:
        return
    if availability.features.isolation == "vm-hardware":
        return
    steps = ["omit --require-hardware"] * request.require_hardware
    steps += ["unset X07_VM_REQUIRE_HARDWARE"] * by_variable
    what = "emulation" if availability.features.emulated else "weaker isolation"
    fix = f"{availability.fix}. To accept {what} instead, {' and '.join(steps)}"
    what_failed = "hardware virtualisation is required, but this run would not have it"
    raise RefusedError(what_failed, availability.proof, fix, code="no-hardware")


def check_pinned(digest: str) -> None:
    """Raise RefusedError if X07_VM_GUEST_IMAGE_DIGEST is set and *digest* differs from it."""
    pinned = text("X07_VM_GUEST_IMAGE_DIGEST")
    if pinned not in {None, digest}:
        why = f"X07_VM_GUEST_IMAGE_DIGEST is {pinned}, but the image's digest is {digest}"
        fix = "Choose another image, or set the variable to the digest that you trust"
        raise RefusedError("this guest image is not allowed to run", why, fix, code="image-not-pinned")


def check_own_image(digest: str, wanted: str | None) -> None:
    """Raise RefusedError if *wanted* is the only image that may be used, and *digest* is another one."""
    if wanted not in {None, digest}:
        why = f"the program may use only the image {wanted}, but the image's digest is {digest}"
        fix = "Install that image, or make the bundle again with this image"
        raise RefusedError("this guest image is not allowed to run", why, fix, code="image-not-pinned")


def current_image(image: Image) -> Image:
    """Return *image* with this installation's guest code, rebuilt if necessary. Return an unnamed image unchanged."""
    if not image.name or image_is_current(image):
        return image
    from x07_sandbox.images.build import build_image

    return build_image(name=image.name, progress=lambda _text: None)
