"""The command ``gradinv train-global``."""

from __future__ import annotations

from pathlib import Path
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
from gradinv_helpers.cli.screen import progress_bar


def train_command(
    ctx: typer.Context,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Largest step size of Adam.")] = None,
    output: Annotated[
        str | None,
        typer.Option(help="Checkpoint, .safetensors or .pth, in --output-dir."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="lenet, mlp, convnet, resnet18, resnet20 or vit.")
    ] = None,
    config: Config = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    device: Device = None,
    seed: Seed = None,
    output_dir: OutputDir = None,
) -> None:
    """Train the server's model on the train split and save it.

    Writes the checkpoint, and beside it a JSON file with the accuracy on the train
    and the test split.
    """
    from gradinv_helpers.training import TrainingOptions, run_training

    values = chosen(ctx, dataset="digits", group="train_global")
    values["output"] = str(Path(values.pop("output_dir", ".")) / values["output"])
    options = TrainingOptions(**values)
    with progress_bar("training", options.epochs) as advance:
        result = run_training(options, on_epoch=lambda report: advance(report.epoch))
    typer.echo(
        f"accuracy {result.train_accuracy:.3f} on train, "
        f"{result.test_accuracy:.3f} on test"
    )
    typer.echo("wrote " + " and ".join(str(path) for path in result.files))
