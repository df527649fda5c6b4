"""Names that only --allow-protected lets a program change, because other tools execute, obey or trust such files."""

import fnmatch
import functools
import itertools
import os
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

from x07_sandbox.errors import escaped
from x07_sandbox.files.changes import RootChanges, parent_folders

# Patterns for one part of the path, ignoring case. `git~1` is `.git` on FAT and NTFS.
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
# Configuration of CI systems, which is protected only at the top of a work tree, where they look for it.
_CI_PARTS: Final = (
    *(".github", ".gitlab-ci.yml", ".gitlab", ".circleci", ".travis.yml", ".drone.yml", ".woodpecker*", ".buildkite"),
    *("jenkinsfile*", "azure-pipelines*.yml", "bitbucket-pipelines.yml", "appveyor.yml", ".cirrus.yml"),
    *(".forgejo", ".gitea", ".appveyor.yml", ".build.yml", ".teamcity", ".semaphore", "azure-pipelines*.yaml"),
    *(".azure-pipelines", ".azuredevops", ".harness", "bitrise.yml", ".bitrise.yml", "wercker.yml", ".scrutinizer.yml"),
    *("screwdriver.yaml", "codemagic.yaml", "circle.yml", ".ci", ".drone.yaml"),
    *(".builds", ".cirrus.star", ".zuul.yaml", ".zuul.d", "zuul.yaml", "zuul.d", ".tekton"),
    *("buildspec.yml", "buildspec.yaml", "cloudbuild.yaml", "cloudbuild.yml", "cloudbuild.json"),
)
# The files in a `.git` that git executes or reads settings from, directly or indirectly.
_GIT_OBEYS: Final = frozenset(
    {
        *("hooks", "config", "config.worktree", "info", "modules", "commondir", "worktrees", "remotes"),
        *("rebase-merge", "rebase-apply", "sequencer"),  # commands and options of a rebase or cherry-pick in progress
    }
)
_GIT: Final = ".git"
_GIT_NEEDS: Final = frozenset({"objects", "refs"})
_GIT_NAMES: Final = frozenset({"head", "commondir", *_GIT_NEEDS})
_GIT_FILES: Final = ("HEAD", "commondir", *_GIT_NEEDS)
# Some file systems ignore these characters, so that git accepts a name with them as `.git` (CVE-2014-9390).
_RANGES: Final = ((0x200C, 0x200F), (0x202A, 0x202E), (0x206A, 0x206F), (0xFEFF, 0xFEFF))
_IGNORED: Final = frozenset(chr(number) for low, high in _RANGES for number in range(low, high + 1))


def folded(text: str) -> str:
    """Return a name as a case-insensitive file system would compare it."""
    plain = "".join(char for char in text if char not in _IGNORED)
    return unicodedata.normalize("NFC", plain).casefold().rstrip(". ")


@functools.cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Return one regular expression with a group for each of *patterns*. Separate ones are too slow for large trees."""
    return re.compile("|".join(f"({fnmatch.translate(pattern)})" for pattern in patterns))


def work_trees(names: Iterable[str]) -> set[str]:
    """Return those folders in *names*, relative to a root, that are the top of a git work tree."""
    return {folder for folder, _, part in (name.rpartition("/") for name in names) if folded(part) == _GIT}


class Protection:
    """The protected names below one root. Everything below a protected folder is protected too.

    root: the path of the root on the host.
    own: more protected names, such as the policy file of the run.
    repository: the git repository that contains the root; empty if there is none.
    allowed: patterns of --allow-protected. Each is compared with the whole path and with each part of it. A path with
    several protected parts needs a pattern for each of them.
    reserved: x07's own paths, which cannot be allowed.
    work_tree_tops: the folders that work_trees() returns for the root.
    """

    def __init__(
        self,
        root: str,
        own: Sequence[str] = (),
        allowed: Sequence[str] = (),
        *,
        repository: str = "",
        reserved: Iterable[str] = (),
        work_tree_tops: Iterable[str] = (),
    ) -> None:
        # The same parts occur in many names. The names come from a guest, so the caches must not outlive this object.
        self._folded = functools.cache(folded)
        self._part = functools.cache(lambda part: self._why_part(part, _PARTS))
        self._ci_part = functools.cache(lambda part: self._why_part(part, _CI_PARTS))
        self._tops = {"", *work_tree_tops}
        self._allows_part = functools.cache(lambda part: self._matches(part, self._folded(part)))
        self._folders: dict[str, str | None] = {}
        self._own = {self._whole(name) for name in own}
        self._allowed = [(re.compile(fnmatch.translate(pattern.casefold())), pattern.casefold()) for pattern in allowed]
        around = why_repository(escaped(repository)) if repository else ""
        self._root = next(filter(None, map(self._any_part, root.split("/"))), around)
        self._name = root.rpartition("/")[2]
        self._reserved = {f"{self._whole(path)}/" for path in reserved}
        self._place = self._whole(root).rstrip("/")
        allows = [self._allows_part(part) for part in root.split("/") if self._any_part(part)]
        self._is_git = self._folded(self._name) == _GIT
        self._allows_root = bool(allows) and all(allows)
        self._root_is_protected = not all(allows)

    def why(self, name: str) -> str:
        """Return why *name* must not be changed, or "" if changing it is allowed."""
        if self._is_named(name) and not self._obeyed(name):
            return ""
        if self._own and self._whole(name) in self._own:
            return "the policy or manifest of this run"
        if self.is_allowed(name):
            return ""
        if self._allowed and (obeyed := self._obeyed(name)):
            return f"protected: git executes {obeyed} or reads settings from it; only a pattern for it allows changes"
        folder, _, part = name.rpartition("/")
        above = _inherited(folder, self._folders, self._why_folder)
        return self._root or above or self._part(part) or (self._ci_part(part) if folder in self._tops else "")

    def is_reserved(self, name: str) -> bool:
        """Return whether *name* holds x07's own data, such as changes that have not been applied yet."""
        path = f"{self._place}/{self._whole(name)}/" if name else f"{self._place}/"
        return any(path.startswith(reserved) for reserved in self._reserved)

    def is_allowed(self, name: str) -> bool:
        """Return whether --allow-protected allows changes of *name*."""
        if not self._allowed:
            return False
        if self._is_named(name) and not self._obeyed(name):
            return True
        parts = (name or self._name).split("/")
        # A pattern for one part, such as a folder of CI tasks, does not allow a `.git` that a program puts there.
        named = next((count for count in range(len(parts), 0, -1) if self._is_named("/".join(parts[:count]))), 0)
        if self._root_is_protected or any(
            self._any_part(part) and not self._allows_part(part) for part in parts[named:]
        ):
            return False
        matched = self._allows_root or named > 0 or any(map(self._allows_part, parts))
        return matched and not self._obeyed(name)

    def _obeyed(self, name: str) -> str:
        """If *name* is or is below a path that git obeys, and no pattern allows that path, return the path, else ""."""
        if not self._allowed:
            return ""
        parts = [*([self._name] if self._is_git else []), *name.split("/")]
        for at, (part, below) in enumerate(itertools.pairwise(parts)):
            if self._folded(part) == _GIT and self._folded(below) in _GIT_OBEYS:
                starts, ends = {0, at, int(self._is_git)}, range(at + 2, len(parts) + 1)
                # A pattern such as `.git*` does not count: the pattern must contain the name itself.
                own = self._folded(below)
                if not any(self._is_named("/".join(parts[start:end]), own) for start in starts for end in ends):
                    return "/".join(parts[at : at + 2])
        return ""

    def repositories(self, nodes: Iterable[str]) -> set[str]:
        """Return the folders that git treats as repositories, as folded names. See gitrepository-layout(5).

        nodes: all names before and after the run.
        """
        return {folder for folder, has in _git_names(nodes, self._folded).items() if _is_repository(has)}

    def refused_in(self, bare: AbstractSet[str], changed: Sequence[str]) -> dict[str, str]:
        """Return the names in *changed* that are in one of the repositories *bare*, and why each is refused."""
        if not bare:
            return {}
        whole = functools.cache(self._whole)
        inside: dict[str, str | None] = {}
        refused = {}
        for name in changed:
            above = name.rpartition("/")[0]
            place = _inherited(above, inside, lambda inner: inner if whole(inner) in bare else None) if name else None
            in_git = place is not None and self._folded(place.rpartition("/")[2] or self._name) == _GIT
            if place is not None and not self._is_named(name) and not (in_git and self.is_allowed(name)):
                refused[name] = why_repository(escaped(place) or "the folder")
        return refused

    def _is_named(self, name: str, part: str = "") -> bool:
        """Return whether an *allowed* pattern matches the whole *name*. part: a part that the pattern must contain."""
        return self._matches(name, self._whole(name), part=part)

    def _whole(self, name: str) -> str:
        return "/".join(map(self._folded, name.split("/")))

    def _matches(self, *forms: str, part: str = "") -> bool:
        allowed = [pattern for pattern, text in self._allowed if not part or part in text.split("/")]
        return any(pattern.match(form.casefold()) for pattern in allowed for form in forms)

    def _why_folder(self, path: str) -> str | None:
        folder, _, part = path.rpartition("/")
        return self._part(part) or (self._ci_part(part) if folder in self._tops else "") or None

    def _any_part(self, part: str) -> str:
        return self._part(part) or self._ci_part(part)

    def _why_part(self, part: str, patterns: tuple[str, ...]) -> str:
        found = _any_of(patterns).match(self._folded(part))
        if found is None or found.lastindex is None:
            return ""
        return f"protected: other tools execute {patterns[found.lastindex - 1]} or read settings from it"


def completed_repository(root: RootChanges, exists: Callable[[str], bool]) -> str | None:
    """Return a folder in which *root* writes and that git would treat as a repository; None if there is none.

    The folders that were repositories when the changes were checked do not count, because that check refused or allowed
    what is in them. Nor does a `.git`, which is protected by its name.
    exists: whether a name below the root exists on the host now.
    """
    written = [change.name for change in root.changes if change.name and change.after is not None]
    new = _git_names(written, folded)
    for folder in sorted({"", *parent_folders(written)}) if written else ():
        whole = _folded_path(folder, folded)
        if whole in root.repositories or _GIT in whole.split("/"):
            continue
        has = new.get(whole, set())
        if "head" in has or exists(posixpath.join(folder, "HEAD")):
            has = has | {name.lower() for name in _GIT_FILES if exists(posixpath.join(folder, name))}
        if _is_repository(has):
            return folder
    return None


def _git_names(names: Iterable[str], fold: Callable[[str], str]) -> dict[str, set[str]]:
    """Return the names of parts of a repository by folder. All are folded."""
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        folder, _, part = name.rpartition("/")
        if (known := fold(part)) in _GIT_NAMES:
            found[_folded_path(folder, fold)].add(known)
    return found


def _is_repository(has: AbstractSet[str]) -> bool:
    return "head" in has and ("commondir" in has or has >= _GIT_NEEDS)


def _folded_path(name: str, fold: Callable[[str], str]) -> str:
    return "/".join(map(fold, name.split("/")))


def why_repository(where: str) -> str:
    """Return why nothing may be written in the repository *where*."""
    return f"git treats {where} as a repository and would run what is in it"


def repository_around(root: str) -> str:
    """Return the folder at or above *root* that git treats as a repository, or "". Like git, stop at a `.git`."""
    here = root
    while here.strip("/") and not os.path.lexists(f"{here}/.git"):
        here = posixpath.dirname(here)
        if _is_repository({name.lower() for name in _GIT_FILES if os.path.lexists(posixpath.join(here, name))}):
            return here
    return ""


def _inherited(folder: str, known: dict[str, str | None], own: Callable[[str], str | None]) -> str | None:
    """Call *own* for *folder* and its parents, the topmost first; return the first result that is not None.

    known: a cache of results by folder.
    """
    path = []
    while folder not in known:
        path.append(folder)
        if not folder:
            break
        folder = folder.rpartition("/")[0]
    found = known.get(folder)
    for inner in reversed(path):
        found = own(inner) if found is None else found
        known[inner] = found
    return found
