"""The command ``gradinv simulate``."""

from __future__ import annotations

from typing import Annotated

import typer

from gradinv_helpers.cli.options import (
    Config,
    DataRoot,
    Dataset,
    Device,
    OutputDir,
    Seed,
    chosen,
)
from gradinv_helpers.cli.screen import (
    InterruptedCommandError,
    progress_bar,
    say_stage,
    wrote,
)


def simulate_command(
    ctx: typer.Context,
    rounds: Annotated[int | None, typer.Option(help="Rounds of training.")] = None,
    clients: Annotated[
        int | None, typer.Option(help="Clients that share the train split.")
    ] = None,
    clients_per_round: Annotated[
        int | None, typer.Option(help="Drawn in each round. [default: all]")
    ] = None,
    samples_per_client: Annotated[
        int | None, typer.Option(help="Most images of a client. [default: all]")
    ] = None,
    partition: Annotated[
        str | None, typer.Option(help="iid, dirichlet or shards.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="dirichlet: small for few classes per client.")
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="fedavg (weight changes) or fedsgd (gradients).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="lenet, mlp, convnet, resnet18, resnet20 or vit.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of the clients.")
    ] = None,
    local_epochs: Annotated[
        int | None, typer.Option(help="fedavg: passes over a client's images.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="fedavg: images per local step.")
    ] = None,
    optimiser: Annotated[
        str | None, typer.Option(help="fedavg: sgd, momentum or adam.")
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(help="Probability that a client's message never arrives."),
    ] = None,
    defence: Annotated[
        list[str] | None,
        typer.Option(
            help="noise:0.01, top-k:0.1, sign, quantise:4 or dp:1.0:0.5 (noise"
            " multiplier, clipping norm; fedsgd). May be repeated."
        ),
    ] = None,
    secure_aggregation: Annotated[
        bool | None, typer.Option(help="The server sees the sum alone.")
    ] = None,
    threshold: Annotated[
        int | None,
        typer.Option(
            help="Clients that must stay for the sum. [default: more than half]"
        ),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="inprocess.")] = None,
    attack: Annotated[
        str | None, typer.Option(help="How images are inverted; auto picks.")
    ] = None,
    attack_every: Annotated[
        int | None, typer.Option(help="Rounds between two attacks; 0 for none.")
    ] = None,
    attack_images: Annotated[
        int | None, typer.Option(help="Most images of a message that is inverted.")
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(help="Outer steps of an inversion.")
    ] = None,
    config: Config = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    device: Device = None,
    seed: Seed = None,
    output_dir: OutputDir = None,
) -> None:
    """Train a federation, and attack its messages while it goes on.

    The clients divide the train split. In every --attack-every-th round the server
    infers the class shares behind the smallest message, and its images where there
    are at most --attack-images of them. Writes accuracy, bytes, seconds and leakage
    of every round (simulation.json), a plot and the pictures to --output-dir.
    """
    from gradinv_helpers.simulation import SimulationOptions, run_simulation

    values = chosen(ctx, dataset="digits", group="simulate")
    values["defence"] = tuple(defence or ())
    options = SimulationOptions(**values)
    with progress_bar("simulate", options.rounds) as advance:
        result = run_simulation(
            options,
            on_stage=say_stage,
            on_round=lambda report: advance(report.round),
        )
    typer.echo(result.table())
    wrote(options.output_dir, result.files)
    if result.interrupted:
        raise InterruptedCommandError("the rounds so far were written")
