"""The tables of scripts/house.py, which measures the project."""

from __future__ import annotations

from scripts.house import by_folder, by_room, render, small_modules


def test_modules_are_counted_by_room() -> None:
    """A room is a folder with everything below it, or a single module; small modules do not include __init__.py."""
    lines = {"runs/run.py": 300, "errors.py": 79, "runs/__init__.py": 1, "backends/qemu/hot.py": 80}
    assert by_room(lines) == {
        "backends": {"lines": 80, "modules": 1},
        "errors.py": {"lines": 79, "modules": 1},
        "runs": {"lines": 301, "modules": 2},
    }
    assert small_modules(lines) == ["errors.py"]


def test_numbers_are_added_up_by_folder() -> None:
    """Deep folders are part of the folder above."""
    numbers = {"docs/how-to/more/a.md": 1, "README.md": 2, "docs/how-to/b.md": 4, "docs/c.md": 8, "LICENSE": 16}
    assert by_folder(numbers, 2) == {".": 18, "docs": 8, "docs/how-to": 5}


def test_a_measurement_that_needs_a_vm_may_be_missing() -> None:
    """The reason stands in place of figures, and a folder without a recorded time has a dash."""
    text = render(
        {
            "sources": {
                "rooms": {"runs": {"lines": 5, "modules": 1}},
                "lines": 5,
                "modules": 1,
                "small_modules": 1,
                "longest_module": {"path": "runs/run.py", "lines": 5},
            },
            "loads": {"x07 run": "there is no guest image", "Sandbox()": {"modules": 3, "bytes": 4096}},
            "tests": {"tests/unit": {"lines": 7}, "tests/vm": {"lines": 8, "seconds": 90}},
            "docs": {"docs": 11},
        }
    )
    rows = [line.split() for line in text.splitlines()]
    assert ["x07", "run", "there", "is", "no", "guest", "image"] in rows
    assert ["Sandbox()", "3", "4096"] in rows
    assert ["tests/unit", "7", "-"] in rows
    assert ["all", "15", "90"] in rows
