"""Print on one line the network interfaces, and which of the given HOST:PORT are reachable."""

import socket
import sys
from pathlib import Path

listing = Path("/proc/net/dev").read_text(encoding="utf-8")
interfaces = [name for line in listing.splitlines()[2:] if (name := line.partition(":")[0].strip()) != "lo"]
reached = []
for target in sys.argv[1:]:
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        continue
    reached.append(target)
print(f"interfaces: {' '.join(interfaces) or 'none'}; reached: {' '.join(reached) or 'none'}")
