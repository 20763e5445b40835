"""Forget stored notebook results when the code behind them changed.

The notebook cache knows the cells of a notebook, not the package that the cells call.
So this script keeps a fingerprint of the package, the settings, the data files beside
the notebooks and the versions of the core libraries, and removes the cache when the
fingerprint is a new one. Pages are always written afresh: a warning of an earlier
failed build must not be lost.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def sources(root: Path) -> Iterator[Path]:
    """Files whose content can change the output of a notebook."""
    yield from (root / "pyproject.toml", root / "config.json")
    for folder in ("gradinv_helpers", "notebooks"):
        for path in sorted((root / folder).rglob("*")):
            inner = path.relative_to(root).parts
            hidden = any(part.startswith((".", "__pycache__")) for part in inner)
            if path.is_file() and path.suffix != ".ipynb" and not hidden:
                yield path


def versions(root: Path) -> Iterator[str]:
    """Python and the installed version of every core dependency."""
    yield f"python {platform.python_version()}"
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    for requirement in project["dependencies"]:
        name = re.split(r"[<>=~!\[ ]", requirement, maxsplit=1)[0]
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name} missing"


def fingerprint(root: Path) -> str:
    """Hash of all that the notebooks depend on besides their own cells."""
    digest = hashlib.sha256("\n".join(versions(root)).encode())
    for path in sources(root):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes() if path.is_file() else b"missing")
    return digest.hexdigest()


def refresh(root: Path) -> bool:
    """Prepare ``_build`` for a build; return whether the cache was removed."""
    build = root / "_build"
    mark = build / "cache_fingerprint.txt"
    current = fingerprint(root)
    stale = not mark.is_file() or mark.read_text() != current
    if stale:
        shutil.rmtree(build / ".jupyter_cache", ignore_errors=True)
    for name in ("html", ".doctrees", "jupyter_execute"):
        shutil.rmtree(build / name, ignore_errors=True)
    build.mkdir(exist_ok=True)
    mark.write_text(current)
    return stale


if __name__ == "__main__":
    refresh(ROOT)
