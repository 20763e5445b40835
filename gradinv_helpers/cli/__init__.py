"""The command ``gradinv``: options, progress and exit codes.

Exit codes: 0 done, 2 bad input (one line, no traceback), 130 Ctrl-C, 1 anything else.
"""

from __future__ import annotations

import sys
from typing import Any

import typer

from gradinv_helpers.cli.bench import bench_command
from gradinv_helpers.cli.diffusion_dlg import diffusion_command
from gradinv_helpers.cli.invert import invert_command
from gradinv_helpers.cli.screen import InterruptedCommandError, say
from gradinv_helpers.cli.simulate import simulate_command
from gradinv_helpers.cli.train_global import train_command
from gradinv_helpers.cli.train_prior import train_prior_command
from gradinv_helpers.errors import InputError

app = typer.Typer(
    name="gradinv",
    add_completion=False,
    no_args_is_help=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Measure what a federated-learning update reveals about the images behind it.",
)
for _name, _command, _example in (
    ("invert", invert_command, "--num-clients 3 --reconstruct-mode both"),
    ("train-global", train_command, "--dataset digits --epochs 20"),
    ("train-prior", train_prior_command, "diffusion --dataset digits --steps 4000"),
    ("diffusion-dlg", diffusion_command, "--num-clients 2 --samples-per-client 4"),
    ("simulate", simulate_command, "--clients 20 --partition dirichlet --alpha 0.1"),
    ("bench", bench_command, "--suite single --dataset photos --images 20"),
):
    app.command(_name, epilog=f"Example: gradinv {_name} {_example}")(_command)


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    import click

    try:
        command = typer.main.get_command(app)
        code = command.main(
            args=arguments or ["--help"], prog_name="gradinv", standalone_mode=False
        )
        if code == 130:  # how typer reports Ctrl-C
            say("interrupted")
        return int(code or 0)
    except InterruptedCommandError as error:
        say(f"interrupted; {error}")
        return 130
    except InputError as error:
        say(_with_option(error))
        return 2
    except (click.exceptions.Abort, KeyboardInterrupt):
        say("interrupted")
        return 130
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.ClickException as error:
        say(" ".join(error.format_message().split()))
        return 2


def _with_option(error: InputError) -> str:
    """The error's line, with the argument spelled as its option, if it is one."""
    text = str(error)
    group: Any = typer.main.get_command(app)
    if any(
        error.argument == param.name and param.param_type_name == "option"
        for command in group.commands.values()
        for param in command.params
    ):
        return text.replace(error.argument, "--" + error.argument.replace("_", "-"), 1)
    return text
