"""Create the file named by the argument."""

import sys
from pathlib import Path

Path(sys.argv[1]).touch()
