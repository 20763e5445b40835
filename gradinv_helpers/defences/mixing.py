"""Mixup: gradients of images that were mixed in pairs.

Taught in: notebooks/08_differential_privacy.
"""

from __future__ import annotations

import torch
from torch import nn

from gradinv_helpers.data import Images
from gradinv_helpers.encoding import Encoding
from gradinv_helpers.errors import InputError, check_number
from gradinv_helpers.updates import SharedUpdate, local_update


def mixup_update(
    model: nn.Module,
    images: Images,
    *,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
) -> SharedUpdate:
    r"""Compute the gradient of a batch whose images were mixed in pairs.

    With one :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)` for the batch and a
    random cycle of its images, image i and its label become
    :math:`\lambda x_i + (1 - \lambda) x_{\pi(i)}`, and likewise for labels. No image
    is mixed with itself. Only alpha is public; the update says that it is ``mixed``.

    Args:
        model: The model received from the server; it is left as it was.
        images: The client's private images, at least two.
        alpha: Concentration of the mixing weight, above 0: small values hardly mix.
        generator: Source of the weight and of the pairs; torch's global one where
            ``None``.

    Returns:
        The update, of as many mixtures as there are images.

    Raises:
        InputError: Fewer than two images, or alpha out of range.

    Source: Zhang et al. (2018), Section 2.
    Taught in: notebooks/08_differential_privacy.
    """
    check_number("alpha", alpha, exclusive=True)
    if len(images) < 2:
        raise InputError("images", "at least two images to mix", len(images))
    weight = _beta(alpha, generator)
    cycle = torch.randperm(len(images), generator=generator)
    partner = torch.empty_like(cycle)
    partner[cycle] = cycle.roll(1)

    mixed = weight * images.pixels + (1 - weight) * images.pixels[partner]
    # The loss of a mixed label is the same mixture of the losses of its two labels.
    own, other = (
        local_update(model, Images(mixed, labels, images.class_names))
        for labels in (images.labels, images.labels[partner])
    )
    mean = {
        name: weight * tensor + (1 - weight) * other.tensors[name]
        for name, tensor in own.tensors.items()
    }
    return own.replace_tensors(mean, encoding=Encoding("mixed"))


def _beta(alpha: float, generator: torch.Generator | None) -> float:
    """One draw of Beta(alpha, alpha), which torch draws without a generator only."""
    shape = torch.full((2,), alpha, dtype=torch.float64)
    first, second = torch._standard_gamma(shape, generator=generator).tolist()
    return first / (first + second) if first + second > 0 else 0.5
