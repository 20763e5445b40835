"""Habits that all notebooks share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_LINES = 12
MAX_BOXES = 4
DRAWS = re.compile(r"\b(?:gi\.plots|plots|plt)\.\w+\(")
GUARD = """try:
    import gradinv_helpers as gi
except ModuleNotFoundError:  # on Colab
    %pip install -q "git+ADDRESS@vVERSION"
    import gradinv_helpers as gi"""
# Chapters whose libraries a hosted notebook does not have.
EXTRAS = {"08_differential_privacy": "federated", "09_secure_aggregation": "federated"}

Cell = dict[str, Any]


def read(path: Path) -> list[Cell]:
    return nbformat.read(path, as_version=4).cells


def code_cells(path: Path) -> list[Cell]:
    return [cell for cell in read(path) if cell["cell_type"] == "code"]


def tags(cell: Cell) -> list[str]:
    return cell["metadata"].get("tags", [])


def too_long(cell: Cell) -> bool:
    """More lines than one idea needs."""
    lines = cell["source"].strip().splitlines()
    return len(lines) > MAX_LINES and "full-listing" not in tags(cell)


def lacks_alt(cell: Cell) -> bool:
    """A cell that draws a figure and does not say what the figure shows."""
    source = cell["source"]
    # The frames of a slider carry their own texts.
    if "explorer" in source or "no-figure" in tags(cell) or not DRAWS.search(source):
        return False
    image = cell["metadata"].get("mystnb", {}).get("image", {})
    return not str(image.get("alt", "")).strip()


def example(source: str, **metadata: Any) -> Cell:
    return {"cell_type": "code", "source": source, "metadata": metadata}


def test_contents_and_folder_hold_the_same_notebooks() -> None:
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text("utf-8"))
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    listed = [name for name in files if name.startswith("notebooks/")]
    assert listed == [f"notebooks/{path.stem}" for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_valid_file(self, path: Path) -> None:
        nbformat.validate(nbformat.read(path, as_version=4))

    def test_no_outputs_are_stored(self, path: Path) -> None:
        for number, cell in enumerate(code_cells(path)):
            assert cell["outputs"] == [], f"code cell {number}: strip the outputs"
            assert cell["execution_count"] is None, f"code cell {number}"

    def test_first_code_cell_installs_the_package(self, path: Path) -> None:
        first = code_cells(path)[0]
        source = re.sub(r"git\+[^@]+@v[\w.]+", "git+ADDRESS@vVERSION", first["source"])
        extra = EXTRAS.get(path.stem)
        package = f"gradinv-helpers[{extra}] @ git+" if extra else "git+"
        assert source.strip() == GUARD.replace("git+", package)
        assert "hide-input" in tags(first)

    def test_code_cells_are_short(self, path: Path) -> None:
        long = [cell["source"] for cell in code_cells(path) if too_long(cell)]
        assert long == [], f"more than {MAX_LINES} lines: {long}"

    def test_figures_have_alt_text(self, path: Path) -> None:
        silent = [cell["source"] for cell in code_cells(path) if lacks_alt(cell)]
        assert silent == [], "metadata mystnb.image.alt is missing"

    def test_one_title(self, path: Path) -> None:
        texts = [c["source"] for c in read(path) if c["cell_type"] == "markdown"]
        titles = [
            line for t in texts for line in t.splitlines() if re.match("# ", line)
        ]
        assert len(titles) == 1
        assert texts[0].startswith(titles[0])

    def test_few_boxes(self, path: Path) -> None:
        texts = [c["source"] for c in read(path) if c["cell_type"] == "markdown"]
        box = r"(?m)^:{3,}\{(?:note|tip|important|warning|caution|admonition)\}"
        assert len(re.findall(box, "\n".join(texts))) <= MAX_BOXES

    def test_imports_are_explicit(self, path: Path) -> None:
        for cell in code_cells(path):
            assert not re.search(r"import \*", cell["source"])
            assert not re.search(r"pip install.* -U\b", cell["source"])


def test_long_cell_is_found() -> None:
    assert too_long(example("x = 1\n" * 13))
    assert not too_long(example("x = 1\n" * 12))
    assert not too_long(example("x = 1\n" * 13, tags=["full-listing"]))


@pytest.mark.parametrize("source", ["gi.plots.show_images(x)", "plt.plot(x)"])
def test_figure_without_alt_is_found(source: str) -> None:
    assert lacks_alt(example(source))
    assert lacks_alt(example(source, mystnb={"image": {"alt": " "}}))
    assert not lacks_alt(example(source, mystnb={"image": {"alt": "A line"}}))
    assert not lacks_alt(example(source, tags=["no-figure"]))
    assert not lacks_alt(example("import matplotlib.pyplot as plt"))
