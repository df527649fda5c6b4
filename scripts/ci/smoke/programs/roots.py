"""Read the read root, try to write there, write to the write root, and look for the given file."""

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
