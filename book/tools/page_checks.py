"""Open pages of the built book in a browser and list what is wrong with them.

Each check takes a :class:`Visit` and returns sentences, one for each problem; an empty
list means that the page is fine.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
VIEW = 'script[type="application/vnd.jupyter.widget-view+json"]'
STATE = 'script[type="application/vnd.jupyter.widget-state+json"]'
SHOWN_IMAGES = """node => [...node.querySelectorAll('img')]
    .filter(image => image.offsetParent !== null && image.clientWidth > 1)
    .map(image => image.src)"""


@dataclass
class Visit:
    """One page in one window, and all that happened while it loaded."""

    page: Page
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Write nothing."""


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine only; give its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def find_program() -> str:
    """Path of the browser: the variable CHROMIUM or the first known command."""
    named = os.environ.get("CHROMIUM", "")
    found = [named, *map(shutil.which, PROGRAMS)]
    for program in found:
        if program and os.access(program, os.X_OK):
            return program
    raise FileNotFoundError(
        f"no browser: install one of {', '.join(PROGRAMS)} or set CHROMIUM to its path"
    )


@contextmanager
def start_browser() -> Iterator[Browser]:
    """Start the system's browser with a fresh profile."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_program(), args=list(ARGUMENTS)
        )
        try:
            yield browser
        finally:
            browser.close()


def visit(context: BrowserContext, base: str, path: str) -> Visit:
    """Open ``base + path`` and wait until formulas and widgets are drawn."""
    seen = Visit(context.new_page())

    def block(route: object) -> None:
        seen.outside.append(route.request.url)
        route.abort()

    def on_console(message: object) -> None:
        if message.type == "error":
            seen.errors.append(message.text)

    def on_response(response: object) -> None:
        if response.status >= 400:
            seen.failed.append(f"{response.status} {response.url}")

    local = (base, "data:", "blob:", "about:")
    page = seen.page
    page.route(lambda url: not url.startswith(local), block)
    page.on("console", on_console)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("response", on_response)
    page.goto(base + path, wait_until="load")
    views = page.locator(VIEW).count()
    if views:
        _wait(
            seen,
            f"document.querySelectorAll('.widget-subarea .jupyter-widgets').length"
            f" >= {views}",
            "the widgets were not drawn",
        )
    if page.locator("article .math").count():
        _wait(seen, "window.MathJax?.startup?.promise", "MathJax did not start")
        page.evaluate("window.MathJax?.startup?.promise?.then(() => null)")
    page.wait_for_load_state("networkidle")
    return seen


def _wait(seen: Visit, condition: str, otherwise: str) -> None:
    from playwright.sync_api import TimeoutError as TooLate

    try:
        seen.page.wait_for_function(f"() => !!({condition})", timeout=15_000)
    except TooLate:
        seen.errors.append(otherwise)


def script_problems(seen: Visit) -> list[str]:
    """Messages of scripts that went wrong."""
    return [f"script error: {text}" for text in seen.errors]


def network_problems(seen: Visit) -> list[str]:
    """Requests that left this machine or found nothing."""
    left = [f"request to another host: {url}" for url in seen.outside]
    return left + [f"failed request: {what}" for what in seen.failed]


def formula_problems(seen: Visit) -> list[str]:
    """Formulas that are still text, or that MathJax could not read."""
    return seen.page.evaluate(
        """() => {
            const plain = [...document.querySelectorAll('article .math')]
                .filter(node => !node.querySelector('mjx-container'))
                .map(node => 'formula not drawn: ' + node.textContent.slice(0, 60));
            const wrong = [...document.querySelectorAll('mjx-merror, [data-mjx-error]')]
                .map(node => 'formula with an error: '
                    + (node.getAttribute('data-mjx-error') || node.textContent));
            return plain.concat(wrong);
        }"""
    )


def bad_alt(alt: str | None) -> bool:
    """Whether an alternative text is missing or only a file name."""
    return not (alt or "").strip() or "_images/" in (alt or "")


class _Images(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.alts: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.alts.append(dict(attrs).get("alt"))


def alt_problems(seen: Visit) -> list[str]:
    """Pictures without a text that says what they show, hidden frames included."""
    page = seen.page
    pictures = page.eval_on_selector_all(
        "article img",
        "nodes => nodes.map(n => [n.getAttribute('alt'), n.src.slice(0, 80)])",
    )
    problems = [f"no alt text: {src}" for alt, src in pictures if bad_alt(alt)]
    for text in page.eval_on_selector_all(STATE, "all => all.map(n => n.textContent)"):
        for model in json.loads(text)["state"].values():
            if model["model_name"] == "ImageModel":
                problems.append("widgets.Image has no alt text, use widgets.HTML")
            if model["model_name"] == "PlayModel":
                problems.append("widgets.Play stops the other links of a static page")
            value = model["state"].get("value")
            if model["model_name"] == "HTMLModel" and value:
                parser = _Images()
                parser.feed(value)
                alts = filter(bad_alt, parser.alts)
                problems += ["no alt text in a frame of a slider" for _ in alts]
    return problems


def width_problems(seen: Visit) -> list[str]:
    """The page is wider than the window, with the elements that reach out."""
    return seen.page.evaluate(
        """() => {
            const room = document.documentElement.clientWidth;
            if (document.documentElement.scrollWidth <= room + 1) return [];
            const scrolls = node => node && node !== document.body
                && (getComputedStyle(node).overflowX !== 'visible'
                    || scrolls(node.parentElement));
            const wide = [...document.querySelectorAll('main *')]
                .filter(node => node.getBoundingClientRect().right > room + 1)
                .filter(node => !scrolls(node.parentElement))
                .slice(0, 5)
                .map(node => node.tagName.toLowerCase() + '.' + node.className);
            return ['wider than the window (' + room + ' px): ' + wide.join(', ')];
        }"""
    )


def slider_problems(seen: Visit, *, expected: bool) -> list[str]:
    """Sliders whose picture stays the same, or no slider where one is expected."""
    handles = seen.page.locator(".widget-subarea [role=slider]:visible").all()
    if expected and not handles:
        return ["no slider on a page whose notebook makes one"]
    problems = []
    for number, handle in enumerate(handles, start=1):
        area = handle.locator("xpath=ancestor::*[contains(@class,'widget-subarea')][1]")
        before = area.evaluate(SHOWN_IMAGES)
        if not before:
            problems.append(f"slider {number} shows no picture")
            continue
        handle.focus()
        moved = False
        for key in ("ArrowRight", "ArrowLeft"):
            handle.press(key)
            moved = moved or _changes(seen.page, area, before)
        if not moved:
            problems.append(f"slider {number} does not change its picture")
    return problems


def _changes(page: Page, area: object, before: list[str]) -> bool:
    for _ in range(20):
        if area.evaluate(SHOWN_IMAGES) != before:
            return True
        page.wait_for_timeout(50)
    return False


class _Loaded(HTMLParser):
    """Addresses of other hosts that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("script", "link", "img", "iframe", "source", "video"):
            return
        for name, value in attrs:
            remote = (value or "").startswith(("http:", "https:", "//"))
            if name in ("src", "href") and remote:
                self.outside.append(f"<{tag} {name}={value}>")


def outside_files(html: str) -> list[str]:
    """Scripts, styles and pictures in a page that come from another host."""
    parser = _Loaded()
    parser.feed(html)
    return parser.outside
