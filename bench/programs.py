"""The programs to time. Each prints a nonce from its input, so that a cached output would be noticed."""

from __future__ import annotations

from typing import Final

C: Final = """\
#include <stdio.h>
int main(void) { char line[128]; return !fgets(line, sizeof line, stdin) || printf("got %s", line) < 0; }
"""
PYTHON: Final = 'print("got", input())\n'


def expected(nonce: str) -> bytes:
    """Return what both programs print for the input line *nonce*."""
    return f"got {nonce}\n".encode()


COUNT: Final = """\
#include <stdio.h>
int main(void) { static char b[65536]; long n = 0; size_t k; while ((k = fread(b, 1, sizeof b, stdin))) n += k;
return printf("%ld\\n", n) < 0; }
"""
