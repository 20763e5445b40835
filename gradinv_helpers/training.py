"""Train the server's model and save it: the work behind ``gradinv train-global``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from gradinv_helpers.checkpoints import (
    ModelInfo,
    check_checkpoint_name,
    save_checkpoint,
)
from gradinv_helpers.classifier import EpochReport, accuracy, train_classifier
from gradinv_helpers.compute import resolve_device
from gradinv_helpers.data import load_images
from gradinv_helpers.errors import check_choice, check_count, check_number, check_seed
from gradinv_helpers.experiment import versions
from gradinv_helpers.files import prepare_folder, write_json
from gradinv_helpers.models import MODELS


@dataclass(frozen=True)
class TrainingOptions:
    """Everything that ``gradinv train-global`` can be told; see its ``--help``.

    Raises:
        InputError: A value is unknown or out of range.
    """

    dataset: str
    data_root: str | None
    device: str
    seed: int
    output: str
    epochs: int
    batch_size: int
    lr: float
    model: str

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_count("batch_size", self.batch_size)
        check_seed("seed", self.seed)
        check_number("lr", self.lr, exclusive=True)
        check_choice("model", self.model, MODELS)
        resolve_device(self.device)
        check_checkpoint_name(self.output)


@dataclass(frozen=True)
class TrainingResult:
    """Accuracy on both splits, in [0, 1], and the files written."""

    train_accuracy: float
    test_accuracy: float
    files: tuple[Path, ...]


def run_training(
    options: TrainingOptions,
    *,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> TrainingResult:
    """Train on the train split, measure on both, write checkpoint and JSON.

    Raises:
        InputError: An option does not fit, or the folder cannot be written to.
    """
    path = check_checkpoint_name(options.output)
    train, test = (
        load_images(options.dataset, data_root=options.data_root, split=split)
        for split in ("train", "test")
    )
    prepare_folder(path.parent, "output")
    classifier = train_classifier(
        train,
        model=options.model,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
        device=resolve_device(options.device),
        on_epoch=on_epoch,
    )
    channels, size, _ = train.shape
    info = ModelInfo(options.model, channels, size, train.num_classes)
    scores = {
        name: accuracy(classifier, s)
        for name, s in zip(("train", "test"), (train, test), strict=True)
    }
    checkpoint = save_checkpoint(path, classifier.model, info)
    record = write_json(
        path.with_suffix(".json"),
        {
            "command": "gradinv train-global",
            "options": asdict(options),
            "accuracy": scores,
            "epochs": [asdict(report) for report in classifier.history],
            "versions": versions(),
        },
    )
    return TrainingResult(scores["train"], scores["test"], (checkpoint, record))
