#!/bin/bash -p
# Run the tests of integrations, each in a virtual environment of its own with its framework.
#   scripts/test_integrations.sh [NAME...]
# NAME is a folder in tests/integrations, whose requirements.txt lists what pip installs besides this package. Without a
# name, all are tested. Packages that cannot be had are a reason to skip, and with CI=1 an error.
set -euo pipefail
unset CDPATH # cd would print where it went

root=$(cd -- "$(/usr/bin/dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"

export X07_VM_SAVE_FIRST=1 # as tests/conftest.py does

names=("$@")
if [[ ${#names[@]} -eq 0 ]]; then
    for file in tests/integrations/*/requirements.txt; do names+=("$(basename -- "$(dirname -- "$file")")"); done
fi
status=0
for name in "${names[@]}"; do
    folder=tests/integrations/$name
    [[ -f $folder/requirements.txt ]] || fail "there is no integration called $name" "See the folders in tests/integrations."
    step "Integration $name"
    env=.venv-integrations/$name
    if ! cmp -s "$folder/requirements.txt" "$env/installed"; then
        .venv/bin/python -m venv --clear "$env"
        if ! "$env/bin/pip" install --quiet --editable . --requirement "$folder/requirements.txt"; then
            say "SKIPPED: the packages of $folder/requirements.txt could not be installed."
            if [[ ${CI:-} == 1 || ${CI:-} == true ]]; then status=1; fi
            continue
        fi
        cp -- "$folder/requirements.txt" "$env/installed"
    fi
    PATH="$root/$env/bin:$PATH" "$env/bin/python" -m pytest -c tests/integrations/pytest.ini --rootdir "$root" \
        --confcutdir "$folder" -rsfE "$folder" || status=1
done
exit "$status"
