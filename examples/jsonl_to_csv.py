"""Convert JSON lines on standard input to CSV: one column per key; nested keys are joined by a dot."""

import csv
import json
import sys


def flatten(value, prefix=""):
    """Yield a column name and a value for every leaf of an object."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(item) if isinstance(item, list) else item


def main():
    """Read all lines before writing, because any line can add a column."""
    rows, bad = [], 0
    for number, line in enumerate(sys.stdin, start=1):
        if not line.strip():
            continue
        try:
            rows.append(dict(flatten(json.loads(line))))
        except (ValueError, AttributeError) as error:
            bad += 1
            print(f"line {number}: {error}", file=sys.stderr)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
