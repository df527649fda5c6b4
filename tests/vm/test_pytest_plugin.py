"""The pytest plugin: fixtures, marker, and reports of tests that fail or cannot run. pytest runs in a subprocess."""

from __future__ import annotations

import pytest

from x07_sandbox.host.paths import cache_dir

pytest_plugins = ["pytester"]
pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image")]

CACHE = str(cache_dir())


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester) -> None:
    """Let the inner pytest find the image, for which it has another HOME, and keep its records in the test's folder."""
    jobs = pytester.path / "jobs"
    jobs.mkdir(mode=0o700)
    monkeypatch.setenv("X07_VM_CACHE_DIR", CACHE)
    monkeypatch.setenv("X07_VM_STATE_DIR", str(jobs))


def test_a_program_is_run_with_the_options_of_the_marker_and_the_call(pytester: pytest.Pytester) -> None:
    """The nearest marker decides about an option, and the call about all."""
    pytester.makepyfile(
        """
        import pytest

        pytestmark = pytest.mark.x07(cpu_s=2, toolchain="python", env={"WORD": "module"})
        PRINT = "import os; print(os.environ['WORD'])"

        @pytest.mark.x07(env={"WORD": "test"})
        def test_words(x07_run):
            assert x07_run(source=PRINT).stdout.text == "test\\n"
            assert x07_run(source=PRINT, env={"WORD": "call"}).stdout.text == "call\\n"

        def test_limit(x07_run):
            assert x07_run(source="while True: pass").outcome == "cpu-limit"
        """
    )
    pytester.runpytest_subprocess("--strict-markers", "-Werror").assert_outcomes(passed=2)


def test_a_failed_test_shows_outcome_denials_and_last_lines(pytester: pytest.Pytester) -> None:
    """The report of a failed test says how the program ended, with its last lines, escaped, and what was denied."""
    pytester.makepyfile(
        r"""
        def test_output(x07_run):
            source = "import sys; [print(n) for n in range(50)]; print('\\33[2J', file=sys.stderr); open('/etc/x', 'w')"
            assert x07_run(source=source, toolchain="python").ok
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*- x07 -*", "failed: the program exited with status 1*", "denied: * /etc/*", "stdout: 30", "stdout: 49"]
    )
    result.stdout.fnmatch_lines([r"stderr: \x1b[[]2J", "stderr: OSError: *"])
    result.stdout.no_fnmatch_line("stdout: 29")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_fault_of_the_host_is_an_error_and_no_failure(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    """Without an image, no test passes or fails: not one that expects a failure or an error of the sandbox."""
    monkeypatch.setenv("X07_VM_GUEST_IMAGE", "missing")
    pytester.makepyfile(
        """
        import pytest
        from x07_sandbox import SandboxError

        def test_run(x07_run):
            assert x07_run(source="exit(1)", toolchain="python").ok

        @pytest.mark.xfail
        def test_expected(x07_run):
            assert x07_run(source="exit(1)", toolchain="python").ok

        def test_refusal(x07_run):
            with pytest.raises(SandboxError):
                x07_run(source="", toolchain="python", policy="built-in:postgres-client")

        def test_sandbox(x07_sandbox):
            pass
        """
    )
    result = pytester.runpytest_subprocess("-n", workers)
    result.assert_outcomes(errors=4)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*ERROR at call of test_run*", "*there is no guest image 'missing'*"])


def test_a_refusal_is_the_matter_of_the_test(pytester: pytest.Pytester) -> None:
    """A refused run raises SandboxError, which a test can expect; otherwise the test fails and says what was denied."""
    pytester.makepyfile(
        """
        import pytest
        from x07_sandbox import SandboxError

        pytestmark = pytest.mark.x07(policy="built-in:postgres-client", toolchain="python")

        def test_expected(x07_run):
            with pytest.raises(SandboxError):
                x07_run(source="")

        def test_unexpected(x07_run):
            x07_run(source="")
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*- x07 -*", "refused: *", "denied: *db.enabled*"])


def test_a_sandbox_lasts_for_one_test(pytester: pytest.Pytester) -> None:
    """Each test has a sandbox of its own, and the report of a failed test shows its last commands."""
    pytester.mkdir("project")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.x07(timeout_s=300, workdir="project")
        def test_files(x07_sandbox):
            x07_sandbox.shell("echo new > made", check=True)
            assert x07_sandbox.files.read("made") == b"new\\n"

        def test_fails(x07_sandbox):
            assert not x07_sandbox.shell("test -e made").ok
            assert x07_sandbox.shell("echo last words; echo no > /etc/no").ok
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*- x07 -*", "failed: *", "denied: write /etc/*", "stdout: last words"])
    assert not (pytester.path / "project" / "made").exists()


def test_a_lost_sandbox_is_an_error(pytester: pytest.Pytester) -> None:
    """If the host kills the VM of a sandbox, the test ends as an error."""
    pytester.makepyfile(
        """
        import json, os, pathlib, signal

        def test_lost(x07_sandbox):
            (owner,) = pathlib.Path(os.environ["X07_VM_STATE_DIR"]).glob("*/owner.json")
            for process in json.loads(owner.read_bytes())["processes"].values():
                os.kill(process["pid"], signal.SIGKILL)
            x07_sandbox.exec(["sleep", "60"])
        """
    )
    result = pytester.runpytest_subprocess()
    assert "failed" not in result.parseoutcomes()
    result.stdout.fnmatch_lines(["*ERROR at call of test_lost*", "*ERROR at teardown of test_lost*"])


def test_the_plugin_can_be_switched_off_and_loads_nothing(pytester: pytest.Pytester) -> None:
    """A run that uses no fixture loads no other module of this package, and -p no:x07 loads not even the plugin."""
    pytester.makepyfile(
        """
        import sys

        def test_modules(pytestconfig):
            loaded = {name for name in sys.modules if name.startswith("x07_sandbox")}
            plugin = "x07_sandbox.integrations.pytest_plugin"
            own = {"x07_sandbox", "x07_sandbox.integrations", plugin}
            assert loaded == (own if pytestconfig.pluginmanager.hasplugin("x07") else set())
        """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=1)
    pytester.runpytest_subprocess("-p", "no:x07").assert_outcomes(passed=1)
