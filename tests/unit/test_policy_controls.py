"""The plan: one truthful control for every field, and refusals for what cannot be provided."""

import msgspec
import pytest

from tests.policies import document_with
from x07_sandbox.errors import RefusedError
from x07_sandbox.policy.controls import TABLE, Plan, make_plan
from x07_sandbox.policy.decode import decode_policy, default_policy, render_policy
from x07_sandbox.policy.denials import HowToAllow
from x07_sandbox.policy.features import VM_CAPABILITIES, Features
from x07_sandbox.policy.guest import confinement
from x07_sandbox.policy.model import Policy
from x07_sandbox.policy.schema import fields

VM = Features(isolation="vm-emulated", own_kernel=True, can_enforce=VM_CAPABILITIES)
NOTHING = Features(isolation="none", own_kernel=False, can_enforce=frozenset())
SERVERS = {"sqlite": True, "postgres": True, "mysql": False}
ADVISORY = {
    "fs.allow_walk",
    "fs.allow_glob",
    *(f"process.{name}" for name in ("allow_exit", "max_spawns", "max_runtime_ms", "allow_args_regex_lite")),
    *(f"process.{name}" for name in ("allow_env_keys", "allow_cwd", "allow_cwd_roots", "max_args", "max_env")),
}


def policy(**values: object) -> Policy:
    """The default policy with values set by path (two underscores for a dot)."""
    made = document_with({path.replace("__", "."): value for path, value in values.items()})
    return decode_policy(render_policy(made), source="p")


def plan(**values: object) -> Plan:
    """The plan in a VM for such a policy."""
    return make_plan(policy(**values), VM)


def states(made: Plan, *names: str) -> set[str]:
    """The states of the named fields."""
    return {control.state for control in made.controls if control.field in names}


def test_every_field_has_one_control() -> None:
    """Every policy field has exactly one control."""
    paths = [field.path for field in fields()]
    assert [control.field for control in plan().controls] == paths
    assert set(TABLE) == set(paths)


def test_the_default_policy_holds_fully_in_a_virtual_machine() -> None:
    """In a VM every field of the default policy is enforced or advisory."""
    made = plan()
    assert made.refusals == ()
    assert {control.state for control in made.controls} == {"enforced", "advisory"}
    made.require()


def test_limits_are_enforced_and_named_for_the_job() -> None:
    """Each limit is enforced and passed to the job."""
    made = plan(limits__core_dumps=True)
    names = ("cpu_ms", "wall_ms", "mem_bytes", "fds", "procs", "core_dumps")
    assert states(made, *(f"limits.{name}" for name in names)) == {"enforced"}
    limits = made.limits
    assert (limits.wall_ms, limits.cpu_ms, limits.mem_bytes) == (60_000, 60_000, 512 << 20)
    assert (limits.fds, limits.procs, limits.core_dumps, limits.ram_bytes) == (1024, 64, True, 2 << 30)


def test_advisory_fields_are_never_refused() -> None:
    """Advisory fields are never refused."""
    advisory = ADVISORY | {
        field.path
        for field in fields()
        if field.path.startswith(("time.", "language.", "threads.max_", "db.drivers", "db.max_", "db.sqlite"))
        or (field.path.startswith("process.max_") and field.path.endswith("_bytes"))
    }
    extreme = {"time__allow_sleep": False, "process__max_spawns": 1, "threads__max_workers": 3, "process__max_args": 0}
    for made in (plan(), plan(**extreme), make_plan(default_policy(), NOTHING)):
        assert states(made, *advisory) == {"advisory"}


HOSTS = [{"host": "example.org", "ports": [443]}]


@pytest.mark.parametrize("fields", [{"net__allow_hosts": HOSTS}, {"db__enabled": True}])
def test_unreachable_hosts_are_refused_by_field(fields: dict[str, object]) -> None:
    """Hosts or databases that a backend cannot reach are refused by field, with the line to change."""
    without = msgspec.structs.replace(VM, can_enforce=VM.can_enforce - {"network"})
    made = make_plan(policy(**({"db__drivers": SERVERS, "db__enabled": False} | fields)), without)
    (refusal,) = made.refusals
    (field,) = [name.replace("__", ".") for name in fields]
    assert refusal.field == field
    assert refusal.why.endswith(f" ({field})")
    assert refusal.how_to_allow.json_path == f"$.{field}"
    assert refusal.how_to_allow.value in ([], False)
    assert states(made, field) == {"refused"}
    with pytest.raises(RefusedError, match=field):
        made.require()
    unconfined = make_plan(policy(**({"db__drivers": SERVERS, "db__enabled": False} | fields)), NOTHING)
    assert [refusal.field for refusal in unconfined.refusals] == [field]


def test_hosts_are_held_by_the_egress_gate() -> None:
    """With network access every network field is enforced by the egress gate."""
    made = plan(net__allow_hosts=HOSTS)
    assert made.refusals == ()
    names = ("enabled", "allow_dns", "allow_tcp", "allow_udp", "allow_hosts")
    controls = [control for control in made.controls if control.field in {f"net.{name}" for name in names}]
    assert {(control.state, control.by) for control in controls} == {("enforced", "the egress gate")}


def test_a_plan_states_how_connections_are_refused() -> None:
    """The plan says on which backends connect() succeeds before a refused connection is reset."""
    weaker = msgspec.structs.replace(VM, can_enforce=VM.can_enforce - {"held-connections"})
    for features, named in ((VM, False), (weaker, True)):
        made = make_plan(policy(net__allow_hosts=HOSTS), features)
        (control,) = [control for control in made.controls if control.field == "net.allow_hosts"]
        assert ("connection is reset" in control.why) is named


def test_database_servers_join_the_hosts() -> None:
    """Servers of db.net can be reached with net.allow_hosts and alone, and the plan says what is missing."""
    servers = {"allow_dns": ["db.example"], "allow_ports": [5432]}
    for hosts, listed in ((HOSTS, {}), ([], servers)):
        joined = plan(db__drivers=SERVERS, db__enabled=True, db__net=listed, net__allow_hosts=hosts)
        assert joined.refusals == ()
        assert states(joined, "db.net.allow_dns", "net.allow_hosts") == {"enforced"}
    (refusal,) = plan(db__drivers=SERVERS, db__enabled=True).refusals
    assert "entries in db.net or net.allow_hosts" in refusal.why
    without = msgspec.structs.replace(VM, can_enforce=VM.can_enforce - {"network"})
    (refusal,) = make_plan(policy(db__drivers=SERVERS, db__enabled=True, db__net=servers), without).refusals
    assert refusal.field == "db.enabled"


def test_refusals_are_reported_all_at_once() -> None:
    """All refusals are reported at once, with the flags that caused them."""
    without = msgspec.structs.replace(VM, can_enforce=VM.can_enforce - {"network"})
    made = make_plan(policy(fs__read_roots=["/usr"], net__allow_hosts=[{"host": "a", "ports": [1]}]), without)
    assert [refusal.field for refusal in made.refusals] == ["fs.read_roots", "net.allow_hosts"]
    with pytest.raises(RefusedError) as caught:
        made.require()
    assert caught.value.fix == "Change fs.read_roots, net.allow_hosts in the policy"
    with pytest.raises(RefusedError) as caught:
        made.require(["--allow-host", "--deny-host"])
    assert caught.value.fix == "Omit --allow-host, or change fs.read_roots, net.allow_hosts in the policy"


FILE_FIELDS = [field.path for field in fields() if field.path.startswith("fs.") and field.path not in ADVISORY]


def test_file_fields_name_their_enforcer() -> None:
    """With roots every file field names its enforcer."""
    made = plan(fs__read_roots=["."], fs__write_roots=["out"])
    assert made.refusals == ()
    assert states(made, *FILE_FIELDS) == {"enforced"}
    by = {control.field: control.by for control in made.controls}
    assert (by["fs.read_roots"], by["fs.allow_remove"]) == ("the copy of host files", "the change check")


def test_disabled_fs_gives_no_roots() -> None:
    """With fs.enabled false no host file goes in, whatever the roots are."""
    made = plan(fs__enabled=False, fs__read_roots=["/usr"])
    assert made.refusals == ()
    assert {control.by for control in made.controls if control.field in FILE_FIELDS} == {"the virtual machine"}


@pytest.mark.parametrize(
    ("root", "why"),
    [
        ("/", "own /bin"),
        ("/usr/share/dict", "own /usr"),
        ("//x07/../x07", "own /x07"),
        ("/opt/x07/a", "own /opt/x07"),
        ("..", "must stay below the folder where the program starts"),
        ("a/../../b", "must stay below the folder where the program starts"),
        (".git", "is hidden"),
        ("/home/u/.config/x", "is hidden"),
    ],
)
def test_a_conflicting_root_is_refused(root: str, why: str) -> None:
    """A root that would hide the guest's system, escape its folder or be hidden is refused."""
    for field in ("fs.read_roots", "fs.write_roots"):
        (refusal,) = plan(**{field.replace(".", "__"): ["data", root]}).refusals
        assert refusal.field == field
        assert why in refusal.why
        assert root in refusal.why


@pytest.mark.parametrize("root", [".", "data", "a/../b", "/home/u/data", "/data", "/tmp/x", "/opt/other", "/home"])  # noqa: S108
def test_other_roots_are_accepted(root: str) -> None:
    """Relative roots, and absolute ones outside the guest's system, are accepted."""
    assert plan(fs__read_roots=[root]).refusals == ()


def test_a_database_in_a_file_needs_no_server() -> None:
    """A database in a file needs no network."""
    made = plan(db={"enabled": True, "drivers": {"sqlite": True, "postgres": False, "mysql": False}})
    assert made.refusals == ()
    assert states(made, "db.enabled", "db.drivers.sqlite") == {"advisory"}


@pytest.mark.parametrize(
    ("changes", "field", "state"),
    [
        ({"process__allow_spawn": False}, "process.allow_spawn", "enforced"),
        ({"threads__enabled": False}, "threads.enabled", "enforced"),
        ({"process__enabled": False}, "process.enabled", "enforced"),
        ({"process__enabled": False}, "process.allow_spawn", "enforced"),
        ({"process__allow_exec": False}, "process.allow_exec", "enforced"),
        ({"process__allow_exec_prefixes": ["/usr/"]}, "process.allow_exec_prefixes", "enforced"),
        ({"process__max_live": 8}, "process.max_live", "enforced"),
        ({"process__kill_tree": False}, "process.kill_tree", "advisory"),
        ({"env__deny_keys": ["PATH"]}, "env.deny_keys", "enforced"),
        ({"env__enabled": False, "env__allow_keys": ["HOME"]}, "env.enabled", "enforced"),
    ],
)
def test_unenforced_restrictions_are_declared(changes: dict[str, object], field: str, state: str) -> None:
    """A control says "enforced" only if the run behaves as the policy says."""
    made = plan(**changes)
    assert states(made, field) == {state}
    assert made.refusals == ()


def test_a_backend_claims_only_what_it_enforces() -> None:
    """A backend claims only the limits that it enforces."""
    limits = {field for field in VM_CAPABILITIES if field.startswith("limits.")}
    for isolation, state in (("container", "refused"), ("process", "advisory"), ("none", "advisory")):
        made = make_plan(default_policy(), msgspec.structs.replace(NOTHING, isolation=isolation))
        assert states(made, *limits, "fs.enabled", "net.enabled", "env.enabled") == {state}
        assert bool(made.refusals) == (state == "refused")


def test_x07s_own_variables_cannot_be_denied() -> None:
    """A policy that denies X07's own variables is refused."""
    (refusal,) = plan(env__deny_keys=["X07_OS_FS"]).refusals
    assert refusal.field == "env.deny_keys"


def test_x07s_own_variables_of_the_host_cannot_be_asked_for() -> None:
    """A policy that passes in the host's X07 variables is refused by name."""
    (refusal,) = plan(env__allow_keys=["LANG", "X07_VM_STATE_DIR", "X07_OS_FS"]).refusals
    assert refusal.field == "env.allow_keys"
    assert "X07_OS_FS, X07_VM_STATE_DIR" in refusal.why
    assert plan(env__allow_keys=["X07_OS_FS"], env__enabled=False).refusals == ()


@pytest.mark.parametrize(
    ("changes", "expected", "absent"),
    [
        ({}, "none of the host's variables", "refused"),
        ({"env__allow_keys": ["LANG"]}, "the host's variables in env.allow_keys", "none of the host's variables"),
        ({"env__allow_keys": ["LANG"], "env__enabled": False}, "a run that sets others is refused", "the host"),
    ],
)
def test_the_control_says_which_variables_go_in(changes: dict[str, object], expected: str, absent: str) -> None:
    """The control for env.enabled says which host variables go in."""
    (control,) = (control for control in plan(**changes).controls if control.field == "env.enabled")
    assert expected in control.why
    assert absent not in control.why


def test_unavailable_confinement_is_refused() -> None:
    """A backend without confinement refuses each field that needs it."""
    weak = Features(isolation="none", own_kernel=False, can_enforce=VM_CAPABILITIES - {"confinement"})
    off = {"process__allow_exec": False, "process__allow_spawn": False, "threads__enabled": False}
    without = policy(process__max_live=1, **off)
    names = ("threads.enabled", "process.allow_spawn", "process.allow_exec", "process.allow_execs")
    assert states(make_plan(without, weak), *names) == {"refused"}
    assert states(make_plan(without, VM), *names, "process.max_live") == {"enforced"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"process__allow_execs": ["out/tool", "/tmp/tool"], "process__allow_exec_prefixes": ["/usr/"]}, ""),  # noqa: S108
        ({"process__allow_exec_prefixes": ["/tmp/", "deps/", "/usr/"]}, "/tmp/, deps/"),  # noqa: S108 - the guest's own
        ({"process__allow_exec_prefixes": ["/data/b"]}, ""),
        ({"process__allow_exec_prefixes": ["/data/b"], "fs__write_roots": ["/data"]}, "/data/b"),
        ({"process__allow_exec_prefixes": ["/data/b"], "fs__write_roots": ["/data"], "fs__enabled": False}, ""),
        (
            {"process__allow_exec_prefixes": [], "process__allow_execs": ["a/../tool"], "fs__write_roots": ["tool"]},
            "a/../tool",
        ),
    ],
)
def test_writable_executables_are_named(changes: dict[str, object], expected: str) -> None:
    """The control for executables names the entries in which the program can write."""
    found = {control.field: control.why for control in plan(**changes).controls}["process.allow_exec_prefixes"]
    assert found.partition("execute files below: ")[2] == expected
    assert "executed" in found


@pytest.mark.parametrize(
    ("root", "path", "value"),
    [
        ("a/.git", "$.fs.deny_hidden", False),
        ("/etc/.x", "$.fs.read_roots", []),
    ],
)
def test_a_hidden_root_names_deny_hidden(root: str, path: str, value: object) -> None:
    """The refusal of a hidden root names fs.deny_hidden if that is all that is missing."""
    made = plan(fs__read_roots=["in", root])
    (refusal,) = made.refusals
    assert (refusal.field, refusal.how_to_allow) == ("fs.read_roots", HowToAllow(json_path=path, value=value))
    with pytest.raises(RefusedError) as error:
        made.require(["--allow-read-root"])
    assert f"Omit --allow-read-root, or change {path[2:]} in the policy" in error.value.fix
    assert (plan(fs__read_roots=[root], fs__deny_hidden=False).refusals == ()) == (value is False)


def test_fewer_children_than_tasks_bound_all_tasks() -> None:
    """process.max_live replaces a larger limits.procs."""
    assert plan(process__max_live=8).limits.for_guest().tasks == 9
    assert plan(process__max_live=100).limits.for_guest().tasks == 65
    assert plan(process__max_live=8, process__allow_spawn=False).limits.for_guest().tasks == 65
    assert plan(process__max_live=8, process__enabled=False).limits.for_guest().tasks == 65


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (True, True, True, None, [])),
        ({"threads__enabled": False}, (False, True, True, None, [])),
        ({"process__enabled": False}, (True, False, False, None, [])),
        ({"process__allow_spawn": False, "process__max_live": 0}, (True, False, True, None, [])),
        ({"process__allow_exec": False}, (True, True, False, None, [])),
        (
            {"process__allow_execs": ["/bin/true", "tool"], "process__allow_exec_prefixes": ["deps/", "/usr/"]},
            (True, True, True, ["/bin/true", "/home/x/tool"], ["/home/x/deps/", "/usr/"]),
        ),
        ({"process__allow_execs": ["/bin/true"]}, (True, True, True, None, [])),
        (
            {
                "process__allow_execs": ["../tool", "a/../b", "/usr//bin/env"],
                "process__allow_exec_prefixes": ["../../tmp/x", "deps/.", "//usr/bin/", "deps/x"],
            },
            (
                *(True, True, True, ["/home/tool", "/home/x/b", "/usr/bin/env"]),
                ["/tmp/x", "/home/x/deps/", "/usr/bin/", "/home/x/deps/x"],  # noqa: S108 - the guest's own
            ),
        ),
        ({"process__allow_exec_prefixes": ["/usr/.."]}, (True, True, True, None, [])),
    ],
)
def test_confinement_follows_from_the_policy(changes: dict[str, object], expected: tuple[object, ...]) -> None:
    """The confinement sent to the guest follows from the policy."""
    found = confinement(policy(**changes), "/home/x")
    assert (found.threads, found.spawn, found.execute, found.programs, found.prefixes) == expected
