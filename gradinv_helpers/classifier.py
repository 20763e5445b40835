"""Train an ordinary classifier: the global model of a book, or an independent judge.

A judge looks at reconstructions with other eyes than the attacked model. It is trained
on the ``train`` split, so it has never seen the victims.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gradinv_helpers.compute import cpu_threads, private_randomness
from gradinv_helpers.errors import InputError, check_count, check_number, check_seed
from gradinv_helpers.models import build_model

if TYPE_CHECKING:
    from gradinv_helpers.data import Images

_CHUNK = 256  # images per forward pass where no gradient is needed
_WORK_PER_PIXEL = 20_000  # multiplications of the convnet per pixel, roughly


@dataclass(frozen=True)
class EpochReport:
    """What happened in one epoch of training.

    Attributes:
        epoch: Number of the epoch, from 1.
        epochs: Number of epochs in all.
        loss: Mean cross-entropy over the epoch's images, in nats.
        accuracy: Share of right predictions during the epoch, in [0, 1].
    """

    epoch: int
    epochs: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Classifier:
    """A classifier with access to its last features.

    Attributes:
        model: Maps images (N, C, H, W) to logits (N, K); its last linear layer is the
            output layer.
        history: One report per training epoch; empty for a model from elsewhere.

    Taught in: notebooks/02_dlg_four_steps
    """

    model: nn.Module
    history: tuple[EpochReport, ...] = ()

    def predict(self, images: Images | Tensor) -> Tensor:
        """Return the most likely class of each image.

        Args:
            images: ``Images`` or a tensor (N, C, H, W), values in [0, 1].

        Returns:
            (N,) int64, on the CPU.
        """
        return _forward(self.model, images).argmax(dim=1)

    def features(self, images: Images | Tensor) -> Tensor:
        """Return the input of the last linear layer for each image.

        Args:
            images: ``Images`` or a tensor (N, C, H, W), values in [0, 1].

        Returns:
            (N, D) float32, on the CPU.

        Raises:
            InputError: The model has no linear layer.
        """
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        if not layers:
            name = type(self.model).__name__
            raise InputError("model", "a model whose last layer is nn.Linear", name)
        seen: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0].detach().flatten(1).cpu())

        handle = layers[-1].register_forward_pre_hook(keep)
        try:
            _forward(self.model, images)
        finally:
            handle.remove()
        return torch.cat(seen)


def train_classifier(
    images: Images,
    *,
    model: str | nn.Module = "convnet",
    epochs: int = 12,
    batch_size: int = 32,
    lr: float = 3e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> Classifier:
    """Train a classifier with cross-entropy, Adam and a falling step size.

    The step size rises over the first fifth of the steps and falls to zero along a
    cosine. The same call gives the same weights; torch's global random state and a
    given module are left as they were.

    Args:
        images: Training images, square; use the ``train`` split.
        model: Name for ``build_model``, or a module whose copy is trained further.
        epochs: Passes over the images.
        batch_size: Largest batch; the batches of an epoch have (almost) equal sizes.
        lr: Largest step size of Adam.
        seed: Seed of the weights, the order of the images and any dropout.
        device: Where to train; the result is on the CPU.
        on_epoch: Called after every epoch, for a progress bar.

    Returns:
        The trained classifier, in evaluation mode.

    Raises:
        InputError: A bad count, no images, fewer than two classes, images that are not
            square, or a loss that is not finite.

    Source: Kingma and Ba (2015) for Adam.
    Taught in: notebooks/01_fl_guarantees
    """
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    check_number("lr", lr, exclusive=True)
    check_seed("seed", seed)
    pixels, labels = images.pixels.to(device), images.labels.to(device)
    if not len(pixels):
        raise InputError("images", "at least one image", 0)
    if isinstance(model, nn.Module):
        network = copy.deepcopy(model)
    else:
        network = _built(model, images, seed)
    history: list[EpochReport] = []
    work = _WORK_PER_PIXEL * min(batch_size, len(pixels)) * pixels[0, 0].numel()
    with cpu_threads(work), private_randomness(seed, torch.device(device)):
        network.to(device).train()
        steps = epochs * math.ceil(len(pixels) / batch_size)
        optimiser = torch.optim.Adam(network.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: _warm_cosine(step, steps)
        )
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(1, epochs + 1):
            order = torch.randperm(len(pixels), generator=generator).to(device)
            loss_sum, right = 0.0, 0
            for batch in order.tensor_split(math.ceil(len(order) / batch_size)):
                logits = network(pixels[batch])
                loss = nn.functional.cross_entropy(logits, labels[batch])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                loss_sum += loss.item() * len(batch)
                right += int((logits.argmax(dim=1) == labels[batch]).sum())
            report = EpochReport(
                epoch, epochs, loss_sum / len(pixels), right / len(pixels)
            )
            if not math.isfinite(report.loss):
                hint = "use a smaller lr, or look for NaN in the images"
                got = f"{report.loss} in epoch {epoch} with lr={lr:g}"
                raise InputError("lr", "a finite training loss", got, hint)
            history.append(report)
            if on_epoch is not None:
                on_epoch(report)
    return Classifier(network.cpu().eval(), tuple(history))


def accuracy(model: nn.Module | Classifier, images: Images) -> float:
    """Return the share of images whose label the model predicts.

    Args:
        model: A classifier or a bare module; its training mode is left as it was.
        images: Images with their labels.

    Returns:
        A share in [0, 1].

    Raises:
        InputError: There are no images.

    Taught in: notebooks/01_fl_guarantees
    """
    judge = model if isinstance(model, Classifier) else Classifier(model)
    if not len(images.labels):
        raise InputError("images", "at least one image", 0)
    return float((judge.predict(images) == images.labels.cpu()).double().mean())


def _built(name: str, images: Images, seed: int) -> nn.Module:
    channels, height, width = images.pixels.shape[1:]
    if height != width:
        raise InputError("images", "square images", f"{height} x {width}")
    return build_model(
        name,
        in_channels=channels,
        image_size=height,
        num_classes=len(images.class_names),
        seed=seed,
    )


def _warm_cosine(step: int, steps: int) -> float:
    """Scale of the step size: a linear rise, then half a cosine down to zero."""
    warm = max(1, steps // 5)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule into evaluation mode, then restore each one's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _forward(model: nn.Module, images: Images | Tensor) -> Tensor:
    """Return the logits (N, K) on the CPU, in chunks and without gradients."""
    pixels = images if isinstance(images, Tensor) else images.pixels
    if pixels.ndim != 4 or not len(pixels):
        raise InputError("images", "shape (N, C, H, W)", tuple(pixels.shape))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    work = _WORK_PER_PIXEL * min(_CHUNK, len(pixels)) * pixels[0, 0].numel()
    with cpu_threads(work), _evaluating(model), torch.no_grad():
        chunks = pixels.detach().float().split(_CHUNK)
        return torch.cat([model(chunk.to(device)).cpu() for chunk in chunks])
