"""The X07_OS_* variables, which pass a policy to the X07 language's runtime libraries. Other programs ignore them."""

from x07_sandbox.policy.default import default_policy
from x07_sandbox.policy.model import HostPorts, Policy, leaf_values

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
