"""Counts of labels from a weight change of several local steps.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.label_counts import (
    certain_counts,
    mean_feature,
    nearest_counts,
    predictions_of,
    with_bias,
)
from gradinv_helpers.attacks.last_layer import (
    LastLayer,
    bias_noise,
    dummy_features,
    dummy_images,
    gains,
    groups_of,
    mean_gradient,
)
from gradinv_helpers.compute import private_randomness
from gradinv_helpers.errors import InputError
from gradinv_helpers.updates import LocalTraining, SharedUpdate

_ROUNDS = 8  # of counts and way in turn
_PATH_POINTS = 24
_ORDERS = 8  # random orders of the local batches
_MODEL_ERROR = 0.02  # relative, of a simulated change
_MOMENTUM, _BETA1, _BETA2, _EPSILON = 0.9, 0.9, 0.999, 1e-8


def counts_by_trajectory(
    update: SharedUpdate, layer: LastLayer, num_samples: int, seed: int
) -> Tensor:
    """Counts (K,) of a weight change of several local steps.

    The mean gradient along the way is mean prediction minus label shares, as for one
    step, but predictions move while the client trains. For SGD, with or without
    momentum, the way of the last layer is simulated from the counts, and the counts
    follow from the way, in turn. Adam rescales every step: there each possible count
    of a class goes through the client's optimiser, and the likeliest counts that add
    up to N are returned.
    """
    bias = layer.sent_bias
    if bias is None or not bool(bias.any()):
        got = "no bias" if bias is None else "no change"
        raise InputError("update", "a change of the last layer's bias", got)
    if update.kind == "gradient" or update.normalized:
        got = "a gradient" if update.kind == "gradient" else "normalised clients"
        raise InputError(
            "update",
            "a weight change of known scale for method 'trajectory'",
            got,
            "use another method, such as 'llg'",
        )
    groups = groups_of(update, num_samples)
    steps = max(update.training.num_steps(size) for size in groups)
    if update.training.optimiser == "adam":
        return _counts_of_adam(update, layer, groups, steps, seed)
    return _counts_of_sgd(update, layer, groups, steps, seed)


# --- SGD ----------------------------------------------------------------------------


def _counts_of_sgd(
    update: SharedUpdate,
    layer: LastLayer,
    groups: tuple[int, ...],
    steps: int,
    seed: int,
) -> Tensor:
    """Counts (K,), improved in turn with the simulated way of the last layer.

    What a simulated way misses at its end is spread evenly over its steps.
    """
    assert layer.sent_bias is not None
    recipe, total = update.training, sum(groups)
    weights = gains(recipe, steps)
    weights = weights / weights.sum()
    features = dummy_features(update, seed)
    scatter = features - features.mean(0)
    gradient = with_bias(*mean_gradient(update, layer, groups), features)
    feature = mean_feature(gradient)
    lowest = torch.zeros(layer.num_classes, dtype=torch.int64)
    if _counts_every_sample_alike(recipe, groups):
        noise = bias_noise(update, layer, groups)
        lowest = certain_counts(gradient[1], total, noise)
    chosen = torch.linspace(0, steps - 1, min(steps, _PATH_POINTS)).round().long()
    end = (layer.weight + layer.sent_weight, layer.bias + layer.sent_bias)
    line, missed = [], (layer.sent_weight, layer.sent_bias)
    for round_ in range(_ROUNDS):
        if not round_:  # a straight way
            line = [(layer.weight, layer.bias)] * len(chosen)
        points = []
        for step, (weight, bias) in zip(chosen.tolist(), line, strict=True):
            weight = weight + step / steps * missed[0]
            bias = bias + step / steps * missed[1]
            points.append(predictions_of(weight, bias, feature[None], scatter)[0])
        predictions = _interpolated(torch.stack(points), chosen, steps)
        estimate = total * (weights @ predictions - gradient[1])
        counts = nearest_counts(estimate, total, lowest)
        line, last = _simulate_layer(
            recipe, layer, feature, counts / total, steps, chosen
        )
        missed = (end[0] - last[0], end[1] - last[1])
    return counts


def _counts_every_sample_alike(recipe: LocalTraining, groups: tuple[int, ...]) -> bool:
    """Whether every sample has the same weight in the mean gradient."""
    even = all(size % (recipe.batch_size or size) == 0 for size in groups)
    steps = {recipe.num_steps(size) for size in groups}
    plain = recipe.optimiser == "sgd" and recipe.weight_decay == 0
    return plain and even and len(steps) == 1


def _simulate_layer(
    recipe: LocalTraining,
    layer: LastLayer,
    feature: Tensor,
    shares: Tensor,
    steps: int,
    chosen: Tensor,
) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Train the last layer on one feature with soft labels: its way and its end."""
    momentum = _MOMENTUM if recipe.optimiser == "momentum" else 0.0
    weight, bias = layer.weight, layer.bias
    weight_speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    line, wanted = [], set(chosen.tolist())
    for step in range(steps):
        if step in wanted:
            line.append((weight, bias))
        error = (weight @ feature + bias).softmax(0) - shares
        weight_speed = momentum * weight_speed + torch.outer(error, feature)
        weight_speed = weight_speed + recipe.weight_decay * weight
        bias_speed = momentum * bias_speed + error + recipe.weight_decay * bias
        weight = weight - recipe.rate * weight_speed
        bias = bias - recipe.rate * bias_speed
    return line, (weight, bias)


# --- Adam ---------------------------------------------------------------------------


def _counts_of_adam(
    update: SharedUpdate,
    layer: LastLayer,
    groups: tuple[int, ...],
    steps: int,
    seed: int,
) -> Tensor:
    """The likeliest counts (K,), with local batches in random orders."""
    assert layer.sent_bias is not None
    predictions = _predictions_on_the_line(update, steps, seed)
    labels = _label_shares(update.training, groups, seed)
    costs = [
        _costs(
            update.training,
            predictions[:, k],
            labels,
            layer.bias[k],
            layer.sent_bias[k],
            update.noise_std,
        )
        for k in range(layer.num_classes)
    ]
    return _cheapest(torch.stack(costs))


def _predictions_on_the_line(update: SharedUpdate, steps: int, seed: int) -> Tensor:
    """Mean predictions (T, K) of dummy images, on the line between both models."""
    images = dummy_images(update, seed)
    chosen = torch.linspace(0, steps - 1, min(steps, _PATH_POINTS)).round().long()
    found = []
    with private_randomness(seed, images.device), torch.no_grad():
        for step in chosen.tolist():
            logits = _moved(update, step / steps)(images)
            found.append(logits.double().softmax(1).mean(0).cpu())
    return _interpolated(torch.stack(found), chosen, steps)


def _moved(update: SharedUpdate, share: float) -> nn.Module:
    """A copy of the server's model, moved by a share of the update."""
    model = copy.deepcopy(update.model)
    for name, parameter in model.named_parameters():
        if name in update.tensors:
            parameter.add_(share * update.tensors[name])
    return model


def _interpolated(points: Tensor, chosen: Tensor, steps: int) -> Tensor:
    """Values (T, K) at all steps from those at the chosen ones, (P, K)."""
    time = torch.arange(steps)
    right = torch.searchsorted(chosen, time).clamp(1, max(len(chosen) - 1, 1))
    right = right.clamp_max(len(chosen) - 1)
    left = (right - 1).clamp_min(0)
    width = (chosen[right] - chosen[left]).clamp_min(1)
    share = ((time - chosen[left]) / width)[:, None].to(points.dtype)
    return points[left] + share * (points[right] - points[left])


def _label_shares(
    recipe: LocalTraining, groups: tuple[int, ...], seed: int
) -> list[tuple[float, Tensor]]:
    """Share of a class in every local batch, if n of all N samples belong to it.

    Returns:
        For each client its share of the samples, and a tensor (orders, T, N + 1) over
        random orders, steps and n.
    """
    generator = torch.Generator().manual_seed(seed)
    total = sum(groups)
    members = [torch.randperm(total, generator=generator) for _ in range(_ORDERS)]
    found, first = [], 0
    for size in groups:
        rows = []
        for order in members:
            own = order[first : first + size]
            for _ in range(recipe.epochs):
                shuffled = own[torch.randperm(size, generator=generator)]
                for batch in shuffled.split(recipe.batch_size or size):
                    row = torch.zeros(total + 1, dtype=torch.float64)
                    row[batch + 1] = 1 / len(batch)
                    rows.append(row.cumsum(0))
        shares = torch.stack(rows).reshape(_ORDERS, -1, total + 1)
        found.append((size / total, shares))
        first += size
    return found


def _costs(
    recipe: LocalTraining,
    predictions: Tensor,
    labels: list[tuple[float, Tensor]],
    start: Tensor,
    observed: Tensor,
    noise: float,
) -> Tensor:
    """Minus log likelihood (N + 1,) of every count of one class, given its bias."""
    change = torch.zeros(())
    for weight, shares in labels:
        steps = shares.shape[1]
        at = torch.linspace(0, len(predictions) - 1, steps).round().long()
        gradient = predictions[at][None, :, None] - shares  # (orders, T, N + 1)
        change = change + weight * _change_by_adam(recipe, gradient, start)
    mean = change.mean(0)
    error = (_MODEL_ERROR * mean).square() + (1e-3 * recipe.rate) ** 2
    variance = change.var(0) + error + noise**2
    return (observed - mean).square() / variance + variance.log()


def _change_by_adam(recipe: LocalTraining, gradient: Tensor, start: Tensor) -> Tensor:
    """How far Adam moves a bias, (orders, N + 1); gradients (orders, T, N + 1)."""
    bias = start.expand(gradient[:, 0].shape)
    first, second = torch.zeros_like(bias), torch.zeros_like(bias)
    for step, row in enumerate(gradient.unbind(1), start=1):
        slope = row + recipe.weight_decay * bias
        first = _BETA1 * first + (1 - _BETA1) * slope
        second = _BETA2 * second + (1 - _BETA2) * slope.square()
        scale = (second / (1 - _BETA2**step)).sqrt() + _EPSILON
        bias = bias - recipe.rate * first / (1 - _BETA1**step) / scale
    return bias - start


def _cheapest(costs: Tensor) -> Tensor:
    """Counts (K,) with sum N and the lowest total of ``costs[k, n_k]``, (K, N + 1).

    Dynamic programming over the classes.
    """
    num_classes, size = costs.shape
    left = torch.arange(size)[:, None] - torch.arange(size)
    best = torch.full((size,), float("inf"), dtype=costs.dtype)
    best[0] = 0.0
    choices = []
    for row in costs:
        before = torch.where(left < 0, float("inf"), best[left.clamp_min(0)])
        best, choice = (before + row).min(1)
        choices.append(choice)
    counts = torch.zeros(num_classes, dtype=torch.int64)
    remaining = size - 1
    for k in reversed(range(num_classes)):
        counts[k] = choices[k][remaining]
        remaining -= int(counts[k])
    return counts
