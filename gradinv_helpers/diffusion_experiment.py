"""Attack clients with a diffusion prior: the work behind ``gradinv diffusion-dlg``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradinv_helpers import plots
from gradinv_helpers.attacks.diffusion_latent import diffusion_latent
from gradinv_helpers.attacks.diffusion_posterior import diffusion_posterior
from gradinv_helpers.attacks.gradinvdiff import gradinvdiff
from gradinv_helpers.attacks.guidance import SampledReconstruction
from gradinv_helpers.attacks.reconstruction import Step
from gradinv_helpers.checkpoints import load_checkpoint
from gradinv_helpers.classifier import Classifier, accuracy, train_classifier
from gradinv_helpers.compute import resolve_device
from gradinv_helpers.data import Images, is_split, load_images
from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
    check_seed,
)
from gradinv_helpers.experiment import versions
from gradinv_helpers.files import prepare_folder, write_bytes, write_json
from gradinv_helpers.metrics import (
    Floor,
    LeakageScore,
    assign,
    peak_signal_noise_ratio,
    score,
)
from gradinv_helpers.models import build_model
from gradinv_helpers.priors.diffusion import DiffusionPrior
from gradinv_helpers.priors.library import load_prior
from gradinv_helpers.updates import local_update

MODEL = "lenet"
_JUDGE_IMAGES = 5000  # enough to judge by; keeps large data sets quick
_PRIOR_DRAWS, _PRIOR_STEPS = 8, 50
_PRIOR_SEED = 2**31  # away from the seeds of the attacks


@dataclass(frozen=True)
class _Attack:
    """An attack, its defaults, and what it calls the options that it takes."""

    run: Callable[..., SampledReconstruction]
    steps: int
    restarts: int
    trials: str = "restarts"
    weights: Mapping[str, tuple[str, float]] = field(default_factory=dict)


_STEP_SIZE = ("step_size", 0.1)
_ATTACKS = {
    "diffusion-latent": _Attack(
        diffusion_latent,
        150,
        1,
        weights={"lambda_prior": ("prior_weight", 2.0), "lr": _STEP_SIZE},
    ),
    "diffusion-posterior": _Attack(diffusion_posterior, 50, 4, trials="draws"),
    "gradinvdiff": _Attack(gradinvdiff, 50, 1, weights={"lr": _STEP_SIZE}),
}
ATTACKS: tuple[str, ...] = tuple(_ATTACKS)


@dataclass(frozen=True)
class DiffusionOptions:
    """Everything that ``gradinv diffusion-dlg`` can be told; see its ``--help``.

    What is ``None`` takes the default of the attack.

    Raises:
        InputError: A value is unknown, out of range, or means nothing to the attack.
    """

    dataset: str
    data_root: str | None
    device: str
    seed: int
    output_dir: str
    attack: str = "diffusion-latent"
    prior: str = "diffusion-digits"
    num_clients: int = 1
    samples_per_client: int = 1
    client_id: int | None = None
    round_id: int = 0
    model_checkpoint: str | None = None
    steps: int | None = None
    restarts: int | None = None
    log_every: int = 10
    lambda_prior: float | None = None
    lr: float | None = None
    fix_labels: bool = False
    judge: bool = True

    def __post_init__(self) -> None:
        for name in ("num_clients", "samples_per_client", "log_every"):
            check_count(name, getattr(self, name))
        for name in ("steps", "restarts"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_count("round_id", self.round_id, minimum=0)
        if self.client_id is not None:
            last = self.num_clients - 1
            check_count("client_id", self.client_id, minimum=0, maximum=last)
        check_seed("seed", self.seed)
        check_choice("attack", self.attack, ATTACKS)
        resolve_device(self.device)
        if self.lambda_prior is not None:
            check_number("lambda_prior", self.lambda_prior)
        if self.lr is not None:
            check_number("lr", self.lr, exclusive=True)
        for name in ("lambda_prior", "lr"):
            if getattr(self, name) is not None and name not in self._known.weights:
                takers = [a for a, known in _ATTACKS.items() if name in known.weights]
                got = repr(getattr(self, name))
                hint = f"it belongs to {' and '.join(takers)}"
                raise InputError(name, f"nothing for {self.attack}", got, hint)

    @property
    def _known(self) -> _Attack:
        return _ATTACKS[self.attack]

    def filled(self) -> DiffusionOptions:
        """The same options with the attack's defaults in place."""
        known = self._known
        defaults: dict[str, Any] = {"steps": known.steps, "restarts": known.restarts}
        defaults |= {option: value for option, (_, value) in known.weights.items()}
        missing = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        return replace(self, **missing)

    @property
    def attack_settings(self) -> dict[str, Any]:
        """Arguments of the attack's function."""
        known, filled = self._known, self.filled()
        names = {"steps": "steps", "restarts": known.trials}
        names |= {option: name for option, (name, _) in known.weights.items()}
        return {name: getattr(filled, option) for option, name in names.items()}

    @property
    def clients(self) -> tuple[int, ...]:
        """Numbers of the clients under attack."""
        if self.client_id is not None:
            return (self.client_id,)
        return tuple(range(self.num_clients))


@dataclass(frozen=True)
class DiffusionResult:
    """What ``run_diffusion_inversion`` found and wrote.

    Attributes:
        scores: Score of every attacked client by its number.
        notes: What a reader of a client's score must know.
        files: Files written, in order.
        interrupted: Whether Ctrl-C cut the run short.
    """

    scores: dict[int, LeakageScore]
    notes: dict[int, tuple[str, ...]]
    files: tuple[Path, ...]
    interrupted: bool


def run_diffusion_inversion(
    options: DiffusionOptions,
    *,
    on_stage: Callable[[str], None] = lambda text: None,
    on_step: Callable[[Step], None] | None = None,
) -> DiffusionResult:
    """Attack the update of each client, score what comes back, write the files.

    Args:
        options: The options of the command.
        on_stage: Called with a line of text before each stage.
        on_step: Called after every step of the attack.

    Returns:
        The scores and the files. After Ctrl-C, those of the clients reached.

    Raises:
        InputError: An option does not fit the data, the prior or the checkpoint, or
            the folder cannot be written to.
    """
    begun = time.perf_counter()
    options = options.filled()
    prior, pool, spare = _prior_and_images(options)
    model, source = _server_model(options, pool)
    if options.round_id and options.model_checkpoint is None and spare is None:
        got = f"{options.round_id} with no image left to train on"
        raise InputError("round_id", "0", got, "attack fewer images")
    folder = prepare_folder(options.output_dir)
    if options.round_id and options.model_checkpoint is None and spare is not None:
        on_stage(f"training the server's model, number of epochs: {options.round_id}")
        model, source["epochs"] = _trained(options, model, spare), options.round_id
    source["test_accuracy"] = accuracy(model, pool)
    model = model.to(resolve_device(options.device))
    report = _Report(options, folder, prior, pool, source)
    try:
        if options.judge:
            on_stage("training the judge of class accuracy and feature similarity")
            report.judge = _train_judge(options, spare)
        for client in options.clients:
            on_stage(f"inverting the update of client {client}")
            indices = _victims(options, client)
            truth = pool[list(indices)]
            update = local_update(model, truth)
            found = _ATTACKS[options.attack].run(
                update,
                prior,
                labels=truth.labels if options.fix_labels else None,
                **options.attack_settings,
                seed=(options.seed + client) % 2**32,
                on_step=on_step,
                client=client,
            )
            report.add(client, found, truth, indices)
            if report.interrupted:
                break
    except KeyboardInterrupt:
        if not report.scores:
            raise
        report.interrupted = True
    report.finish(time.perf_counter() - begun)
    return DiffusionResult(
        report.scores, report.notes, tuple(report.files), report.interrupted
    )


def _prior_and_images(
    options: DiffusionOptions,
) -> tuple[DiffusionPrior, Images, Images | None]:
    """The prior, the images that victims come from, and others to train on."""
    # "spectrum" is no diffusion model, and could not be loaded without a shape.
    prior = None if options.prior == "spectrum" else load_prior(options.prior)
    if not isinstance(prior, DiffusionPrior):
        expected = "a diffusion model"
        hint = "gradinv train-prior diffusion makes one"
        raise InputError("prior", expected, repr(options.prior), hint)
    channels, height, width = prior.image_shape
    if height != width:
        raise InputError("prior", "a model of square images", f"{height} x {width}")
    where: dict[str, Any] = {"data_root": options.data_root, "image_size": height}
    pool = load_images(options.dataset, **where, split="test")
    if pool.shape[0] != channels:
        raise InputError(
            "prior",
            f"a model of images with {pool.shape[0]} channels, as {options.dataset}",
            f"{options.prior!r} with {channels}",
            f"gradinv train-prior diffusion --dataset {options.dataset} makes one",
        )
    if prior.knows_classes and pool.num_classes > prior.num_classes:
        raise InputError(
            "prior",
            f"a model of {pool.num_classes} classes, as {options.dataset}, or of none",
            f"{options.prior!r} with {prior.num_classes}",
        )
    wanted = options.num_clients * options.samples_per_client
    if wanted > len(pool):
        raise InputError(
            "num_clients",
            f"at most {len(pool)} images in all ({options.dataset}, test split)",
            f"{options.num_clients} clients x {options.samples_per_client} samples",
            "lower --num-clients or --samples-per-client",
        )
    if is_split(options.dataset, options.data_root):
        return prior, pool, load_images(options.dataset, **where)
    rest = list(range(wanted, len(pool)))
    return prior, pool, pool[rest] if rest else None


def _victims(options: DiffusionOptions, client: int) -> tuple[int, ...]:
    """Places of a client's images in the test split."""
    start = client * options.samples_per_client
    return tuple(range(start, start + options.samples_per_client))


def _server_model(
    options: DiffusionOptions, pool: Images
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint or a new one, and what a reader must know of it."""
    channels, size, _ = pool.shape
    if options.model_checkpoint is not None:
        model, info = load_checkpoint(options.model_checkpoint)
        expected = f"a model for {channels} x {size} x {size} images"
        if info is None:
            raise InputError("model_checkpoint", expected, "one that does not say")
        if (info.in_channels, info.image_size) != (channels, size):
            found = f"{info.in_channels} x {info.image_size} x {info.image_size}"
            hint = "its images must have the shape of the prior's"
            got = f"{info.name} for {found}"
            raise InputError("model_checkpoint", expected, got, hint)
        return model, {"name": info.name, "source": options.model_checkpoint}
    model = build_model(
        MODEL,
        in_channels=channels,
        image_size=size,
        num_classes=max(2, pool.num_classes),
        seed=options.seed,
    )
    return model, {"name": MODEL, "source": "new", "epochs": 0}


def _trained(options: DiffusionOptions, model: nn.Module, images: Images) -> nn.Module:
    """The server's model after the epochs that come before the round."""
    return train_classifier(
        images,
        model=model,
        epochs=options.round_id,
        seed=options.seed,
        device=resolve_device(options.device),
    ).model


def _train_judge(options: DiffusionOptions, spare: Images | None) -> Classifier | None:
    """A classifier that has never seen a victim, or None where none can be trained."""
    if spare is None or len(spare.labels.unique()) < 2:
        return None
    if len(spare) > _JUDGE_IMAGES:
        generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(len(spare), generator=generator)
        spare = spare[order[:_JUDGE_IMAGES]]
    device = resolve_device(options.device)
    return train_classifier(spare, seed=options.seed, device=device)


def prior_draws(
    prior: DiffusionPrior, labels: Tensor, count: int, seed: int = 0
) -> Tensor:
    """Images (count, N, C, H, W) that the prior draws for N labels, without an update.

    Args:
        prior: The diffusion model; the labels mean nothing to one without classes.
        labels: Labels (N,) that the attacker has.
        count: Draws of all N images.
        seed: Seed of the noise.

    Taught in: notebooks/06_diffusion_prior.
    """
    if prior.knows_classes:
        told = prior.given(labels.cpu())
        return told.sample(count, seed=seed, steps=_PRIOR_STEPS).cpu()
    drawn = prior.sample(count * len(labels), seed=seed, steps=_PRIOR_STEPS).cpu()
    return drawn.unflatten(0, (count, len(labels)))


def prior_floor(
    draws: Tensor,
    labels: Tensor,
    truth: Images,
    *,
    others: Images | None = None,
    judge: Classifier | None = None,
    seed: int = 0,
) -> Floor:
    """Score draws of a prior as if an attack had made them, and average.

    Args:
        draws: Shape (count, N, C, H, W) in [0, 1].
        labels: Labels (N,) of the images of every draw.
        truth: The N true images.
        others: As for ``score``.
        judge: As for ``score``.
        seed: As for ``score``.

    Returns:
        The floor: what the prior says of the true images without the update.

    Taught in: notebooks/06_diffusion_prior.
    """
    scores = [
        score(
            Images(draw, labels, truth.class_names),
            truth,
            others=others,
            judge=judge,
            seed=seed,
        )
        for draw in draws
    ]
    columns: dict[str, Any] = {}
    for name in Floor.__dataclass_fields__:
        if name != "psnr_draws":
            values = [getattr(one, name) for one in scores]
            columns[name] = None
            if values[0] is not None:
                rows = zip(*values, strict=True)
                columns[name] = tuple(statistics.fmean(map(float, r)) for r in rows)
    return Floor(**columns, psnr_draws=tuple(one.psnr for one in scores))


class _Report:
    """Collects results and writes each of them as soon as it is there."""

    def __init__(
        self,
        options: DiffusionOptions,
        folder: Path,
        prior: DiffusionPrior,
        pool: Images,
        model: dict[str, Any],
    ):
        self.options, self.folder, self.prior = options, folder, prior
        self.pool, self.model = pool, model
        self.judge: Classifier | None = None
        self.scores: dict[int, LeakageScore] = {}
        self.notes: dict[int, tuple[str, ...]] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.files: list[Path] = []
        self.interrupted = False

    def add(
        self,
        client: int,
        found: SampledReconstruction,
        truth: Images,
        indices: Sequence[int],
    ) -> None:
        """Score one reconstruction beside the prior alone; write picture and JSON."""
        options = self.options
        measure: dict[str, Any] = {"others": self.pool, "judge": self.judge}
        measure["seed"] = options.seed
        seed = (options.seed + client + _PRIOR_SEED) % 2**32
        alone = prior_draws(self.prior, found.labels, _PRIOR_DRAWS, seed)
        result = score(found, truth, **measure)
        floor = prior_floor(alone, found.labels, truth, **measure)
        result = replace(result, floors={**result.floors, "prior_alone": floor})
        self.scores[client] = result
        self.interrupted |= found.stopped == "interrupted"
        self.notes[client] = tuple(self._caveats(truth))

        end = f"client_{client}_round_{options.round_id}"
        picture = _picture(truth, found, result, alone[0], bool(self._bounds()))
        self._keep(f"{end}.png", picture)
        last = len(found.losses) - 1
        shown = [k for k in range(last) if not (k + 1) % options.log_every] + [last]
        trials = [asdict(trial) for trial in found.trials]
        for trial in trials:  # JSON has no NaN: a start that failed has no loss
            trial["loss"] = _finite(trial["loss"])
        self._keep_json(
            f"loss_{end}.json",
            {
                "loss": [_finite(found.losses[k]) for k in shown],
                "steps": [found.iterations[k] for k in shown],
                "trials": trials,
            },
        )
        order = torch.tensor(result.assignment)
        attack = {
            "attack": found.attack,
            "reason": found.reason,
            "label_source": found.label_source,
            "upper_bound": self._bounds(),
            "stopped": found.stopped,
        }
        self._keep_json(
            f"metrics_{end}.json",
            {
                "client": client,
                "round": options.round_id,
                "indices": list(indices),
                "true_labels": truth.labels.tolist(),
                "labels": found.labels[order].tolist(),
                **attack,
                **result.to_dict(),
            },
        )
        self.results[f"client_{client}"] = attack | {
            "seconds": round(found.seconds, 3),
            "summary": result.to_dict()["summary"],
        }

    def finish(self, seconds: float) -> None:
        """Write the record of the run."""
        record = {
            "command": "gradinv diffusion-dlg",
            "options": asdict(self.options),
            "model": self.model,
            "prior": {"name": self.prior.name, "decoding_steps": self.prior.steps},
            "prior_alone_draws": _PRIOR_DRAWS,
            "interrupted": self.interrupted,
            "results": self.results,
            "files": [path.name for path in self.files],
            "seconds": round(seconds, 3),
            "versions": versions(),
        }
        self._keep_json("run.json", record)

    def _bounds(self) -> list[str]:
        """Why this result is only an upper bound of what an attacker gets."""
        found = ["the attacker was given the true labels"]
        found = found if self.options.fix_labels else []
        about = self.prior.about
        same = about.get("dataset") == self.options.dataset
        if same and about.get("split") == "all":
            found.append("the prior may have been trained on the victims")
        return found

    def _caveats(self, truth: Images) -> list[str]:
        lines = [f"upper bound: {reason}" for reason in self._bounds()]
        if self.judge is not None:
            right = int((self.judge.predict(truth) == truth.labels).sum())
            lines.append(f"the judge knows {right} of {len(truth)} true images")
        return lines

    def _keep(self, name: str, content: bytes) -> None:
        self.files.append(write_bytes(self.folder / name, content))

    def _keep_json(self, name: str, value: object) -> None:
        self.files.append(write_json(self.folder / name, value))


def _picture(
    truth: Images,
    found: SampledReconstruction,
    result: LeakageScore,
    alone: Tensor,
    is_bound: bool,
) -> bytes:
    """Truth, reconstruction and an unguided draw, each below the other, as a PNG."""
    order = torch.tensor(result.assignment)
    places = assign(alone, truth.pixels)
    decibels = peak_signal_noise_ratio(alone[places], truth.pixels)
    what = "upper bound" if is_bound else "reconstruction"
    bands = {
        "truth": (truth.pixels, None),
        what: (found.images[order], result.psnr),
        "prior alone": (alone[places], decibels.tolist()),
    }
    rows: dict[str, Any] = {}
    captions: dict[str, list[str]] = {}
    for start in range(0, len(truth), plots.MAX_COLUMNS):
        part = slice(start, start + plots.MAX_COLUMNS)
        for name, (images, values) in bands.items():
            end = f" from {start}" if start else ""
            rows[name + end] = images[part]
            if values is not None:
                captions[name + end] = [plots.decibel_text(v) for v in values[part]]
    return plots.to_png(plots.image_grid(rows, captions=captions))


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
