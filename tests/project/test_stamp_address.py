"""The address and the version stand in one place and are copied to all others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import stamp_address

NOTEBOOK = r"""{"cells": [{"source": [
"    %pip install -q \"git+https://github.com/old/name@v0.0.1\"\n",
"[Colab](https://colab.research.google.com/github/old/name/blob/main/a.ipynb)"]}]}"""
CONFIG = "repository:\n  url: https://github.com/old/name\n  branch: main\n"
README = """git clone https://github.com/old/name folder
pip install "git+https://github.com/old/name@v0.0.1"
[the book](https://old.github.io/name/book/intro.html)
[ask](https://github.com/old/name/issues)
[other](https://github.com/someone/else)
"""


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    """A small project whose pyproject.toml names a new address."""
    (tmp_path / "book").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nversion = "2.3.4"\n[project.urls]\n'
        'Repository = "https://github.com/me/my-book"\n'
    )
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "book" / "_config.yml").write_text(CONFIG)
    (tmp_path / "notebooks" / "a.ipynb").write_text(NOTEBOOK)
    return tmp_path


def test_this_project_is_stamped(root: Path) -> None:
    different = [
        str(p.relative_to(root)) for p in stamp_address.stamp(root, check=True)
    ]
    assert different == [], "run `make stamp`"


def test_check_names_the_files_and_writes_nothing(fork: Path) -> None:
    names = [p.name for p in stamp_address.stamp(fork, check=True)]
    assert names == ["README.md", "_config.yml", "a.ipynb"]
    assert (fork / "README.md").read_text() == README


def test_stamp_writes_the_new_address(fork: Path) -> None:
    stamp_address.stamp(fork)
    readme = (fork / "README.md").read_text()
    assert "git clone https://github.com/me/my-book folder" in readme
    assert '"git+https://github.com/me/my-book@v2.3.4"' in readme
    assert "https://me.github.io/my-book/book/intro.html" in readme
    assert "https://github.com/me/my-book/issues" in readme
    assert "https://github.com/someone/else" in readme
    config = (fork / "book" / "_config.yml").read_text()
    assert config == CONFIG.replace("old/name", "me/my-book")
    notebook = (fork / "notebooks" / "a.ipynb").read_text()
    new = NOTEBOOK.replace("old/name", "me/my-book").replace("0.0.1", "2.3.4")
    assert notebook == new
    assert stamp_address.stamp(fork, check=True) == []


def test_files_of_this_project_follow_a_fork(root: Path, tmp_path: Path) -> None:
    for path in [root / "pyproject.toml", *stamp_address.targets(root)]:
        copy = tmp_path / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    settings = tmp_path / "pyproject.toml"
    text = settings.read_text("utf-8")
    start = text.index("Repository = ")
    old = text[start:].split('"')[1]
    settings.write_text(text.replace(old, "https://github.com/me/my-book"), "utf-8")
    stamp_address.stamp(tmp_path)
    for path in stamp_address.targets(tmp_path):
        assert old not in path.read_text("utf-8"), path.name
