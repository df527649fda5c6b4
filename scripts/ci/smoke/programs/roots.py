"""Reads its read root, tries to write there, writes into its write root, and looks for the file that it is given."""

import errno
import sys
from pathlib import Path

text = Path("readable/in.txt").read_text(encoding="utf-8").strip()
try:
    Path("readable/in.txt").write_text("changed by the program\n", encoding="utf-8")
    written = "written"
except OSError as exc:
    written = errno.errorcode.get(exc.errno or 0, "?")
Path("writable/out.txt").write_text(text.upper() + "\n", encoding="utf-8")
print(f"read: {text}; read root: {written}; other file: {'found' if Path(sys.argv[1]).exists() else 'missing'}")
