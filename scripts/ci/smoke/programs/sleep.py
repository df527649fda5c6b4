"""Print a line, then sleep for the given number of seconds."""

import sys
import time

print("started", flush=True)
time.sleep(float(sys.argv[1]))
print("it slept")
