"""Texts that are printed on request: the help of `x07 run` and `x07 exec`, and completion for shells."""

import argparse
from typing import Final

from x07_sandbox.cli.console import write_stdout
from x07_sandbox.cli.parser import actions, parser_for
from x07_sandbox.programs.toolchains import TOOLCHAINS, describe

_EXAMPLES: Final = """examples:
  x07 run prog.py                                    no files, no network, 60 s
  x07 run --input data.txt prog.c -- --top 10        compile, then run with input and arguments
  x07 run -c 'print(6 * 7)' --toolchain python
  x07 run --allow-write-root build --allow-host example.org:443 prog.py
"""
_MORE_EXAMPLES: Final = """\
  generate | x07 run --toolchain shell -           the source comes from standard input
  x07 run --policy strict.json --json prog.py
  x07 run --memory 1G --timeout 300 prog.py
  x07 run --env LEVEL=3 ./a.out
  while read -r name; do x07 run --input /dev/null "$name"; done < list
  x07 run --dry-run project/                       show what would be done, without running anything
"""
_EXITS: Final = """\
exit code: the program's own; 2 wrong usage, 124 time limit, 125 not run or VM lost, 126 build failed,
128+N killed by signal N, 137 out of memory, 153 output limit. Scripts should read `outcome` in --json.
"""
EXEC: Final = """examples:
  x07 exec --workdir . -- make test              run the project's tests; changes are copied back
  x07 exec --workdir proj --read -- grep -rn main src
  x07 exec --workdir . --changes keep -- sh -c './configure && make'
  x07 diff                                       show what the last command changed
  x07 exec --workdir . --timeout 600 --memory 1G -- make -j2
  x07 exec -- python3 --version                  without --workdir: start in an empty folder

If the command has no slash, x07 looks it up in the image. If it has one, as in ./configure, x07 looks it up in
DIR. To add Debian packages to the image, use x07 image build --include. Relative paths in --allow-read-root and
--allow-write-root start in DIR. The exit code is that of the command, or 127 if there is no such command.
See docs/how-to/run-a-command.md.
"""
SHELLS: Final = ("bash", "zsh", "tcsh")
_EPILOG: Final = """examples:
  eval "$(x07 completion bash)"                                write this line into ~/.bashrc
  x07 completion bash > ~/.local/share/bash-completion/completions/x07
  x07 completion zsh > ~/.zfunc/_x07                           ~/.zfunc must be in fpath
  x07 completion tcsh > ~/.x07.tcsh                            and source this file in ~/.tcshrc
"""
# Replacements that make the script serve the command's second name too. By shell: text of shtab's script, new text.
_BOTH: Final = {
    "bash": (" _shtab_x07 x07", " _shtab_x07 x07 x07-sandbox"),
    "zsh": ("#compdef x07\n", "#compdef x07 x07-sandbox\n"),
}
# Metavars of options that take a file or a folder.
_FILES: Final = frozenset({"FILE", "PATH", "F", "PROGRAM", "POLICY"})
_FOLDERS: Final = frozenset({"DIR"})


def of_run(level: str) -> str:
    """Return the text that the help of `x07 run` of this level shows below the options."""
    if level == "all":
        return _of_every_option()
    if level == "x07":
        return (
            "Without PROGRAM, x07 run uses the x07.json of this folder or of the nearest folder above it.\n"
            "docs/reference/x07.md describes the reports and the command x07-os-runner.\n"
        )
    languages = ", ".join(row.name for row in TOOLCHAINS)
    return f"toolchains: {languages}.\nA project folder contains x07-sandbox.toml.\n{_EXITS}\n{_EXAMPLES}"


def _of_every_option() -> str:
    from x07_sandbox.policy.outcomes import describe_exits

    return f"""toolchains, selected by --toolchain or by the suffix of the file:
{describe()}
A folder with an x07-sandbox.toml is a project of several files. See docs/reference/programs.md.

exit codes and outcomes (docs/reference/outcomes.md):
{describe_exits()}A program can exit with the same numbers, so scripts should read `outcome`. The exit code is also 125
if x07 could not write the output.

{_EXAMPLES}{_MORE_EXAMPLES}"""


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 completion`."""
    parser.epilog = _EPILOG
    parser.add_argument("shell", choices=SHELLS, help="the shell that will read the script")
    parser.set_defaults(carry_out=_completion)


def _completion(options: argparse.Namespace) -> int:
    import shtab  # only here: no other command needs it

    parser = parser_for([])
    for action in actions(parser):
        if isinstance(action.metavar, str) and action.choices is None:
            kind = shtab.FILE if action.metavar in _FILES else shtab.DIR if action.metavar in _FOLDERS else None
            if kind is not None:
                action.complete = kind  # type: ignore[attr-defined]  # shtab's own attribute
    text = shtab.complete(parser, shell=options.shell)
    if options.shell in _BOTH:
        text = text.replace(*_BOTH[options.shell])
    write_stdout(text.rstrip("\n").encode() + b"\n")
    return 0
