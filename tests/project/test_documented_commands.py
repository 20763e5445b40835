"""What README and the book tell people to type works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from gradinv_helpers.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "book/intro.md", "book/how_to_run.md"]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    text = (ROOT / page).read_text("utf-8")
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


def commands() -> list[tuple[str, str]]:
    """Every line of the pages that calls the command, with its page."""
    lines = [
        (page, line)
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.splitlines()
    ]
    return [(page, line) for page, line in lines if line.startswith("gradinv ")]


@pytest.mark.parametrize(("page", "line"), commands())
def test_named_options_exist(page: str, line: str) -> None:
    group = typer.main.get_command(app)
    _, name, *rest = shlex.split(line, comments=True)
    command = group.commands[name]
    # Raises for an unknown option or a value of the wrong type.
    command.make_context(name, list(rest), resilient_parsing=False)


def test_table_names_existing_options() -> None:
    text = (ROOT / "book" / "how_to_run.md").read_text("utf-8")
    named = set(re.findall(r"(?m)(--[a-z-]+)", "".join(re.findall(r"\| `--.*", text))))
    command = typer.main.get_command(app).commands["invert"]
    known = {option for param in command.params for option in param.opts}
    assert named
    assert named <= known


@pytest.mark.parametrize("page", ["README.md", "book/api.md"])
def test_python_example_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks(page, "python")
    assert "gi.invert(update)" in example
    short = example.replace("(update)", "(update, iterations=5, restarts=1)")
    exec(compile(short, page, "exec"), {})
    assert "PSNR" in capsys.readouterr().out
