"""Rules for a guest's changes: roots, protected names, links, and bounds on the work."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec
import pytest

from tests.conftest import need
from x07_sandbox.channel.trees import Entry, Kind
from x07_sandbox.errors import PeerError, RefusedError
from x07_sandbox.files.change_rules import AllowedActions, CheckedChanges, check_changes
from x07_sandbox.files.changes import ChangeSet, Node, RootChanges
from x07_sandbox.files.checks import check_set
from x07_sandbox.files.copy import Bounds, Skipped, link_stays_inside
from x07_sandbox.files.incoming import Incoming, ReportedEntry
from x07_sandbox.files.protected import Protection, work_trees
from x07_sandbox.sessions.selection import Grants, select_changes

if TYPE_CHECKING:
    from pathlib import Path

ROOT = "/home/u/project"
BOUNDS = Bounds(
    deny_hidden=False, allow_symlinks=True, read_bytes=1 << 20, write_bytes=1 << 20, entries=1 << 20, depth=128
)
ALL = AllowedActions(mkdir=True, remove=True, rename=True)
NOTHING = AllowedActions(mkdir=False, remove=False, rename=False)
FOLDER = Node(kind="folder", mode=0o755)
FILE = Node(kind="file", mode=0o644, size=1, sha256="0" * 64, at=0)
LINK = Node(kind="link", target="a")


def new(*names: str, node: Node = FILE) -> list[ReportedEntry]:
    """Reported files and the folders that contain them."""
    found: dict[str, Node] = {}
    for name in names:
        parts = name.split("/")
        found |= {"/".join(parts[:count]): FOLDER for count in range(1, len(parts))}
        found[name] = node
    return [ReportedEntry(root=0, name=name, node=one) for name, one in found.items()]


def judged(
    reported: list[ReportedEntry],
    before: dict[str, Node] | None = None,
    allowed: AllowedActions = ALL,
    bounds: Bounds = BOUNDS,
    own: tuple[str, ...] = (),
    skipped: dict[str, Skipped] | None = None,
) -> CheckedChanges:
    """The verdict on reported changes."""
    before = {"": FOLDER} if before is None else before
    return check_changes(before, skipped or {}, reported, bounds, allowed, Protection(ROOT, own))


def as_set(found: CheckedChanges) -> ChangeSet:
    """The change set that is saved from a verdict."""
    root = RootChanges(root=ROOT, guest="/g", missing=False, changes=found.changes, refused=found.refused)
    return ChangeSet(run="1-1-1", roots=(root,))


def refused(found: CheckedChanges) -> set[tuple[str, str]]:
    """The refused names and their rules."""
    return {(refusal.name, refusal.rule) for refusal in found.refused}


# the root itself


@pytest.mark.parametrize(
    ("before", "reported"),
    [
        ({"": FOLDER, "a": FILE}, [ReportedEntry(root=0, name="a"), ReportedEntry(root=0, name="", node=LINK)]),
        ({"": FOLDER}, [ReportedEntry(root=0, name="", node=FILE)]),
        ({"": FOLDER}, [ReportedEntry(root=0, name="")]),
        ({"": FOLDER}, [ReportedEntry(root=0, name="", other=stat.S_IFREG | 0o644)]),
        ({}, [ReportedEntry(root=0, name="", node=FILE)]),
        ({}, [ReportedEntry(root=0, name="", node=LINK), *new("a")]),
        ({"": FILE}, [ReportedEntry(root=0, name="", node=FOLDER)]),
        ({"": FILE}, [ReportedEntry(root=0, name="")]),
        ({"": FILE}, [ReportedEntry(root=0, name="", other=stat.S_IFDIR | 0o755)]),
        ({"": FILE}, new("a")),
    ],
)
def test_a_root_stays_what_it_is(before: dict[str, Node], reported: list[ReportedEntry]) -> None:
    """A guest that reports a root as removed or of another kind breaks the protocol."""
    with pytest.raises(PeerError):
        judged(reported, before)


def test_valid_reports_about_a_root_are_accepted() -> None:
    """A root's mode is recorded, a file root may be written, and extended attributes are refused."""
    other = msgspec.structs.replace(FILE, sha256="1" * 64)
    moded = judged([ReportedEntry(root=0, name="", node=Node(kind="folder", mode=0o700)), *new("a")])
    assert (moded.refused, [change.name for change in moded.changes]) == ((), ["a"])
    assert judged([ReportedEntry(root=0, name="", node=FOLDER)]) == CheckedChanges(changes=(), refused=())
    assert [change.name for change in judged(new("a"), {}).changes] == ["a"]
    assert [change.after for change in judged([ReportedEntry(root=0, name="", node=other)], {"": FILE}).changes] == [
        other
    ]
    attributes = judged([ReportedEntry(root=0, name="", other=stat.S_IFREG | 0o644)], {"": FILE})
    assert (attributes.changes, refused(attributes)) == ((), {("", "kind")})
    attributes = judged([ReportedEntry(root=0, name="", other=stat.S_IFDIR | 0o755)])
    assert (attributes.changes, refused(attributes)) == ((), {("", "kind")})
    assert "a folder with extended attributes" in attributes.refused[0].why
    deep = "/".join(["d" * 255] * 15)
    reported = [*new(f"{deep}/x", node=FOLDER)[:-1], ReportedEntry(root=0, name=deep, other=stat.S_IFDIR | 0o755)]
    assert [refusal.why for refusal in judged(reported).refused] == ["its path is too long"]


@pytest.mark.parametrize("kind", [Kind.FILE, Kind.FOLDER])
def test_a_mode_has_permission_bits_only(kind: Kind) -> None:
    """A reported mode with file-type bits breaks the protocol."""
    fd = os.memfd_create("x07-test")
    try:
        incoming = Incoming(fd, roots=1, most_entries=10, most_bytes=10)
        with pytest.raises(PeerError):
            incoming.take(Entry(Kind.ROOT, b"0").encoded() + Entry(kind, b"a", mode=0o100644).encoded())
    finally:
        os.close(fd)


# protected names


@pytest.mark.parametrize(
    ("names", "inside"),
    [
        (["HEAD", "objects/x", "refs/x", "config"], "config"),
        (["r/HEAD", "r/objects/x", "r/refs/x", "r/config"], "r/config"),
        (["HEAD", "commondir", "config.worktree", "c/objects/x", "c/refs/x"], "config.worktree"),
        (["r/Head", "r/COMMONDIR", "r/sub/deep/config"], "r/sub/deep/config"),
    ],
)
def test_a_git_repository_is_protected(names: list[str], inside: str) -> None:
    """A folder that git treats as a repository is protected, in any spelling."""
    found = refused(judged(new(*names)))
    assert (inside, "protected") in found
    for missing in ("head", "commondir" if any("ommon" in name.lower() for name in names) else "refs/x"):
        less = [name for name in names if not name.lower().endswith(missing)]
        assert refused(judged(new(*less))) == set(), missing


@pytest.mark.parametrize("missing", ["objects", "refs", "HEAD"])
def test_a_host_repository_with_missing_parts_is_protected(missing: str) -> None:
    """A host repository stays protected if a part was not copied in or was removed by the program."""
    parts = ["HEAD", "objects", "refs", "config"]
    before = {"": FOLDER, "r": FOLDER} | {f"r/{part}": FILE for part in parts}
    reported = new("r/config", node=msgspec.structs.replace(FILE, size=2))[1:]
    gone = [ReportedEntry(root=0, name=f"r/{missing}")]
    assert refused(judged(reported + gone, before)) == {("r/config", "protected")}
    assert refused(judged(gone, before)) == set()
    skipped = {f"r/{missing}": Skipped("link-out", 0)}
    before.pop(f"r/{missing}")
    assert refused(judged(reported, before, skipped=skipped)) == {("r/config", "protected")}
    assert refused(judged(reported, before)) == set()


def test_git_runs_no_command_of_a_refused_tree(tmp_path: Path) -> None:
    """A tree whose configuration makes git run a command is refused."""
    need(os.access("/usr/bin/git", os.X_OK), "git", installable=True)
    contents = {
        "HEAD": "ref: refs/heads/x\n",
        "commondir": "c\n",
        "c/objects/x": "",
        "c/refs/x": "",
        "c/config": "[core]\n\trepositoryformatversion = 1\n[extensions]\n\tworktreeConfig = true\n",
        "config.worktree": '[core]\n\tbare = false\n\tworktree = .\n\tfsmonitor = "echo >ran; false"\n',
    }
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["/usr/bin/git", "status"], cwd=tmp_path, env=env, check=False, capture_output=True)
    assert list(tmp_path.rglob("ran")), "this git runs nothing of it: the test looks at nothing"
    assert {(name, "protected") for name in contents} <= refused(judged(new(*contents)))


@pytest.mark.parametrize(
    "name",
    [
        *("lefthook.yaml", ".devcontainer.json", ".nvim.lua", ".lvimrc"),
        *(".theia", ".ideavimrc", "X.sublime-project", ".xsession", ".xsessionrc", ".shrc", ".mkshrc"),
        *(".yashrc", ".xonshrc", ".gdbinit", ".lldbinit", ".Rprofile", ".irbrc", ".psqlrc", ".sqliterc"),
        *(".mise.local.toml", ".mise/config.toml", "mise.local.toml", ".mcp.json", ".codex/config.toml"),
        *(".vs/tasks.vs.json", ".helix/languages.toml", ".nova/Tasks/x.json", ".lapce/run.toml", ".gitpod.yml"),
        *(".roo/mcp.json", ".roomodes", ".kiro/hooks/x", ".windsurf/x", ".windsurfrules"),
        *(".continue/x", "opencode.json", "opencode.jsonc", ".opencode/x", "CLAUDE.md", "CLAUDE.local.md"),
        *("AGENTS.md", "GEMINI.md", ".cursorrules", ".clinerules", ".pdbrc", ".ghci", ".ocamlinit", ".pryrc"),
        *(".dir-locals.el", ".dir-locals-2.el", ".aider.conf.yml", "lefthook.json", "lefthook.toml", "lefthook.jsonc"),
        *("lefthook-local.yml", "lefthook-local.toml", ".lefthook-local.json", ".lefthook.toml", ".lefthook/x/y.sh"),
        *(".autoenv.zsh", ".rvmrc", ".ruby-version", ".node-version", ".login_conf"),
        *(".project", "QWEN.md", ".qwen/x", "WARP.md", ".warp/x", "crush.json", ".crush.json", ".trae/rules/x"),
        *(".amazonq/x", ".junie/x", ".augment/x", ".goosehints", ".agents/x", ".agent/x", ".copilot/x", ".rules"),
        *(".gemini", ".GIT", "x07.json", ".husky/pre-commit", ".pre-commit-config.yaml"),
        *("copilot-instructions.md", "x.prompt.md", "x.instructions.md"),
        *(".bashrc", "GIT~1", ".g\u200cit", "x07-sandbox.toml", ".vscode/tasks.json"),
    ],
)
def test_files_that_tools_execute_are_protected(name: str) -> None:
    """Files that git, editors, shells, debuggers or assistants execute or obey are protected in any folder."""
    assert Protection(ROOT).why(name)
    assert Protection(ROOT).why(f"sub/{name}")
    assert Protection(f"/home/{name}").why("x")
    assert not Protection(ROOT, (), name.split("/")).why(name)


@pytest.mark.parametrize(
    "name",
    [
        *(".forgejo/workflows/x.yml", ".gitea", ".appveyor.yml", ".build.yml", ".teamcity/x", ".semaphore"),
        *("azure-pipelines.yaml", ".drone.yaml", ".builds/x.yml", ".cirrus.star", ".zuul.yaml", ".zuul.d/x.yaml"),
        *(".tekton/x.yaml", "buildspec.yml", "cloudbuild.yaml", "azure-pipelines-x.yml", ".azure-pipelines/x.yml"),
        *(".azuredevops/x.yml", ".harness/x.yaml", "bitrise.yml", ".bitrise.yml", "wercker.yml", ".scrutinizer.yml"),
        *("screwdriver.yaml", "codemagic.yaml", "circle.yml", "Jenkinsfile.groovy", ".ci/x", ".github/workflows/x"),
        *("appveyor.yml", ".travis.yml", "JENKINSFILE", ".gitlab-ci.yml", "bitbucket-pipelines.yml", ".circleci/x"),
    ],
)
def test_ci_files_are_protected_at_the_top(name: str) -> None:
    """CI configuration is protected at the top of a write root and of a git work tree."""
    tree = Protection(ROOT, work_tree_tops=work_trees(["a", "a/b/.GIT", "c/.gitx"]))
    assert tree.why(name)
    assert tree.why(f"a/b/{name}")
    assert not tree.why(f"a/{name}")
    assert not tree.why(f"c/{name}")
    assert tree.why(f"a/{name}/.envrc")
    assert Protection(f"/home/{name}").why("x")
    assert not Protection(ROOT, (), name.split("/")).why(name)


@pytest.mark.parametrize("patterns", [(".git",), (".git", ".git/refs"), (".git*",), ("*",)])
def test_allowing_git_excludes_hooks_and_configuration(patterns: tuple[str, ...]) -> None:
    """`--allow-protected .git` allows commits, but no hook, configuration or nested repository."""
    plain = ["HEAD", "index", "objects/aa/x", "refs/heads/main", "logs/HEAD"]
    obeyed = ["hooks/post-commit", "config", "Config.worktree", "info/attributes", "modules/x/config", "commondir"]
    obeyed += ["sequencer/opts", "rebase-apply/x", "rebase-merge/git-rebase-todo", "remotes/origin"]
    for folder in ("", "sub/"):
        reported = new(*(f"{folder}.git/{name}" for name in (*plain, *obeyed)))
        names = [one.name for one in reported]
        protection = Protection(ROOT, (), patterns)
        left = {name for name in names if protection.why(name)} | set(
            protection.refused_in(protection.repositories(names), names)
        )
        assert {f"{folder}.git/{name}" for name in obeyed} <= left
        assert not {f"{folder}.git", *(f"{folder}.git/{name}" for name in plain)} & left
        named = Protection(ROOT, (), (*patterns, ".git/hooks"))
        assert not named.why(f"{folder}.git/hooks/post-commit")
        assert named.why(f"{folder}.git/config")


def test_a_protected_root_needs_its_own_pattern() -> None:
    """A protected write root needs a pattern for exactly its protected part."""
    root = "/home/u/.config/work"
    assert Protection(root).why("x")
    assert not Protection(root, (), (".config",)).why("x")
    assert Protection(root, (), ("u", "home", "work")).why("x")
    assert Protection(root, (), (".config",)).why("x.git") == ""
    assert Protection("/home/u/work", (), ("work",)).why(".git/config")


@pytest.mark.parametrize(
    ("patterns", "name", "is_allowed"),
    [
        ((".github",), ".github/workflows/x", True),
        ((".github",), ".github/.git/hooks/x", False),
        ((".github",), ".github/.envrc", False),
        ((".github", ".git"), ".github/.git/objects/x", True),
        ((".github", ".git"), ".github/.git/hooks/x", False),
        ((".github", ".git", ".git/hooks"), ".github/.git/hooks/x", True),
        ((".github/.git/hooks",), ".github/.git/hooks/x", True),
        ((".github/.git/hooks",), ".github/.git/objects/x", False),
        ((".github/.git/*",), ".github/.git/hooks/x", False),
        ((".github/.git/*",), ".github/.git/objects/x", True),
        (("src",), "src/.git/config", False),
        (("*",), "src/.git/config", False),
        (("*", ".git/config"), "src/.git/config", True),
        ((".github",), ".github/policy.json", False),
        ((".github/policy.json",), ".github/policy.json", True),
    ],
)
def test_a_pattern_allows_no_other_protected_name(patterns: tuple[str, ...], name: str, *, is_allowed: bool) -> None:
    """A pattern for one part of a path does not allow other protected parts of it."""
    own = (".github/policy.json",)  # the policy in use
    assert (not Protection(ROOT, own, patterns).why(name)) is is_allowed
    root, _, part = name.partition("/")
    if "/" not in patterns[0]:
        assert (not Protection(f"/home/u/{root}", (own[0].partition("/")[2],), patterns).why(part)) is is_allowed


def test_a_repository_needs_a_pattern_for_its_own_name() -> None:
    """A repository folder is allowed only by a pattern for its own name."""
    names = [".github/b/HEAD", ".github/b/config", ".github/b/objects", ".github/b/refs"]
    one, both = Protection(ROOT, (), (".github",)), Protection(ROOT, (), (".github", ".github/b*"))
    assert set(one.refused_in(one.repositories(names), names)) == set(names)
    assert both.refused_in(both.repositories(names), names) == {}
    assert Protection("/p/.git", (), (".github",)).why(".github/x")
    assert Protection("/p/.git", (), (".github", ".git")).why(".github/x") == ""


def test_allow_protected_lifts_only_protection() -> None:
    """`--allow-protected` lifts only the protection of the named entries; other rules still apply."""
    found = judged(
        [
            ReportedEntry(root=0, name=".vscode", node=Node(kind="link", target="/home/u/.ssh")),
            *new(".git/config", "mine.json"),
        ],
        allowed=NOTHING,
        own=("mine.json",),
    )
    assert refused(found) == {
        *((".git", rule) for rule in ("protected", "fs.allow_mkdir")),
        *((".vscode", rule) for rule in ("protected", "fs.allow_symlinks")),
        (".git/config", "protected"),
        ("mine.json", "protected"),
    }
    kept = as_set(found)
    for patterns in (["*", ".git/config"], [".vscode", ".git", ".git/config", "mine.json"]):
        with pytest.raises(RefusedError, match="outside the folder") as caught:
            select_changes(kept, [], Grants(tuple(patterns)))
        assert "is protected" not in caught.value.why
    with pytest.raises(RefusedError, match="policy or manifest of this run"):
        select_changes(kept, [".vscode", ".git"], Grants(("Jenkinsfile",)))
    only = select_changes(kept, [".vscode", ".git"], Grants(("mine.json",))).roots[0]
    assert [change.name for change in only.changes] == ["mine.json"]


def test_an_escaping_link_is_always_refused() -> None:
    """A link out of its root is refused, and no policy value allows it."""
    assert not link_stays_inside("", "beside")  # a root's own target lies beside it
    for allow in (True, False):
        bounds = msgspec.structs.replace(BOUNDS, allow_symlinks=allow)
        reported = [ReportedEntry(root=0, name="l", node=Node(kind="link", target="../x"))]
        assert [refusal.value for refusal in judged(reported, bounds=bounds).refused] == [None]


@pytest.mark.parametrize(
    ("links", "name", "out"),
    [
        ({"l": "out"}, "l", "out"),
        ({"l": "out/sub/x"}, "l", "out"),
        ({"d/l": ".././out"}, "d/l", "out"),
        ({"l": "d/secret/x"}, "l", "d/secret"),
        ({"a": "b", "b": "d", "l": "a/secret"}, "l", "d/secret"),
        ({"a": "d", "d/b": "../out", "l": "a/b"}, "l", "out"),
        ({"c1": "c2", "c2": "c1/x", "l": "c1"}, "l", ""),
        ({"l": "d/new", "m": "outside", "n": "nothing/out"}, "l", ""),
        ({f"l{number}": f"l{number + 1}" for number in range(60)}, "l0", "too many"),
        ({"l0": "out"} | {f"l{number + 1}": f"l{number}" for number in range(60)}, "l20", "out"),
    ],
)
def test_a_link_through_a_left_out_entry_is_refused(links: dict[str, str], name: str, out: str) -> None:
    """A link through an entry that was not copied in is refused, also by way of other links."""
    skipped = {"out": Skipped("link-out", 0), "d/secret": Skipped("secret", 0)}
    reported = [ReportedEntry(root=0, name=at, node=Node(kind="link", target=target)) for at, target in links.items()]
    found = judged([*new("d/x"), *reported], skipped=skipped).refused
    assert [refusal.why for refusal in found if refusal.name == name and out not in refusal.why] == []
    assert (name in {refusal.name for refusal in found}) == bool(out)
    assert {refusal.reveal for refusal in found if refusal.rule == "secrets"} <= {"d/secret"}


@pytest.mark.parametrize(
    ("there", "target", "out"),
    [
        ({"l": "../x"}, "l/f", True),
        ({"l": "../x"}, "l", True),
        ({"d/l": "../../root/d"}, "d/l/x", True),
        ({"l": "/etc"}, "l/passwd", True),
        ({"l": "../x", "m": "l"}, "m/f", True),
        ({"d/l": "../e"}, "d/l/x", False),
        ({"l": "../x"}, "e/l", False),
    ],
)
def test_no_link_escapes_through_an_existing_one(there: dict[str, str], target: str, *, out: bool) -> None:
    """A new link may not leave its root through an existing link."""
    before = {"": FOLDER, "d": FOLDER, "e": FOLDER}
    before |= {name: Node(kind="link", target=where) for name, where in there.items()}
    found = judged([ReportedEntry(root=0, name="new", node=Node(kind="link", target=target))], before).refused
    assert [(refusal.name, refusal.rule) for refusal in found] == [("new", "fs.allow_symlinks")] * out
    assert all("to a path outside the folder" in refusal.why for refusal in found)


def test_an_accepted_set_can_be_applied() -> None:
    """An accepted change set can be applied, and reserved names are refused."""
    for reported in (new("a/b/c", "d"), [ReportedEntry(root=0, name="f", node=Node(kind="link", target="a"))], []):
        check_set(as_set(judged(reported)))
    for name in (".x07-apply-0", "a/.x07-apply-0/b"):
        assert "reserved" in {rule for _, rule in refused(judged(new(name)))}


# work


DEEP = "/".join("a" * 120)
IN_DEEP = {"": FOLDER} | {one.name: one.node for one in new(*(f"{DEEP}/{n}" for n in range(500))) if one.node}
BEYOND = "/".join("a" * 1000)
LARGE: dict[str, tuple[list[ReportedEntry], dict[str, Node], int]] = {
    "chained links": (
        [
            ReportedEntry(root=0, name=f"l{at}", node=Node(kind="link", target=f"l{at - 1}" if at else "nothing"))
            for at in range(1000)
        ],
        {"": FOLDER},
        80,
    ),
    "files in a deep folder": (
        new(*(f"{'/'.join(f'src{number}' for number in range(20))}/{number}" for number in range(3000))),
        {"": FOLDER},
        30,
    ),
    "entries beyond the depth limit": (
        [*new(f"{BEYOND}/x"), *(ReportedEntry(root=0, name=f"{BEYOND}/{number}", node=FILE) for number in range(1000))],
        {"": FOLDER},
        15,
    ),
    "moves in deep trees": (
        [ReportedEntry(root=0, name=name) for name in reversed(IN_DEEP) if name]
        + new("r/HEAD", "r/objects", "r/refs", *(f"r/{DEEP[:200]}/{number}" for number in range(500))),
        IN_DEEP,
        35,
    ),
}


@pytest.mark.parametrize("what", LARGE)
def test_work_is_linear(what: str) -> None:
    """Judging thousands of links, files, entries that are too deep, or moves takes time linear in their number."""
    reported, before, most = LARGE[what]
    calls = 0

    def count(_frame: object, event: str, _what: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        found = judged(reported, before, skipped={"out": Skipped("link-out", 0)})
    finally:
        sys.setprofile(None)
    assert calls < most * len(reported)
    if what == "entries beyond the depth limit":
        deepest = "/".join("a" * 129)
        assert [(one.name, one.rule, one.value) for one in found.refused] == [(deepest, "fs.max_depth", None)]
    else:
        assert len(found.changes) == len(reported)


def test_reasons_with_any_names_can_be_encoded() -> None:
    """Reasons that name entries which are not UTF-8 can be encoded."""
    place = os.fsdecode(b"\xff")
    for refusal in judged(new(*(f"{place}/{name}" for name in ("HEAD", "commondir", "\udcfe.code-workspace")))).refused:
        assert refusal.why.encode()
