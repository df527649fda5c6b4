"""`x07 completion`: print shell completion, made from the parsers."""

import argparse
from typing import Final

from x07_sandbox.cli.console import write_stdout
from x07_sandbox.cli.parser import actions, parser_for

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
_FILES: Final = frozenset({"FILE", "PATH", "F", "PROGRAM", "POLICY", "A", "B"})
_FOLDERS: Final = frozenset({"DIR"})


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
