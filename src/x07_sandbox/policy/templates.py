"""The built-in policies: this tool's default, and the X07 language's eight policy templates; and policies from them.

All values of the templates come from X07. A test compares them with the checksums of X07's own documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from x07_sandbox.errors import UsageError
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.policy.model import ABSENT_LANGUAGE, Db, DbNet, Drivers, Fs, Limits, Policy, Sqlite

if TYPE_CHECKING:
    from x07_sandbox.policy.changes import LimitChanges, Overrides, ReadFile

_MIB: Final = 1 << 20
_DEFAULT: Final = default_policy()
_NO_DRIVER: Final = Drivers(sqlite=False, postgres=False, mysql=False)
_FILES: Final = replace(
    _DEFAULT.fs,
    read_roots=(".",),
    write_roots=("out",),
    allow_remove=False,
    max_read_bytes=64 * _MIB,
    max_write_bytes=64 * _MIB,
    max_entries=50_000,
    max_depth=64,
)
_DATABASE: Final = Db(
    enabled=True,
    drivers=_NO_DRIVER,
    max_live_conns=8,
    max_queries=10_000,
    connect_timeout_ms=5000,
    query_timeout_ms=30_000,
    max_sql_bytes=_MIB,
    max_rows=100_000,
    max_resp_bytes=16 * _MIB,
)
_CALM: Final = replace(_DEFAULT.time, allow_sleep=False, max_sleep_ms=0)


def _limits(cpu_s: int, wall_s: int, mem_mib: int, fds: int, procs: int) -> Limits:
    return Limits(cpu_ms=cpu_s * 1000, wall_ms=wall_s * 1000, mem_bytes=mem_mib * _MIB, fds=fds, procs=procs)


# The base of the other templates.
_CLI: Final = replace(
    _DEFAULT,
    policy_id="sandbox.cli.base",
    notes="A command that reads the project and writes to out, without network.",
    limits=_limits(60, 120, 512, 128, 16),
    fs=_FILES,
    net=replace(_DEFAULT.net, enabled=False, allow_dns=False, allow_tcp=False),
    env=replace(_DEFAULT.env, enabled=False),
    time=_CALM,
    language=ABSENT_LANGUAGE,
    process=replace(
        _DEFAULT.process,
        allow_spawn=False,
        max_live=0,
        max_spawns=0,
        allow_exec=False,
        allow_exec_prefixes=(),
        max_runtime_ms=0,
    ),
)
_WORKER: Final = replace(
    _CLI,
    policy_id="sandbox.worker.base",
    notes="A long computation on its input: no files, no network, no time of day.",
    limits=_limits(300, 300, 1024, 64, 16),
    fs=Fs(enabled=False, read_roots=(), write_roots=(), deny_hidden=True),
    time=replace(_CALM, allow_wall_clock=False, allow_sleep=True, max_sleep_ms=5000),
)

TEMPLATES: Final[Mapping[str, Policy]] = MappingProxyType(
    {
        "default": _DEFAULT,
        "cli": _CLI,
        "http-client": replace(
            _CLI,
            policy_id="sandbox.http-client.base",
            notes="An HTTP client; add the hosts that it may reach.",
            limits=_limits(180, 300, 1024, 256, 32),
            fs=replace(_FILES, allow_glob=False, max_write_bytes=256 * _MIB, max_entries=20_000, max_depth=32),
            net=_DEFAULT.net,
            time=replace(_CALM, allow_sleep=True, max_sleep_ms=5000),
            language=_DEFAULT.language,
        ),
        "web-service": replace(
            _CLI,
            policy_id="sandbox.web-service.base",
            notes="A web service that takes its port and host from variables; add the hosts that it may reach.",
            limits=_limits(180, 600, 1024, 512, 64),
            fs=replace(_FILES, max_write_bytes=128 * _MIB),
            net=_DEFAULT.net,
            env=replace(_DEFAULT.env, allow_keys=("PORT", "HOST", "LOG_LEVEL")),
            time=replace(_CALM, allow_sleep=True, max_sleep_ms=1000),
            language=_DEFAULT.language,
        ),
        "fs-tool": replace(
            _CLI,
            policy_id="sandbox.fs-tool.base",
            notes="A tool that reads the project and changes files in src and out.",
            limits=_limits(90, 180, 512, 256, 16),
            fs=replace(
                _FILES,
                write_roots=("src", "out"),
                max_read_bytes=256 * _MIB,
                max_write_bytes=256 * _MIB,
                max_entries=200_000,
                max_depth=128,
            ),
        ),
        "sqlite-app": replace(
            _CLI,
            policy_id="sandbox.sqlite-app.base",
            notes="A program with its own SQLite database in out.",
            limits=_limits(120, 300, 1024, 256, 32),
            fs=replace(_FILES, max_read_bytes=128 * _MIB, max_write_bytes=256 * _MIB, max_entries=100_000),
            language=_DEFAULT.language,
            db=replace(
                _DATABASE,
                drivers=replace(_NO_DRIVER, sqlite=True),
                connect_timeout_ms=2000,
                sqlite=Sqlite(allow_paths=("out/app.sqlite",), allow_create=True, allow_in_memory=True),
            ),
        ),
        "postgres-client": replace(
            _CLI,
            policy_id="sandbox.postgres-client.base",
            notes="A client of a PostgreSQL server, over TLS only; add the server.",
            limits=_limits(120, 300, 1024, 256, 32),
            language=_DEFAULT.language,
            db=replace(_DATABASE, drivers=replace(_NO_DRIVER, postgres=True), net=DbNet()),
        ),
        "worker": _WORKER,
        "worker-parallel": replace(
            _WORKER,
            policy_id="sandbox.worker-parallel.base",
            notes="A long computation that starts processes of the project's own dependencies.",
            limits=_limits(300, 300, 1024, 128, 1024),
            process=replace(_DEFAULT.process, max_live=16, max_spawns=64, allow_exec_prefixes=("deps/x07/",)),
        ),
    }
)
BUILT_IN: Final = "built-in:"


def built_in(name: str) -> Policy | None:
    """Return the policy `built-in:TEMPLATE`, or None if *name* has another form. Raises UsageError if it is unknown."""
    if not name.startswith(BUILT_IN):
        return None
    try:
        return TEMPLATES[name.removeprefix(BUILT_IN)]
    except KeyError:
        known = ", ".join(f"{BUILT_IN}{template}" for template in TEMPLATES)
        raise UsageError(f"unknown policy {name}", "no such built-in policy", f"Use one of {known}") from None


def make_policy(
    template: str, limits: LimitChanges | None, overrides: Overrides | None, read_spec_file: ReadFile
) -> Policy:
    """Return a template with these changes. Raises UsageError if a policy cannot hold one of the values.

    A grant enables the section that it belongs to. read_spec_file: see `derive_policy`.
    """
    from x07_sandbox.policy.changes import change_limits, derive_policy  # most users of templates change none

    base = policy = TEMPLATES[template]
    if limits is not None:
        policy = change_limits(policy, limits, may_raise=True, source=f"{BUILT_IN}{template}")
    if overrides is not None:
        if overrides.allows:
            policy = replace(policy, net=replace(policy.net, enabled=True, allow_tcp=True))
        if overrides.allow_read_root or overrides.allow_write_root or overrides.include:
            policy = replace(policy, fs=replace(policy.fs, enabled=True))
        data = render_policy(policy)
        policy = derive_policy(policy, data, template, overrides, read_spec_file=read_spec_file, may_relax=True).policy
    return replace(policy, policy_id=base.policy_id, notes=base.notes)
