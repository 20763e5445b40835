r"""The gradient map of clients that clip the gradient of every sample.

Differentially private training sends
:math:`\bar g = \frac1B \sum_i g_i \min(1, C / \|g_i\|)` plus noise, where :math:`g_i`
is the gradient of sample i over all layers. An attack that leaves the clipping out of
its forward map looks for images whose plain gradient is a clipped one.

Taught in: notebooks/05_vae_prior.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradinv_helpers.attacks.gradients import GradientMap, Gradients, Pullback
from gradinv_helpers.attacks.matching import squared_norm
from gradinv_helpers.errors import check_number


def clipped(gradient_map: GradientMap, clip_norm: float) -> GradientMap:
    r"""Clip the gradient of every sample before the mean over samples is taken.

    The pull-back of a cotangent v is that of :math:`v / B` for samples within the
    bound, and that of :math:`\frac{C}{B \|g_i\|} (v - \hat g_i \langle \hat g_i, v
    \rangle)`, with :math:`\hat g_i = g_i / \|g_i\|`, for samples beyond it.

    Args:
        gradient_map: The map of the mean gradient of a batch; it is called with
            batches of one sample, all samples of all trials together.
        clip_norm: Largest L2 norm C of a sample's gradient.

    Returns:
        A map of the same form. It keeps B times as many gradients.

    Raises:
        InputError: The norm is not a finite number above 0.

    Source: Abadi et al. (2016), Algorithm 1, without its noise.
    Taught in: notebooks/05_vae_prior.
    """
    bound = check_number("clip_norm", clip_norm, exclusive=True)

    def mapped(images: Tensor, targets: Tensor) -> tuple[Gradients, Pullback]:
        batch = targets.shape[:2]
        singles, pullback = gradient_map(
            images.flatten(0, 1)[:, None], targets.flatten(0, 1)[:, None]
        )
        norm = squared_norm(singles).clamp_min(1e-300 if _is_double(singles) else 1e-36)
        norm = norm.sqrt()
        factor = (bound / norm).clamp_max(1)
        means = [(g * _like(factor, g)).unflatten(0, batch).mean(1) for g in singles]

        def pull(cotangents: Gradients) -> tuple[Tensor, Tensor]:
            spread = [v.repeat_interleave(batch[1], 0) / batch[1] for v in cotangents]
            pairs = list(zip(singles, spread, strict=True))
            along = torch.stack([(g * v).flatten(1).sum(1) for g, v in pairs]).sum(0)
            # Beyond the bound only the direction of a gradient counts.
            lost = torch.where(norm > bound, along / norm.square(), 0)
            parts = [(v - g * _like(lost, g)) * _like(factor, g) for g, v in pairs]
            to_images, to_targets = pullback(parts)
            return (
                to_images[:, 0].unflatten(0, batch),
                to_targets[:, 0].unflatten(0, batch),
            )

        return means, pull

    return mapped


def _is_double(gradients: Gradients) -> bool:
    return gradients[0].dtype == torch.float64


def _like(per_sample: Tensor, reference: Tensor) -> Tensor:
    return per_sample.view(-1, *(1,) * (reference.dim() - 1))
