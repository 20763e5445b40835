"""The commands that README and the book name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

TARGETS = {"book", "test", "check", "demo", "lab", "stamp", "clean", "help"}


def test_help_lists_every_target(root: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make"], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert set(re.findall(r"make (\w+) ", done.stdout)) >= TARGETS


@pytest.mark.parametrize("page", ["README.md", "book/how_to_run.md"])
def test_named_targets_exist(root: Path, page: str) -> None:
    named = set(re.findall(r"\bmake ([a-z]+)\b(?=[`\s])", (root / page).read_text()))
    makefile = (root / "Makefile").read_text("utf-8")
    assert named
    for target in named:
        assert re.search(rf"(?m)^{target}:", makefile), f"{page} names make {target}"


def test_ci_runs_make_test(root: Path) -> None:
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text("utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert lines[-1] == "make test"


def test_missing_browser_is_explained(root: Path, tmp_path: Path) -> None:
    # A search path without a browser, apt-get or sudo.
    for name in ("bash", "env", "id", "cat"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    done = subprocess.run(
        [str(root / "book" / "tools" / "ensure_chromium.sh")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Install Chromium" in done.stderr


def test_named_browser_is_taken(root: Path) -> None:
    done = subprocess.run(
        [str(root / "book" / "tools" / "ensure_chromium.sh")],
        env={"PATH": os.environ["PATH"], "CHROMIUM": shutil.which("bash") or ""},
    )
    assert done.returncode == 0
