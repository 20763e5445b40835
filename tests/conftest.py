"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the project."""
    return ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below ``tests/book`` needs the built book."""
    for item in items:
        if (ROOT / "tests" / "book") in item.path.parents:
            item.add_marker(pytest.mark.book)
