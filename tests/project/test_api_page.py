"""The page of functions lists what the package offers."""

from __future__ import annotations

import re
from pathlib import Path

import gradinv_helpers as gi


def test_api_page_lists_every_public_name(root: Path) -> None:
    page = (root / "book" / "api.md").read_text("utf-8")
    listed = set(re.findall(r"\.\. auto(?:function|class|exception):: (\w+)", page))
    modules = set(re.findall(r"\.\. automodule:: gradinv_helpers\.(\w+)", page))
    public = {name for name in gi.__all__ if not name.startswith("_")}
    assert modules >= {"plots", "widgets"}
    assert public - modules == listed


def test_taught_in_names_a_chapter_that_exists(root: Path) -> None:
    chapters = {path.stem for path in (root / "notebooks").glob("*.ipynb")}
    named = {
        name
        for path in (root / "gradinv_helpers").rglob("*.py")
        for name in re.findall(r"notebooks/(\w+)", path.read_text("utf-8"))
    }
    assert named
    assert named <= chapters
