#!/usr/bin/env python3
"""Write docs/backends/README.md: the behaviours of each backend, with known gaps.

python -m scripts.make_backends_page        in an environment that has x07-sandbox
"""

from __future__ import annotations

from pathlib import Path

from x07_sandbox.backends.registry import BY_NAME, create
from x07_sandbox.conformance.behaviours import BEHAVIOURS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "backends" / "README.md"
# Where the contract was checked, for each backend.
CHECKED = {
    "firecracker-ctr": "containerd with runc, and a stand-in for the VMs",
    "apple-container": "a stand-in for `container` over podman, in three versions",
    "qemu": "emulated VMs, x86_64 and arm64; [KVM in an emulated computer](../explanation/kvm.md)",
    "vz": "a stand-in for the helper over QEMU, x86_64 and arm64",
    "gvisor": "runsc",
    "podman": "the engine",
    "docker": "the engine",
    "containerd": "the engine",
    "os": "this system",
    "none": "this system",
}
HEAD = """\
# Backends and their behaviours

`scripts/make_backends_page.py` generates this page from the list of behaviours
(`src/x07_sandbox/conformance/behaviours.py`) and the gaps that each backend declares. `tests/contract` checks the list
on every backend that the test host can run; `x07 conform` checks it on your host. If a behaviour needs a host feature
that is missing, such as control groups, the check is skipped.

Each backend has a page with its prerequisites and guarantees:

```{toctree}
:maxdepth: 1

PAGES
```
"""


def render() -> str:
    """Return the current page."""
    names = [*BY_NAME]
    gaps = {name: create(name).known_gaps for name in names}
    pages = sorted(path.stem for path in PAGE.parent.glob("*.md") if path != PAGE)
    lines = [
        HEAD.replace("PAGES", "\n".join(pages)),
        f"| group | behaviour | promise | {' | '.join(f'`{name}`' for name in names)} |",
    ]
    lines.append(f"|---|---|---|{'---|' * len(names)}")
    isolation = (" or ".join(BY_NAME[name].isolation) for name in names)
    lines.append(f"| | | isolation | {' | '.join(isolation)} |")
    lines.append(f"| | | checked with | {' | '.join(CHECKED[name] for name in names)} |")
    for one in BEHAVIOURS:
        cells = ["gap" if one.name in gaps[name] else "yes" for name in names]
        lines.append(f"| {one.group} | {one.name} | {one.promise} | {' | '.join(cells)} |")
    for name in names:
        if gaps[name]:
            lines += ["", f"## Known gaps of `{name}`", ""]
            for reason in dict.fromkeys(gaps[name].values()):
                behaviours = (behaviour for behaviour, given in gaps[name].items() if given == reason)
                lines.append(f"- {', '.join(behaviours)}: {reason}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
