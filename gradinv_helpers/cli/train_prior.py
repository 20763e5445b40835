"""The command ``gradinv train-prior``."""

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


def train_prior_command(
    ctx: typer.Context,
    kind: Annotated[
        str, typer.Argument(metavar="vae|diffusion", help="What to train.")
    ],
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Height and width of the images (default: 16 for digits, 24 "
            "for faces, else those of the data set)."
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="vae: passes over the training images (default: 50)."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="diffusion: updates of the weights (default: 4000)."),
    ] = None,
    latent_size: Annotated[
        int | None, typer.Option(help="vae: latents of an image (default: 16).")
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="vae: channels of the first convolution (default: 32)."),
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(help="vae: units of the linear layers (default: 128).")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images per step (default: vae 64, diffusion 32)."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Largest step size of Adam (default: vae 3e-3, diffusion 1e-3)."
        ),
    ] = None,
    half: Annotated[
        bool | None, typer.Option(help="diffusion: keep 16 bits of every weight.")
    ] = None,
    config: Config = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    device: Device = None,
    seed: Seed = None,
    output_dir: OutputDir = None,
) -> None:
    """Train a prior of images on the train split and save it.

    A tenth of the split is held out to measure the prior; the test split, where
    victims come from, is never seen. Writes a folder that gradinv diffusion-dlg --prior
    and load_prior read (outputs/priors/KIND-DATASET), with the numbers of the held-out
    images in config.json (vae) or prior.json (diffusion), and samples.png. The folder
    appears whole or not at all. Ctrl-C keeps what was learned so far. A VAE trains on
    the CPU.
    """
    from gradinv_helpers.prior_training import PriorOptions, run_prior_training

    values = chosen(ctx, dataset="digits")
    values["output_dir"] = output_dir or f"outputs/priors/{kind}-{values['dataset']}"
    options = PriorOptions(**values)
    with progress_bar("training", 1) as advance:
        result = run_prior_training(
            options,
            on_progress=lambda done, total: advance(done / total),
            on_stage=say_stage,
        )
    typer.echo(result.summary)
    if not result.split:
        typer.echo(
            "this data set has no test split, so the prior has seen all of its images: "
            "take victims from elsewhere"
        )
    wrote(options.output_dir, result.files)
    if result.interrupted:
        raise InterruptedCommandError(
            "what was learned so far was measured and written"
        )
