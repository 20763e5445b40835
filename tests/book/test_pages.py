"""Every page of the book, on a desk and on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import page_checks
import pytest
import yaml
from page_checks import Visit
from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[2]
TOC = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text("utf-8"))
CHAPTERS = [entry["file"] for part in TOC["parts"] for entry in part["chapters"]]
PAGES = [TOC["root"], *CHAPTERS]
WINDOWS = {"desk": (1280, 900), "phone": (390, 844)}
# Pages that Sphinx adds by itself.
GENERATED = {"index", "search", "genindex", "py-modindex"}


def has_slider(page: str) -> bool:
    """Whether the notebook of a page makes a slider."""
    path = ROOT / f"{page}.ipynb"
    if not path.is_file():
        return False
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = ("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    return any("explorer" in source for source in code)


@pytest.fixture(
    scope="module",
    params=[(page, window) for page in PAGES for window in WINDOWS],
    ids=lambda param: "-".join(param),
)
def seen(
    request: pytest.FixtureRequest, browser: Browser, address: str
) -> Iterator[Visit]:
    page, window = request.param
    width, height = WINDOWS[window]
    context = browser.new_context(viewport={"width": width, "height": height})
    yield page_checks.visit(context, address, f"{page}.html")
    context.close()


def test_no_script_fails(seen: Visit) -> None:
    assert page_checks.script_problems(seen) == []


def test_all_files_come_with_the_book(seen: Visit) -> None:
    assert page_checks.network_problems(seen) == []


def test_formulas_are_drawn(seen: Visit) -> None:
    assert page_checks.formula_problems(seen) == []


def test_pictures_have_alt_text(seen: Visit) -> None:
    assert page_checks.alt_problems(seen) == []


def test_page_fits_the_window(seen: Visit) -> None:
    assert page_checks.width_problems(seen) == []


def test_sliders_move_their_picture(
    seen: Visit, request: pytest.FixtureRequest
) -> None:
    page = request.node.callspec.params["seen"][0]
    expected = has_slider(page)
    assert page_checks.slider_problems(seen, expected=expected) == []
    assert page_checks.script_problems(seen) == []


def test_page_has_one_title(seen: Visit) -> None:
    assert seen.page.locator("article h1").count() == 1


def test_every_page_of_the_contents_was_built(site: Path) -> None:
    built = {
        str(path.relative_to(site).with_suffix(""))
        for path in site.rglob("*.html")
        if path.relative_to(site).parts[0] not in ("_modules", "_static")
    }
    assert built - GENERATED == set(PAGES)


def test_no_page_names_a_file_of_another_host(site: Path) -> None:
    found = {
        str(path.relative_to(site)): page_checks.outside_files(path.read_text("utf-8"))
        for path in site.rglob("*.html")
    }
    assert {name: files for name, files in found.items() if files} == {}


def test_search_finds_a_word(browser: Browser, address: str) -> None:
    context = browser.new_context()
    seen = page_checks.visit(context, address, "search.html?q=gradient")
    seen.page.locator("#search-results li").first.wait_for(timeout=15_000)
    assert page_checks.network_problems(seen) == []
    assert page_checks.script_problems(seen) == []
    context.close()


def test_chapters_open_on_colab(site: Path, root: Path) -> None:
    config = yaml.safe_load((root / "book" / "_config.yml").read_text("utf-8"))
    repository = config["repository"]["url"].split("github.com/")[1]
    for chapter in CHAPTERS:
        if chapter.startswith("notebooks/"):
            link = (
                f"https://colab.research.google.com/github/{repository}"
                f"/blob/main/{chapter}.ipynb"
            )
            assert link in (site / f"{chapter}.html").read_text("utf-8")
