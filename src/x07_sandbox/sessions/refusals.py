"""Denials and result entries for refused changes: one of each for a refused folder and everything below it."""

import glob
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from x07_sandbox.files.changes import ChangeSet, Refused, RootChanges, display_name
from x07_sandbox.options import flag_for_file
from x07_sandbox.policy.denials import Denial, HowToAllow
from x07_sandbox.sessions.result import LeftOutEntry

_ENTRIES_MAX: Final = 100
_PATTERNS_MAX: Final = 8  # in a line to paste
_CHECK: Final = "the check of changes"


def denial(field: str, action: str, subject: str, by: str, count: int, how: tuple[object, str | None]) -> Denial:
    """Return a denial. by: the component that denied. how: the value and flag that would allow the action, or None."""
    json_path = f"$.{field}" if "." in field else None  # others are not fields of a policy
    value, flag = how
    allow = None if how == (None, None) else HowToAllow(json_path=json_path, value=value, flag=flag)
    return Denial(
        field=field, action=action, subject=subject, enforced_by=by, observed_by="host", count=count, how_to_allow=allow
    )


def flag_for(flag: str, name: str) -> str:
    """Return *flag* with a pattern that matches only *name*, quoted for a shell, or "" if *name* is not printable."""
    if not name.isprintable():
        return ""
    pattern = glob.escape(name)
    if pattern.startswith("-"):
        pattern = f"[-]{pattern[1:]}"  # so that it is not a flag
    return f"{flag} {shlex.quote(pattern)}"


def denials_and_entries(changes: ChangeSet, *, built_in: bool) -> tuple[list[Denial], tuple[LeftOutEntry, ...]]:
    """Return a denial and a result entry for each uppermost refused name. built_in: whether the policy is built in."""
    denials: list[Denial] = []
    entries: list[LeftOutEntry] = []
    for root in changes.roots:
        for name, reasons in list(_uppermost(root).items())[: _ENTRIES_MAX - len(denials)]:
            subject = display_name(root.root, name, several_roots=changes.several_roots)
            own = [one for one in reasons if one.name == name]
            by_rule: dict[str, Refused] = {}
            for one in [*own, *reasons]:
                by_rule.setdefault(one.rule, one)
            one_of_each = list(by_rule.values())
            why = "; ".join(dict.fromkeys(_why(root, name, one) for one in [*own, *one_of_each]))
            count = len({one.name for one in reasons})
            rules = tuple(one.rule for one in one_of_each)
            field = "protected" if "protected" in rules else rules[0]
            how = _how(root, name, own, one_of_each, built_in=built_in)
            denials.append(
                Denial(
                    field=field,
                    action="change",
                    subject=subject,
                    enforced_by=_CHECK,
                    observed_by="host",
                    count=count,
                    how_to_allow=how,
                    reason=why,
                )
            )
            take = _flags(root, name, one_of_each) if all(one.flag for one in own) else []
            take = take if all(take) else []  # a name is not printable
            entries.append(LeftOutEntry(name=subject, rules=rules, entries=count, take=" ".join(take)))
    return denials, tuple(entries)


def apply_command(run: str, entries: Iterable[LeftOutEntry]) -> str:
    """Return the `x07 apply` command for those *entries* that flags can allow, or "" if there are none."""
    flags = dict.fromkeys([entry.take for entry in entries if entry.take][:_PATTERNS_MAX])
    return " ".join(["x07 apply", run, *flags]) if flags else ""


def _uppermost(root: RootChanges) -> dict[str, list[Refused]]:
    names = {refusal.name for refusal in root.refused}
    found: defaultdict[str, list[Refused]] = defaultdict(list)
    for refusal in root.refused:
        top = above = refusal.name
        while above := above.rpartition("/")[0]:
            top = above if above in names else top
        found[top].append(refusal)
    return found


def _why(root: RootChanges, top: str, refusal: Refused) -> str:
    if refusal.name == top:
        return refusal.why
    return f"{display_name(root.root, refusal.name, several_roots=False)}: {refusal.why}"


def _how(
    root: RootChanges, top: str, own: Sequence[Refused], reasons: Sequence[Refused], *, built_in: bool
) -> HowToAllow | None:
    if any(not one.flag and not one.reveal and one.value is None for one in own):
        return None
    if edits := [one for one in reasons if one.value is not None and not (built_in and one.flag)]:
        rule, value = edits[0].rule, edits[0].value
        size = value if built_in and rule in {"fs.max_read_bytes", "fs.max_write_bytes"} else None
        flag = flag_for_file(size) if size is not None else None
        return HowToAllow(json_path=f"$.{rule}", value=value, flag=flag)
    flags = _flags(root, top, reasons)
    flags += [flag_for("--reveal", Path(one.reveal).name) for one in reasons if one.reveal]
    if not all(flags):
        return None
    fields = [one for one in reasons if one.value is not None]
    path, value = (f"$.{fields[0].rule}", fields[0].value) if fields else (None, None)
    return HowToAllow(json_path=path, value=value, flag=" ".join(flags) or None)


def _flags(root: RootChanges, top: str, reasons: Iterable[Refused]) -> list[str]:
    flags: set[str] = {one.flag for one in reasons if one.flag}
    named = "--allow-protected"
    found = sorted(flags - {named})
    return [*found, flag_for(named, top or Path(root.root).name)] if named in flags else found
