"""The command ``gradinv diffusion-dlg``."""

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


def diffusion_command(
    ctx: typer.Context,
    num_clients: Annotated[int, typer.Option(help="Clients that send an update.")] = 1,
    samples_per_client: Annotated[int, typer.Option(help="Images of each client.")] = 1,
    client_id: Annotated[
        int | None,
        typer.Option(help="Attack this client alone, counted from 0 (default: all)."),
    ] = None,
    round_id: Annotated[
        int,
        typer.Option(
            help="Round of the attack. In round r the clients receive a LeNet "
            "that was trained for r epochs on the train split; 0 is a new"
            " one. With --model-checkpoint it only names the files."
        ),
    ] = 0,
    model_checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Attack this model instead; its images must have the prior's shape."
        ),
    ] = None,
    attack: Annotated[
        str, typer.Option(help="diffusion-latent, diffusion-posterior or gradinvdiff.")
    ] = "diffusion-latent",
    prior: Annotated[
        str,
        typer.Option(
            help="A shipped diffusion model, a folder (of gradinv train-prior "
            "or of diffusers), or a name on the hub."
        ),
    ] = "diffusion-digits",
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of the attack (default: 150 for diffusion-latent, else 50)."
        ),
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option(
            help="Random starts or draws, of which the one that explains the "
            "update best is kept (default: 4 for diffusion-posterior, "
            "else 1)."
        ),
    ] = None,
    lambda_prior: Annotated[
        float | None,
        typer.Option(
            help="diffusion-latent: weight of the typical length of the noise;"
            " 0 for none (default: 2, that of its law)."
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="diffusion-latent, gradinvdiff: step size of Adam (default: 0.1)."
        ),
    ] = None,
    fix_labels: Annotated[
        bool,
        typer.Option(
            "--fix-labels/--infer-labels",
            help="Give the attacker the true labels: an upper bound.",
        ),
    ] = False,
    log_every: Annotated[
        int, typer.Option(help="Steps between two losses in the file.")
    ] = 10,
    judge: Annotated[
        bool,
        typer.Option(
            help="Train a classifier for class accuracy and feature similarity."
        ),
    ] = True,
    config: Config = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    device: Device = None,
    seed: Seed = None,
    output_dir: OutputDir = "outputs/diffusion_dlg",
) -> None:
    """Reconstruct images from gradients with a diffusion model as the prior.

    Victims are the first images of the test split, which the prior has not seen, in the
    prior's size. Writes for every client k in round r client_K_round_R.png (truth,
    reconstruction, and what the prior draws without the update),
    loss_client_K_round_R.json and metrics_client_K_round_R.json (MSE, PSNR, feature
    similarity and class accuracy beside their floors), and run.json, to --output-dir
    (outputs/diffusion_dlg).
    """
    from gradinv_helpers.diffusion_experiment import (
        DiffusionOptions,
        run_diffusion_inversion,
    )

    options = DiffusionOptions(**chosen(ctx, dataset="digits"))
    first = options.clients[0]
    with progress_bar(options.attack, len(options.clients)) as advance:
        result = run_diffusion_inversion(
            options,
            on_stage=say_stage,
            on_step=lambda step: advance(
                step.client - first + step.iteration / step.iterations
            ),
        )
    for client, found in result.scores.items():
        typer.echo(f"\nclient {client}, round {round_id}\n{found.table()}")
        for note in result.notes[client]:
            typer.echo(note)
    wrote(options.output_dir, result.files)
    if result.interrupted:
        raise InterruptedCommandError("the best so far was scored and written")
