"""How far a dummy gradient is from the shared one.

Taught in: notebooks/02_dlg_four_steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradinv_helpers.attacks.gradients import GradientMap, Gradients, Pullback


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
