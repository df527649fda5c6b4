"""What a run would do, told without booting anything."""

from __future__ import annotations

import contextlib
from typing import Final, Literal

import msgspec

from x07_sandbox.files.roots import Root
from x07_sandbox.host.variables import text
from x07_sandbox.images.store import find_image
from x07_sandbox.images.verify import open_image
from x07_sandbox.plan.controls import Plan, make_plan
from x07_sandbox.plan.features import VM_HOLDS, Features
from x07_sandbox.programs.toolchains import require_packages
from x07_sandbox.runs.host_files import roots_in_force
from x07_sandbox.runs.program import load_program
from x07_sandbox.runs.request import RunRequest, check_arguments, check_variables, policy_in_force, sha256_text

SCHEMA: Final = "x07.sandbox.preview@0.1.0"


class Preview(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What would be done.

    toolchain: its name. build: argv in the build VM, or None where nothing is built. run: argv in the run VM.
    roots: folders of the host that it gets copies of. digests: of image, policy and source. The isolation class is not
    known before something has booted.
    """

    schema_version: Literal["x07.sandbox.preview@0.1.0"] = SCHEMA
    toolchain: str
    build: list[str] | None
    run: list[str]
    files: list[str]
    roots: tuple[Root, ...]
    digests: dict[str, str]
    image: str
    plan: Plan


def preview(request: RunRequest) -> Preview:
    """The plan of *request*. Raises SandboxError for everything that a run would refuse before it boots."""
    with contextlib.ExitStack() as stack:
        request, program = load_program(request, stack)
        check_arguments(request)
        policy, policy_bytes = policy_in_force(request)
        check_variables(request, policy)
        image = stack.enter_context(open_image(find_image(request.image)))
        require_packages(
            program.toolchain, image.manifest.holds(), request.image or text("X07_VM_GUEST_IMAGE") or "default"
        )
        features = Features(isolation="vm-emulated", own_kernel=True, can_hold=VM_HOLDS)
        toolchain = program.toolchain
        return Preview(
            toolchain=toolchain.name,
            build=None if toolchain.build is None else toolchain.build(program.source),
            run=[*toolchain.start(program.source), *request.args],
            files=list(program.source.files) or [program.source.name],
            roots=roots_in_force(request, program, policy),
            digests={
                "image": image.manifest.digest,
                "policy": sha256_text(policy_bytes),
                "source": program.sha256,
            },
            image=request.image or "default",
            plan=make_plan(policy, features),
        )
