"""Stored notebook results are forgotten when the code behind them changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import refresh_cache


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project, below a hidden folder, with a stored notebook result."""
    tmp_path = tmp_path / ".hidden"
    (tmp_path / "gradinv_helpers" / "__pycache__").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "gradinv_helpers" / "a.py").write_text("x = 1\n")
    (tmp_path / "notebooks" / "one.ipynb").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["numpy>=2.0", "no-such-package>=1"]\n'
    )
    refresh_cache.refresh(tmp_path)
    store(tmp_path)
    return tmp_path


def store(project: Path) -> Path:
    """Put a file into the notebook cache."""
    stored = project / "_build" / ".jupyter_cache" / "result"
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text("old")
    return stored


def test_cache_is_kept_when_nothing_changed(project: Path) -> None:
    assert refresh_cache.refresh(project) is False
    assert store(project).is_file()


@pytest.mark.parametrize(
    "name",
    [
        "gradinv_helpers/a.py",
        "gradinv_helpers/new.json",
        "config.json",
        "pyproject.toml",
        "notebooks/frames.npz",
    ],
)
def test_cache_goes_when_a_source_changes(project: Path, name: str) -> None:
    stored = store(project)
    path = project / name
    old = path.read_text() if path.exists() else ""
    path.write_text(old + "\n# changed\n")
    assert refresh_cache.refresh(project) is True
    assert not stored.exists()
    assert refresh_cache.refresh(project) is False


@pytest.mark.parametrize(
    "name", ["gradinv_helpers/__pycache__/a.pyc", "notebooks/one.ipynb"]
)
def test_other_files_keep_the_cache(project: Path, name: str) -> None:
    (project / name).write_text("changed")
    assert refresh_cache.refresh(project) is False


def test_pages_are_always_written_afresh(project: Path) -> None:
    page = project / "_build" / "html" / "old.html"
    page.parent.mkdir(parents=True)
    page.write_text("old")
    refresh_cache.refresh(project)
    assert not page.exists()
