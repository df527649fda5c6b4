#!/bin/bash -p
# Install everything that the tests need, and run them: ruff, mypy, import-linter, shellcheck, check-jsonschema and
# zizmor (for the CI files), the build of the documentation and of the guest image, and pytest.
#   scripts/test.sh [--full] [--integrations] [-- PYTEST ARGUMENTS]
# --full: full sizes, long property tests, the quick start in a clean Debian root, and runs under KVM in an emulated
# computer. --integrations: also the tests of all frameworks (scripts/test_integrations.sh).
# Environment: CI=1 makes a missing tool an error instead of a skip; X07_PYTHON is the Python for .venv.
set -euo pipefail
unset CDPATH # cd would print where it went

root=$(cd -- "$(/usr/bin/dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"

# Without byte code, each of the thousands of processes that tests start would compile what it imports.
unset PYTHONDONTWRITEBYTECODE

full=no integrations=no
while [[ $# -gt 0 ]]; do
    case $1 in
        --full) full=yes ;;
        --integrations) integrations=yes ;;
        --) shift && break ;;
        *) fail "unknown argument: $1" "Usage: scripts/test.sh [--full] [--integrations] [-- PYTEST ARGUMENTS]" ;;
    esac
    shift
done

set_up dev
export PATH="$root/.venv/bin:$PATH"

# Run all checks, so that one run shows every failure.
broken=()
check() {
    step "$*"
    "$@" || broken+=("$*")
}
# Status 77: it cannot run here, and has said why.
under_kvm() { as_root scripts/nested_kvm_check.sh || [[ $? -eq 77 ]]; }
static_checks() {
    check ruff format --check
    check ruff check
    check mypy
    check mypy --python-version 3.11 --exclude '/x07_sandbox/guest/' src
    check lint-imports --no-logo
    check check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
    check check-jsonschema --builtin-schema vendor.github-actions action.yml
    check zizmor --offline --no-progress --strict-collection .github action.yml
    check scripts/build_docs.sh
    check shellcheck --external-sources scripts/*.sh scripts/ci/*.sh .ci/run
    [[ ${#broken[@]} -eq 0 ]] || fail "static checks failed; the tests were not started" "${broken[@]}"
}
# Run the checks during the image build, which uses one processor.
said=$(mktemp)
trap 'rm -f -- "$said"' EXIT
static_checks >"$said" 2>&1 &
checks=$!

step "Guest image: .venv/bin/x07 image build"
.venv/bin/x07 image build || fail "the guest image could not be built" "See the message above."
passed=yes
wait "$checks" || passed=no
cat -- "$said"
rm -f -- "$said"
[[ $passed == yes ]] || exit 1

if [[ $full == yes ]]; then
    export X07_TEST_FULL=1
    check as_root scripts/fresh_root_check.sh
    check as_root scripts/fresh_root_check.sh --user
    check under_kvm
    [[ ${#broken[@]} -eq 0 ]] || fail "these checks failed; the tests were not started" "${broken[@]}"
fi

if [[ $integrations == yes ]]; then
    check scripts/test_integrations.sh
    [[ ${#broken[@]} -eq 0 ]] || fail "the tests of integrations failed; the other tests were not started"
fi

# -rs lists every skip with its reason, --durations the slowest tests. There are more workers than processors, because
# some tests wait. Each file has one worker, so that its images and templates are made once, and so has each container
# engine (tests/durations.py).
step "pytest"
workers=$(($(nproc) * 2))
exec .venv/bin/pytest -rsfE --durations=30 -n "$workers" --maxprocesses 6 --dist loadfile --no-loadscope-reorder "$@"
