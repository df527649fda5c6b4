"""Find the program that a Makefile makes. Pure, and bounded: nobody knows who wrote the Makefile."""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING, Final

from x07_sandbox.errors import UsageError
from x07_sandbox.programs.toolchains import MAKEFILES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

_LINE_MAX: Final = 4096  # characters of a line that are looked at, and of what its variables expand to
_EXPANDED_MAX: Final = 1 << 20  # characters that all variables of a file may expand to
_NESTED_MAX: Final = 8  # variables within variables
_VISITS_MAX: Final = 1000  # targets that are followed, and what one needs
_TARGETS_MAX: Final = 32  # of a rule
_RECIPE_MAX: Final = 64  # lines
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VARIABLE: Final = re.compile(r"\$[({](\w+)[)}]")
_PLAIN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,1023}")
_OUTPUT: Final = re.compile(r"\s-o\s+(\S+)")
_CONDITIONAL: Final = re.compile(r"\s*(ifeq|ifneq|ifdef|ifndef|endif)\b")
# What is made on the way, or for other programs, and cannot be started.
_NO_PROGRAM: Final = (".a", ".o", ".so", ".la", ".lo", ".dylib", ".dll", ".h", ".hpp", ".c", ".cpp", ".d", ".pc", ".1")
_SOURCES: Final = (".c", ".cpp", ".cc", ".C")  # of make's own rules for programs
# Names that make no file by convention, also where .PHONY does not list them.
_PHONY: Final = frozenset(
    {"all", "build", "check", "clean", "debug", "default", "dist", "distclean", "doc", "docs", "help", "install", "lib"}
    | {"libs", "release", "run", "shared", "static", "test", "tests", "uninstall"}
)


class _Rule:
    """A target: what it needs, and the lines of its recipe."""

    def __init__(self) -> None:
        self.needs: list[str] = []
        self.recipe: list[str] = []

    def add(self, needs: list[str], command: str) -> None:
        """Add what another line says, within bounds."""
        self.needs += needs[: _VISITS_MAX - len(self.needs)]
        if command.strip() and len(self.recipe) < _RECIPE_MAX:
            self.recipe.append(command)

    def makes(self, target: str) -> bool:
        """Whether the rule makes a file of the target's name: by a built-in rule, or its recipe names the file."""
        return not self.recipe or any("$@" in line or target in line for line in self.recipe)


class _Makefile:
    """What is understood of one file: its variables, rules in their order, and the targets that are no files."""

    def __init__(self, text: str, files: Collection[str] = ()) -> None:
        """files: names of what lies in its folder."""
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
                if depth > 0:  # perhaps for another system
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
            needed = self.expanded(needs).split()
            if targets.strip() == ".PHONY":
                self.phony.update(needed)
                continue
            names = [] if targets[0] == "." else self.expanded(targets).split()
            current = [self.rules.setdefault(name, _Rule()) for name in names[:_TARGETS_MAX]]
            for rule in current:
                rule.add(needed, self.expanded(command))
            if self._left <= 0:
                return

    def expanded(self, text: str) -> str:
        """The text with the variables put in that the file sets; others stay as they are."""
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
        """The rule that makes *name*: one for it, or for a pattern, or make's own for a program of one source."""
        if name in self.rules:
            return self.rules[name]
        for pattern, rule in self._patterns:
            head, _, tail = pattern.partition("%")
            if len(name) >= len(head + tail) and name.startswith(head) and name.endswith(tail):
                return rule
        return _Rule() if any(f"{name}{suffix}" in self._files for suffix in _SOURCES) else None

    def programs(self) -> Iterator[str]:
        """Targets that are programs, those first that plain `make` makes first."""
        seen: set[str] = set()
        for root in [*list(self.rules)[:1], "all"]:
            yield from self._below(root, seen)
        # A recipe may make a program without a target of its own: `all:` with `cc -o prog prog.c`.
        recipes = (
            line for name in (*list(self.rules)[:1], "all") if name in self.rules for line in self.rules[name].recipe
        )
        for name in (found[1] for line in recipes for found in _OUTPUT.finditer(line)):
            if _PLAIN.fullmatch(name) and not name.endswith(_NO_PROGRAM):
                yield name

    def _below(self, target: str, seen: set[str]) -> Iterator[str]:
        waiting = [(target, False)]
        while waiting and len(seen) < _VISITS_MAX:
            name, after_needs = waiting.pop()
            rule = self._rule_of(name)
            if rule is None or (name in seen and not after_needs):
                continue
            seen.add(name)
            program = name not in self.phony and rule.makes(name) and _PLAIN.fullmatch(name) is not None
            if program and (rule.recipe or after_needs):
                if not name.endswith(_NO_PROGRAM):
                    yield name
                continue
            if program:  # no recipe: perhaps only a name for what it needs
                waiting.append((name, True))
            waiting += [(need, False) for need in reversed(rule.needs)]


def program_of(makefiles: Mapping[str, str], files: Collection[str]) -> str:
    """The program that `make` makes in a project's folder: a path in it. Raises UsageError.

    makefiles: texts, by path. Where the uppermost one makes no program itself, those in folders that it names are read.
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
    fix = "Name the file with --artifact. To run make in the folder instead, as for a library's tests: "
    command = "sh -c './configure && make'" if "configure" in files else "make test"
    raise UsageError("cannot tell which program make makes", why, f"{fix}x07 exec --workdir . -- {command}")


def _assignment(line: str) -> tuple[str, str] | None:
    """The variable that a line sets, and its value."""
    name, equals, value = line.partition("=")
    name = name.rstrip(":? \t").lstrip(" ")
    return (name, value.partition("#")[0].strip()) if equals and _NAME.fullmatch(name) else None


def _rule(line: str) -> tuple[str, str, str] | None:
    """The targets of a rule's line, what they need, and a command on the same line."""
    targets, colon, needs = line.partition(":")
    if not colon or not targets.strip() or needs[:1] == "=" or {"=", "#"} & set(targets):
        return None
    needs, _, command = needs.removeprefix(":").partition(";")
    return targets, re.split("[#=]", needs, maxsplit=1)[0], command
