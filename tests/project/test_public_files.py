"""No file of the project may hold what belongs to one machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

# Joined from pieces, so that this file does not hold what it looks for.
HOSTS = (
    "py" + "pi.org",
    "python" + "hosted.org",
    "registry." + "npmjs.org",
    "registry." + "yarnpkg.com",
    "download." + "pytorch.org",
    "anaconda" + ".org",
)
FOLDERS = re.compile(
    r"(?<![\w.~$}/<-])/(?:"
    + "|".join(("work", "root", "home", "Users", "tmp/w"))
    + ")/"
)


def public_files(root: Path) -> list[Path]:
    """Files that git tracks or would track."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [root / name for name in done.stdout.split("\0") if name]


def problems(text: str) -> list[str]:
    """Registry hosts and machine folders in a text."""
    return [host for host in HOSTS if host in text] + FOLDERS.findall(text)


def test_no_machine_folder_and_no_registry(root: Path) -> None:
    found = {}
    for path in public_files(root):
        if path.is_file():
            hits = problems(path.read_text("utf-8", errors="ignore"))
            if hits:
                found[str(path.relative_to(root))] = hits
    assert found == {}


@pytest.mark.parametrize("text", [HOSTS[0], "see /" + "root/x", '"/' + 'home/me"'])
def test_the_search_finds_them(text: str) -> None:
    assert len(problems(text)) == 1


@pytest.mark.parametrize(
    "text", [".github/workflows/tests.yml", "https://example.org/home/", "~/work/"]
)
def test_the_search_lets_others_pass(text: str) -> None:
    assert problems(text) == []


def test_made_files_are_not_public(root: Path) -> None:
    made = ("_build", ".venv", "outputs", "book/_vendor", "book/assets/node_modules")
    for path in public_files(root):
        name = path.relative_to(root).as_posix()
        assert not name.startswith(tuple(f"{folder}/" for folder in made)), name


def test_no_large_file(root: Path) -> None:
    """Only priors that come with the package may be larger."""
    pretrained = root / "gradinv_helpers" / "priors" / "pretrained"
    for path in public_files(root):
        if path.is_file():
            most = 5_000_000 if pretrained in path.parents else 1_000_000
            assert path.stat().st_size < most, path.relative_to(root)
