"""Bring samples of exchangeable images into one order.

The gradient of a batch does not say which image of a class comes first: a posterior has
as many equal modes as there are orders. An average over them is a blur of the class, so
every sample is brought into the order of a reference first.

Taught in: notebooks/05_vae_prior.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradinv_helpers.errors import InputError


def align_images(samples: Tensor, reference: Tensor, groups: Tensor) -> Tensor:
    """Find the order in which each sample's images come closest to a reference.

    Args:
        samples: Images or latents (S, N, ...).
        reference: One set of them (N, ...).
        groups: What may change places, (N,): images with equal numbers, such as their
            labels.

    Returns:
        Indices (S, N): ``samples[s][order[s]]`` has the least squared distance to the
        reference.

    Raises:
        InputError: The shapes do not go together.

    Source: Kuhn (1955) for the assignment.
    Taught in: notebooks/05_vae_prior.
    """
    from scipy.optimize import linear_sum_assignment

    if samples.shape[1:] != reference.shape:
        expected = f"samples of shape (S, {', '.join(map(str, reference.shape))})"
        raise InputError("samples", expected, tuple(samples.shape))
    if groups.shape != reference.shape[:1]:
        raise InputError("groups", f"shape ({len(reference)},)", tuple(groups.shape))
    order = torch.arange(len(reference)).repeat(len(samples), 1)
    for group in groups.unique():
        places = (groups == group).nonzero()[:, 0].cpu()
        if len(places) == 1:
            continue
        own = samples[:, places.to(samples.device)].flatten(2).double()
        fixed = reference[places.to(reference.device)].flatten(1).double().to(own)
        costs = (own.square().sum(2)[:, None] - 2 * fixed @ own.mT).cpu().numpy()
        for row, cost in zip(order, costs, strict=True):
            row[places] = places[torch.from_numpy(linear_sum_assignment(cost)[1])]
    return order


def reorder(samples: Tensor, order: Tensor) -> Tensor:
    """Apply the orders (S, N) of ``align_images`` to samples (S, N, ...).

    Taught in: notebooks/05_vae_prior.
    """
    rows = torch.arange(len(samples), device=samples.device)[:, None]
    return samples[rows, order.to(samples.device)]
