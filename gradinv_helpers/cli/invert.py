"""The command ``gradinv invert``."""

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
from gradinv_helpers.cli.screen import InterruptedCommandError, attack_progress, wrote
from gradinv_helpers.errors import InputError


def invert_command(
    ctx: typer.Context,
    num_clients: Annotated[
        int | None, typer.Option(help="Clients that send an update.")
    ] = None,
    samples_per_client: Annotated[
        int | None, typer.Option(help="Images of each client.")
    ] = None,
    client_indices: Annotated[
        str | None,
        typer.Option(
            help="Test images to use, client after client, such as 1,5,42,100."
        ),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(help="Outer steps per restart, up to 20 updates each.")
    ] = None,
    log_every: Annotated[
        int | None, typer.Option(help="Iterations between two snapshots.")
    ] = None,
    reconstruct_mode: Annotated[
        str | None,
        typer.Option(help="per-client, aggregated (the weighted mean alone) or both."),
    ] = None,
    restarts: Annotated[
        int | None, typer.Option(help="Independent random starts per update.")
    ] = None,
    dummy_seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the dummy starts; client k adds k. [default: --seed]"
        ),
    ] = None,
    normalize_gradients: Annotated[
        bool | None,
        typer.Option(
            help="Scale each client's gradient to L2 norm 1 before aggregation."
        ),
    ] = None,
    tv_weight: Annotated[
        float | None,
        typer.Option(help="Weight of total variation; the attack's by default."),
    ] = None,
    init_scale: Annotated[
        float | None,
        typer.Option(help="Standard deviation of the dummy start around grey."),
    ] = None,
    apply_agg_step: Annotated[
        bool | None,
        typer.Option(
            help="First move the server's model by one aggregated gradient step."
        ),
    ] = None,
    agg_lr: Annotated[
        float | None, typer.Option(help="Step size of that aggregated step.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="lenet, mlp, convnet, resnet18, resnet20 or vit.")
    ] = None,
    model_checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Attack this trained model (from gradinv train-global) instead."
        ),
    ] = None,
    attack: Annotated[
        str | None,
        typer.Option(
            help="auto, dlg, idlg, inverting-gradients, gradinversion, "
            "gaussian-map or exact."
        ),
    ] = None,
    judge: Annotated[
        bool,
        typer.Option(
            help="Train a classifier for class accuracy and feature similarity."
        ),
    ] = True,
    resume: Annotated[
        bool,
        typer.Option(
            help="Go on with a search that was interrupted in the same --output-dir."
        ),
    ] = False,
    config: Config = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    device: Device = None,
    seed: Seed = None,
    output_dir: OutputDir = None,
) -> None:
    """Reconstruct images from the gradients that clients send.

    Victims are images of the test split, the first ones unless --client-indices
    names others. Where algebra solves a single image (attack auto or exact) there are
    no iterations; --attack dlg searches. Writes for every client and for the aggregate
    a picture (truth beside reconstruction), a GIF of the snapshots, the loss and the
    scores, and a summary.png and run.json for the whole run.
    """
    from gradinv_helpers.experiment import InversionOptions, run_inversion

    if model is not None and model_checkpoint is not None:
        raise InputError(
            "model",
            "nothing beside --model-checkpoint, which says which model it holds",
            repr(model),
        )
    values = chosen(ctx, dataset="photos", group="invert")
    values.setdefault("dummy_seed", values["seed"])
    values |= {
        "client_indices": _indices(client_indices),
        "model_checkpoint": model_checkpoint,
    }
    options = InversionOptions(**values)
    with attack_progress() as (stage, watch):
        result = run_inversion(options, on_stage=stage, on_step=watch)
    for name, found in result.scores.items():
        typer.echo(f"\n{name}\n{found.table()}")
        if name in result.judged:
            typer.echo(result.judged[name])
    wrote(options.output_dir, result.files)
    if result.interrupted:
        raise InterruptedCommandError(
            "the best so far was scored and written; --resume goes on from here"
        )


def _indices(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            "client_indices", "integers with commas, such as 1,5,42", repr(text)
        ) from error
