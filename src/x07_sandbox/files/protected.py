"""Names that no program may change, whatever its policy says: what other tools run, obey or trust.

A program that could write a git hook, a shell's start-up file or an editor's task would have the user's rights the next
time that the user works in the folder. Only the host's owner can allow it, by name.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import os
import posixpath
import re
import unicodedata
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from x07_sandbox.files.changes import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

# By a part of the path, letters of either case. Git's own and what reads like it on other file systems.
_PARTS: Final = (
    *(".git", "git~1", ".gitmodules", ".gitattributes", ".gitconfig", ".hg", ".svn", ".jj"),
    *(".x07", "x07.json", "x07-sandbox.toml"),
    *(".envrc", ".env", ".direnv", ".tool-versions", ".python-version", ".nvmrc"),
    *(".autoenv*", ".rvmrc", ".ruby-version", ".node-version", ".login_conf"),
    *(".mise", ".mise.toml", ".mise.local.toml", "mise.toml", "mise.local.toml"),
    *(".profile", ".login", ".logout", ".bash*", ".zsh*", ".zprofile", ".zlogin", ".zlogout", ".ksh*", ".csh*"),
    *(".tcsh*", ".config", ".inputrc", ".screenrc", ".tmux.conf", ".xinitrc", ".xprofile", ".pam_environment"),
    *(".xsession", ".xsessionrc", ".shrc", ".mkshrc", ".yashrc", ".xonshrc", ".gdbinit", ".lldbinit", ".rprofile"),
    *(".irbrc", ".pryrc", ".pdbrc", ".ghci", ".ocamlinit", ".psqlrc", ".sqliterc"),
    *(".ssh", ".gnupg", ".netrc", ".npmrc", ".yarnrc*", ".pypirc", ".pip", "pip.conf", ".cargo", ".gemrc"),
    *(".vimrc", ".gvimrc", ".nvimrc", ".exrc", ".vim", ".emacs*", ".dir-locals*.el", ".nanorc", "_vimrc"),
    *(".vscode", ".idea", ".fleet", ".zed", ".cursor", ".devcontainer", "*.code-workspace", ".devcontainer.json"),
    *(".nvim.lua", ".lvimrc", ".theia", ".ideavimrc", "*.sublime-project", ".project"),
    *(".vs", ".helix", ".nova", ".lapce", ".gitpod.yml", ".gitpod.dockerfile"),
    *(".claude", "claude.md", "claude.local.md", "agents.md", ".mcp.json", ".codex", ".gemini", "gemini.md"),
    *(".roo", ".roomodes", ".kiro", ".windsurf", ".windsurfrules", ".continue", ".opencode", "opencode.json*"),
    *(".cursorrules", ".clinerules", ".aider.conf.yml"),
    *("qwen.md", ".qwen", "warp.md", ".warp", "crush.json", ".crush.json", ".trae", ".amazonq", ".junie", ".augment"),
    *(".goosehints", ".agents", ".agent", ".copilot", ".rules"),
    *("copilot-instructions.md", "*.instructions.md", "*.prompt.md", "*.chatmode.md"),
    *(".husky", ".pre-commit-config.yaml", ".lefthook*", ".overcommit.yml"),
    *(f"lefthook{local}.{kind}" for local in ("", "-local") for kind in ("yml", "yaml", "toml", "json*")),
)
# What CI systems run. They look at the top of a repository only, so a copy of a project elsewhere is none of theirs.
_CI_PARTS: Final = (
    *(".github", ".gitlab-ci.yml", ".gitlab", ".circleci", ".travis.yml", ".drone.yml", ".woodpecker*", ".buildkite"),
    *("jenkinsfile*", "azure-pipelines*.yml", "bitbucket-pipelines.yml", "appveyor.yml", ".cirrus.yml"),
    *(".forgejo", ".gitea", ".appveyor.yml", ".build.yml", ".teamcity", ".semaphore", "azure-pipelines*.yaml"),
    *(".azure-pipelines", ".azuredevops", ".harness", "bitrise.yml", ".bitrise.yml", "wercker.yml", ".scrutinizer.yml"),
    *("screwdriver.yaml", "codemagic.yaml", "circle.yml", ".ci", ".drone.yaml"),
    *(".builds", ".cirrus.star", ".zuul.yaml", ".zuul.d", "zuul.yaml", "zuul.d", ".tekton"),
    *("buildspec.yml", "buildspec.yaml", "cloudbuild.yaml", "cloudbuild.yml", "cloudbuild.json"),
)
# What git runs, or takes settings from, directly below a `.git` or by way of it.
_GIT_OBEYS: Final = frozenset(
    {
        *("hooks", "config", "config.worktree", "info", "modules", "commondir", "worktrees", "remotes"),
        *("rebase-merge", "rebase-apply", "sequencer"),  # commands and options of a rebase or cherry-pick that goes on
    }
)
_GIT: Final = ".git"
_GIT_NEEDS: Final = frozenset({"objects", "refs"})
_GIT_NAMES: Final = frozenset({"head", "commondir", *_GIT_NEEDS})
_GIT_FILES: Final = ("HEAD", "commondir", *_GIT_NEEDS)
# Git on some file systems takes names for `.git` that hold these (CVE-2014-9390).
_RANGES: Final = ((0x200C, 0x200F), (0x202A, 0x202E), (0x206A, 0x206F), (0xFEFF, 0xFEFF))
_IGNORED: Final = frozenset(chr(number) for low, high in _RANGES for number in range(low, high + 1))


def folded(text: str) -> str:
    """A name as a file system that knows no case would compare it."""
    plain = "".join(char for char in text if char not in _IGNORED)
    return unicodedata.normalize("NFC", plain).casefold().rstrip(". ")


@functools.cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """All of them at once, a group for each: a hundred comparisons for each part of a large tree take minutes."""
    return re.compile("|".join(f"({fnmatch.translate(pattern)})" for pattern in patterns))


def work_trees(names: Iterable[str]) -> set[str]:
    """Return the folders of *names*, names below a root, that are the top of a git work tree."""
    return {folder for folder, _, part in (name.rpartition("/") for name in names) if folded(part) == _GIT}


class Protection:
    """What is protected below one root.

    root: its path on the host; what lies below a protected folder is protected. repository: the folder around the root
    that git takes for one. own: further names that are protected, say the policy in use. allowed: patterns that the
    host's owner has let go, each for a path from the root, or a part of that or of the root's own path; of a path all
    protected parts are let. kept: paths below which x07 keeps what it trusts itself: nobody can let go what lies there.
    tops: folders, besides the root, in which files of CI systems count, as work_trees() finds them.
    """

    def __init__(
        self,
        root: str,
        own: Sequence[str] = (),
        allowed: Sequence[str] = (),
        *,
        repository: str = "",
        kept: Iterable[str] = (),
        work_tree_tops: Iterable[str] = (),
    ) -> None:
        # A part stands in the names of all that lies below it. These caches go with this object: names are a guest's.
        self._folded = functools.cache(folded)
        self._part = functools.cache(lambda part: self._why_part(part, _PARTS))
        self._ci_part = functools.cache(lambda part: self._why_part(part, _CI_PARTS))
        self._tops = {"", *work_tree_tops}
        self._lets_part = functools.cache(lambda part: self._matches(part, self._folded(part)))
        self._folders: dict[str, str | None] = {}
        self._own = {self._whole(name) for name in own}
        self._allowed = [(re.compile(fnmatch.translate(pattern.casefold())), pattern.casefold()) for pattern in allowed]
        around = _of_repository(printable(repository)) if repository else ""
        self._root = next(filter(None, map(self._any_part, root.split("/"))), around)
        self._name = root.rpartition("/")[2]
        self._kept = {f"{self._whole(path)}/" for path in kept}
        self._place = self._whole(root).rstrip("/")
        is_allowed = [self._lets_part(part) for part in root.split("/") if self._any_part(part)]
        self._below_git = self._folded(self._name) == _GIT
        self._lets_root = bool(is_allowed) and all(is_allowed)
        self._left = not all(is_allowed)

    def why(self, name: str) -> str:
        """Why *name* may not be changed; empty if it may."""
        if self._is_named(name) and not self._obeyed(name):
            return ""
        if self._own and self._whole(name) in self._own:
            return "it is the policy or the manifest in use"
        if self.is_allowed(name):
            return ""
        if self._allowed and (obeyed := self._obeyed(name)):
            return f"git runs or obeys {obeyed}, which only a pattern for that name allows"
        folder, _, part = name.rpartition("/")
        above = _inherited(folder, self._folders, lambda inner: self._by_name(*inner.rpartition("/")) or None)
        return self._root or above or self._part(part) or (self._ci_part(part) if folder in self._tops else "")

    def is_reserved(self, name: str) -> bool:
        """Whether x07 itself keeps what is under *name*, a set of changes that waits to be applied, say."""
        path = f"{self._place}/{self._whole(name)}/" if name else f"{self._place}/"
        return any(path.startswith(kept) for kept in self._kept)

    def is_allowed(self, name: str) -> bool:
        """Whether the host's owner has let *name* go: as it is written, or as it is compared."""
        if not self._allowed:
            return False
        if self._is_named(name) and not self._obeyed(name):
            return True
        parts = (name or self._name).split("/")
        # Who lets one part go, a folder of CI tasks say, has not let go a `.git` that a program puts into it.
        named = next((count for count in range(len(parts), 0, -1) if self._is_named("/".join(parts[:count]))), 0)
        left = self._left or any(self._any_part(part) and not self._lets_part(part) for part in parts[named:])
        is_let = self._lets_root or named > 0 or any(map(self._lets_part, parts))
        return is_let and not left and not self._obeyed(name)

    def _obeyed(self, name: str) -> str:
        """What git runs or obeys, if *name* is it or lies in it and no pattern is for that; else empty."""
        if not self._allowed:
            return ""
        parts = [*([self._name] if self._below_git else []), *name.split("/")]
        for at, (part, below) in enumerate(itertools.pairwise(parts)):
            if self._folded(part) == _GIT and self._folded(below) in _GIT_OBEYS:
                starts, ends = {0, at, int(self._below_git)}, range(at + 2, len(parts) + 1)
                # A pattern such as `.git*` is meant for other names: this one has to stand in it.
                own = self._folded(below)
                if not any(self._is_named("/".join(parts[start:end]), own) for start in starts for end in ends):
                    return "/".join(parts[at : at + 2])
        return ""

    def repositories(self, nodes: Iterable[str], changed: Sequence[str]) -> dict[str, str]:
        """Those of *changed* that lie in a folder git takes for a repository, and why each may not.

        nodes: all names that were there or are to be. A part of the path above that says `.git` is not needed for one,
        nor are objects and references, where a file says in which other folder they are (gitrepository-layout(5)).
        """
        whole = functools.cache(self._whole)
        found: dict[str, set[str]] = defaultdict(set)
        for name in nodes:
            folder, _, part = name.rpartition("/")
            if (known := self._folded(part)) in _GIT_NAMES:
                found[whole(folder)].add(known)
        bare = {folder for folder, has in found.items() if "head" in has and ("commondir" in has or has >= _GIT_NEEDS)}
        if not bare:
            return {}
        inside: dict[str, str | None] = {}
        refused = {}
        for name in changed:
            above = name.rpartition("/")[0]
            place = _inherited(above, inside, lambda inner: inner if whole(inner) in bare else None) if name else None
            in_git = place is not None and self._folded(place.rpartition("/")[2] or self._name) == _GIT
            if place is not None and not self._is_named(name) and not (in_git and self.is_allowed(name)):
                refused[name] = _of_repository(printable(place) or "the root")
        return refused

    def _is_named(self, name: str, part: str = "") -> bool:
        """Whether a pattern is for this very name, and not for a part of it only. part: which it must have, if any."""
        return self._matches(name, self._whole(name), part=part)

    def _whole(self, name: str) -> str:
        return "/".join(map(self._folded, name.split("/")))

    def _matches(self, *forms: str, part: str = "") -> bool:
        allowed = [pattern for pattern, text in self._allowed if not part or part in text.split("/")]
        return any(pattern.match(form.casefold()) for pattern in allowed for form in forms)

    def _by_name(self, folder: str, _: str, part: str) -> str:
        """Why *part* is protected where it lies."""
        return self._part(part) or (self._ci_part(part) if folder in self._tops else "")

    def _any_part(self, part: str) -> str:
        return self._part(part) or self._ci_part(part)

    def _why_part(self, part: str, patterns: tuple[str, ...]) -> str:
        found = _any_of(patterns).match(self._folded(part))
        if found is None or found.lastindex is None:
            return ""
        return f"{patterns[found.lastindex - 1]} is protected: other tools run or obey it"


def _of_repository(where: str) -> str:
    return f"git takes {where} for a repository, and would run what is in it"


def repository_around(root: str) -> str:
    """The folder around *root* that git takes for a repository, or "". At a `.git` on the way git looks no further."""
    here = root
    while here.strip("/") and not os.path.lexists(f"{here}/.git"):
        here = posixpath.dirname(here)
        has = {name for name in _GIT_FILES if os.path.lexists(posixpath.join(here, name))}
        if "HEAD" in has and ("commondir" in has or has >= _GIT_NEEDS):
            return here
    return ""


def _inherited(folder: str, known: dict[str, str | None], own: Callable[[str], str | None]) -> str | None:
    """What *own* says of the uppermost folder, *folder* or one above it, that it says something of. known: a cache."""
    way = []
    while folder not in known:
        way.append(folder)
        if not folder:
            break
        folder = folder.rpartition("/")[0]
    found = known.get(folder)
    for inner in reversed(way):
        found = own(inner) if found is None else found
        known[inner] = found
    return found
