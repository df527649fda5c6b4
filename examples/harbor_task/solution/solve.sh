#!/bin/bash
set -euo pipefail
echo 42 > /srv/answer.txt
