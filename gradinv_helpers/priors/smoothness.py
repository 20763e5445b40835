"""Smoothness of images as a prior. Taught in: notebooks/02_dlg_four_steps."""

from __future__ import annotations

import torch
from torch import Tensor


def total_variation(images: Tensor, *, smoothing: float = 0.0) -> Tensor:
    r"""Mean absolute difference between neighbouring pixels (anisotropic).

    :math:`TV(x) = \overline{|x_{i+1,j} - x_{i,j}|} + \overline{|x_{i,j+1} - x_{i,j}|}`,
    the means being over all neighbours, channels and images. With ``smoothing`` s,
    |d| becomes sqrt(d² + s²) - s, which is differentiable everywhere, as line
    searches need.

    Args:
        images: Shape (..., N, C, H, W) with H, W >= 2.
        smoothing: Scale below which differences count quadratically.

    Returns:
        Shape (...): one value per leading index.

    Source: Rudin, Osher and Fatemi (1992); Geiping et al. (2020), Section 3, for the
    mean form. Taught in: notebooks/02_dlg_four_steps.
    """

    def size(differences: Tensor) -> Tensor:
        if smoothing:
            differences = torch.sqrt(differences.square() + smoothing**2) - smoothing
        return differences.abs().mean((-4, -3, -2, -1))

    down = images[..., 1:, :] - images[..., :-1, :]
    right = images[..., :, 1:] - images[..., :, :-1]
    return size(down) + size(right)
