"""Says that it started, and sleeps for the number of seconds given."""

import sys
import time

print("started", flush=True)
time.sleep(float(sys.argv[1]))
print("it slept")
