"""The checks of the pages must find what they are there for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import page_checks
import pytest
from page_checks import Visit
from playwright.sync_api import Browser

Look = Callable[[str], Visit]
GOOD = "<article><h1>Title</h1><img alt='A dot' src='data:image/gif;base64,'></article>"


@pytest.fixture
def look(tmp_path: Path, browser: Browser) -> Iterator[Look]:
    """Open a small page that holds the given body."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    with page_checks.serve(tmp_path) as base:

        def opened(body: str) -> Visit:
            html = f"<!doctype html><link rel=icon href=data:,><main>{body}</main>"
            (tmp_path / "page.html").write_text(html, "utf-8")
            return page_checks.visit(context, base, "page.html")

        yield opened
        context.close()


def state(model: str, **values: object) -> str:
    models = {"a": {"model_name": model, "state": values}}
    kind = "application/vnd.jupyter.widget-state+json"
    return f'<script type="{kind}">{json.dumps({"state": models})}</script>'


def test_good_page_has_no_problem(look: Look) -> None:
    seen = look(GOOD)
    checks = (
        page_checks.script_problems,
        page_checks.network_problems,
        page_checks.formula_problems,
        page_checks.alt_problems,
        page_checks.width_problems,
    )
    assert [problem for check in checks for problem in check(seen)] == []


def test_script_errors_are_found(look: Look) -> None:
    seen = look("<script>undefinedFunction()</script>")
    assert "undefinedFunction" in page_checks.script_problems(seen)[0]
    seen = look("<script>console.error('broken')</script>")
    assert "broken" in page_checks.script_problems(seen)[0]


def test_other_hosts_and_missing_files_are_found(look: Look) -> None:
    seen = look("<script src='https://example.org/a.js'></script>")
    assert "example.org" in page_checks.network_problems(seen)[0]
    seen = look("<img alt='x' src='nowhere.png'>")
    assert "404" in page_checks.network_problems(seen)[0]


def test_plain_and_broken_formulas_are_found(look: Look) -> None:
    fake = "<script>window.MathJax = {startup: {promise: Promise.resolve()}}</script>"
    seen = look(fake + "<article><span class=math>x^2</span></article>")
    assert "not drawn" in page_checks.formula_problems(seen)[0]
    broken = "<span class=math><mjx-container><mjx-merror>no</mjx-merror>"
    seen = look(fake + f"<article>{broken}</mjx-container></span></article>")
    assert "with an error" in page_checks.formula_problems(seen)[0]


@pytest.mark.parametrize(
    "alt", ["", "alt=''", "alt=' '", "alt='../_images/a.png'"], ids=repr
)
def test_missing_alt_texts_are_found(look: Look, alt: str) -> None:
    seen = look(f"<article><img {alt} src='data:image/gif;base64,'></article>")
    assert len(page_checks.alt_problems(seen)) == 1


def test_hidden_frames_need_alt_texts(look: Look) -> None:
    good = state("HTMLModel", value="<img alt='A dot' src='data:,'>")
    assert page_checks.alt_problems(look(good)) == []
    for bad in (
        state("HTMLModel", value="<img src='data:,'>"),
        state("ImageModel"),
        state("PlayModel"),
    ):
        assert len(page_checks.alt_problems(look(bad))) == 1


def test_wide_page_is_found(look: Look) -> None:
    seen = look("<article><div class=wide style='width: 600px'>x</div></article>")
    assert "div.wide" in page_checks.width_problems(seen)[0]


def test_dead_and_missing_sliders_are_found(look: Look) -> None:
    assert page_checks.slider_problems(look(GOOD), expected=False) == []
    assert len(page_checks.slider_problems(look(GOOD), expected=True)) == 1
    dot = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' {}/>"
    slider = (
        "<div class=widget-subarea><div role=slider tabindex=0>handle</div>"
        f'<img width=9 height=9 alt=dot src="{dot.format("")}"></div>'
    )
    dead = page_checks.slider_problems(look(slider), expected=True)
    assert dead == ["slider 1 does not change its picture"]
    script = (
        "<script>document.querySelector('[role=slider]').onkeydown = () => {"
        f'document.querySelector("img").src = `{dot.format("id=b")}`' + "}</script>"
    )
    assert page_checks.slider_problems(look(slider + script), expected=True) == []


def test_files_of_other_hosts_are_found() -> None:
    assert page_checks.outside_files("<script src='//cdn.example/a.js'></script>")
    assert page_checks.outside_files("<link href='https://example.org/a.css'>")
    assert page_checks.outside_files("<a href='https://example.org'>a</a>") == []
