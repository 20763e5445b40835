"""The command ``gradinv bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from gradinv_helpers.bench import SUITES
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


def bench_command(
    ctx: typer.Context,
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}.")],
    images: Annotated[
        int | None, typer.Option(help="single, table1: images under attack.")
    ] = None,
    recipe_images: Annotated[
        int | None, typer.Option(help="single: images for the published recipe.")
    ] = None,
    noise_images: Annotated[
        int | None, typer.Option(help="single: images with a noisy gradient.")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            help="trials: rounds of timing; others: batches, or seeds, of each kind."
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Of every attack: updates in table1 and networks, else rounds of 20."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="The smallest cases only, to see that it runs.")
    ] = False,
    config: Config = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    device: Device = None,
    seed: Seed = None,
    output_dir: OutputDir = "outputs/bench",
) -> None:
    """Measure our attacks beside the published recipes, in turns, on one thread.

    single: one image, quality and time. trials: many images at once. labels: which
    labels an update gives away. table1: the design of Table 1 of Inverting Gradients.
    networks: batches behind ConvNet and ResNet-18. batch: aggregates behind LeNet.
    wall: what a gradient determines. fedavg: weight changes of several local steps.
    learning-rate: rates that the server does not know.
    priors: VAE and diffusion beside Gaussian priors (--dataset digits).
    diffusion: the options of diffusion-dlg, one at a time (--dataset digits).
    heterogeneity, privacy, defences (--dataset digits), secagg: federations, and what
    protects them.
    Writes a table, a plot and a JSON file with every measurement and the facts of the
    machine to --output-dir (outputs/bench). After Ctrl-C the same command goes on.
    """
    from gradinv_helpers.bench.runner import BenchOptions, run_bench

    options = BenchOptions(**chosen(ctx, dataset="photos"))
    with progress_bar(f"suite {suite}", 1) as advance:
        try:
            result = run_bench(
                options,
                on_stage=say_stage,
                on_task=lambda done, total: advance(done / total),
            )
        except KeyboardInterrupt:
            raise InterruptedCommandError(
                "the same command goes on from here"
            ) from None
    typer.echo(result.table)
    wrote(options.output_dir, result.files)
