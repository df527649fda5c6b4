#!/bin/bash -p
# Write requirements/runtime.txt and requirements/dev.txt from the .in files, with pinned versions and wheel hashes but
# without index addresses. Run it by hand; it needs python3.11 with venv. --upgrade selects new releases.
set -euo pipefail

cd -- "$(/usr/bin/dirname -- "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT

# Resolve with the oldest supported Python. Packages that only it needs do no harm on newer versions.
python3.11 -I -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --upgrade 'pip>=26' pip-tools

export CUSTOM_COMPILE_COMMAND='scripts/lock.sh'
for name in runtime dev; do
    # Releases must be at least a week old, because most malicious uploads are found within a week.
    "$work/venv/bin/pip-compile" --quiet --generate-hashes --strip-extras --allow-unsafe \
        --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options \
        --pip-args='--uploaded-prior-to=P7D' "$@" \
        --output-file="requirements/$name.txt" "requirements/$name.in"
done
echo "Wrote requirements/runtime.txt and requirements/dev.txt."
