"""Models of the suites at several stages of training, kept on disk.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gradinv_helpers.bench.suite import Setting, fingerprint
from gradinv_helpers.checkpoints import ModelInfo, load_checkpoint, save_checkpoint
from gradinv_helpers.classifier import accuracy, train_classifier
from gradinv_helpers.data import Images, is_split
from gradinv_helpers.models import build_model

STAGES: tuple[str, ...] = ("untrained", "1 epoch", "trained")
_MOST_IMAGES, _QUICK_IMAGES = 10_000, 100  # to train on
_USUAL = (12, 3e-3)  # epochs and largest step size of a trained model
_RECIPES = {"lenet": (40, 1e-2)}  # sigmoids learn slowly


def model_at(
    setting: Setting,
    name: str,
    stage: str,
    train: Images,
    test: Images,
    *,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
) -> nn.Module:
    """Build a model, and train it on the train split where the stage asks for it.

    Trained weights are kept in ``models/`` of the output folder and read from there
    by the next run with the same images, seed and recipe. Accuracies go to the notes.

    Args:
        setting: Seed, device and folder.
        name: For ``build_model``.
        stage: One of ``STAGES``.
        train: Images to train on; of many, 10,000 are drawn.
        test: Images that it must not see.
        statistics: Mean and standard deviation per channel for a layer in front.

    Returns:
        The model in evaluation mode, on the setting's device.
    """
    channels, size, _ = train.shape
    info = ModelInfo(name, channels, size, max(2, train.num_classes))
    mean, std = statistics or (None, None)
    fresh = build_model(
        name,
        in_channels=channels,
        image_size=size,
        num_classes=info.num_classes,
        seed=setting.seed,
        mean=mean,
        std=std,
    )
    if stage == "untrained":
        return fresh.to(setting.device)
    epochs, lr = _RECIPES.get(name, _USUAL)
    if stage == "1 epoch":
        epochs = 1
    elif setting.quick:
        epochs = 2
    most = _QUICK_IMAGES if setting.quick else _MOST_IMAGES
    images = _drawn(train, most, setting.seed)
    parts = [setting.dataset, name, f"{epochs}epochs", f"seed{setting.seed}"]
    parts += ["standardised"] * (statistics is not None) + [fingerprint(images)[:8]]
    path = setting.folder / "models" / ("_".join(parts) + ".safetensors")
    if path.is_file():
        model, _ = load_checkpoint(path, model=fresh)
    else:
        setting.say(f"training {name}, epochs: {epochs}")
        model = train_classifier(
            images,
            model=fresh,
            epochs=epochs,
            lr=lr,
            seed=setting.seed,
            device=setting.device,
        ).model
        save_checkpoint(path, model, info)
    setting.notes.setdefault("models", {})[f"{name}, {stage}"] = {
        "epochs": epochs,
        "lr": lr,
        "train_accuracy": accuracy(model, images),
        "test_accuracy": accuracy(model, test),
        "victims_unseen": is_split(setting.dataset, setting.data_root),
    }
    return model.to(setting.device)


def pixel_statistics(images: Images) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel."""
    by_channel = images.pixels.transpose(0, 1).flatten(1)
    return by_channel.mean(1).tolist(), by_channel.std(1).tolist()


def _drawn(images: Images, most: int, seed: int) -> Images:
    if len(images) <= most:
        return images
    generator = torch.Generator().manual_seed(seed)
    return images[torch.randperm(len(images), generator=generator)[:most]]
