"""Runs once in a machine before it waits in a pool, to warm up what most programs use."""

import json
import sys

for line in sys.stdin:
    print("warm", json.loads(json.dumps([line.strip()]))[0])
print(sys.argv[1:], file=sys.stderr)
