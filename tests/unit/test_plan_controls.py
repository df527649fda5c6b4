"""Promises of the plan: one truthful control for every field, and refusals for what cannot be given."""

import json
from typing import Any

import msgspec
import pytest

from x07_sandbox.errors import RefusedError
from x07_sandbox.plan.confinement import confinement
from x07_sandbox.plan.control_table import TABLE
from x07_sandbox.plan.controls import Plan, make_plan
from x07_sandbox.plan.denials import HowToAllow
from x07_sandbox.plan.features import VM_CAPABILITIES, Features
from x07_sandbox.policy.decode import decode_policy
from x07_sandbox.policy.default import default_policy, render_policy
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
    """The default policy with values set by path (dots written as two underscores)."""
    made: dict[str, Any] = json.loads(render_policy(default_policy()))
    for path, value in values.items():
        *sections, name = path.split("__")
        holder = made
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[name] = value
    return decode_policy(render_policy(made), source="p")


def plan(**values: object) -> Plan:
    """The plan in a VM for such a policy."""
    return make_plan(policy(**values), VM)


def states(made: Plan, *names: str) -> set[str]:
    """The states of the named fields."""
    return {control.state for control in made.controls if control.field in names}


def test_every_field_has_one_control() -> None:
    """The controls name exactly the fields of the model, each once, and so does the table behind them."""
    paths = [field.path for field in fields()]
    assert [control.field for control in plan().controls] == paths
    assert set(TABLE) == set(paths)


def test_the_default_policy_holds_fully_in_a_virtual_machine() -> None:
    """Without a policy of one's own nothing is refused, and nothing is left unenforced."""
    made = plan()
    assert made.refusals == ()
    assert {control.state for control in made.controls} == {"enforced", "advisory"}
    made.require()


def test_limits_are_enforced_and_named_for_the_job() -> None:
    """Each limit is held by clock, control group or resource limit, and the job gets its value."""
    made = plan(limits__core_dumps=True)
    names = ("cpu_ms", "wall_ms", "mem_bytes", "fds", "procs", "core_dumps")
    assert states(made, *(f"limits.{name}" for name in names)) == {"enforced"}
    limits = made.limits
    assert (limits.wall_ms, limits.cpu_ms, limits.mem_bytes) == (60_000, 60_000, 512 << 20)
    assert (limits.fds, limits.procs, limits.core_dumps, limits.ram_bytes) == (256, 64, True, 2 << 30)


def test_advice_is_advice_whatever_its_value() -> None:
    """The advisory fields are never refused for being set."""
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
def test_what_a_backend_cannot_carry_is_refused_by_name(fields: dict[str, object]) -> None:
    """Hosts, and database servers without hosts, are refused with the field, the reason, and the line to change."""
    without = msgspec.structs.replace(VM, can_enforce=VM.can_enforce - {"network"})
    made = make_plan(policy(**({"db__drivers": SERVERS, "db__enabled": False} | fields)), without)
    (refusal,) = made.refusals
    (field,) = [name.replace("__", ".") for name in fields]
    assert refusal.field == field
    assert refusal.why.endswith(f": {field}")
    assert refusal.how_to_allow.json_path == f"$.{field}"
    assert refusal.how_to_allow.value in ([], False)
    assert states(made, field) == {"refused"}
    with pytest.raises(RefusedError, match=field):
        made.require()


def test_hosts_are_held_by_the_egress_gate() -> None:
    """Where connections can be carried, every switch of the network and every host is enforced by the gate."""
    made = plan(net__allow_hosts=HOSTS)
    assert made.refusals == ()
    names = ("enabled", "allow_dns", "allow_tcp", "allow_udp", "allow_hosts")
    controls = [control for control in made.controls if control.field in {f"net.{name}" for name in names}]
    assert {(control.state, control.by) for control in controls} == {("enforced", "the egress gate")}


def test_a_plan_says_where_refused_connections_are_reset() -> None:
    """Where the first packet cannot wait for the gate, the plan says that connect() succeeds at first."""
    weaker = msgspec.structs.replace(VM, can_enforce=VM.can_enforce - {"held-connections"})
    for features, said in ((VM, False), (weaker, True)):
        made = make_plan(policy(net__allow_hosts=HOSTS), features)
        (control,) = [control for control in made.controls if control.field == "net.allow_hosts"]
        assert ("connection is reset" in control.why) is said


def test_database_servers_join_the_hosts() -> None:
    """Servers of db.net are reached where hosts are listed too; otherwise they are refused, and the plan says why."""
    joined = plan(db__drivers=SERVERS, db__enabled=True, net__allow_hosts=HOSTS)
    assert joined.refusals == ()
    assert states(joined, "db.net.allow_dns") == {"enforced"}
    (refusal,) = plan(db__drivers=SERVERS, db__enabled=True).refusals
    assert "non-empty net.allow_hosts" in refusal.why


def test_refusals_are_told_all_at_once() -> None:
    """A policy that asks for several missing things hears of each, and of the flags that were given for them only."""
    without = msgspec.structs.replace(VM, can_enforce=VM.can_enforce - {"network"})
    made = make_plan(policy(fs__read_roots=["/usr"], net__allow_hosts=[{"host": "a", "ports": [1]}]), without)
    assert [refusal.field for refusal in made.refusals] == ["fs.read_roots", "net.allow_hosts"]
    with pytest.raises(RefusedError) as told:
        made.require()
    assert told.value.fix == "Change fs.read_roots, net.allow_hosts in the policy"
    with pytest.raises(RefusedError) as told:
        made.require(["--allow-host", "--deny-host"])
    assert told.value.fix == "Change fs.read_roots, net.allow_hosts in the policy, or omit --allow-host"


FILE_FIELDS = [field.path for field in fields() if field.path.startswith("fs.") and field.path not in ADVISORY]


def test_files_are_given_within_rules_that_hold() -> None:
    """With roots every field about files says what holds it: copying, the check of changes, or no file at all."""
    made = plan(fs__read_roots=["."], fs__write_roots=["out"])
    assert made.refusals == ()
    assert states(made, *FILE_FIELDS) == {"enforced"}
    by = {control.field: control.by for control in made.controls}
    assert (by["fs.read_roots"], by["fs.allow_remove"]) == ("the copy of host files", "the change check")


def test_with_fs_off_roots_are_not_given() -> None:
    """Whatever roots a policy names, with fs.enabled false nothing of the host goes in, though upstream mounts them."""
    made = plan(fs__enabled=False, fs__read_roots=["/usr"])
    assert made.refusals == ()
    assert {control.by for control in made.controls if control.field in FILE_FIELDS} == {"the virtual machine"}


@pytest.mark.parametrize(
    ("root", "why"),
    [
        ("/", "over /bin"),
        ("/usr/share/dict", "over /usr"),
        ("/etc", "over /etc"),
        ("/x07/in", "over /x07"),
        ("//x07/../x07", "over /x07"),
        ("/tmp", "over /tmp"),  # noqa: S108 - the guest's own
        ("/opt", "over /opt"),
        ("/opt/x07/a", "over /opt/x07"),
        ("..", "leads out of its start folder"),
        ("a/../../b", "leads out of its start folder"),
        (".git", "is hidden"),
        ("a/.b/c", "is hidden"),
        ("/home/u/.config/x", "is hidden"),
    ],
)
def test_a_root_without_a_place_in_the_machine_is_refused(root: str, why: str) -> None:
    """Nothing of the host's lies over the machine's own tree, comes from outside its folder, or is hidden."""
    for field in ("fs.read_roots", "fs.write_roots"):
        (refusal,) = plan(**{field.replace(".", "__"): ["data", root]}).refusals
        assert refusal.field == field
        assert why in refusal.why
        assert root in refusal.why


@pytest.mark.parametrize("root", [".", "data", "a/../b", "/home/u/data", "/data", "/tmp/x", "/opt/other", "/home"])  # noqa: S108
def test_other_roots_have_one(root: str) -> None:
    """Folders below the program's own, and absolute ones that are not the machine's, are given."""
    assert plan(fs__read_roots=[root]).refusals == ()


def test_a_hidden_root_is_given_where_the_policy_lets_hidden_names_in() -> None:
    """With fs.deny_hidden false a hidden folder is one like any other."""
    assert plan(fs__read_roots=[".config"], fs__deny_hidden=False).refusals == ()


def test_a_database_in_a_file_needs_no_server() -> None:
    """The drivers that need no network are advice for X07's libraries; a file is held by the rules of files."""
    made = plan(db={"enabled": True, "drivers": {"sqlite": True, "postgres": False, "mysql": False}})
    assert made.refusals == ()
    assert states(made, "db.enabled", "db.drivers.sqlite") == {"advisory"}


def test_no_network_holds_for_every_network_field() -> None:
    """Without hosts, or with net off, nothing of the network is there: enforced, not promised."""
    names = ("net.enabled", "net.allow_dns", "net.allow_tcp", "net.allow_udp", "net.allow_hosts")
    off = plan(net__enabled=False, net__allow_hosts=[{"host": "a", "ports": [1]}])
    for made in (plan(), off):
        assert states(made, *names) == {"enforced"}
        assert made.refusals == ()


@pytest.mark.parametrize(
    ("changes", "field", "state"),
    [
        ({"process__allow_spawn": False}, "process.allow_spawn", "enforced"),
        ({"process__allow_spawn": False, "limits__procs": 0}, "process.allow_spawn", "enforced"),
        ({"threads__enabled": False}, "threads.enabled", "enforced"),
        ({"threads__enabled": False, "limits__procs": 0}, "threads.enabled", "enforced"),
        ({"process__enabled": False}, "process.enabled", "enforced"),
        ({"process__enabled": False}, "process.allow_spawn", "enforced"),
        ({"process__enabled": False}, "process.allow_exec", "enforced"),
        ({"process__allow_exec": False}, "process.allow_exec", "enforced"),
        ({"process__allow_exec": False}, "process.enabled", "enforced"),
        ({"process__allow_exec_prefixes": ["/usr/"]}, "process.allow_exec_prefixes", "enforced"),
        ({"process__allow_execs": ["/bin/true"]}, "process.allow_execs", "enforced"),
        ({"process__max_live": 8}, "process.max_live", "enforced"),
        ({"process__max_live": 8, "limits__procs": 8}, "process.max_live", "enforced"),
        ({"process__kill_tree": False}, "process.kill_tree", "advisory"),
        ({"process__kill_on_drop": False}, "process.kill_on_drop", "advisory"),
        ({"env__deny_keys": ["SECRET"]}, "env.deny_keys", "enforced"),
        ({"env__deny_keys": ["PATH"]}, "env.deny_keys", "enforced"),
        ({"env__enabled": False, "env__allow_keys": ["HOME"]}, "env.enabled", "enforced"),
    ],
)
def test_a_restriction_that_nobody_holds_is_said_to_be_unenforced(
    changes: dict[str, object], field: str, state: str
) -> None:
    """A control says enforced only where the run behaves as the policy says; the run goes on, and its result tells."""
    made = plan(**changes)
    assert states(made, field) == {state}
    assert made.refusals == ()


def test_a_backend_without_walls_claims_none() -> None:
    """What a backend cannot hold is refused; where the user has accepted that it holds less, it is advisory."""
    limits = {field for field in VM_CAPABILITIES if field.startswith("limits.")}
    for isolation, state in (("container", "refused"), ("process", "advisory"), ("none", "advisory")):
        made = make_plan(default_policy(), msgspec.structs.replace(NOTHING, isolation=isolation))
        assert states(made, *limits, "fs.enabled", "net.enabled", "env.enabled") == {state}
        assert bool(made.refusals) == (state == "refused")


def test_x07s_own_variables_cannot_be_denied() -> None:
    """A policy that denies what every program is told is refused, since it would not be kept."""
    (refusal,) = plan(env__deny_keys=["X07_OS_FS"]).refusals
    assert refusal.field == "env.deny_keys"


def test_x07s_own_variables_of_the_host_cannot_be_asked_for() -> None:
    """A policy that wants the host's X07 variables in is refused by name, and not where no variable goes in."""
    (refusal,) = plan(env__allow_keys=["LANG", "X07_VM_STATE_DIR", "X07_OS_FS"]).refusals
    assert refusal.field == "env.allow_keys"
    assert "X07_OS_FS, X07_VM_STATE_DIR" in refusal.why
    assert plan(env__allow_keys=["X07_OS_FS"], env__enabled=False).refusals == ()


@pytest.mark.parametrize(
    ("changes", "told", "untold"),
    [
        ({}, "none from the host", "refused"),
        ({"env__allow_keys": ["LANG"]}, "those of env.allow_keys from the host", "none from the host"),
        ({"env__allow_keys": ["LANG"], "env__enabled": False}, "a request for others is refused", "the host"),
    ],
)
def test_which_variables_go_in_is_said_as_it_is(changes: dict[str, object], told: str, untold: str) -> None:
    """Where variables of the host go in no control says that none does, and where none may be given one says so."""
    (control,) = (control for control in plan(**changes).controls if control.field == "env.enabled")
    assert told in control.why
    assert untold not in control.why


def test_what_counts_in_place_of_a_value_is_said() -> None:
    """Of files the controls say the bound that is in force whatever the policy says, and that a flag may give more."""
    why = {control.field: control.why for control in plan(fs__read_roots=["."], fs__max_depth=1000).controls}
    assert "more than 256 means 256" in why["fs.max_depth"]
    assert {"--out" in control.why for control in plan().controls if control.field in FILE_FIELDS} == {True}
    assert not any("--out" in control.why for control in plan(fs__enabled=False).controls)


def test_a_variable_too_long_for_linux_is_refused_before_anything_starts() -> None:
    """A list that no program could be started with is refused by name, not by a failing start."""
    made = plan(process__allow_execs=["/" + "x" * 4000] * 40)
    (refusal,) = made.refusals
    assert refusal.field == "process.allow_execs"
    assert "X07_OS_PROC_ALLOW_EXECS" in refusal.why


def test_confinement_is_claimed_only_where_it_stands() -> None:
    """A backend that does not confine programs refuses each field that asks for it."""
    weak = Features(isolation="none", own_kernel=False, can_enforce=VM_CAPABILITIES - {"confinement"})
    changes: dict[str, Any] = json.loads(render_policy(default_policy()))
    changes["process"] |= {"allow_exec": False, "allow_spawn": False, "max_live": 1}
    changes["threads"]["enabled"] = False
    policy = decode_policy(render_policy(changes), source="p")
    names = ("threads.enabled", "process.allow_spawn", "process.allow_exec", "process.allow_execs")
    assert states(make_plan(policy, weak), *names) == {"refused"}
    assert states(make_plan(policy, VM), *names, "process.max_live") == {"enforced"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"process__allow_execs": ["out/tool", "/tmp/tool"], "process__allow_exec_prefixes": ["/usr/"]}, ""),  # noqa: S108
        ({"process__allow_exec_prefixes": ["/tmp/", "deps/", "/usr/"]}, "/tmp/, deps/"),  # noqa: S108 - the guest's own
        ({"process__allow_exec_prefixes": ["/data/b"]}, ""),
        ({"process__allow_exec_prefixes": ["/data/b"], "fs__write_roots": ["/data"]}, "/data/b"),
        ({"process__allow_exec_prefixes": ["/data/b"], "fs__write_roots": ["/data"], "fs__enabled": False}, ""),
        ({"process__allow_exec_prefixes": ["/data/../usr/"], "fs__write_roots": ["/data"]}, ""),
        (
            {"process__allow_exec_prefixes": [], "process__allow_execs": ["a/../tool"], "fs__write_roots": ["tool"]},
            "a/../tool",
        ),
    ],
)
def test_a_list_tells_where_what_is_written_may_be_executed(changes: dict[str, object], told: str) -> None:
    """The control names the entries that lead into a place where the program can write, and is silent without one."""
    found = {control.field: control.why for control in plan(**changes).controls}["process.allow_exec_prefixes"]
    assert found.partition("execute files below: ")[2] == told
    assert "executed" in found


@pytest.mark.parametrize(
    ("root", "path", "value"),
    [
        ("a/.git", "$.fs.deny_hidden", False),
        ("/srv/.data", "$.fs.deny_hidden", False),
        ("/etc/.x", "$.fs.read_roots", []),
    ],
)
def test_of_a_hidden_root_what_lets_it_is_told(root: str, path: str, value: object) -> None:
    """A root that only fs.deny_hidden keeps out needs that field to be false; one with no place at all is left out."""
    made = plan(fs__read_roots=["in", root])
    (refusal,) = made.refusals
    assert (refusal.field, refusal.how_to_allow) == ("fs.read_roots", HowToAllow(json_path=path, value=value))
    with pytest.raises(RefusedError) as error:
        made.require(["--allow-read-root"])
    assert f"Change {path[2:]} in the policy, or omit --allow-read-root" in error.value.fix
    assert (plan(fs__read_roots=[root], fs__deny_hidden=False).refusals == ()) == (value is False)


@pytest.mark.parametrize(
    ("given", "written", "told"),
    [
        ("/srv/two", "two", "/srv/two/, /srv/two"),
        ("/srv/two", "/data", ""),
        ("two", "/srv", "two/, two"),  # the prefix always leads into a folder that the program can write
        ("two", "three", "two/"),
    ],
)
def test_a_list_tells_where_two_roots_may_be_one_folder(given: str, written: str, told: str) -> None:
    """A relative and an absolute root may be one folder of the host, which write roots open: no name can say that."""
    changes: dict[str, object] = {"fs__read_roots": [given], "fs__write_roots": [written]}
    changes |= {"process__allow_execs": [given], "process__allow_exec_prefixes": [f"{given}/"]}
    found = {control.field: control.why for control in plan(**changes).controls}
    assert found["process.allow_execs"].partition("execute files below: ")[2] == told
    assert "changes count only inside a write root" in found["fs.read_roots"]


def test_fewer_children_than_tasks_bound_all_tasks() -> None:
    """process.max_live stands in place of a larger limits.procs, unless no child may be started at all."""
    assert plan(process__max_live=8).limits.for_guest()["tasks"] == 9
    assert plan(process__max_live=100).limits.for_guest()["tasks"] == 65
    assert plan(process__max_live=8, process__allow_spawn=False).limits.for_guest()["tasks"] == 65
    assert plan(process__max_live=8, process__enabled=False).limits.for_guest()["tasks"] == 65


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, (True, True, True, None, ())),
        ({"threads__enabled": False}, (False, True, True, None, ())),
        ({"process__enabled": False}, (True, False, False, None, ())),
        ({"process__allow_spawn": False, "process__max_live": 0}, (True, False, True, None, ())),
        ({"process__allow_exec": False}, (True, True, False, None, ())),
        (
            {"process__allow_execs": ["/bin/true", "tool"], "process__allow_exec_prefixes": ["deps/", "/usr/"]},
            (True, True, True, ("/bin/true", "/home/x/tool"), ("/home/x/deps/", "/usr/")),
        ),
        ({"process__allow_execs": ["/bin/true"]}, (True, True, True, None, ())),
        (
            {
                "process__allow_execs": ["../tool", "a/../b", "/usr//bin/env"],
                "process__allow_exec_prefixes": ["../../tmp/x", "deps/.", "//usr/bin/", "deps/x"],
            },
            (
                *(True, True, True, ("/home/tool", "/home/x/b", "/usr/bin/env")),
                ("/tmp/x", "/home/x/deps/", "/usr/bin/", "/home/x/deps/x"),  # noqa: S108 - the guest's own
            ),
        ),
        ({"process__allow_exec_prefixes": ["//"]}, (True, True, True, None, ())),
        ({"process__allow_exec_prefixes": ["/usr/.."]}, (True, True, True, None, ())),
    ],
)
def test_the_machine_is_told_what_the_policy_forbids(changes: dict[str, object], told: tuple[object, ...]) -> None:
    """What START carries follows from the policy; relative paths are those below the working directory."""
    made: dict[str, Any] = json.loads(render_policy(default_policy()))
    for path, value in changes.items():
        section, name = path.split("__")
        made[section][name] = value
    found = confinement(decode_policy(render_policy(made), source="p"), "/home/x")
    assert (found.threads, found.spawn, found.execute, found.programs, found.prefixes) == told
