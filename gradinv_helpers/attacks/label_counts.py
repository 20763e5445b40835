r"""How often each class occurs in a batch, from the last layer's gradient.

The bias gradient is :math:`g = \bar p - n / N`: mean prediction minus share of each
class. The methods differ in what they take for the mean prediction :math:`\bar p`.
Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradinv_helpers.attacks.last_layer import (
    LastLayer,
    bias_noise,
    dummy_features,
    mean_gradient,
)
from gradinv_helpers.errors import InputError
from gradinv_helpers.updates import SharedUpdate

_REFINEMENTS = 3  # of the features of each class
_FEATURE_RIDGE = 1e-2  # share of the mean eigenvalue
_COUNT_RIDGE = 1e-3
_HUGE = 1e9  # larger estimates would leave no digits for the others

Gradient = tuple[Tensor, Tensor]  # of weight (K, d) and bias (K,)


def counts_by_signs(weight_gradient: Tensor, num_samples: int) -> Tensor:
    """One sample for each of the classes whose row holds the lowest entries.

    Source: Yin et al. (2021).
    """
    num_classes = len(weight_gradient)
    if num_samples > num_classes:
        raise InputError(
            "update",
            f"at most {num_classes} samples, one per class, for method 'signs'",
            num_samples,
            "use method 'moments', which counts repeated labels",
        )
    counts = torch.zeros(num_classes, dtype=torch.int64)
    lowest = weight_gradient.amin(1).argsort(stable=True)[:num_samples]
    counts[lowest] = 1
    return counts


def counts_by_llg(
    weight_gradient: Tensor,
    num_samples: int,
    *,
    impact: float | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Label Leakage from Gradients: subtract one label at a time from the row sums.

    A class with a negative sum occurs. Every label found takes its impact out of the
    sum of its own class, the one that was just picked; then the lowest sum is next.

    Args:
        weight_gradient: (K, d), of features that are not negative.
        num_samples: Number of labels N.
        impact: What one label adds to the sum of its class, below 0; the mean of the
            negative sums, times 1 + 1 / K, where ``None``.
        offset: Sums of a batch in which the class does not occur, (K,); zeros where
            ``None``.

    Returns:
        Counts (K,).

    Source: Wainakh et al. (2022).
    """
    sums = weight_gradient.sum(1)
    num_classes = len(sums)
    if impact is None:
        impact = float(sums.clamp_max(0).sum()) / num_samples * (1 + 1 / num_classes)
    counts = torch.zeros(num_classes, dtype=torch.int64)
    present = (sums < 0).nonzero().flatten()
    present = present[sums[present].argsort(stable=True)][:num_samples]
    left = sums if offset is None else sums - offset
    counts[present] = 1
    left = left - impact * counts
    while int(counts.sum()) < num_samples:
        lowest = int(left.argmin())
        counts[lowest] += 1
        left[lowest] -= impact
    return counts


def dummy_impact(
    layer: LastLayer, features: Tensor, num_samples: int
) -> tuple[float, Tensor]:
    """Impact of one label and offsets (K,) for LLG*, measured with dummy images."""
    sums = features.sum(1)
    probabilities = (features @ layer.weight.T + layer.bias).softmax(1)
    own = ((probabilities - 1) * sums[:, None]).mean()
    impact = float(own) / num_samples * (1 + 1 / layer.num_classes)
    return impact, (probabilities * sums[:, None]).mean(0)


def counts_by_moments(
    update: SharedUpdate, layer: LastLayer, num_samples: int, seed: int
) -> Tensor:
    """Counts (K,) of one gradient: N times mean prediction minus bias gradient.

    The mean feature of the batch follows from the gradient itself; dummy images only
    say how features scatter around it. From first counts follow the features of each
    class, from these the predictions per class, and from these better counts.
    """
    features = dummy_features(update, seed)
    weight_gradient, bias_gradient = mean_gradient(update, layer, (num_samples,))
    gradient = with_bias(weight_gradient, bias_gradient, features)
    scatter = features - features.mean(0)
    if update.normalized:
        return _counts_of_unknown_scale(gradient, layer, num_samples, scatter)
    lowest = bounds_of_one_step(update, layer, num_samples)
    counts, _ = _fit(gradient, layer, num_samples, scatter, lowest)
    return nearest_counts(counts, num_samples, lowest)


def bounds_of_one_step(
    update: SharedUpdate, layer: LastLayer, num_samples: int
) -> Tensor:
    """What one gradient proves about the counts, (K,); see ``certain_counts``."""
    _, bias = mean_gradient(update, layer, (num_samples,))
    if bias is None:
        return torch.zeros(layer.num_classes, dtype=torch.int64)
    noise = bias_noise(update, layer, (num_samples,))
    return certain_counts(bias, num_samples, noise)


def certain_counts(bias_gradient: Tensor, num_samples: int, noise: float) -> Tensor:
    r"""Labels (K,) that the bias gradient proves: at least :math:`-N g_k` of class k.

    Predictions are not negative, so :math:`n_k = N (\bar p_k - g_k) \ge -N g_k`. Where
    the bounds add up to N they are the counts.

    Args:
        bias_gradient: (K,), a mean in which every sample has the same weight.
        num_samples: Number of samples N.
        noise: Standard deviation of each entry.

    Returns:
        Lower bounds (K,), int64; zeros where noise makes them contradict N.
    """
    slack = 1e-3 + num_samples * (1e-6 + 4 * noise)
    lowest = (-num_samples * bias_gradient - slack).ceil().clamp_min(0).long()
    return lowest if int(lowest.sum()) <= num_samples else torch.zeros_like(lowest)


def nearest_counts(
    estimate: Tensor, num_samples: int, lowest: Tensor | None = None
) -> Tensor:
    """Integers that add up to N and are nearest to an estimate, by largest remainder.

    Args:
        estimate: Real numbers (K,) of any sign and sum.
        num_samples: The sum N.
        lowest: Counts (K,) that are certain; zeros where ``None``.

    Returns:
        Counts (K,), int64.
    """
    if lowest is None:
        lowest = torch.zeros(len(estimate), dtype=torch.int64)
    total = num_samples - int(lowest.sum())
    finite = torch.nan_to_num(estimate.double()).clamp(-_HUGE, _HUGE)
    rest = finite - lowest
    # Euclidean projection onto the non-negative numbers with this sum.
    falling = rest.sort(descending=True).values
    excess = (falling.cumsum(0) - total) / torch.arange(1, len(rest) + 1)
    last = int((falling > excess).sum()) - 1
    rest = (rest - excess[max(last, 0)]).clamp_min(0)
    counts = rest.floor().long()
    missing = total - int(counts.sum())
    if missing > 0:
        counts[(rest - counts).argsort(descending=True, stable=True)[:missing]] += 1
    return counts + lowest


# --- one gradient ------------------------------------------------------------------


def with_bias(weight: Tensor, bias: Tensor | None, features: Tensor) -> Gradient:
    """Weight gradient and bias gradient; without a bias, what it would be.

    A direction along which the features of dummy images are near 1 stands in for the
    constant input of the bias.
    """
    if bias is None:
        mean = features.mean(0)
        bias = weight @ mean / mean.square().sum()
    if not bool(bias.any()):
        raise InputError("update", "a non-zero gradient in the last layer", "all zeros")
    return weight, bias


def _fit(
    gradient: Gradient,
    layer: LastLayer,
    num_samples: int,
    scatter: Tensor,
    lowest: Tensor,
) -> tuple[Tensor, Tensor]:
    """Counts (K,) and features of every class (K, d) that explain a gradient."""
    weight, bias = gradient
    features = mean_feature(gradient).expand(len(bias), -1)
    for refinement in range(_REFINEMENTS + 1):
        predictions = predictions_of(layer.weight, layer.bias, features, scatter)
        counts = _solve_counts(predictions, bias, num_samples)
        if refinement < _REFINEMENTS:
            counts = torch.maximum(counts, lowest)
            counts = counts * (num_samples / counts.sum())
            errors = _class_errors(predictions, counts, num_samples)
            features = features + _ridge(errors, weight - errors @ features)
    return counts, features


def mean_feature(gradient: Gradient) -> Tensor:
    """The feature (d,) by which each bias gradient is multiplied in its row."""
    weight, bias = gradient
    return weight.T @ bias / bias.square().sum()


def mean_prediction(gradient: Gradient, layer: LastLayer, features: Tensor) -> Tensor:
    """Mean prediction (K,) for the mean feature of a gradient, scattered as dummies."""
    scatter = features - features.mean(0)
    mean = mean_feature(gradient)[None]
    return predictions_of(layer.weight, layer.bias, mean, scatter)[0]


def predictions_of(
    weight: Tensor, bias: Tensor, features: Tensor, scatter: Tensor
) -> Tensor:
    """Softmax output (M, K) for features (M, d), averaged over their scatter (S, d)."""
    logits = (features @ weight.T + bias)[:, None] + scatter @ weight.T  # (M, S, K)
    return logits.softmax(2).mean(1)


def _solve_counts(predictions: Tensor, bias: Tensor, num_samples: int) -> Tensor:
    """Counts (K,) with sum N that explain the bias gradient best; a little ridge.

    Entry k of N times the bias gradient is the sum over classes j of
    ``counts[j] * (predictions[j, k] - (j == k))``.
    """
    num_classes = len(bias)
    identity = torch.eye(num_classes, dtype=bias.dtype)
    even = torch.full_like(bias, num_samples / num_classes)
    system = (predictions - identity).T
    ones = torch.ones(1, num_classes, dtype=bias.dtype)
    balanced = torch.linalg.svd(ones)[2][1:].T  # directions of sum 0, (K, K - 1)
    reduced = system @ balanced
    normal = reduced.T @ reduced + _COUNT_RIDGE * identity[1:, 1:]
    right = reduced.T @ (num_samples * bias - system @ even)
    return even + balanced @ torch.linalg.solve(normal, right)


def _class_errors(predictions: Tensor, counts: Tensor, num_samples: int) -> Tensor:
    """Column j: the share of class j times its mean prediction minus its label."""
    identity = torch.eye(len(counts), dtype=counts.dtype)
    return ((predictions - identity) * (counts / num_samples)[:, None]).T


def _ridge(matrix: Tensor, right: Tensor) -> Tensor:
    """Least-norm solution of ``matrix @ x = right``, damped."""
    gram = matrix @ matrix.T
    damping = _FEATURE_RIDGE * float(gram.trace()) / len(gram)
    damping = max(damping, torch.finfo(gram.dtype).tiny)
    identity = torch.eye(len(gram), dtype=gram.dtype)
    return matrix.T @ torch.linalg.solve(gram + damping * identity, right)


def _counts_of_unknown_scale(
    gradient: Gradient, layer: LastLayer, num_samples: int, scatter: Tensor
) -> Tensor:
    """Counts of a normalised gradient: as if some class did not occur.

    Then its count of zero says what the gradient was divided by.
    """
    weight, bias = gradient
    num_classes = len(bias)
    if num_samples >= num_classes:
        raise InputError(
            "update",
            f"fewer than {num_classes} samples where the scale is unknown",
            num_samples,
            "use method 'llg', which needs no scale",
        )
    features = mean_feature(gradient).expand(num_classes, -1)
    lowest = torch.zeros(num_classes, dtype=torch.int64)
    for _ in range(_REFINEMENTS):
        expected = predictions_of(layer.weight, layer.bias, features, scatter).mean(0)
        scale = float((expected / bias)[bias > 0].min())
        scaled = (scale * weight, scale * bias)
        counts, features = _fit(scaled, layer, num_samples, scatter, lowest)
    return nearest_counts(counts, num_samples)
