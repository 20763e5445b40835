"""Two sums that differ in one client give its update away.

Taught in: notebooks/09_secure_aggregation.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import check_same_round
from gradinv_helpers.updates import SharedUpdate


def difference_updates(
    larger: SharedUpdate, smaller: SharedUpdate, *, same_noise: bool = False
) -> SharedUpdate:
    r"""Subtract the mean of a smaller cohort from that of a larger one.

    With cohorts :math:`A \supset B` of :math:`N_A` and :math:`N_B` samples,

    .. math:: g_{A \setminus B} = \frac{N_A \bar g_A - N_B \bar g_B}{N_A - N_B}.

    Errors grow by the same factors. The noise of the result is stated as

    .. math:: \sigma^2 = (N_A^2 \sigma_A^2 \pm N_B^2 \sigma_B^2) / (N_A - N_B)^2

    with a plus where the clients of B drew new noise for the second mean. With a minus
    both means hold the *same* noise of these clients, which cancels: they sent the same
    numbers twice, or rounded to the nearest whole number in the same steps. The
    rounding of the tensors of both means is counted as well.

    Args:
        larger: Mean over the cohort A.
        smaller: Mean over the cohort B, from the same model and recipe. All of its
            clients are in A.
        same_noise: Whether both means hold the same noise of the clients of B.

    Returns:
        The mean over the clients who are only in A: the update of a single client
        where the cohorts differ in one.

    Raises:
        InputError: The updates do not answer the same model with the same recipe, or
            B is not a smaller part of A.

    Taught in: notebooks/09_secure_aggregation.
    """
    check_same_round([larger, smaller])
    rest = Counter(larger.group_sizes or ())
    rest.subtract(Counter(smaller.group_sizes or ()))
    if min(rest.values()) < 0 or not any(rest.values()):
        raise InputError(
            "smaller",
            f"some, not all, of the clients with {larger.group_sizes} samples",
            f"clients with {smaller.group_sizes}",
        )
    total, part = larger.num_samples, smaller.num_samples
    left = total - part

    def subtract(one: Tensor, other: Tensor) -> Tensor:
        if not one.is_floating_point():  # BatchNorm counts its batches
            return one
        exact = total * one.double() - part * other.to(one.device).double()
        return (exact / left).to(one.dtype)

    tensors = {n: subtract(t, smaller.tensors[n]) for n, t in larger.tensors.items()}
    buffers = None
    if larger.buffers is not None and smaller.buffers is not None:
        others = smaller.buffers
        buffers = {n: subtract(t, others[n]) for n, t in larger.buffers.items()}
    old, new = total * larger.noise_std, part * smaller.noise_std
    variance = max(old**2 - new**2, 0.0) if same_noise else old**2 + new**2
    rounding = math.hypot(total * _rounding(larger), part * _rounding(smaller))
    return larger.replace_tensors(
        tensors,
        num_samples=left,
        group_sizes=tuple(rest.elements()),
        noise_std=math.hypot(variance**0.5, rounding) / left,
        buffers=buffers,
    )


def _rounding(update: SharedUpdate) -> float:
    """Typical rounding of the entries of an update."""
    entries = torch.cat([t.double().flatten() for t in update.tensors.values()])
    eps = torch.finfo(next(iter(update.tensors.values())).dtype).eps
    # A mantissa is off by up to eps / 2, evenly: 0.2 eps of the value on average.
    return 0.2 * eps * float(entries.square().mean().sqrt())
