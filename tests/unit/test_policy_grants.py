"""A plan grants nothing that its policy does not."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tests.policies import document_with
from x07_sandbox.channel.messages import CWD
from x07_sandbox.files.copy import roots_of
from x07_sandbox.policy.controls import make_plan, run_limits
from x07_sandbox.policy.features import vm_features
from x07_sandbox.policy.guest import confinement, filters_of
from x07_sandbox.policy.model import Policy, leaf_values

PATHS = st.lists(
    st.sampled_from(["/", "/usr/bin/env", "/usr/bin/", "/tmp/", "tool", "../up", "/data/a", ".hidden", "/etc", "a/b"]),  # noqa: S108 - words
    max_size=4,
    unique=True,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(
        (
            *("threads.enabled", "process.enabled", "process.allow_spawn", "process.allow_exec"),
            *("fs.enabled", "fs.deny_hidden", "fs.allow_symlinks", "net.enabled", "env.enabled"),
        ),
        st.booleans(),
    ),
    **dict.fromkeys(("process.allow_execs", "process.allow_exec_prefixes", "fs.read_roots", "fs.write_roots"), PATHS),
    "process.max_live": st.integers(0, 200),
    "limits.procs": st.integers(0, 200),
    "limits.fds": st.integers(0, 1024),
    "limits.wall_ms": st.integers(1, 600_000),
    "limits.cpu_ms": st.integers(1, 600_000),
    "limits.mem_bytes": st.integers(1 << 20, 1 << 34),
    "net.allow_hosts": st.sampled_from([[], [{"host": "example.org", "ports": [443]}]]),
}


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Policies with any values, even if rules between fields are broken."""
    return msgspec.convert(document_with({name: draw(values) for name, values in FIELDS.items()}), Policy)


@given(policies())
def test_the_guest_gets_no_more_than_the_policy(policy: Policy) -> None:
    """The guest's confinement and limits never exceed the policy."""
    process, granted = policy.process, confinement(policy, CWD)
    assert not granted.threads or policy.threads_in_force.enabled
    assert not granted.spawn or (process.enabled and process.allow_spawn)
    assert not granted.execute or (process.enabled and process.allow_exec)
    if granted.execute and "/" not in process.allow_exec_prefixes:
        assert granted.programs is not None
        own = {posixpath.normpath(posixpath.join(CWD, path)) for path in process.allow_execs}
        assert {posixpath.normpath(path) for path in granted.programs} <= own
        begins = {posixpath.normpath(posixpath.join(CWD, path)) for path in process.allow_exec_prefixes}
        assert {posixpath.normpath(path) for path in granted.prefixes} <= begins
    names = {"threads": granted.threads, "spawn": granted.spawn, "exec": granted.execute}
    assert {word for word, allowed in names.items() if not allowed} == {
        word for word in names if any(f"no-{word}" in name for name in filters_of(granted))
    }
    limits, held = policy.limits, run_limits(policy)
    assert (held.wall_ms, held.cpu_ms, held.mem_bytes) == (limits.wall_ms, limits.cpu_ms, limits.mem_bytes)
    assert held.fds == limits.fds
    assert held.tasks <= limits.procs + 1


@given(policies())
def test_no_folder_is_opened_that_the_policy_does_not_name(policy: Policy) -> None:
    """Only roots named by the policy go in, and only write roots are writable."""
    roots = roots_of(policy, Path("/home/u/work"), CWD)
    assert not roots or policy.fs.enabled
    for root in roots:
        named = policy.fs.write_roots if root.write else policy.fs.read_roots
        assert root.given in named
        assert root.host == posixpath.normpath(posixpath.join("/home/u/work", root.given))


@given(policies())
def test_every_field_has_one_answer(policy: Policy) -> None:
    """For any policy each field has one control, and refused fields stop the run."""
    plan = make_plan(policy, vm_features("vm-emulated"))
    assert [control.field for control in plan.controls] == list(leaf_values(policy))
    refused = {control.field for control in plan.controls if control.state == "refused"}
    assert refused <= {refusal.field for refusal in plan.refusals}
