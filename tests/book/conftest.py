"""The built book, served on this machine, and one browser for all tests."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import page_checks
import pytest
from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def site(root: Path) -> Path:
    """Folder of the built pages; built here when missing or failed."""
    pages = root / "_build" / "html"
    (root / "_build").mkdir(exist_ok=True)
    # Two test processes must not build at the same time.
    with (root / "_build" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        failed = any((pages / "reports").rglob("*.log"))
        if failed or not (pages / "index.html").is_file():
            environment = {k: v for k, v in os.environ.items() if k != "MAKEFLAGS"}
            done = subprocess.run(
                ["make", "book"],
                cwd=root,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return pages


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Where the pages are served."""
    with page_checks.serve(site) as base:
        yield base


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser with a fresh profile."""
    with page_checks.start_browser() as started:
        yield started
