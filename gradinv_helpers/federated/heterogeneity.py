"""How differently clients are supplied: label histograms and their distances.

These look at private labels: they describe an experiment and are no part of an attack.
Taught in: notebooks/07_iid_noniid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradinv_helpers.errors import InputError
from gradinv_helpers.partition import Client
from gradinv_helpers.updates import SharedUpdate


def label_histograms(clients: Sequence[Client]) -> Tensor:
    """Count the images of every class at every client.

    Args:
        clients: Clients with images of the same classes.

    Returns:
        (clients, K), int64.

    Raises:
        InputError: No clients, or clients whose images have other classes.

    Taught in: notebooks/07_iid_noniid.
    """
    if not clients:
        raise InputError("clients", "at least one client", "none")
    num_classes = clients[0].images.num_classes
    if any(c.images.num_classes != num_classes for c in clients):
        raise InputError("clients", f"images of {num_classes} classes in all", "others")
    return torch.stack(
        [c.images.labels.cpu().bincount(minlength=num_classes) for c in clients]
    )


def total_variation(shares: Tensor, others: Tensor) -> Tensor:
    r"""Compute the total variation distance :math:`\frac12 \sum_c |p_c - q_c|`.

    It is the share of images whose label has to change to turn one mix into the other:
    0 for equal mixes, 1 for mixes without a common class.

    Args:
        shares: Counts or shares (..., K) of non-negative numbers; each row is divided
            by its sum.
        others: The same, of a shape that broadcasts.

    Returns:
        Distances (...), float64, in [0, 1].

    Raises:
        InputError: Negative numbers, or a row of zeros.

    Taught in: notebooks/07_iid_noniid.

    >>> float(total_variation(torch.tensor([3, 1]), torch.tensor([1, 1])))
    0.25
    """
    rows = []
    for name, given in (("shares", shares), ("others", others)):
        row = given.double()
        total = row.sum(-1, keepdim=True)
        if bool((row < 0).any()) or not bool((total > 0).all()):
            raise InputError(name, "non-negative numbers, some above 0", given.tolist())
        rows.append(row / total)
    return (rows[0] - rows[1]).abs().sum(-1) / 2


def update_similarity(updates: Sequence[SharedUpdate]) -> float:
    """Compute the mean cosine between the updates of different clients.

    Near 1 where all clients pull the model the same way, near 0 or below where each
    pulls its own. Local epochs on different labels lower it: client drift.

    Args:
        updates: Two or more updates of one model.

    Returns:
        A number in [-1, 1]; a zero update counts as cosine 0.

    Raises:
        InputError: Fewer than two updates.

    Taught in: notebooks/07_iid_noniid.
    """
    if len(updates) < 2:
        raise InputError("updates", "at least two updates", len(updates))
    flat = torch.stack(
        [torch.cat([t.double().flatten() for t in u.tensors.values()]) for u in updates]
    )
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-300)
    count = len(flat)
    cosines = flat @ flat.T
    return float((cosines.sum() - cosines.trace()) / (count * (count - 1)))
