"""Run once in a machine before it waits in a pool: what most programs do, so that its processor has met it."""

import json
import sys

for line in sys.stdin:
    print("warm", json.loads(json.dumps([line.strip()]))[0])
print(sys.argv[1:], file=sys.stderr)
