"""X07's attestation of a run, `x07.runtime.attest@0.2.0`: what ran, with which policy, in which image. No I/O."""

import hashlib
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Annotated, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from x07_sandbox.errors import Command, Flag, RefusedError, Text
from x07_sandbox.policy.model import Policy
from x07_sandbox.sessions.result import Result
from x07_sandbox.x07.runner_report import AttestationReference, SandboxBackend, SolveReport, World, sandbox_backend_of

SCHEMA: Final = "x07.runtime.attest@0.2.0"
POLICY_CODE: Final = "X07RA_EPOLICY_DIGEST"
GUEST_CODE: Final = "X07RA_EGUEST_DIGEST"
WRITE_CODE: Final = "X07RA_EWRITE"

Digest = Annotated[str, Meta(pattern="^sha256:[0-9a-f]{64}$")]
NetworkMode = Literal["none", "disabled", "allowlist"]
Enforcement = Literal["none", "vm_boundary_allowlist", "guest_allowlist", "unsupported"]


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A host and its ports. A denied host without ports is denied on all ports."""

    host: str
    ports: list[Annotated[int, Meta(ge=1, le=65535)]]


class AttestedOutcome(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the program ended."""

    ok: bool
    exit_status: int
    trap: str | UnsetType | None = UNSET


class Attestation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The attestation.

    effective_policy_digest: digest of the policy in the guest. weaker_isolation: whether the user accepted it.
    """

    schema_version: Literal["x07.runtime.attest@0.2.0"] = SCHEMA
    world: World
    sandbox_backend: SandboxBackend
    weaker_isolation: bool
    artifact_path: str
    input_len_bytes: Annotated[int, Meta(ge=0)]
    guest_image_digest: Digest | None
    effective_policy_digest: Digest
    network_mode: NetworkMode
    network_enforcement: Enforcement
    allow_dns: bool
    allow_tcp: bool
    allow_udp: bool
    effective_allow_hosts: list[Host]
    effective_deny_hosts: list[Host]
    bundled_binary_digest: Digest | None
    compile_attestation_digest: Digest | None
    capsule_attestation_digests: list[Digest]
    effect_log_digests: list[Digest]
    outcome: AttestedOutcome
    policy_path: str | UnsetType = UNSET
    run_dir: str | UnsetType = UNSET


class Attested(msgspec.Struct, frozen=True, kw_only=True):
    """Facts for the attestation that the result does not contain. denied: ports by host; None stands for all ports."""

    policy: Policy
    policy_bytes: bytes
    policy_path: str | None
    artifact_path: str
    input_len_bytes: int
    weaker_isolation: bool
    denied: Mapping[str, Collection[int] | None] = MappingProxyType({})


def attest(result: Result, solve: SolveReport, given: Attested) -> Attestation:
    """Return the attestation of a run. Raises RefusedError if the run cannot be attested."""
    policy_digest = f"sha256:{hashlib.sha256(given.policy_bytes).hexdigest()}"
    if result.digests.policy != policy_digest:
        raise _cannot(
            POLICY_CODE, f"{given.policy_path} changed while the run started", "Try again without changing that file"
        )
    backend = sandbox_backend_of(result)
    if isinstance(backend, UnsetType):
        raise _cannot(WRITE_CODE, "the program was not isolated", ("Use ", Flag("--sandbox-backend vm")))
    if result.digests.image is None and backend == "vm":
        fix = ("To rebuild the image: ", Command("x07 image build"))
        raise _cannot(GUEST_CODE, "the digest of the guest image is unknown", fix)
    net = given.policy.net
    mode = network_mode(given.policy)
    return Attestation(
        world="run-os-sandboxed",
        sandbox_backend=backend,
        weaker_isolation=given.weaker_isolation,
        artifact_path=given.artifact_path,
        input_len_bytes=given.input_len_bytes,
        guest_image_digest=result.digests.image,
        effective_policy_digest=policy_digest,
        network_mode=mode,
        # A run with allowed hosts starts only if the host enforces the list.
        network_enforcement="vm_boundary_allowlist" if mode == "allowlist" else "none",
        allow_dns=net.allow_dns,
        allow_tcp=net.allow_tcp,
        allow_udp=net.allow_udp,
        effective_allow_hosts=[Host(host=entry.host, ports=list(entry.ports)) for entry in net.allow_hosts],
        effective_deny_hosts=[Host(host=host, ports=sorted(ports or ())) for host, ports in given.denied.items()],
        bundled_binary_digest=result.digests.artifact,
        compile_attestation_digest=None,
        capsule_attestation_digests=[],
        effect_log_digests=[],
        outcome=AttestedOutcome(
            ok=solve.ok, exit_status=solve.exit_status, trap=UNSET if solve.trap is None else solve.trap
        ),
        policy_path=UNSET if given.policy_path is None else given.policy_path,
    )


def network_mode(policy: Policy) -> NetworkMode:
    """Return the policy's network mode, as X07's attestation calls it."""
    if not policy.net.enabled:
        return "none"
    return "allowlist" if policy.may_connect else "disabled"


def reference(path: str, made: Attestation) -> AttestationReference:
    """Return the entry in the runner report that refers to the attestation at *path*."""
    return AttestationReference(
        path=path,
        sandbox_backend=made.sandbox_backend,
        weaker_isolation=made.weaker_isolation,
        network_mode=made.network_mode,
        network_enforcement=made.network_enforcement,
    )


def _cannot(code: str, why: str, fix: Text) -> RefusedError:
    return RefusedError(f"{code}: cannot attest this run", why, fix, code="no-attestation")
