"""The documentation as a site, in a browser: what fits into a narrow screen, and what a reader sees first."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.browser import missing, running

if TYPE_CHECKING:
    from tests.conftest import Need

DOCS: Final = Path(__file__).resolve().parents[2] / "docs"
PAGES: Final = ("index", "reference/codes", "reference/outcomes", "reference/result", "reference/library")
WIDE_TABLES: Final = "[...document.querySelectorAll('.table-wrapper')].filter(one => one.scrollWidth > one.clientWidth)"
BROKEN_CODES: Final = (
    "[...document.querySelectorAll('td:first-child code')]"
    ".filter(one => /^[a-z]{1,10}$/.test(one.textContent) && one.getClientRects().length > 1)"
)
COMMAND_END: Final = "document.querySelector('.highlight-sh').getBoundingClientRect().bottom"
PICTURE_TOP: Final = "document.querySelector('article img').getBoundingClientRect().top"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few pages as HTML. Links to other pages lead nowhere."""
    folder = tmp_path_factory.mktemp("site")
    for page in PAGES:
        (folder / f"{page}.md").parent.mkdir(exist_ok=True)
        (folder / f"{page}.md").write_bytes((DOCS / f"{page}.md").read_bytes())
    (folder / "picture.svg").write_bytes((DOCS / "picture.svg").read_bytes())
    argv = [sys.executable, "-m", "sphinx", "-Q", "-c", str(DOCS), str(folder), str(folder / "html")]
    subprocess.run(argv, check=True, timeout=120)
    return folder / "html"


def test_the_site_shows_no_path_of_a_page_in_place_of_a_link(site: Path) -> None:
    """No page of the site, and no docstring on it, names a page of the documentation by its path."""
    shown = [re.sub(r"<[^>]*>", "", (site / f"{page}.html").read_text(encoding="utf-8")) for page in PAGES]
    assert [found for text in shown for found in re.findall(r"\(docs/\S*", text)] == []


def test_tables_fit_into_a_narrow_screen(site: Path, need: Need) -> None:
    """At 420 pixels, the tables of codes and outcomes need no scrolling, and no short word in them is broken."""
    need(not (reason := missing()), reason, installable=False)
    with running() as browser:
        for page in ("reference/codes", "reference/outcomes", "reference/result"):
            browser.open(site / f"{page}.html", 420)
            assert browser.value(f"{WIDE_TABLES}.length") == 0, page
            assert browser.value(f"{BROKEN_CODES}.map(one => one.textContent).join()") == "", page


def test_the_first_command_comes_before_the_picture(site: Path, need: Need) -> None:
    """In a window of 1280 by 900 pixels, the landing page shows its first command whole, above the picture."""
    need(not (reason := missing()), reason, installable=False)
    with running() as browser:
        browser.open(site / "index.html", 1280)
        end = browser.value(COMMAND_END)
        assert end < 900
        assert end < browser.value(PICTURE_TOP)
