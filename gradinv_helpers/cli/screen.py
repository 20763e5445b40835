"""What the user of a command sees: lines, bars, and where the files are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer


class InterruptedCommandError(Exception):
    """Ctrl-C ended a command, and its results so far were kept; says how."""


def say(text: str) -> None:
    """Print a line of the program itself."""
    typer.echo(f"gradinv: {text}", err=True)


def say_stage(text: str) -> None:
    """Print what is done now."""
    typer.echo(text, err=True)


def wrote(folder: str, files: Sequence[Path]) -> None:
    """Name the files that a command has written."""
    typer.echo(f"\nwrote to {Path(folder)}:")
    for path in files:
        inside = path.relative_to(folder) if path.is_relative_to(folder) else path
        typer.echo(f"  {inside}")


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, nothing elsewhere; call the result with what is done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(
        console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def attack_progress() -> Iterator[tuple[Callable[[str], None], Callable[[Any], None]]]:
    """A line per stage, and a bar over all restarts of the attack that runs."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("starting", total=None)
        reached: dict[tuple[int, int], float] = {}
        losses: dict[int, float] = {}

        def stage(text: str) -> None:
            reached.clear()
            losses.clear()
            console.print(text, highlight=False)
            bar.update(task, description="", total=None, completed=0)

        def watch(step: Any) -> None:
            done = 1.0 if step.finished else step.iteration / step.iterations
            reached[step.client, step.restart] = done
            losses[step.client] = min(losses.get(step.client, 1e9), step.loss)
            worst = max(losses.values())
            bar.update(
                task,
                description=f"loss {worst:.1e}",
                total=len(reached),
                completed=sum(reached.values()),
            )

        yield stage, watch
