"""One whole inversion experiment: clients, updates, attacks, scores, files.

``gradinv invert`` is a thin layer of options over ``run_inversion``.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradinv_helpers import plots
from gradinv_helpers.attacks.invert import (
    ATTACKS,
    Reconstruction,
    Step,
    invert,
    invert_clients,
)
from gradinv_helpers.checkpoints import load_checkpoint
from gradinv_helpers.classifier import Classifier, train_classifier
from gradinv_helpers.compute import resolve_device
from gradinv_helpers.data import Images, is_split, load_images
from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
    check_seed,
)
from gradinv_helpers.federated.aggregation import aggregate, apply_update, normalize
from gradinv_helpers.files import prepare_folder, write_bytes, write_json
from gradinv_helpers.metrics import LeakageScore, score
from gradinv_helpers.models import MODELS, build_model
from gradinv_helpers.updates import SharedUpdate, local_update

MODES: tuple[str, ...] = ("per-client", "aggregated", "both")
_JUDGE_IMAGES = 5000  # enough to judge by; keeps large data sets quick
_SUMMARY_COLUMNS = 10


@dataclass(frozen=True)
class InversionOptions:
    """Everything that ``gradinv invert`` can be told; see its ``--help``.

    Raises:
        InputError: A value is unknown or out of range.
    """

    dataset: str
    data_root: str | None
    device: str
    seed: int
    output_dir: str
    num_clients: int
    samples_per_client: int
    client_indices: tuple[int, ...] | None
    iterations: int
    log_every: int
    reconstruct_mode: str
    restarts: int
    dummy_seed: int
    normalize_gradients: bool
    tv_weight: float | None
    init_scale: float
    apply_agg_step: bool
    agg_lr: float
    model: str
    model_checkpoint: str | None
    attack: str
    judge: bool
    resume: bool = False

    def __post_init__(self) -> None:
        for name in (
            "num_clients",
            "samples_per_client",
            "iterations",
            "log_every",
            "restarts",
        ):
            check_count(name, getattr(self, name))
        check_seed("seed", self.seed)
        check_seed("dummy_seed", self.dummy_seed)
        if self.tv_weight is not None:
            check_number("tv_weight", self.tv_weight)
        check_number("init_scale", self.init_scale)
        check_number("agg_lr", self.agg_lr, exclusive=True)
        check_choice("reconstruct_mode", self.reconstruct_mode, MODES)
        check_choice("model", self.model, MODELS)
        check_choice("attack", self.attack, ATTACKS)
        resolve_device(self.device)

    @property
    def num_images(self) -> int:
        """Number of victims over all clients."""
        return self.num_clients * self.samples_per_client


@dataclass(frozen=True)
class InversionResult:
    """What ``run_inversion`` found and wrote.

    Args:
        scores: Score of every attacked update by its name, such as ``client_0``.
        files: Files written, in order.
        interrupted: Whether Ctrl-C cut the attack short.
        judged: For every attacked update, how far the judge can be trusted on its
            true images; empty without a judge.
    """

    scores: dict[str, LeakageScore]
    files: tuple[Path, ...]
    interrupted: bool
    judged: dict[str, str]


def run_inversion(
    options: InversionOptions,
    *,
    on_stage: Callable[[str], None] = lambda text: None,
    on_step: Callable[[Step], None] | None = None,
) -> InversionResult:
    """Let clients compute updates, attack them, and write what came out.

    Args:
        options: The experiment.
        on_stage: Told in words what begins.
        on_step: Told of every iteration of every restart.

    Returns:
        Scores and files. Ctrl-C during an attack ends the experiment early, with the
        best so far scored and written.

    Raises:
        InputError: An option does not fit the data set or the model, or the output
            folder cannot be written to.
    """
    begun = time.perf_counter()
    pool = load_images(options.dataset, data_root=options.data_root, split="test")
    chosen = choose_victims(options, len(pool))
    clients = [
        pool[list(chosen[start : start + options.samples_per_client])]
        for start in range(0, len(chosen), options.samples_per_client)
    ]
    model, architecture = _server_model(options, pool)
    options = replace(options, model=architecture)
    folder = prepare_folder(options.output_dir)
    updates = _updates(options, model, clients)
    judge = None
    if options.judge:
        on_stage("training the judge of class accuracy and feature similarity")
        judge = _train_judge(options, pool, chosen)

    report = _Report(options, folder, pool, judge)
    if options.reconstruct_mode != "aggregated":
        on_stage(f"inverting the updates, number of clients: {len(clients)}")
        found = invert_clients(
            updates,
            **_attack_settings(options),
            on_step=on_step,
            checkpoint=_checkpoint(options, folder, "clients"),
        )
        for number, reconstruction in enumerate(found):
            name = f"client_{number}"
            start = number * options.samples_per_client
            indices = chosen[start : start + options.samples_per_client]
            report.add(name, reconstruction, clients[number], indices)
    if options.reconstruct_mode != "per-client" and not report.interrupted:
        on_stage(f"inverting the aggregate, number of clients: {len(clients)}")
        reconstruction = invert(
            _aggregate(options, updates),
            **_attack_settings(options),
            on_step=on_step,
            checkpoint=_checkpoint(options, folder, "aggregate"),
        )
        report.add("aggregate", reconstruction, pool[list(chosen)], chosen)
    report.finish(pool[list(chosen)], chosen, time.perf_counter() - begun)
    return InversionResult(
        report.scores, tuple(report.files), report.interrupted, report.judged
    )


def choose_victims(options: InversionOptions, available: int) -> tuple[int, ...]:
    """Indices of the victims in the test split, client after client.

    Raises:
        InputError: More images than there are, or indices that are repeated, out of
            range, or of a wrong number.
    """
    wanted = options.num_images
    if wanted > available:
        raise InputError(
            "num_clients",
            f"at most {available} images in all ({options.dataset}, test split)",
            f"{options.num_clients} clients x {options.samples_per_client} samples",
            "lower --num-clients or --samples-per-client",
        )
    indices = options.client_indices
    if indices is None:
        return tuple(range(wanted))
    if len(indices) != wanted:
        raise InputError(
            "client_indices",
            f"{wanted} indices (clients x samples)",
            f"{len(indices)}",
            "name every image once, client after client",
        )
    repeated = sorted({i for i in indices if indices.count(i) > 1})
    if repeated:
        raise InputError("client_indices", "different indices", f"{repeated} twice")
    outside = [i for i in indices if not 0 <= i < available]
    if outside:
        raise InputError(
            "client_indices", f"indices from 0 to {available - 1}", f"{outside}"
        )
    return indices


def _server_model(options: InversionOptions, pool: Images) -> tuple[nn.Module, str]:
    """The model under attack and the name of its architecture."""
    device = resolve_device(options.device)
    if options.model_checkpoint is not None:
        model, info = load_checkpoint(options.model_checkpoint)
        channels, size, _ = pool.shape
        expected = f"a model for {channels} x {size} x {size} images"
        if info is None:
            raise InputError("model_checkpoint", expected, "one that does not say")
        if (info.in_channels, info.image_size) != (channels, size):
            found = f"{info.in_channels} x {info.image_size} x {info.image_size}"
            raise InputError("model_checkpoint", expected, f"{info.name} for {found}")
        return model.to(device), info.name
    channels, size, _ = pool.shape
    fresh = build_model(
        options.model,
        in_channels=channels,
        image_size=size,
        num_classes=max(2, pool.num_classes),
        seed=options.seed,
    )
    return fresh.to(device), options.model


def _updates(
    options: InversionOptions, model: nn.Module, clients: Sequence[Images]
) -> list[SharedUpdate]:
    updates = [local_update(model, images) for images in clients]
    if options.apply_agg_step:
        apply_update(model, _aggregate(options, updates), lr=options.agg_lr)
        updates = [local_update(model, images) for images in clients]
    return updates


def _aggregate(
    options: InversionOptions, updates: Sequence[SharedUpdate]
) -> SharedUpdate:
    if options.normalize_gradients:
        updates = [normalize(update) for update in updates]
    return aggregate(updates)


def _checkpoint(options: InversionOptions, folder: Path, name: str) -> Path:
    """The file that keeps a search; what an earlier run left is used or removed."""
    path = folder / f"{name}.checkpoint.safetensors"
    if not options.resume:
        for old in folder.glob(f"{name}.checkpoint*.safetensors"):
            old.unlink()
    return path


def _attack_settings(options: InversionOptions) -> dict[str, Any]:
    return {
        "attack": options.attack,
        "iterations": options.iterations,
        "restarts": options.restarts,
        "seed": options.dummy_seed,
        "init_scale": options.init_scale,
        "tv_weight": options.tv_weight,
        "log_every": options.log_every,
    }


def _train_judge(
    options: InversionOptions, pool: Images, victims: Sequence[int]
) -> Classifier | None:
    """A classifier that has never seen a victim, or None where none can be trained."""
    if is_split(options.dataset, options.data_root):
        images = load_images(options.dataset, data_root=options.data_root)
    else:
        images = pool
        held_out = set(victims)
        rest = [i for i in range(len(pool)) if i not in held_out]
        if not rest:
            return None
        images = pool[rest]
    if len(images) > _JUDGE_IMAGES:
        generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(len(images), generator=generator)
        images = images[order[:_JUDGE_IMAGES]]
    if len(images.labels.unique()) < 2:
        return None
    return train_classifier(
        images, seed=options.seed, device=resolve_device(options.device)
    )


class _Report:
    """Collects results and writes each of them as soon as it is there."""

    def __init__(
        self,
        options: InversionOptions,
        folder: Path,
        pool: Images,
        judge: Classifier | None,
    ):
        self.options, self.folder, self.pool, self.judge = options, folder, pool, judge
        self.scores: dict[str, LeakageScore] = {}
        self.files: list[Path] = []
        self.interrupted = False
        self.judged: dict[str, str] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.shown: dict[str, dict[int, tuple[torch.Tensor, float]]] = {}

    def add(
        self,
        name: str,
        reconstruction: Reconstruction,
        truth: Images,
        indices: Sequence[int],
    ) -> None:
        """Score one reconstruction and write its picture, film and numbers."""
        result = score(
            reconstruction,
            truth,
            others=self.pool,
            judge=self.judge,
            seed=self.options.seed,
        )
        self.scores[name] = result
        self.interrupted |= reconstruction.stopped == "interrupted"
        order = torch.tensor(result.assignment)
        self._keep(f"{name}.png", plots.to_png(plots.pairs(truth, reconstruction)))
        film = plots.snapshot_gif(reconstruction.snapshots[:, order], truth=truth)
        self._keep(f"{name}.gif", film)
        trials = [asdict(trial) for trial in reconstruction.trials]
        for trial in trials:  # JSON has no NaN: a start that failed has no loss
            trial["loss"] = _finite(trial["loss"])
        self._keep_json(
            f"{name}_loss.json",
            {
                "iterations": reconstruction.iterations,
                "loss": [_finite(loss) for loss in reconstruction.losses],
                "trials": trials,
            },
        )
        attack = {
            "attack": reconstruction.attack,
            "reason": reconstruction.reason,
            "label_source": reconstruction.label_source,
            "stopped": reconstruction.stopped,
        }
        self._keep_json(
            f"{name}_metrics.json",
            {
                "indices": list(indices),
                "true_labels": truth.labels.tolist(),
                "labels": reconstruction.labels[order].tolist(),
                **attack,
                **result.to_dict(),
            },
        )
        if self.judge is not None:
            right = int((self.judge.predict(truth) == truth.labels).sum())
            self.judged[name] = f"the judge knows {right} of {len(truth)} true images"
        self.results[name] = attack | {
            "seconds": round(reconstruction.seconds, 3),
            "summary": result.to_dict()["summary"],
        }
        row = "aggregated" if name == "aggregate" else "per client"
        images = zip(indices, reconstruction.images[order], result.psnr, strict=True)
        for index, image, psnr in images:
            self.shown.setdefault(row, {})[index] = (image, psnr)

    def finish(self, victims: Images, indices: Sequence[int], seconds: float) -> None:
        """Write the summary picture and the record of the run."""
        columns = list(indices)[:_SUMMARY_COLUMNS]
        if all(index in images for images in self.shown.values() for index in columns):
            rows = {"truth": victims.pixels[: len(columns)]}
            captions = {}
            for row, images in self.shown.items():
                rows[row] = torch.stack([images[i][0] for i in columns])
                captions[row] = [plots.decibel_text(images[i][1]) for i in columns]
            figure = plots.image_grid(
                rows, column_titles=[f"#{i}" for i in columns], captions=captions
            )
            self._keep("summary.png", plots.to_png(figure))
        record = {
            "command": "gradinv invert",
            "options": asdict(self.options),
            "indices": list(indices),
            "interrupted": self.interrupted,
            "results": self.results,
            "files": [path.name for path in self.files],
            "seconds": round(seconds, 3),
            "versions": versions(),
        }
        self._keep_json("run.json", record)

    def _keep(self, name: str, content: bytes) -> None:
        self.files.append(write_bytes(self.folder / name, content))

    def _keep_json(self, name: str, value: object) -> None:
        self.files.append(write_json(self.folder / name, value))


def versions() -> dict[str, str]:
    """Versions of everything that a number can depend on."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    packages = ("gradinv-helpers", "torch", "torchvision", "numpy", "scipy")
    for package in (*packages, "torchmetrics", "scikit-image", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
