"""Creates the file whose path it is given."""

import sys
from pathlib import Path

Path(sys.argv[1]).touch()
