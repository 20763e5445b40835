"""The command ``gradinv``: options, progress and exit codes.

Exit codes: 0 done, 2 bad input (one line, no traceback), 130 Ctrl-C, 1 anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from gradinv_helpers.bench import SUITES
from gradinv_helpers.config import Settings, load_config
from gradinv_helpers.data import DATASETS
from gradinv_helpers.errors import InputError

app = typer.Typer(
    name="gradinv",
    add_completion=False,
    no_args_is_help=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Measure what a federated-learning update reveals about the images behind it.",
)

Config = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option("--config", help="Settings file.  [default: the nearest config.json]"),
]
Dataset = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--dataset", help=f"One of {', '.join(DATASETS)}."),
]
DataRoot = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--data-root", help="Folder of downloads, or of your images for 'folder'."
    ),
]
Device = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--device", help="auto, cpu, cuda or mps."),
]
Seed = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--seed", help="Seed of the model and of everything random."),
]
OutputDir = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--output-dir", help="Folder for all results."),
]


class _InterruptedError(Exception):
    """Ctrl-C ended a command, and its results so far were kept; says how."""


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
            _say("interrupted")
        return int(code or 0)
    except _InterruptedError as error:
        _say(f"interrupted; {error}")
        return 130
    except InputError as error:
        _say(_with_option(error))
        return 2
    except (click.exceptions.Abort, KeyboardInterrupt):
        _say("interrupted")
        return 130
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.ClickException as error:
        _say(" ".join(error.format_message().split()))
        return 2


@app.callback()
def _root() -> None:
    """Keep sub-commands, also while there is only one."""


@app.command(
    "invert",
    epilog="Example: gradinv invert --num-clients 3 --reconstruct-mode both",
)
def invert_command(
    num_clients: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--num-clients", help="Clients that send an update."),
    ] = None,
    samples_per_client: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--samples-per-client", help="Images of each client."),
    ] = None,
    client_indices: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--client-indices",
            help="Test images to use, client after client, such as 1,5,42,100.",
        ),
    ] = None,
    iterations: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--iterations", help="Outer steps per restart, up to 20 updates each."
        ),
    ] = None,
    log_every: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--log-every", help="Iterations between two snapshots."),
    ] = None,
    reconstruct_mode: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--reconstruct-mode",
            help="per-client, aggregated (the weighted mean alone) or both.",
        ),
    ] = None,
    restarts: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--restarts", help="Independent random starts per update."),
    ] = None,
    dummy_seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--dummy-seed",
            help="Seed of the dummy starts; client k adds k.  [default: --seed]",
        ),
    ] = None,
    normalize_gradients: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--normalize-gradients/--no-normalize-gradients",
            help="Scale each client's gradient to L2 norm 1 before aggregation.",
        ),
    ] = None,
    tv_weight: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--tv-weight", help="Weight of total variation; the attack's by default."
        ),
    ] = None,
    init_scale: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--init-scale", help="Standard deviation of the dummy start around grey."
        ),
    ] = None,
    apply_agg_step: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--apply-agg-step/--no-apply-agg-step",
            help="First move the server's model by one aggregated gradient step.",
        ),
    ] = None,
    agg_lr: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--agg-lr", help="Step size of that aggregated step."),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model", help="lenet, mlp, convnet, resnet18, resnet20 or vit."),
    ] = None,
    model_checkpoint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--model-checkpoint",
            help="Attack this trained model (from gradinv train-global) instead.",
        ),
    ] = None,
    attack: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--attack",
            help="auto, dlg, idlg, inverting-gradients, gradinversion, gaussian-map "
            "or exact.",
        ),
    ] = None,
    judge: Annotated[
        bool,
        typer.Option(
            "--judge/--no-judge",
            help="Train a classifier for class accuracy and feature similarity.",
        ),
    ] = True,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on with a search that was interrupted in the same --output-dir.",
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
    settings = load_config(config)
    group = settings.invert
    common = _common(settings, dataset, data_root, device, seed, "photos")
    options = InversionOptions(
        **common,
        output_dir=_or(output_dir, group.output_dir),
        num_clients=_or(num_clients, group.num_clients),
        samples_per_client=_or(samples_per_client, group.samples_per_client),
        client_indices=_indices(client_indices),
        iterations=_or(iterations, group.iterations),
        log_every=_or(log_every, group.log_every),
        reconstruct_mode=_or(reconstruct_mode, group.reconstruct_mode),
        restarts=_or(restarts, group.restarts),
        dummy_seed=_or(dummy_seed, common["seed"]),
        normalize_gradients=_or(normalize_gradients, group.normalize_gradients),
        tv_weight=_or(tv_weight, group.tv_weight),
        init_scale=_or(init_scale, group.init_scale),
        apply_agg_step=_or(apply_agg_step, group.apply_agg_step),
        agg_lr=_or(agg_lr, group.agg_lr),
        model=_or(model, group.model),
        model_checkpoint=model_checkpoint,
        attack=_or(attack, group.attack),
        judge=judge,
        resume=resume,
    )
    with _progress() as (stage, watch):
        result = run_inversion(options, on_stage=stage, on_step=watch)
    for name, found in result.scores.items():
        typer.echo(f"\n{name}\n{found.table()}")
        if name in result.judged:
            typer.echo(result.judged[name])
    typer.echo(f"\nwrote to {Path(options.output_dir)}:")
    typer.echo("  " + "\n  ".join(path.name for path in result.files))
    if result.interrupted:
        raise _InterruptedError(
            "the best so far was scored and written; --resume goes on from here"
        )


@app.command(
    "train-global",
    epilog="Example: gradinv train-global --dataset digits --epochs 20",
)
def train_command(
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--epochs", help="Passes over the training images."),
    ] = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--batch-size", help="Images per step."),
    ] = None,
    lr: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--lr", help="Largest step size of Adam."),
    ] = None,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--output", help="Checkpoint, .safetensors or .pth, in --output-dir."
        ),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model", help="lenet, mlp, convnet, resnet18, resnet20 or vit."),
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

    settings = load_config(config)
    group = settings.train_global
    options = TrainingOptions(
        **_common(settings, dataset, data_root, device, seed, "digits"),
        output=str(Path(_or(output_dir, ".")) / _or(output, group.output)),
        epochs=_or(epochs, group.epochs),
        batch_size=_or(batch_size, group.batch_size),
        lr=_or(lr, group.lr),
        model=_or(model, group.model),
    )
    with _progress_bar("training", options.epochs) as advance:
        result = run_training(options, on_epoch=lambda report: advance(report.epoch))
    typer.echo(
        f"accuracy {result.train_accuracy:.3f} on train, "
        f"{result.test_accuracy:.3f} on test"
    )
    typer.echo("wrote " + " and ".join(str(path) for path in result.files))


@app.command(
    "train-prior",
    epilog="Example: gradinv train-prior diffusion --dataset digits --steps 4000",
)
def train_prior_command(
    kind: Annotated[
        str, typer.Argument(metavar="vae|diffusion", help="What to train.")
    ],
    image_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--image-size",
            help="Height and width of the images (default: 16 for digits, 24 for "
            "faces, else those of the data set).",
        ),
    ] = None,
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--epochs", help="vae: passes over the training images (default: 50)."
        ),
    ] = None,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--steps", help="diffusion: updates of the weights (default: 4000)."
        ),
    ] = None,
    latent_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--latent-size", help="vae: latents of an image (default: 16)."),
    ] = None,
    width: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--width", help="vae: channels of the first convolution (default: 32)."
        ),
    ] = None,
    hidden: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--hidden", help="vae: units of the linear layers (default: 128)."
        ),
    ] = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--batch-size", help="Images per step (default: vae 64, diffusion 32)."
        ),
    ] = None,
    lr: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--lr",
            help="Largest step size of Adam (default: vae 3e-3, diffusion 1e-3).",
        ),
    ] = None,
    half: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--half/--no-half", help="diffusion: keep 16 bits of every weight."
        ),
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

    common = _common(load_config(config), dataset, data_root, device, seed, "digits")
    options = PriorOptions(
        kind=kind,
        **common,
        output_dir=_or(output_dir, f"outputs/priors/{kind}-{common['dataset']}"),
        image_size=image_size,
        epochs=epochs,
        steps=steps,
        latent_size=latent_size,
        width=width,
        hidden=hidden,
        batch_size=batch_size,
        lr=lr,
        half=half,
    )
    with _progress_bar("training", 1) as advance:
        result = run_prior_training(
            options,
            on_progress=lambda done, total: advance(done / total),
            on_stage=_stage,
        )
    typer.echo(result.summary)
    if not result.split:
        typer.echo(
            "this data set has no test split, so the prior has seen all of its images: "
            "take victims from elsewhere"
        )
    typer.echo(f"\nwrote to {Path(options.output_dir)}:")
    typer.echo("  " + "\n  ".join(map(str, result.files)))
    if result.interrupted:
        raise _InterruptedError("what was learned so far was measured and written")


@app.command(
    "diffusion-dlg",
    epilog="Example: gradinv diffusion-dlg --num-clients 2 --samples-per-client 4",
)
def diffusion_command(
    num_clients: Annotated[
        int, typer.Option("--num-clients", help="Clients that send an update.")
    ] = 1,
    samples_per_client: Annotated[
        int, typer.Option("--samples-per-client", help="Images of each client.")
    ] = 1,
    client_id: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--client-id",
            help="Attack this client alone, counted from 0 (default: all).",
        ),
    ] = None,
    round_id: Annotated[
        int,
        typer.Option(
            "--round-id",
            help="Round of the attack. In round r the clients receive a LeNet that was "
            "trained for r epochs on the train split; 0 is a new one. With "
            "--model-checkpoint it only names the files.",
        ),
    ] = 0,
    model_checkpoint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--model-checkpoint",
            help="Attack this model instead; its images must have the prior's shape.",
        ),
    ] = None,
    attack: Annotated[
        str,
        typer.Option(
            "--attack", help="diffusion-latent, diffusion-posterior or gradinvdiff."
        ),
    ] = "diffusion-latent",
    prior: Annotated[
        str,
        typer.Option(
            "--prior",
            help="A shipped diffusion model, a folder (of gradinv train-prior or of "
            "diffusers), or a name on the hub.",
        ),
    ] = "diffusion-digits",
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--steps",
            help="Steps of the attack (default: 150 for diffusion-latent, else 50).",
        ),
    ] = None,
    restarts: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--restarts",
            help="Random starts or draws, of which the one that explains the update "
            "best is kept (default: 4 for diffusion-posterior, else 1).",
        ),
    ] = None,
    lambda_prior: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--lambda-prior",
            help="diffusion-latent: weight of the typical length of the noise; 0 for "
            "none (default: 2, that of its law).",
        ),
    ] = None,
    lr: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--lr",
            help="diffusion-latent, gradinvdiff: step size of Adam (default: 0.1).",
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
        int, typer.Option("--log-every", help="Steps between two losses in the file.")
    ] = 10,
    judge: Annotated[
        bool,
        typer.Option(
            "--judge/--no-judge",
            help="Train a classifier for class accuracy and feature similarity.",
        ),
    ] = True,
    config: Config = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    device: Device = None,
    seed: Seed = None,
    output_dir: OutputDir = None,
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

    options = DiffusionOptions(
        **_common(load_config(config), dataset, data_root, device, seed, "digits"),
        output_dir=_or(output_dir, "outputs/diffusion_dlg"),
        attack=attack,
        prior=prior,
        num_clients=num_clients,
        samples_per_client=samples_per_client,
        client_id=client_id,
        round_id=round_id,
        model_checkpoint=model_checkpoint,
        steps=steps,
        restarts=restarts,
        log_every=log_every,
        lambda_prior=lambda_prior,
        lr=lr,
        fix_labels=fix_labels,
        judge=judge,
    )
    first = options.clients[0]
    with _progress_bar(options.attack, len(options.clients)) as advance:
        result = run_diffusion_inversion(
            options,
            on_stage=_stage,
            on_step=lambda step: advance(
                step.client - first + step.iteration / step.iterations
            ),
        )
    for client, found in result.scores.items():
        typer.echo(f"\nclient {client}, round {round_id}\n{found.table()}")
        for note in result.notes[client]:
            typer.echo(note)
    typer.echo(f"\nwrote to {Path(options.output_dir)}:")
    typer.echo("  " + "\n  ".join(path.name for path in result.files))
    if result.interrupted:
        raise _InterruptedError("the best so far was scored and written")


@app.command(
    "simulate",
    epilog="Example: gradinv simulate --clients 20 --partition dirichlet --alpha 0.1",
)
def simulate_command(
    rounds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--rounds", help="Rounds of training."),
    ] = None,
    clients: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--clients", help="Clients that share the train split."),
    ] = None,
    clients_per_round: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--clients-per-round", help="Drawn in each round.  [default: all]"
        ),
    ] = None,
    samples_per_client: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--samples-per-client", help="Most images of a client.  [default: all]"
        ),
    ] = None,
    partition: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--partition", help="iid, dirichlet or shards."),
    ] = None,
    alpha: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--alpha", help="dirichlet: small for few classes per client."),
    ] = None,
    algorithm: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--algorithm", help="fedavg (weight changes) or fedsgd (gradients)."
        ),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model", help="lenet, mlp, convnet, resnet18, resnet20 or vit."),
    ] = None,
    lr: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--lr", help="Learning rate of the clients."),
    ] = None,
    local_epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--local-epochs", help="fedavg: passes over a client's images."),
    ] = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--batch-size", help="fedavg: images per local step."),
    ] = None,
    optimiser: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--optimiser", help="fedavg: sgd, momentum or adam."),
    ] = None,
    dropout: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--dropout", help="Probability that a client's message never arrives."
        ),
    ] = None,
    defence: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--defence",
            help="noise:0.01, top-k:0.1, sign, quantise:4 or dp:1.0:0.5 (noise "
            "multiplier, clipping norm; fedsgd). May be repeated.",
        ),
    ] = None,
    secure_aggregation: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--secure-aggregation/--no-secure-aggregation",
            help="The server sees the sum alone.",
        ),
    ] = None,
    threshold: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--threshold",
            help="Clients that must stay for the sum.  [default: more than half]",
        ),
    ] = None,
    engine: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--engine", help="inprocess."),
    ] = None,
    attack: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--attack", help="How images are inverted; auto picks."),
    ] = None,
    attack_every: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--attack-every", help="Rounds between two attacks; 0 for none."),
    ] = None,
    attack_images: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--attack-images", help="Most images of a message that is inverted."
        ),
    ] = None,
    iterations: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--iterations", help="Outer steps of an inversion."),
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

    settings = load_config(config)
    values = settings.simulate.model_dump()
    given = {
        "rounds": rounds,
        "clients": clients,
        "clients_per_round": clients_per_round,
        "samples_per_client": samples_per_client,
        "partition": partition,
        "alpha": alpha,
        "algorithm": algorithm,
        "model": model,
        "lr": lr,
        "local_epochs": local_epochs,
        "batch_size": batch_size,
        "optimiser": optimiser,
        "dropout": dropout,
        "secure_aggregation": secure_aggregation,
        "threshold": threshold,
        "engine": engine,
        "attack": attack,
        "attack_every": attack_every,
        "attack_images": attack_images,
        "iterations": iterations,
        "output_dir": output_dir,
    }
    values |= {name: value for name, value in given.items() if value is not None}
    options = SimulationOptions(
        **_common(settings, dataset, data_root, device, seed, "digits"),
        **values,
        defence=tuple(defence or ()),
    )
    with _progress_bar("simulate", options.rounds) as advance:
        result = run_simulation(
            options,
            on_stage=_stage,
            on_round=lambda report: advance(report.round),
        )
    typer.echo(result.table())
    typer.echo(f"\nwrote to {Path(options.output_dir)}:")
    typer.echo("  " + "\n  ".join(path.name for path in result.files))
    if result.interrupted:
        raise _InterruptedError("the rounds so far were written")


@app.command(
    "bench",
    epilog="Example: gradinv bench --suite single --dataset photos --images 20",
)
def bench_command(
    suite: Annotated[
        str,
        typer.Option("--suite", help=f"One of {', '.join(SUITES)}."),
    ],
    images: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--images", help="single, table1: images under attack."),
    ] = None,
    recipe_images: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--recipe-images", help="single: images for the published recipe."
        ),
    ] = None,
    noise_images: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--noise-images", help="single: images with a noisy gradient."),
    ] = None,
    repeats: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--repeats",
            help="trials: rounds of timing; others: batches, or seeds, of each kind.",
        ),
    ] = None,
    iterations: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--iterations",
            help="Of every attack: updates in table1 and networks, else rounds of 20.",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="The smallest cases only, to see that it runs."),
    ] = False,
    config: Config = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    device: Device = None,
    seed: Seed = None,
    output_dir: OutputDir = None,
) -> None:
    """Measure our attacks beside the published recipes, in turns, on one thread.

    single: one image, quality and time. trials: many images at once. labels: which
    labels an update gives away. table1: the design of Table 1 of Inverting Gradients.
    networks: batches behind ConvNet and ResNet-18. batch: aggregates behind LeNet.
    wall: what a gradient determines. fedavg: weight changes of several local steps.
    priors: VAE and diffusion beside Gaussian priors (--dataset digits).
    diffusion: the options of diffusion-dlg, one at a time (--dataset digits).
    heterogeneity, privacy, defences (--dataset digits), secagg: federations, and what
    protects them.
    Writes a table, a plot and a JSON file with every measurement and the facts of the
    machine to --output-dir (outputs/bench). After Ctrl-C the same command goes on.
    """
    from gradinv_helpers.bench.runner import BenchOptions, run_bench

    settings = load_config(config)
    options = BenchOptions(
        suite=suite,
        **_common(settings, dataset, data_root, device, seed, "photos"),
        output_dir=_or(output_dir, "outputs/bench"),
        quick=quick,
        images=images,
        recipe_images=recipe_images,
        noise_images=noise_images,
        repeats=repeats,
        iterations=iterations,
    )
    with _progress_bar(f"suite {suite}", 1) as advance:
        try:
            result = run_bench(
                options,
                on_stage=_stage,
                on_task=lambda done, total: advance(done / total),
            )
        except KeyboardInterrupt:
            raise _InterruptedError("the same command goes on from here") from None
    typer.echo(result.table)
    typer.echo(f"\nwrote to {Path(options.output_dir)}:")
    typer.echo("  " + "\n  ".join(path.name for path in result.files))


# --- options --------------------------------------------------------------------


def _or(given: Any, default: Any) -> Any:
    return default if given is None else given


def _common(
    settings: Settings,
    dataset: str | None,
    data_root: str | None,
    device: str | None,
    seed: int | None,
    automatic: str,
) -> dict[str, Any]:
    """Options that every command takes, from the command line or the settings."""
    name = _or(dataset, settings.dataset)
    name = automatic if name == "auto" else name
    root = _or(data_root, settings.data_root)
    if name == "folder" and data_root is None and root == Settings().data_root:
        root = None  # the folder of downloads is no folder of the reader's images
    return {
        "dataset": name,
        "data_root": root,
        "device": _or(device, settings.device),
        "seed": _or(seed, settings.seed),
    }


def _indices(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            "client_indices", "integers with commas, such as 1,5,42", repr(text)
        ) from error


# --- what the user sees -----------------------------------------------------------


def _say(text: str) -> None:
    typer.echo(f"gradinv: {text}", err=True)


def _stage(text: str) -> None:
    typer.echo(text, err=True)


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


@contextmanager
def _progress_bar(text: str, total: int) -> Iterator[Callable[[float], None]]:
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
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[Any], None]]]:
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


if __name__ == "__main__":
    main()
