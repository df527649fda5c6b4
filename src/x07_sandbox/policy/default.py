"""The built-in default policy, and the forms of a policy: a file, the canonical one for its digest, and variables.

The X07_OS_* variables pass a policy to the X07 language's runtime libraries. Other programs ignore them.
"""

import hashlib
import json
from collections.abc import Mapping

import msgspec

from x07_sandbox.policy import model
from x07_sandbox.policy.model import HostPorts, Policy, leaf_values

_MIB = 1 << 20


def default_policy() -> Policy:
    """Return the built-in default: one minute, 512 MiB, 64 processes, no host files, no network hosts.

    Processes may be started because the machine is thrown away after the run. fs and net are enabled with empty lists
    so that a flag can add a folder or a host without a policy file.
    """
    return Policy(
        schema_version=model.SCHEMA_VERSION,
        policy_id="sandbox.default.base",
        notes="Built in: a minute, 512 MiB, no host files or network until added.",
        limits=model.Limits(cpu_ms=60_000, wall_ms=60_000, mem_bytes=512 * _MIB, fds=1024, procs=64, core_dumps=False),
        fs=model.Fs(
            enabled=True,
            read_roots=(),
            write_roots=(),
            deny_hidden=True,
            allow_symlinks=False,
            allow_mkdir=True,
            allow_remove=True,
            allow_rename=True,
            allow_walk=True,
            allow_glob=True,
            max_read_bytes=256 * _MIB,
            max_write_bytes=256 * _MIB,
            max_entries=100_000,
            max_depth=128,
        ),
        net=model.Net(enabled=True, allow_dns=True, allow_tcp=True, allow_udp=False, allow_hosts=()),
        env=model.Env(enabled=True, allow_keys=(), deny_keys=()),
        time=model.Time(
            enabled=True,
            allow_monotonic=True,
            allow_wall_clock=True,
            allow_sleep=True,
            max_sleep_ms=86_400_000,
            allow_local_tzid=False,
        ),
        language=model.Language(allow_unsafe=True, allow_ffi=True),
        threads=model.ABSENT_THREADS,
        process=model.Process(
            enabled=True,
            allow_spawn=True,
            max_live=64,
            max_spawns=1024,
            allow_exec=True,
            allow_exit=True,
            allow_exec_prefixes=("/",),
            max_runtime_ms=60_000,
            max_stdout_bytes=10 * _MIB,
            max_stderr_bytes=10 * _MIB,
            max_total_bytes=16 * _MIB,
            max_stdin_bytes=_MIB,
        ),
    )


def render_policy(policy: Policy | Mapping[str, object]) -> bytes:
    """Return a policy as file content: indented JSON with sorted keys and the defaults of every present section."""
    document = msgspec.to_builtins(policy) if isinstance(policy, Policy) else policy
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def canonical_json(value: object) -> bytes:
    """Return JSON with sorted keys, without whitespace, final newline or escapes for non-ASCII characters."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def policy_digest(policy: Policy) -> str:
    """Return `sha256:` and the digest of the canonical JSON of *policy*, with the defaults of every section.

    The field `digests.policy` in a run's result is a different digest: that of the policy file's bytes.
    """
    return f"sha256:{hashlib.sha256(canonical_json(msgspec.to_builtins(policy))).hexdigest()}"


_SECTIONS = ("fs.", "net.", "db.", "env.", "time.", "threads.", "process.")
# Variables not named after their fields.
_IRREGULAR = {
    "fs.deny_hidden": "X07_OS_DENY_HIDDEN",
    "db.drivers.postgres": "X07_OS_DB_PG",
    "db.connect_timeout_ms": "X07_OS_DB_MAX_CONNECT_TIMEOUT_MS",
    "db.query_timeout_ms": "X07_OS_DB_MAX_QUERY_TIMEOUT_MS",
}


def _variable(field: str) -> str:
    """Return a field's variable: X07_OS_PROC_MAX_LIVE for "process.max_live", X07_OS_FS for "fs.enabled"."""
    path = field.removesuffix(".enabled").replace("process", "proc").replace(".drivers", "")
    return _IRREGULAR.get(field) or f"X07_OS_{path.replace('.', '_').upper()}"


# (variable, field), in the order of the model.
VARIABLES: tuple[tuple[str, str], ...] = tuple(
    (_variable(field), field) for field in leaf_values(default_policy()) if field.startswith(_SECTIONS)
)


def program_environment(policy: Policy) -> dict[str, str]:
    """Return all X07 variables of a sandboxed program. None of them comes from the host's environment."""
    values = leaf_values(policy)
    carried = {variable: _text(values[field]) for variable, field in VARIABLES}
    return {"X07_WORLD": "run-os-sandboxed", "X07_OS_SANDBOXED": "1", **carried}


def _text(value: object) -> str:
    match value:
        case bool():
            return "1" if value else "0"
        case tuple():
            # Ports are joined by commas, everything else by semicolons.
            return ("," if value and isinstance(value[0], int) else ";").join(_entry(entry) for entry in value)
        case _:
            return str(value)


def _entry(entry: object) -> str:
    if isinstance(entry, HostPorts):
        return f"{entry.host}:{','.join(str(port) for port in entry.ports)}"
    return str(entry)
