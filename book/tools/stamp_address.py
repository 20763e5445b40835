"""Write the public address and the version into every file that shows them.

Both live in ``pyproject.toml`` only: ``[project.urls] Repository`` and ``version``.
Run ``make stamp`` after a change. With ``--check`` nothing is written; the script
names the files that differ and ends with exit code 1.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
FILES = ("README.md", "environment.yml", "book/*.md", "book/_config.yml")
NOTEBOOKS = ("notebooks/*.ipynb",)


def rules(address: str, version: str) -> list[tuple[re.Pattern[str], str]]:
    """Pairs of a pattern and the text that must stand in its place."""
    owner, name = urlsplit(address).path.strip("/").split("/")[:2]
    return [
        # pip install "git+https://host/owner/name@v1.2.3"
        (
            re.compile(r"git\+https?://[^\s\"'\\@]+@v[\w.]+"),
            f"git+{address}@v{version}",
        ),
        # git clone https://host/owner/name folder
        (re.compile(r"git clone https?://\S+"), f"git clone {address}"),
        # _config.yml, the line below `repository:`
        (
            re.compile(r"(?m)^(repository:\n  url: )\S+"),
            rf"\g<1>{address}",
        ),
        # the link that opens a notebook on Colab
        (
            re.compile(r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+"),
            rf"\g<1>{owner}/{name}",
        ),
        # the published book
        (
            re.compile(r"https://[\w-]+\.github\.io/[\w.-]+"),
            f"https://{owner}.github.io/{name}",
        ),
        # a link to a file or page of the repository
        (
            re.compile(
                r"https://github\.com/[\w.-]+/[\w.-]+"
                r"(?=/(?:issues|blob|tree|releases)\b)"
            ),
            address,
        ),
    ]


def stamped(text: str, address: str, version: str) -> str:
    """Return ``text`` with the address and the version of this project."""
    for pattern, replacement in rules(address, version):
        text = pattern.sub(replacement, text)
    return text


def targets(root: Path) -> list[Path]:
    """All files that may show the address, in a fixed order."""
    return sorted(p for pattern in FILES + NOTEBOOKS for p in root.glob(pattern))


def stamp(root: Path, *, check: bool = False) -> list[Path]:
    """Stamp every file below ``root`` and return those that differed."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    address = project["urls"]["Repository"].rstrip("/")
    different = []
    for path in targets(root):
        old = path.read_text("utf-8")
        new = stamped(old, address, project["version"])
        if new != old:
            different.append(path)
            if not check:
                path.write_text(new, "utf-8")
    return different


def main() -> int:
    """Command line; the exit code is 1 when ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only report")
    parser.add_argument("--root", type=Path, default=ROOT, help="project folder")
    arguments = parser.parse_args()
    different = stamp(arguments.root, check=arguments.check)
    for path in different:
        name = path.relative_to(arguments.root)
        print(f"{name}: differs, run `make stamp`" if arguments.check else name)
    return int(arguments.check and bool(different))


if __name__ == "__main__":
    raise SystemExit(main())
