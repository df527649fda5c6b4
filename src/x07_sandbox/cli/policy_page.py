"""The text of docs/policy.md: model, rules, templates, plan and exit codes on one page.

A unit test holds the file to this. ``python -m x07_sandbox.cli.policy_page`` prints it.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.cli.policy import EXIT_CODES
from x07_sandbox.plan.controls import make_plan
from x07_sandbox.plan.features import vm_features
from x07_sandbox.policy.default import default_policy, render_policy
from x07_sandbox.policy.model import OPTIONAL_SECTIONS, SCHEMA_VERSION
from x07_sandbox.policy.rules import RULES
from x07_sandbox.policy.schema import fields, host_fields, policy_schema
from x07_sandbox.policy.templates import TEMPLATES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from x07_sandbox.policy.model import Policy, Section
    from x07_sandbox.policy.schema import Field

_HEAD: Final = f"""# The policy document

<!-- Made by `python -m x07_sandbox.cli.policy_page`; do not edit. -->

A policy is one JSON object of format `{SCHEMA_VERSION}`: UTF-8, at most 1 MiB. It is refused as a whole,
before anything starts, if it holds a field that is not listed here, a key twice, a value out of range, or
breaks one of the rules below; the message names every problem (of more than a hundred the first hundred) with its
place, and what was probably meant. The same as a JSON Schema:
[schemas/run-os-policy.schema.json](../schemas/run-os-policy.schema.json).

## Commands

A policy is named by its file, or as `built-in:NAME` by the name of a template. With `--json` each command prints one
JSON object, errors too; `--report-out FILE` writes it there as well, and `--quiet-json` keeps it off standard output.

| Command | What it gives | Exit code |
|---|---|---|
"""
_COMMANDS: Final = {
    "init": "`x07 policy init --template T` | a template, written into the project, below `.x07/policies/base`",
    "check": "`x07 policy check FILE...` | all that is wrong, at once",
    "digest": "`x07 policy digest FILE` | the canonical digest, see below",
    "explain": "`x07 policy explain [POLICY]` | of each field who enforces it, before anything runs",
    "diff": "`x07 policy diff A B` | what B grants or withdraws compared to A",
    "schema": "`x07 policy schema` | the JSON Schema",
}
_BEFORE_FIELDS: Final = """
## Fields

*Held* says what a run in a virtual machine does about the field of the **default policy**: enforced, and by whom, or
only advice, and to whom. For another policy ask `x07 policy explain FILE`: a value that asks for something that this
version cannot give is refused. The result of each run has the same lines (`controls`).

All sections are required but these, which count like this when they are absent:

"""
_TEMPLATES: Final = """
## Templates

`x07 policy init` writes these, and `built-in:NAME` names them. The first applies when no policy is given; the others
are X07's. `x07 policy diff built-in:default built-in:cli` shows all that two of them differ in.

| Template | For | CPU s | Wall s | MiB | Tasks | Reads | Writes | Network |
|---|---|---|---|---|---|---|---|---|
"""
_OVERRIDES: Final = """
## Flags that change a policy

`--allow-host H:P[,P...]`, `--deny-host H:P[,P...]` or `H:*`, `--allow-host-file PATH` and `--deny-host-file PATH` (one
of these a line, `#` begins a comment), `--allow-read-root PATH` and `--allow-write-root PATH` change the policy for one
run, the built-in default too. Each may stand there any number of times.

- The base must allow what they are about: `net.enabled` and `net.allow_tcp` for hosts, for denied ones too;
  `fs.enabled` for roots.
- Hosts of the base come first, each once and in lower case, then new ones in the order given, files before flags. Ports
  are sorted. Then what is denied goes, whatever allows it; a host without ports goes too.
- A denied network takes the addresses in it along. A part of an allowed network cannot be denied: a policy could not
  say what is left, so it is an error. A denied name does not deny the addresses that it leads to.
- An IPv6 address may stand in brackets. There are no wildcards.
- `net.allow_dns` becomes true when hosts are allowed and a name is among those that are left. An address is no name.
- Roots are added behind those of the base, each once.
- The derived policy is named `<policy_id>.g<D>`; D is 8 digits of the SHA-256 of the base's bytes and the flags. Its
  notes name the base. It is checked like any other. The same base and flags give the same bytes.
"""
_FILES: Final = """
## Files

`fs.read_roots` and `fs.write_roots` name folders, or single files, of the host, without the blanks around a name. A
relative one is below the folder where the command was started, or the project's with a manifest; the program finds it
below its own working directory.
An absolute one has the same path in the machine. A root that would lie over the machine's own system (`/usr`, `/etc`,
`/var`, ...), that leads out of its folder, or to which a link leads is refused. With `fs.enabled` false none is given.

The program gets **copies**: what it may only read is mounted read-only (`EROFS`), and what it may change comes back as
a set of changes when it has ended. Nothing of the host is mounted.

Not copied in, and told among `denials` by name: hidden names (`fs.deny_hidden`); links, unless `fs.allow_symlinks` and
only if they stay in their root; files above `fs.max_read_bytes`; what lies deeper than `fs.max_depth` (256 at the
most); devices, sockets and pipes; what is on another file system; what cannot be read, or is something else each time
that it is looked at; and names under which people keep secrets (`.env`, `*.pem`, `id_rsa` and the like, in any case of
letters; `--hide PATTERN` adds to them, `--reveal PATTERN` lets those of them in that it matches: `key.pem`, or `*.pem`;
each is for a name alone, wherever it lies, and has no slash). A root that is named itself goes in all the same, though
it lies in another that leaves it out: of that one the program sees only empty folders on the way. More than
`fs.max_entries` refuses the run. So does a link that comes into the way to a root after the roots were looked at.

Changes are judged by what is different when the program has ended (`fs.allow_mkdir`, `allow_remove`, `allow_rename`,
`max_write_bytes`, `max_depth`, and the rules above); what it made and removed again is nobody's business. A name that
is gone was renamed if its content has come to another, else removed; neither permission stands for the other. Whatever
the policy says, these are refused: links that lead out of their root (by way of others too) or through what was not
copied in, set-id bits, extended attributes, devices, names that begin with `.x07-apply-`, all that lies where `x07`
keeps its own records and its cache, new names that differ from another in case only, where the root's folder takes both
for one, and names that other tools run or obey (`.git` in any spelling, a folder that git would take for a repository,
with roots in it, files of shells, editors, CI and assistants, `x07-sandbox.toml`, `x07.json`, the policy in use with
every link on the way to it). Only `--allow-protected PATTERN` of `x07 run` and `x07 apply` lets a name of the last
kind, which no policy can do (PATTERN is for its path below the root, a `*` for slashes too; or for each part of that
which is protected, so that `.github` lets no `.git` in it, and neither the policy in use nor what git takes for a
repository); any other reason against that name stands. What was not copied in is neither
replaced nor removed: a change that would do so (it takes away a folder that holds a key) is refused, with what lets
that in. **One refused entry keeps all back**: nothing is applied, each is named with all its reasons, the exit code is
125 where the program ended well, and `x07 apply --skip PATH` does the rest; a folder that was removed stays if it holds
what is skipped. PATH is below a root, or absolute, which tells roots apart. Where more entries are changed than
`fs.max_entries` and those that went in to be changed together, all changes are discarded.

Applying compares each name with what was copied: where it is another one now nothing is changed (`conflict`). What it
displaces is kept among the run's records first: where there is no room for that nothing is changed. A kill at any
moment leaves the old files or the new ones once the next `x07` command has run. `--changes keep` waits for `x07 apply`,
`--changes discard` brings nothing back; the changes of a program that did not end by itself are kept, but for those of
a run that is cancelled (Ctrl-C): it ends at once, and they are lost. `x07 diff` shows changes, `x07 undo` takes them
back; after one part another is applied only once that is undone. A file with several names (hard links) is a file for
each in the machine: what is changed of one becomes a file of its own. What replaces a file has its owner and group; who
may not give it these applies nothing. What is new, and what was deleted and comes back by `x07 undo`, belongs to who
applies it, and has its content and permission bits alone: not the group of a set-group-id folder, no set-id or sticky
bit, no attributes, no times, no other names. Where a program has closed a folder to its owner, an ordinary user cannot
take that back: `x07` cannot look into it, and made readable it is no more what the run left. The mode of a root itself
stays as it was, and a warning says so. A root cannot be replaced, renamed or removed by the program (`EBUSY`), a single
file neither: to write a file anew and rename it, as `sed -i` does, it needs the folder as a root. What lies in a write
root can, also where it is named as a root itself, unless that one leaves it out (`--reveal` lets a secret join it) or a
list of programs names the file. From one root to another nothing is renamed (`EXDEV`), as between file systems. A write
root that is not there is an empty folder for the program, and is made if it is to hold something. On a file system that
keeps no modes (vfat, NTFS) all is applied but modes.
`--out DIR` is a write root that the program finds as `/x07/out`; with `fs.enabled` false it is refused.
"""
_PROCESSES: Final = """
## Processes and programs

What is forbidden ends with an error at once, in the program and in all that it starts; nothing is killed for trying.

| Asked for | Held by | Error |
|---|---|---|
| `threads.enabled` false | a seccomp filter: a process has one thread | `EPERM` |
| `process.enabled` false | as `allow_spawn` and `allow_exec` false together | `EPERM` |
| `process.allow_spawn` false | a seccomp filter: no child by fork, vfork, clone or posix_spawn | `EPERM` |
| `process.allow_exec` false | a seccomp filter, once the program has started; `noexec`, below | `EPERM` |
| a list without the prefix `/` | Landlock and `noexec`, below | `EACCES` |
| `process.max_live` below `limits.procs` | the control group, for `limits.procs`: threads count too | `EAGAIN` |

**A list** is `process.allow_execs` (paths) and `process.allow_exec_prefixes` (beginnings of paths); what an entry
names may be executed. Every other program of the image can be neither executed nor read, so that the loader is no way
around; libraries and data can be read, and names are seen. A relative entry is below the working directory. An entry
counts for the file that is there when the program starts, by whatever name: where it is a link, for what it leads to.
A script needs its interpreter on the list too. The program itself may be executed again; the interpreter of a Python
program only if the list says so, or if it had to be started anew (a variable that Python reads early, `--cold`, modules
to preload).

With a list, or where nothing may be executed, what is not of the image (the program's files, read and write roots,
`/tmp`, `/opt/x07`) is `noexec` but for what entries name: no loader runs it, and libraries there cannot be loaded
either. A file that an entry names in a writable folder can be executed and, as long as the program runs, neither
changed, removed nor moved, but with a folder that holds it; a folder is a mount of its own, so that moving files in or
out is a copy (`EXDEV`). What the program writes may be executed where a prefix leads into a folder of its own or a
write root that is there when it starts (`/opt/x07/` does, `/opt/x07/made/` does not), and where an entry names a single
file that is a write root; `x07 policy explain` says of which entries that is so. A folder of the host that has two
places in the machine (a relative root and an absolute one, or `--out`) is one folder there too: a file that an entry
names is kept as it is at both, and where a prefix leads into one of them, what is written at the other counts.

Whatever the policy says, a filter refuses what no program needs: mounts, modules, namespaces, tracing, keyrings, bpf,
perf, userfaultfd, io_uring, memfd_create, execveat by descriptor, kexec, and sockets of all families but local ones,
those of the internet and the one for routes, which lead nowhere (`guest/boot/filters.py`). The result names the
filters and their digests (`filters`).
"""
_REFUSALS: Final = """
## Refusals

What a program was refused stands in the result (`denials`), and `x07 run` prints the first few if it did not end well:

```text
x07: refused: write /data/; --allow-write-root /data lets it
x07: refused: replace /opt/x07/conf.json; --allow-write-root . lets it
x07: refused: execute /usr/bin/nl; $.process.allow_execs = ["/usr/bin/env", "/usr/bin/nl"] in the policy lets it
x07: refused: read /etc/ssl/private/x; nothing allows it
x07: refused: start a new process; $.process.max_live = 16 in the policy comes first
x07: /data/in.csv is not in the sandbox; --allow-read-root /data/in.csv lets it (to write: --allow-write-root /data)
```

| `field` | what was refused | how it is known |
|---|---|---|
| `fs.write_roots` | writing where no root lets it, replacing a root | the guest kernel's audit |
| `fs.deny_hidden`, `fs.allow_symlinks`, `fs.max_*`, `secrets` | what was not copied in | the copying |
| `fs.allow_mkdir`, `_remove`, `_rename`, `protected`, `kind` | changes that may not come back | the check of changes |
| `threads.enabled`, `process.allow_spawn`, `_exec` | threads, children, executing | the guest's seccomp filter |
| `process.allow_execs`, `process.allow_exec_prefixes` | programs that no list names | the audit |
| `limits.procs`, `process.max_live`, `limits.fds` | one more task or descriptor | control group, audit |
| `limits.fds`, `limits.core_dumps`, `limits.cpu_ms` | a higher limit of its own (`ulimit`) | the audit |
| `limits.wall_ms`, `limits.cpu_ms`, `limits.mem_bytes` | what ended the program | deadline, control group |
| `output` | more output than `--max-output-bytes` | what the host counts |
| `limits.mem_bytes` | writing where `/tmp` or `/dev/shm` is full | what is left in them when the program has ended |
| `permissions`, `system-calls`, `scratch` | what nothing allows: `how_to_allow` is null | audit, filter, disk |

Where no file of a policy was given, `x07 policy init --template default --out "$PWD/policy.json"` (or another template,
where `built-in:NAME` was given) writes the built-in one, to be changed and given with `--policy policy.json` beside the
same flags.

Doing what `how_to_allow` says never makes an invalid policy: where a rule wants another field first (above: "comes
first"), that is what it says, and the next run tells the rest. Where a policy could not say it (a path with `;`), it is
null. Names in flags are quoted for a shell: they may be the program's. Of a file that is not there nothing tells what
it was to be opened for, so a hint says what lets it be read (`how`) and what lets it be made (`to_write`).

A subject with a slash at its end is the folder in which something was to be made, renamed or removed; the kernel notes
no more of it. So of a new folder in `/` or `/opt`, where a root can be (`--allow-write-root /data`), the flag says
`FOLDER` for its name. At most 64 different ones are told of the audit's; `denials_lost` counts what came beyond, or
faster than the kernel records: several records for one refusal. A path that does not exist, a Python module or a
program (of Python's subprocess, of a shell) that is not installed, a variable that is not set, and a library that
cannot be loaded from where it lies (`noexec`) are no refusals, but `hints`: they are read from the program's own error
output.
"""
_DIGESTS: Final = """
## Digests

`x07 policy digest` gives one digest to all documents that say the same: the SHA-256 of the policy as JSON with sorted
keys, without blanks, characters unescaped, with the defaults of each section that is there filled in. Notes and the
order of lists count.

The result of a run has `digests.policy`: the SHA-256 of the file's bytes as they were read (of what
`x07 policy init --template default --emit policy` prints, where no policy was given). `x07 policy digest --json` shows
both, the second as `file_digest`. With flags that change the policy, or a `--timeout` below its `limits.wall_ms`, it is
that of the document which they make, as `x07 policy init` would write it.
"""
_TABLE_HEAD: Final = ("| Field | Values | When absent | Meaning | Held |", "|---|---|---|---|---|")
_MIB: Final = 1 << 20


def render_page() -> str:
    """The whole page."""
    held = _held()
    text = _HEAD + "".join(f"| {_COMMANDS[name]} | {codes} |\n" for name, codes in EXIT_CODES)
    text += _BEFORE_FIELDS
    text += "".join(f"- `{name}`: {_in_words(section)}\n" for name, section in OPTIONAL_SECTIONS.items())
    for section, inner in _by_section():
        doc = policy_schema()["$defs"][inner[0].section]["description"]
        text += "\n".join(
            ["", f"### {section}", "", doc, "", *_TABLE_HEAD, *(_row(field, held) for field in inner), ""]
        )
    head = ("| Field | Values | When absent | Meaning |", "|---|---|---|---|")
    text += "\n".join(
        ["", "### Each host of net.allow_hosts", "", *head, *(_row(field) for field in host_fields()), ""]
    )
    text += "\n## Rules\n\nThese hold whether or not their section is enabled.\n\n"
    text += "".join(f"{number}. {rule.doc}\n" for number, rule in enumerate(RULES, start=1))
    text += _TEMPLATES + "".join(_template_row(name, policy) for name, policy in TEMPLATES.items())
    text += _OVERRIDES + _FILES + _PROCESSES + _REFUSALS + _DIGESTS
    text += "\n## The default policy\n\nThis one applies when none is given.\n\n```json\n"
    return text + render_policy(default_policy()).decode() + "```\n"


def _held() -> dict[str, str]:
    plan = make_plan(default_policy(), vm_features("vm-emulated"))
    words = {"enforced": "", "advisory": "advice to "}
    return {control.field: words.get(control.state, f"{control.state}: ") + control.by for control in plan.controls}


def _by_section() -> Iterator[tuple[str, list[Field]]]:
    grouped: dict[str, list[Field]] = {}
    for field in fields():
        grouped.setdefault(field.path.rpartition(".")[0] or "Top level", []).append(field)
    yield from grouped.items()


def _in_words(section: Section) -> str:
    plain = msgspec.to_builtins(section)
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in plain.items() if not isinstance(value, dict))


def _row(field: Field, held: Mapping[str, str] | None = None) -> str:
    values = f"{field.kind}, {field.bounds}" if field.bounds else field.kind
    absent = "" if field.default is None else f"`{json.dumps(field.default)}`"
    if field.required:
        absent = "required"
    cells = [f"`{field.path}`", values.replace("|", "\\|"), absent, field.doc]
    return f"| {' | '.join(cells if held is None else [*cells, held[field.path]])} |"


def _template_row(name: str, policy: Policy) -> str:
    limits, roots = policy.limits, (policy.fs.read_roots, policy.fs.write_roots)
    cells = [
        f"`{name}`",
        policy.notes_in_force,
        *(limits.cpu_ms // 1000, limits.wall_ms // 1000, limits.mem_bytes // _MIB, limits.procs),
        *(", ".join(f"`{root}`" for root in found) or "nothing" for found in roots),
        "once hosts are added" if policy.net.enabled else "off",
    ]
    return f"| {' | '.join(map(str, cells))} |\n"


if __name__ == "__main__":
    sys.stdout.write(render_page())
