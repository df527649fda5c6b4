"""Names that no program may change, whatever its policy says: what other tools run, obey or trust.

A program that could write a git hook, a shell's start-up file or an editor's task would have the user's rights the next
time that the user works in the folder. Only the host's owner can allow it, by name.
"""

from __future__ import annotations

import fnmatch
import unicodedata
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# By a part of the path, letters of either case. Git's own and what reads like it on other file systems.
_PARTS: Final = (
    *(".git", "git~1", ".gitmodules", ".gitattributes", ".gitconfig", ".hg", ".svn", ".jj"),
    *(".x07", "x07.json", "x07-sandbox.toml"),
    *(".envrc", ".env", ".direnv", ".mise.toml", "mise.toml", ".tool-versions", ".python-version", ".nvmrc"),
    *(".profile", ".login", ".logout", ".bash*", ".zsh*", ".zprofile", ".zlogin", ".zlogout", ".ksh*", ".csh*"),
    *(".tcsh*", ".config", ".inputrc", ".screenrc", ".tmux.conf", ".xinitrc", ".xprofile", ".pam_environment"),
    *(".ssh", ".gnupg", ".netrc", ".npmrc", ".yarnrc*", ".pypirc", ".pip", "pip.conf", ".cargo", ".gemrc"),
    *(".vimrc", ".gvimrc", ".nvimrc", ".exrc", ".vim", ".emacs*", ".dir-locals.el", ".nanorc", "_vimrc"),
    *(".vscode", ".idea", ".fleet", ".zed", ".cursor", ".claude", ".devcontainer", "*.code-workspace"),
    *(".github", ".gitlab-ci.yml", ".gitlab", ".circleci", ".travis.yml", ".drone.yml", ".woodpecker*", ".buildkite"),
    *("jenkinsfile", "azure-pipelines.yml", "bitbucket-pipelines.yml", "appveyor.yml", ".cirrus.yml", ".husky"),
    *(".pre-commit-config.yaml", ".lefthook*", "lefthook.yml", ".overcommit.yml"),
)
_GIT_NEEDS: Final = ("head", "objects", "refs")
# Git on some file systems takes names for `.git` that hold these (CVE-2014-9390).
_RANGES: Final = ((0x200C, 0x200F), (0x202A, 0x202E), (0x206A, 0x206F), (0xFEFF, 0xFEFF))
_IGNORED: Final = frozenset(chr(number) for low, high in _RANGES for number in range(low, high + 1))


def folded(text: str) -> str:
    """A name as a file system that knows no case would compare it."""
    plain = "".join(char for char in text if char not in _IGNORED)
    return unicodedata.normalize("NFC", plain).casefold().rstrip(". ")


class Protection:
    """What is protected below one root.

    root: its path on the host; what lies below a protected folder is protected. own: further names that are, the policy
    in use say. allowed: patterns that the host's owner has let go, each for a path from the root or a part of it.
    """

    def __init__(self, root: str, own: Sequence[str] = (), allowed: Sequence[str] = ()) -> None:
        self._own = {folded(name) for name in own}
        self._allowed = [pattern.casefold() for pattern in allowed]
        self._root = self._parts(root.strip("/").split("/"))

    def why(self, name: str) -> str:
        """Why *name* may not be changed; empty if it may."""
        if self._is_allowed(name):
            return ""
        if folded(name) in self._own:
            return "it is the policy or the manifest in use"
        return self._root or self._parts(name.split("/"))

    def repositories(self, nodes: Iterable[str], changed: Sequence[str]) -> dict[str, str]:
        """Those of *changed* that lie in a folder git takes for a repository, and why each may not.

        nodes: all names that are to be there. A part of the path above that says `.git` is not needed for one.
        """
        names = {folded(name) for name in nodes}
        bare = {
            folder
            for folder in {above for name in changed for above in _above(name)}
            if all(folded(f"{folder}{part}") in names for part in _GIT_NEEDS)
        }
        return {
            name: f"git takes {folder or 'the root'} for a repository, and would run what is in it"
            for name in changed
            for folder in _above(name)
            if folder in bare and not self._is_allowed(name)
        }

    def _is_allowed(self, name: str) -> bool:
        parts = [folded(part) for part in name.split("/")]
        return any(
            fnmatch.fnmatchcase("/".join(parts), pattern) or any(fnmatch.fnmatchcase(part, pattern) for part in parts)
            for pattern in self._allowed
        )

    def _parts(self, parts: Sequence[str]) -> str:
        for part in parts:
            for pattern in _PARTS:
                if fnmatch.fnmatchcase(folded(part), pattern):
                    return f"{pattern} is protected: other tools run or obey it"
        return ""


def _above(name: str) -> list[str]:
    """The folders above *name* with a slash behind each, the root as nothing."""
    parts = name.split("/")
    return ["/".join([*parts[:count], ""]) for count in range(len(parts))]
