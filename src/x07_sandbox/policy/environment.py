"""The X07_OS_* variables by which a policy reaches X07's own run-time libraries; they bind only programs that ask."""

from x07_sandbox.policy.default import default_policy
from x07_sandbox.policy.model import HostPorts, Policy, leaf_values

_SECTIONS = ("fs.", "net.", "db.", "env.", "time.", "threads.", "process.")
# Variables that are not called after their fields.
_ODD = {
    "fs.deny_hidden": "X07_OS_DENY_HIDDEN",
    "db.drivers.postgres": "X07_OS_DB_PG",
    "db.connect_timeout_ms": "X07_OS_DB_MAX_CONNECT_TIMEOUT_MS",
    "db.query_timeout_ms": "X07_OS_DB_MAX_QUERY_TIMEOUT_MS",
}


def _variable(field: str) -> str:
    """Of "process.max_live" X07_OS_PROC_MAX_LIVE, of "fs.enabled" X07_OS_FS."""
    path = field.removesuffix(".enabled").replace("process", "proc").replace(".drivers", "")
    return _ODD.get(field) or f"X07_OS_{path.replace('.', '_').upper()}"


# Variable, and the field that it carries; in the order of the model.
VARIABLES: tuple[tuple[str, str], ...] = tuple(
    (_variable(field), field) for field in leaf_values(default_policy()) if field.startswith(_SECTIONS)
)


def program_environment(policy: Policy) -> dict[str, str]:
    """Every X07 variable of a sandboxed program; nothing of the host's environment is among them."""
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
