"""Presets of `x07 image build`: their table, and the lists that a build gets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from x07_sandbox.cli import image as command
from x07_sandbox.cli.main import main
from x07_sandbox.errors import UsageError
from x07_sandbox.images.base import check_modules, check_packages
from x07_sandbox.images.pip import check_requirements
from x07_sandbox.images.presets import PRESETS, preset_named

if TYPE_CHECKING:
    from x07_sandbox.images.presets import Preset


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_lists_of_presets_are_valid(preset: Preset) -> None:
    """Each list is one that the option of the same name accepts, and each preset has a name for an image."""
    assert set(check_packages(preset.include)) <= set(preset.include)  # without those of every image
    assert set(check_modules(preset.preload)) == set(preset.preload)
    assert len(check_requirements(preset.pip)) == len(preset.pip)
    assert preset_named(preset.name) is preset


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """--list-presets names each preset with its packages, as text and as JSON, and builds nothing."""
    assert main(["image", "build", "--list-presets"]) == 0
    text = capsys.readouterr().out
    assert main(["image", "build", "--list-presets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["presets"]
    assert [one["name"] for one in listed] == list(PRESETS)
    for one in listed:
        assert all(name in text for name in (one["name"], *one["include"], *one["pip"]))


def test_an_unknown_preset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The error for a preset that does not exist names those that do."""
    assert main(["image", "build", "--preset", "agents"]) == 2
    assert "Use agent or data." in capsys.readouterr().err
    with pytest.raises(UsageError):
        preset_named("")


def test_packages_are_added_to_those_of_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options beside --preset add to its lists, and the image has the name of the preset, or the given one."""
    built: list[tuple[str, Any, Any, Any]] = []

    def note(name: str, include: Any, preload: Any, *, pip: Any, **_rest: Any) -> None:  # noqa: ANN401 - as called
        built.append((name, include, preload, pip))
        raise UsageError("nothing is built", "a test looks at the lists", "See there")

    monkeypatch.setattr(command, "build_with_progress", note)
    main(["image", "build", "--preset", "data", "--pip", "scipy", "--preload", "scipy"])
    main(["image", "build", "--preset", "agent", "--name", "mine", "--include", "tmux"])
    data, agent = PRESETS["data"], PRESETS["agent"]
    assert built == [
        ("data", [], [*data.preload, "scipy"], [*data.pip, "scipy"]),
        ("mine", [*agent.include, "tmux"], [], []),
    ]
