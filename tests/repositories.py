"""Git repositories of tests, made with git itself. No settings of the user or the host apply."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.conftest import need

_ENV = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    **dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "A Person"),
    **dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "person@example.org"),
}


def git(folder: Path, *words: str, data: bytes = b"", check: bool = True) -> str:
    """Run git in a folder, and return its output, with standard error if it need not succeed."""
    done = subprocess.run(
        ["/usr/bin/git", "-c", "safe.directory=*", *words],
        cwd=folder,
        env=_ENV,
        input=data,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if check else subprocess.STDOUT,
        check=False,
    )
    assert not check or not done.returncode, done.stderr
    return done.stdout.decode("utf-8", "replace").strip()


def new_repository(folder: Path, *words: str, files: dict[str, bytes] | None = None) -> Path:
    """Make a repository with one commit of *files* on the branch main. words: more words of `git init`."""
    need(Path("/usr/bin/git").exists(), "git is not installed", installable=True)
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main", *words)
    commit(folder, "first", files or {"a.txt": b"one\n"})
    return folder


def commit(folder: Path, message: str, files: dict[str, bytes]) -> str:
    """Write files, commit them, and return the commit."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    git(folder, "add", "-f", *files)
    git(folder, "commit", "-q", "-m", message)
    return git(folder, "rev-parse", "HEAD")


def history(folder: Path, commits: int) -> None:
    """Add *commits* commits on main: one in ten is a merge, one in a hundred has a tag. Each tenth changes a binary."""
    lines = []
    for number in range(1, commits + 1):
        merge = [f"merge :{number - 5}"] if number % 10 == 0 else []
        text, binary = f"{number}\n", bytes(range(256)) * (number % 7 + 1)
        lines += [f"commit refs/heads/main\nmark :{number}", "committer A <a@example.org> 1700000000 +0000"]
        lines += [f"data <<E\nchange {number}\nE", *(["from refs/heads/main^0"] if number == 1 else []), *merge]
        lines += [f"M 644 inline many/{number % 50}.txt\ndata <<E\n{text}E"]
        if number % 10 == 0:
            lines += [f"M 644 inline image.bin\ndata {len(binary)}\n{binary.decode('latin-1')}"]
        if number % 100 == 0:
            lines += [f"tag v{number}\nfrom :{number}\ntagger A <a@example.org> 1700000000 +0000\ndata <<E\nt\nE"]
    git(folder, "fast-import", "--quiet", data="\n".join([*lines, "done", ""]).encode("latin-1"))
    git(folder, "reset", "-q", "--hard")


def state_of(folder: Path) -> dict[str, bytes]:
    """Return what a run must not change: HEAD, index, config, branches and tags."""
    found = {name: (folder / ".git" / name).read_bytes() for name in ("HEAD", "index", "config")}
    found["refs"] = git(folder, "for-each-ref", "refs/heads", "refs/tags", "refs/remotes", "refs/stash").encode()
    return found
