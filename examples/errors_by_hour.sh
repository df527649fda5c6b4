#!/bin/bash
# Count the server errors per hour in a web server's log (common log format).
set -euo pipefail

awk '$9 >= 500 { split($4, time, ":"); print time[2] }' |
    sort |
    uniq -c |
    while read -r count hour; do
        printf '%s:00  %3d  %s\n' "$hour" "$count" "$(printf '%*s' "$count" '' | tr ' ' '#')"
    done
