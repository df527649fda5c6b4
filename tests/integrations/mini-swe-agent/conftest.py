"""mini-swe-agent reads its variables, and makes a folder for settings, when it is imported."""

import os
import tempfile

_SETTINGS = tempfile.TemporaryDirectory()
os.environ |= {"MSWEA_SILENT_STARTUP": "1", "MSWEA_GLOBAL_CONFIG_DIR": _SETTINGS.name}
