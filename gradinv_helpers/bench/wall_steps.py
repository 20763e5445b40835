"""Part of suite ``wall``: local steps, and labels that are not known.

A weight change of several local steps is no gradient at one point. Its Jacobian by the
images is measured through the whole training, in double precision, and so is that of a
gradient by the images and the labels together.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn import functional as F

from gradinv_helpers.attacks.jacobian import gram
from gradinv_helpers.attacks.spectrum import cholesky_rank, determined, rounding_std
from gradinv_helpers.bench.suite import Record, chosen, markdown
from gradinv_helpers.updates import LocalTraining

STEPS, LABELS = "local steps", "labels"
NETWORK = "width 6"  # it leaves the wall at two images
IMAGES = 4
LR = 0.1
RECIPES: tuple[tuple[int, int], ...] = ((4, 1), (2, 1), (1, 1), (4, 2), (2, 2), (1, 2))
_CHUNK = 64  # entries of the update at once

Forward = Callable[[Tensor], Tensor]


def count_steps(
    model: nn.Module, images: Tensor, targets: Tensor, training: LocalTraining
) -> Record:
    """What a weight change of several local steps determines of its images.

    Args:
        model: The model before training; a copy in double precision is used.
        images: (B, C, H, W) in double precision, in the order of training.
        targets: (B, K) one-hot labels.
        training: Plain SGD, the same order in every epoch.
    """
    weights = _weights(model)

    def change(flat: Tensor) -> Tensor:
        x, moved = flat.view_as(images), dict(weights)
        size = training.batch_size or len(x)
        for _ in range(training.epochs):
            for first in range(0, len(x), size):
                some = slice(first, first + size)
                slopes = _gradient(model, moved, x[some], targets[some])
                moved = {n: w - training.rate * slopes[n] for n, w in moved.items()}
        return torch.cat([(moved[n] - w).flatten() for n, w in weights.items()])

    sent, linear = _linearised(change, images.flatten())
    parts = sent.split([w.numel() for w in weights.values()])
    std = torch.cat([rounding_std(part, "float32") for part in parts])
    values = torch.linalg.svdvals(linear / std[:, None])
    return {
        "what": STEPS,
        "batch_size": training.batch_size or len(images),
        "epochs": training.epochs,
        "unknowns": images.numel(),
        "rank": cholesky_rank(gram(linear))[0],
        "determined": determined(values, noise_std=1.0),
    }


def count_labels(
    model: nn.Module, images: Tensor, targets: Tensor, *, known: bool
) -> Record:
    """What a gradient determines with labels given, or with labels as unknowns.

    Unknown labels are probabilities: K - 1 more unknowns for every image.

    Args:
        model: The model; a copy in double precision is used.
        images: (B, C, H, W) in double precision.
        targets: (B, K) one-hot labels.
        known: Whether the labels are given.
    """
    weights, (count, classes) = _weights(model), targets.shape
    # Directions in which probabilities keep their sum.
    whole = torch.eye(classes, dtype=targets.dtype, device=targets.device) - 1 / classes
    basis = torch.linalg.svd(whole)[0][:, :-1]
    codes = images.new_zeros(0 if known else count * (classes - 1))
    point = torch.cat([images.flatten(), codes])

    def sent(flat: Tensor) -> Tensor:
        x, moves = flat[: images.numel()], flat[images.numel() :]
        y = targets if known else targets + moves.view(count, -1) @ basis.T
        slopes = _gradient(model, weights, x.view_as(images), y)
        return torch.cat([slope.flatten() for slope in slopes.values()])

    _, linear = _linearised(sent, point)
    return {
        "what": LABELS,
        "labels": "given" if known else "unknown",
        "batch_size": count,
        "unknowns": len(point),
        "rank": cholesky_rank(gram(linear))[0],
    }


def table(records: Sequence[Record]) -> str:
    """Both tables, as Markdown."""
    steps, labels = chosen(records, what=STEPS), chosen(records, what=LABELS)
    recipes = dict.fromkeys((r["batch_size"], r["epochs"]) for r in steps)
    rows = []
    for size, epochs in recipes:
        found = chosen(steps, batch_size=size, epochs=epochs)
        count = epochs * (IMAGES // size)
        rows.append(
            [
                f"{size}",
                f"{epochs}",
                f"{count}",
                f"{found[0]['unknowns']:,}",
                f"{statistics.fmean(r['rank'] for r in found):,.0f}",
                f"{statistics.fmean(r['determined'] for r in found):,.0f}",
            ]
        )
    head = ["batch size", "epochs", "steps", "unknowns", "rank", "above rounding"]
    text = (
        f"Weight changes of {IMAGES} images behind `{NETWORK}`, untrained, plain SGD "
        f"with learning rate {LR:g}, order known. Above rounding: as below, in "
        "float32."
    )
    label_rows = []
    for size, way in dict.fromkeys((r["batch_size"], r["labels"]) for r in labels):
        found = chosen(labels, batch_size=size, labels=way)
        rank = statistics.fmean(r["rank"] for r in found)
        unknowns = found[0]["unknowns"]
        label_rows.append([f"{size}", way, f"{unknowns:,}", f"{rank:,.0f}"])
    note = (
        "One gradient behind the same network. Unknown labels are probabilities, nine "
        "more unknowns per image of ten classes. (Class counts are whole numbers, and "
        "are inferred before the search.)"
    )
    return "\n\n".join(
        [
            markdown(head, rows),
            text,
            markdown(["batch size", "labels", "unknowns", "rank"], label_rows),
            note,
        ]
    )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().double() for n, p in model.named_parameters()}


def _gradient(
    model: nn.Module, weights: dict[str, Tensor], images: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Gradient of the mean cross-entropy by the weights."""

    def loss(some: dict[str, Tensor]) -> Tensor:
        logits = functional_call(model, some, (images,))
        return -(targets * F.log_softmax(logits, 1)).sum(1).mean()

    return grad(loss)(weights)


def _linearised(forward: Forward, point: Tensor) -> tuple[Tensor, Tensor]:
    """Value (P,) and Jacobian (P, N) of a map at a point (N,)."""
    value, pull_back = vjp(forward, point)[:2]
    unit = torch.eye(len(value), dtype=point.dtype, device=point.device)
    return value, vmap(lambda row: pull_back(row)[0], chunk_size=_CHUNK)(unit)
