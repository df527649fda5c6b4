#!/bin/bash -p
# Build x07-vz-helper on a Mac, and sign it ad hoc with the entitlement that Apple's Virtualization framework demands.
#   scripts/build_vz_helper.sh FILE
# Needs macOS 13 and Xcode's command line tools. The last line of the output is: ok: built FILE
set -euo pipefail
unset CDPATH

root=$(cd -- "$(/usr/bin/dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"

[[ $# -eq 1 && $1 != -* ]] || usage_error FILE
out=$1
[[ $(uname -s) == Darwin ]] ||
    fail "cannot build x07-vz-helper: this is not a Mac, and Apple's Virtualization framework exists only there" \
        "Run this script on a Mac with macOS 13 or newer. On Linux, scripts/check_vz_helper.sh checks its types."
for tool in swiftc codesign; do
    command -v "$tool" >/dev/null ||
        fail "cannot build x07-vz-helper: $tool was not found" "Run: xcode-select --install"
done

mkdir -p -- "$(dirname -- "$out")"
# A new file, renamed: macOS may kill a program that was written over one whose signature it has seen.
new=$(mktemp "$out.XXXXXX") || fail "cannot write beside $out" "Name a file in an existing folder."
trap 'rm -f -- "$new"' EXIT
swiftc -O -swift-version 5 -target "$(uname -m)-apple-macosx13.0" -o "$new" "$root"/macos/x07-vz-helper/*.swift
chmod 0755 "$new"
codesign --force --sign - --timestamp=none \
    --entitlements "$root/macos/x07-vz-helper/x07-vz-helper.entitlements" "$new"
codesign -d --entitlements - "$new" 2>&1 | grep -q com.apple.security.virtualization ||
    fail "the signature lacks the entitlement com.apple.security.virtualization" "See codesign's messages above."
mv -f -- "$new" "$out"
printf 'ok: built %s\n' "$out"
