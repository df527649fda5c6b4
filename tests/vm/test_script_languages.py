"""Scripts in JavaScript, Perl and Lua, checked and run on an image with their packages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from tests.conftest import FULL
from x07_sandbox import run_program
from x07_sandbox.programs.project import FILE, sandbox_manifest

if TYPE_CHECKING:
    from tests.vm.conftest import Sandbox
    from x07_sandbox.images.store import Image

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("no_hot_clones")]


class Language(msgspec.Struct, frozen=True, kw_only=True):
    """Sources in one language.

    name: the program's file name. hello: prints arguments and upper-case input, and exits with 3.
    wrong: has a syntax error in line 2. message: the language's own message about it.
    main: prints 42 from the module *beside*, a file name and its content.
    """

    name: str
    hello: str
    wrong: str
    message: str
    main: str
    beside: tuple[str, str]


LANGUAGES = {
    "perl": Language(
        name="main.pl",
        hello='use strict; use warnings;\nprint "@ARGV\\n";\nprint uc while <STDIN>;\nexit 3;\n',
        wrong='print "before\\n";\nmy $x = ;\n',
        message='syntax error at /x07/in/main.pl line 2, near "= ;"',
        main='use strict;\nuse Near;\nprint $Near::n, "\\n";\n',
        beside=("lib/Near.pm", "package Near;\nour $n = 42;\n1;\n"),
    ),
    "lua": Language(
        name="main.lua",
        hello='print(table.concat(arg, " "))\nio.write(io.read("a"):upper())\nos.exit(3)\n',
        wrong='print("before")\nx = = 1\n',
        message="main.lua:2: unexpected symbol near '='",
        main='print(require("near").n)\n',
        beside=("near/init.lua", "return { n = 42 }\n"),
    ),
    "javascript": Language(
        name="main.js",
        hello="""
            console.log(process.argv.slice(2).join(" "))
            let text = ""
            process.stdin.on("data", data => text += data)
            process.stdin.on("end", () => { process.stdout.write(text.toUpperCase()); process.exitCode = 3 })
        """,
        wrong='console.log("before")\nlet x = ;\n',
        message="main.js:2\nlet x = ;\n        ^\n\nSyntaxError: Unexpected token ';'",
        main="import { n } from './near.mjs'\nconsole.log(n)\n",
        beside=("near.mjs", "export const n = 42\n"),
    ),
}


EACH = pytest.mark.parametrize("toolchain", list(LANGUAGES) if FULL else ["perl", "lua"])


@pytest.fixture(scope="session")
def languages(with_packages: str) -> str:
    """The name of an image with these languages."""
    return with_packages


@EACH
def test_a_script_gets_arguments_and_input_and_gives_its_exit_code(
    sandbox: Sandbox, languages: str, toolchain: str
) -> None:
    """A script runs under the built-in policy with arguments, input and exit code, and without any denial."""
    language = LANGUAGES[toolchain]
    ran = sandbox.run_text(language.name, language.hello, "one", "two", stdin=b"some words\n", image=languages)
    assert (ran.outcome, ran.result.exit_code) == ("failed", 3), ran.stderr
    assert (ran.stdout, ran.stderr) == (b"one two\nSOME WORDS\n", b"")
    assert ran.result.denials == []


@EACH
def test_a_script_with_a_syntax_error_is_a_failed_build(sandbox: Sandbox, languages: str, toolchain: str) -> None:
    """A script with a syntax error fails the build with the language's own message, and does not start."""
    language = LANGUAGES[toolchain]
    ran = sandbox.run_text(language.name, language.wrong, image=languages)
    assert (ran.outcome, ran.stdout) == ("build-failed", b"")
    assert language.message in ran.stderr.decode()


@EACH
def test_a_project_of_scripts_runs_from_the_manifest_that_init_writes(
    sandbox: Sandbox, languages: str, toolchain: str
) -> None:
    """A script project runs with the manifest that `x07 init --toolchain` writes."""
    language = LANGUAGES[toolchain]
    name, text = language.beside
    folder = sandbox.work / "project"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(text)
    (folder / language.name).write_text(language.main)
    (folder / FILE).write_bytes(sandbox_manifest(toolchain, sorted([language.name, name])))
    ran = sandbox.run(folder, image=languages)
    assert (ran.outcome, ran.stdout) == ("ok", b"42\n"), ran.stderr


def test_a_missing_interpreter_is_named(image: Image) -> None:
    """A script exits with 127 if its interpreter is not in the image, and a hint names the package to include."""
    result = run_program(source="#!/usr/bin/ruby\nputs 1\n", toolchain="executable", image=image.digest)
    assert (result.outcome, result.exit_code) == ("failed", 127)
    (hint,) = result.hints
    assert hint.subject == "the program ruby"
    assert "x07 image build --name mine --include ruby" in str(hint.how.flag)  # an image without a name
