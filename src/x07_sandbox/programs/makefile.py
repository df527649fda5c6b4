"""Guess which program a Makefile builds. No I/O. The work is limited, because Makefiles are hostile data."""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING, Final

from x07_sandbox.errors import UsageError
from x07_sandbox.programs.toolchains import MAKEFILES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

_LINE_MAX: Final = 4096  # characters of a line, before and after expansion
_EXPANDED_MAX: Final = 1 << 20  # total characters of expanded variables
_NESTED_MAX: Final = 8  # variables within variables
_VISITS_MAX: Final = 1000  # targets, and prerequisites of one
_TARGETS_MAX: Final = 32  # per rule
_RECIPE_MAX: Final = 64  # lines
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VARIABLE: Final = re.compile(r"\$[({](\w+)[)}]")
_PLAIN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,1023}")
_OUTPUT: Final = re.compile(r"\s-o\s+(\S+)")
_CONDITIONAL: Final = re.compile(r"\s*(ifeq|ifneq|ifdef|ifndef|endif)\b")
# Suffixes of files that cannot be started.
_NO_PROGRAM: Final = (".a", ".o", ".so", ".la", ".lo", ".dylib", ".dll", ".h", ".hpp", ".c", ".cpp", ".d", ".pc", ".1")
_SOURCES: Final = (".c", ".cpp", ".cc", ".C")  # of make's built-in rules for programs
# Targets that by convention create no file, even if .PHONY does not list them.
_PHONY: Final = frozenset(
    {"all", "build", "check", "clean", "debug", "default", "dist", "distclean", "doc", "docs", "help", "install", "lib"}
    | {"libs", "release", "run", "shared", "static", "test", "tests", "uninstall"}
)


class _Rule:
    def __init__(self) -> None:
        self.prerequisites: list[str] = []
        self.recipe: list[str] = []

    def add(self, prerequisites: list[str], command: str) -> None:
        """Add prerequisites and a line of the recipe, unless a limit is reached."""
        self.prerequisites += prerequisites[: _VISITS_MAX - len(self.prerequisites)]
        if command.strip() and len(self.recipe) < _RECIPE_MAX:
            self.recipe.append(command)

    def makes(self, target: str) -> bool:
        """Return whether the rule creates a file *target*, by a built-in recipe or a recipe that contains its name."""
        return not self.recipe or any("$@" in line or target in line for line in self.recipe)


class _Makefile:
    """The variables, rules and phony targets of one Makefile. files: names of all files in its folder."""

    def __init__(self, text: str, files: Collection[str] = ()) -> None:
        self._files = files
        self.rules: dict[str, _Rule] = {}
        self.phony = set(_PHONY)
        self._variables: dict[str, str] = {}
        self._left = _EXPANDED_MAX
        lines = [line[:_LINE_MAX].rstrip("\r") for line in text.replace("\\\r\n", " ").replace("\\\n", " ").split("\n")]
        self._assign(lines)
        self._read(lines)
        self._patterns = [(name, rule) for name, rule in self.rules.items() if "%" in name][:_TARGETS_MAX]

    def _assign(self, lines: Sequence[str]) -> None:
        depth = 0
        for line in lines:
            if found := _CONDITIONAL.match(line):
                depth += -1 if found[1] == "endif" else 1
            elif pair := _assignment(line):
                if depth > 0:  # it may not apply
                    self._variables.setdefault(*pair)
                else:
                    self._variables[pair[0]] = pair[1]

    def _read(self, lines: Sequence[str]) -> None:
        current: list[_Rule] = []
        for line in lines:
            if line.startswith("\t"):
                for rule in current:
                    rule.add([], self.expanded(line))
                continue
            if (parts := _rule(line)) is None:
                continue
            targets, needs, command = parts
            prerequisites = self.expanded(needs).split()
            if targets.strip() == ".PHONY":
                self.phony.update(prerequisites)
                continue
            names = [] if targets[0] == "." else self.expanded(targets).split()
            current = [self.rules.setdefault(name, _Rule()) for name in names[:_TARGETS_MAX]]
            for rule in current:
                rule.add(prerequisites, self.expanded(command))
            if self._left <= 0:
                return

    def expanded(self, text: str) -> str:
        """Return the text with the Makefile's own variables expanded. References to other variables stay unchanged."""
        for _ in range(_NESTED_MAX):
            if "$" not in text or self._left <= 0:
                break
            before, text = text, _VARIABLE.sub(self._value, text)[:_LINE_MAX]
            self._left -= len(text)
            if text == before:
                break
        return text

    def _value(self, match: re.Match[str]) -> str:
        value = self._variables.get(match[1], match[0])
        self._left -= len(value)
        return value if self._left > 0 else ""

    def _rule_of(self, name: str) -> _Rule | None:
        """Return the rule for *name*: its own, a pattern rule, or make's built-in rule for a program of one source."""
        if name in self.rules:
            return self.rules[name]
        for pattern, rule in self._patterns:
            head, _, tail = pattern.partition("%")
            if len(name) >= len(head + tail) and name.startswith(head) and name.endswith(tail):
                return rule
        return _Rule() if any(f"{name}{suffix}" in self._files for suffix in _SOURCES) else None

    def programs(self) -> Iterator[str]:
        """Yield the targets that are programs. Those that plain `make` builds first come first."""
        seen: set[str] = set()
        roots = [*list(self.rules)[:1], "all"]
        for root in roots:
            yield from self._below(root, seen)
        # A recipe may build a program that is not a target: `all:` with `cc -o prog prog.c`.
        recipes = (line for root in roots if root in self.rules for line in self.rules[root].recipe)
        for name in (found[1] for line in recipes for found in _OUTPUT.finditer(line)):
            if _PLAIN.fullmatch(name) and not name.endswith(_NO_PROGRAM):
                yield name

    def _below(self, target: str, seen: set[str]) -> Iterator[str]:
        waiting = [(target, False)]
        while waiting and len(seen) < _VISITS_MAX:
            name, second_visit = waiting.pop()
            rule = self._rule_of(name)
            if rule is None or (name in seen and not second_visit):
                continue
            seen.add(name)
            program = name not in self.phony and rule.makes(name) and _PLAIN.fullmatch(name) is not None
            if program and (rule.recipe or second_visit):
                if not name.endswith(_NO_PROGRAM):
                    yield name
                continue
            if program:  # without a recipe it may only group its prerequisites: visit those first
                waiting.append((name, True))
            waiting += [(other, False) for other in reversed(rule.prerequisites)]


def program_of(makefiles: Mapping[str, str], files: Collection[str]) -> str:
    """Return the path of the program that `make` builds in a project's folder. Raises UsageError if there is none.

    makefiles: texts by path. If the top one builds no program, the Makefiles in folders that it mentions are tried.
    files: names of all files of the project.
    """
    top = next((name for name in MAKEFILES if name in makefiles), "")
    text = makefiles.get(top, "")
    read = _Makefile(text, files)
    if found := next(read.programs(), None):
        return found
    words = set(re.findall(r"[\w./+-]+", text))
    for path in sorted(makefiles, key=lambda path: (path.count("/"), path)):
        folder = posixpath.dirname(path)
        if folder and {folder, f"{folder}/", f"./{folder}"} & words:
            beside = {name.removeprefix(f"{folder}/") for name in files if name.startswith(f"{folder}/")}
            below = next(_Makefile(makefiles[path], beside).programs(), None)
            if below is not None:
                return posixpath.normpath(f"{folder}/{below}")
    why = "no target of the Makefile is clearly a program" if read.rules else "the Makefile has no plain first target"
    fix = "Add --artifact FILE, or run make in the folder: "
    command = "sh -c './configure && make'" if "configure" in files else "make test"
    raise UsageError("cannot tell which program make builds", why, f"{fix}x07 exec --workdir . -- {command}")


def _assignment(line: str) -> tuple[str, str] | None:
    name, equals, value = line.partition("=")
    name = name.rstrip(":? \t").lstrip(" ")
    return (name, value.partition("#")[0].strip()) if equals and _NAME.fullmatch(name) else None


def _rule(line: str) -> tuple[str, str, str] | None:
    targets, colon, needs = line.partition(":")
    if not colon or not targets.strip() or needs[:1] == "=" or {"=", "#"} & set(targets):
        return None
    needs, _, command = needs.removeprefix(":").partition(";")
    return targets, re.split("[#=]", needs, maxsplit=1)[0], command
