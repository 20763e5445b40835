"""How far a dummy gradient is from the shared one.

A distance takes the gradients of T dummy batches and the shared ones, and returns one
value per trial together with its derivative with respect to the dummy gradients. The
derivative is what the pull-back of a gradient map turns into image gradients, so a new
distance is two formulas and no graph. Distances combine: ``weighted``, ``top_k`` and
``only_layers`` turn one into another.

Taught in: notebooks/02_dlg_four_steps and notebooks/03_stronger_matching.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from gradinv_helpers.attacks.gradients import GradientMap, Gradients, Pullback
from gradinv_helpers.errors import InputError, check_number

# (dummy gradients, shared gradients) -> (value (T,), derivatives like the dummy)
Distance = Callable[[Gradients, Gradients], tuple[Tensor, Gradients]]


def squared_error(dummy: Gradients, target: Gradients) -> tuple[Tensor, Gradients]:
    r"""Relative squared distance over all layers, and its derivative.

    :math:`D = \sum_l \|g'_l - g_l\|^2 / \sum_l \|g_l\|^2`: the squared error of DLG,
    divided by a constant so that 1 means "no better than the zero gradient" for every
    model. It is minus a log-likelihood under equal Gaussian noise on all entries.

    Args:
        dummy: One (T, ...) tensor per parameter: gradients of the dummy batches.
        target: The shared gradient of every trial, same shapes.

    Returns:
        D (T,), and its derivative with respect to every tensor of ``dummy``.

    Source: Zhu et al. (2019), Eq. 4. Taught in: notebooks/02_dlg_four_steps.
    """
    scale = squared_norm(target)
    errors = [g - t for g, t in zip(dummy, target, strict=True)]
    derivatives = [e * (2 / _like(scale, e)) for e in errors]
    return squared_norm(errors) / scale, derivatives


def cosine_distance(dummy: Gradients, target: Gradients) -> tuple[Tensor, Gradients]:
    r"""One minus the cosine between two gradients, and its derivative.

    :math:`D = 1 - \langle g', g \rangle / (\|g'\| \, \|g\|)`, over all layers as one
    long vector. It is the squared error with an unknown positive scale profiled out:
    :math:`\min_a \|g - a g'\|^2 = \|g\|^2 (1 - \cos^2)`.

    Args:
        dummy: One (T, ...) tensor per parameter: gradients of the dummy batches.
        target: The shared gradient of every trial, same shapes.

    Returns:
        D (T,) in [0, 2], and its derivative with respect to every tensor of ``dummy``.

    Source: Geiping et al. (2020), Eq. 4. Taught in: notebooks/02_dlg_four_steps.
    """
    length = squared_norm(dummy).sqrt().clamp_min(1e-30)
    size = length * squared_norm(target).sqrt()
    product = torch.stack(
        [(g * t).flatten(1).sum(1) for g, t in zip(dummy, target, strict=True)]
    ).sum(0)
    cosine = product / size
    derivatives = [
        g * _like(cosine / length.square(), g) - t * _like(1 / size, t)
        for g, t in zip(dummy, target, strict=True)
    ]
    return 1 - cosine, derivatives


def absolute_error(dummy: Gradients, target: Gradients) -> tuple[Tensor, Gradients]:
    r"""Relative absolute distance over all layers, and its derivative.

    :math:`D = \sum_l \|g'_l - g_l\|_1 / \sum_l \|g_l\|_1`: minus a log-likelihood under
    equal Laplace noise on all entries, divided by a constant. A few entries that are
    far off, as after sparse noise, count less than in the squared error.

    Args:
        dummy: One (T, ...) tensor per parameter: gradients of the dummy batches.
        target: The shared gradient of every trial, same shapes.

    Returns:
        D (T,), and its derivative with respect to every tensor of ``dummy``.

    Source: Deng et al. (2021), TAG, who add this term to the squared error.
    Taught in: notebooks/03_stronger_matching.
    """
    scale = _absolute_sum(target).clamp_min(1e-30)
    errors = [g - t for g, t in zip(dummy, target, strict=True)]
    derivatives = [torch.sign(e) / _like(scale, e) for e in errors]
    return _absolute_sum(errors) / scale, derivatives


def layerwise_squared_error(
    dummy: Gradients, target: Gradients
) -> tuple[Tensor, Gradients]:
    r"""Mean over the layers of their relative squared distances, and its derivative.

    :math:`D = \frac{1}{L} \sum_l \|g'_l - g_l\|^2 / \|g_l\|^2`: every parameter tensor
    counts the same, however large its gradient is. It is the squared error of a noise
    whose standard deviation is proportional to the gradient of each layer.

    Args:
        dummy: One (T, ...) tensor per parameter: gradients of the dummy batches.
        target: The shared gradient of every trial, same shapes. Layers whose gradient
            is zero count by the mean square of the others.

    Returns:
        D (T,), and its derivative with respect to every tensor of ``dummy``.

    Taught in: notebooks/03_stronger_matching.
    """
    squares = torch.stack([t.flatten(1).square().sum(1) for t in target])  # (L, T)
    squares = torch.where(squares > 0, squares, squares.mean(0).clamp_min(1e-30))
    errors = [g - t for g, t in zip(dummy, target, strict=True)]
    value = torch.stack(
        [e.flatten(1).square().sum(1) / s for e, s in zip(errors, squares, strict=True)]
    )
    count = len(errors)
    derivatives = [
        e * _like(2 / (count * s), e) for e, s in zip(errors, squares, strict=True)
    ]
    return value.mean(0), derivatives


def gaussian_likelihood(std: float | Sequence[float | Tensor]) -> Distance:
    r"""Minus the log-likelihood of Gaussian noise of a known size, up to a constant.

    :math:`D = \frac12 \sum_i (g'_i - g_i)^2 / \sigma_i^2`. Its unit is nats, so it
    adds to minus the logarithm of a prior without a free weight.

    Args:
        std: One standard deviation for all entries, or a sequence with one number or
            one tensor of the parameter's shape for every parameter: a diagonal
            covariance.

    Returns:
        The distance.

    Raises:
        InputError: A standard deviation is not a finite number above 0.

    Source: Balunovic et al. (2022), Section 4, who derive matching losses this way.
    Taught in: notebooks/03_stronger_matching.
    """
    _check_scales("std", std)

    def distance(dummy: Gradients, target: Gradients) -> tuple[Tensor, Gradients]:
        scales = _scales("std", std, target)
        errors = [(g - t) / s for g, t, s in zip(dummy, target, scales, strict=True)]
        derivatives = [e / s for e, s in zip(errors, scales, strict=True)]
        return squared_norm(errors) / 2, derivatives

    return distance


def laplace_likelihood(scale: float | Sequence[float | Tensor]) -> Distance:
    r"""Minus the log-likelihood of Laplace noise of a known size, up to a constant.

    :math:`D = \sum_i |g'_i - g_i| / b_i`, in nats; the noise has standard deviation
    :math:`\sqrt2\,b_i`. The mean of several Laplace noises is not Laplace: use it for
    noise that was added once.

    Args:
        scale: The scale b, given as for ``gaussian_likelihood``.

    Returns:
        The distance.

    Raises:
        InputError: A scale is not a finite number above 0.

    Source: Balunovic et al. (2022), Section 4.
    Taught in: notebooks/03_stronger_matching.
    """
    _check_scales("scale", scale)

    def distance(dummy: Gradients, target: Gradients) -> tuple[Tensor, Gradients]:
        scales = _scales("scale", scale, target)
        errors = [(g - t) / s for g, t, s in zip(dummy, target, scales, strict=True)]
        derivatives = [torch.sign(e) / s for e, s in zip(errors, scales, strict=True)]
        return _absolute_sum(errors), derivatives

    return distance


def weighted(distance: Distance, weights: Sequence[float]) -> Distance:
    """Let some layers count more than others.

    Both gradients are multiplied by the square roots of the weights before they are
    compared, so that the squared error of a layer counts by its weight.

    Args:
        distance: Any distance.
        weights: One number of at least 0 per parameter, in the order of the model.

    Returns:
        The weighted distance.

    Raises:
        InputError: A weight is negative or not finite, all are zero, or their number
            is not that of the parameters (at the first use).

    Taught in: notebooks/03_stronger_matching.
    """
    for weight in weights:
        check_number("weights", weight)
    if not any(weights):
        raise InputError("weights", "at least one weight above 0", list(weights))
    roots = [math.sqrt(weight) for weight in weights]

    def combined(dummy: Gradients, target: Gradients) -> tuple[Tensor, Gradients]:
        _check_length("weights", roots, target)
        value, derivatives = distance(
            [g * r for g, r in zip(dummy, roots, strict=True)],
            [t * r for t, r in zip(target, roots, strict=True)],
        )
        return value, [d * r for d, r in zip(derivatives, roots, strict=True)]

    return combined


def only_layers(distance: Distance, kept: Collection[int]) -> Distance:
    """Compare some parameters only.

    This is what an attacker does who knows that the others were changed by a defence,
    or who never received them.

    Args:
        distance: Any distance.
        kept: Indices of the parameters that count, in the order of the model.

    Returns:
        The partial distance; the derivative of the others is zero.

    Raises:
        InputError: No index, or (at the first use) one that the model does not have.

    Taught in: notebooks/03_stronger_matching.
    """
    chosen = sorted(set(kept))
    if not chosen:
        raise InputError("kept", "at least one parameter", "none")

    def combined(dummy: Gradients, target: Gradients) -> tuple[Tensor, Gradients]:
        if chosen[0] < 0 or chosen[-1] >= len(target):
            raise InputError(
                "kept", f"indices of parameters from 0 to {len(target) - 1}", chosen
            )
        value, some = distance([dummy[i] for i in chosen], [target[i] for i in chosen])
        derivatives = [torch.zeros_like(g) for g in dummy]
        for i, derivative in zip(chosen, some, strict=True):
            derivatives[i] = derivative
        return value, derivatives

    return combined


def top_k(distance: Distance, share: float) -> Distance:
    """Compare the largest entries of the shared gradient only.

    The entries are chosen over all parameters together, per trial. An update that was
    pruned to its largest entries is compared where it still says something.

    Args:
        distance: Any distance.
        share: Share of the entries that count, above 0 and at most 1.

    Returns:
        The distance between the kept entries.

    Raises:
        InputError: The share is out of range.

    Taught in: notebooks/03_stronger_matching.
    """
    if not 0 < check_number("share", share) <= 1:
        raise InputError("share", "a number above 0 and at most 1", share)

    def combined(dummy: Gradients, target: Gradients) -> tuple[Tensor, Gradients]:
        sizes = torch.cat([t.flatten(1).abs() for t in target], 1)
        count = max(1, round(share * sizes.shape[1]))
        limit = sizes.topk(count, sorted=False).values.amin(1)
        masks = [(t.abs() >= _like(limit, t)).to(t) for t in target]
        value, derivatives = distance(
            [g * m for g, m in zip(dummy, masks, strict=True)],
            [t * m for t, m in zip(target, masks, strict=True)],
        )
        return value, [d * m for d, m in zip(derivatives, masks, strict=True)]

    return combined


DISTANCES: dict[str, Distance] = {
    "squared": squared_error,
    "cosine": cosine_distance,
    "absolute": absolute_error,
    "layerwise": layerwise_squared_error,
}


def squared_norm(gradients: Gradients) -> Tensor:
    """Sum of squares over all parameters, per trial: (T,)."""
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)


def normalized_groups(gradient_map: GradientMap, sizes: tuple[int, ...]) -> GradientMap:
    """The update of an aggregate whose clients send gradients of unit L2 norm.

    Images 0 to n_1 - 1 belong to the first client, and so on. The result is the mean
    of the normalised client gradients, weighted by their numbers of samples.

    Args:
        gradient_map: The map of one client.
        sizes: Images of every client.

    Taught in: notebooks/02_dlg_four_steps.
    """
    total = sum(sizes)

    def mapped(images: Tensor, targets: Tensor) -> tuple[Gradients, Pullback]:
        parts = []
        groups = zip(images.split(sizes, 1), targets.split(sizes, 1), strict=True)
        for size, (x, y) in zip(sizes, groups, strict=True):
            gradients, pullback = gradient_map(x, y)
            norm = squared_norm(gradients).clamp_min(1e-30).sqrt()
            unit = [g / _like(norm, g) for g in gradients]
            parts.append((size / total, unit, norm, pullback))
        mean = [
            torch.stack([weight * unit[i] for weight, unit, _, _ in parts]).sum(0)
            for i in range(len(parts[0][1]))
        ]

        def pull(cotangents: Gradients) -> tuple[Tensor, Tensor]:
            back = []
            for weight, unit, norm, pullback in parts:
                along = torch.stack(
                    [
                        (u * v).flatten(1).sum(1)
                        for u, v in zip(unit, cotangents, strict=True)
                    ]
                ).sum(0)
                across = [
                    (v - u * _like(along, u)) * _like(weight / norm, u)
                    for u, v in zip(unit, cotangents, strict=True)
                ]
                back.append(pullback(across))
            return torch.cat([b[0] for b in back], 1), torch.cat(
                [b[1] for b in back], 1
            )

        return mean, pull

    return mapped


def _like(per_trial: Tensor, reference: Tensor) -> Tensor:
    """View (T,) as (T, 1, ..., 1), to broadcast against ``reference``."""
    return per_trial.view(-1, *(1,) * (reference.dim() - 1))


def _absolute_sum(gradients: Gradients) -> Tensor:
    return torch.stack([g.flatten(1).abs().sum(1) for g in gradients]).sum(0)


def _check_length(argument: str, given: Sequence[object], target: Gradients) -> None:
    if len(given) != len(target):
        raise InputError(
            argument, f"one entry for each of {len(target)} parameters", len(given)
        )


def _check_scales(argument: str, given: float | Sequence[float | Tensor]) -> None:
    for entry in given if isinstance(given, Sequence) else [given]:
        values = torch.as_tensor(entry, dtype=torch.float64)
        if not bool((values.isfinite() & (values > 0)).all()):
            raise InputError(argument, "finite numbers above 0", entry)


def _scales(
    argument: str, given: float | Sequence[float | Tensor], target: Gradients
) -> list[Tensor]:
    """One tensor per parameter that divides its (T, ...) gradients."""
    if not isinstance(given, Sequence):
        return [t.new_tensor(given) for t in target]
    _check_length(argument, given, target)
    return [torch.as_tensor(e).to(t) for e, t in zip(given, target, strict=True)]
