"""The preview of a run, made without a VM."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from x07_sandbox.files.copy import Root, trees_of
from x07_sandbox.policy.controls import Plan
from x07_sandbox.records.runs import new_run_id
from x07_sandbox.sessions.host_files import effective_roots
from x07_sandbox.sessions.prepare import Prepared, prepare, wants_scaling
from x07_sandbox.sessions.request import loaded
from x07_sandbox.sessions.result import Draft, Scaling

if TYPE_CHECKING:
    from x07_sandbox.network.rules import Allowlist, Denied, Entry
    from x07_sandbox.sessions.request import Program, RunCaller, RunRequest

SCHEMA: Final = "x07.sandbox.preview@0.1.0"


class Preview(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A description of what a run would do.

    build: command line in the build VM; null if nothing is built.
    run: command line in the run VM.
    roots: folders of the host that are copied in.
    digests: digests of the image, the policy and the source.
    scaling: scaled limits, if the slowdown of emulation is known.
    hosts: HOST:PORTS to which the program may connect.
    denied_hosts: hosts that flags deny.
    blocked_hosts: HOST:PORTS of `hosts` that are special addresses, and the settings that would allow them.
    proxy_resolves: whether the user's proxy resolves the names, so that their addresses are not checked.
    guest_root: whether the program is root in the VM, over a writable layer of its system.
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
    scaling: Scaling | None = None
    hosts: tuple[str, ...] = ()
    denied_hosts: tuple[str, ...] = ()
    blocked_hosts: tuple[str, ...] = ()
    proxy_resolves: bool = False
    guest_root: bool = False


def preview(request: RunRequest, caller: RunCaller) -> Preview:
    """Return the preview of a request. Raises SandboxError if a run would be refused before files are copied."""
    with contextlib.ExitStack() as stack:
        draft = Draft(new_run_id())
        request, program = loaded(request, caller, stack)
        ready = prepare(request, program, caller, draft, stack, dry=True)
        roots = effective_roots(request, program, ready.policy.policy)
        if not ready.plan.refusals:
            trees_of(roots)  # checks them
        ready, scaling = _scaled(ready)
        allowlist = ready.egress and ready.egress.allowlist
        digests = {name: digest for name, digest in msgspec.structs.asdict(draft.result.digests).items() if digest}
        return Preview(
            **_of_program(request, program),
            roots=roots,
            digests=digests,
            image=ready.image_name,
            plan=ready.plan,
            scaling=scaling,
            guest_root=request.guest_root,
            hosts=tuple(_endpoint(entry) for entry in allowlist.entries) if allowlist else (),
            denied_hosts=tuple(_endpoint(entry) for entry in allowlist.denied) if allowlist else (),
            blocked_hosts=_blocked(allowlist) if allowlist else (),
            proxy_resolves=allowlist.settings.proxy_resolves if allowlist else False,
        )


def _of_program(request: RunRequest, program: Program | None) -> dict[str, Any]:
    """Return the fields about the program."""
    if program is None:
        return {"toolchain": "command", "build": None, "run": [*request.command, *request.args], "files": []}
    toolchain, source = program.toolchain, program.source
    return {
        "toolchain": toolchain.name,
        "build": None if toolchain.build is None else toolchain.build(source),
        "run": [*toolchain.start(source), *request.args],
        "files": list(source.files) or [source.name],
    }


def _scaled(ready: Prepared) -> tuple[Prepared, Scaling | None]:
    from x07_sandbox.sessions.scaling import known_factor, scale

    factor = known_factor(ready.arch) if wants_scaling(ready) else None
    return (ready, None) if factor is None else scale(ready, factor)[:2]


def _blocked(allowlist: Allowlist) -> tuple[str, ...]:
    from x07_sandbox.network.rules import unreachable_entries

    return tuple(f"{_endpoint(entry)} ({why})" for entry, why in unreachable_entries(allowlist))


def _endpoint(entry: Entry | Denied) -> str:
    from x07_sandbox.network.hosts import pattern_text

    host = pattern_text(entry.what)
    ports = "*" if entry.ports is None else ",".join(map(str, sorted(entry.ports)))
    return f"[{host}]:{ports}" if ":" in host else f"{host}:{ports}"
