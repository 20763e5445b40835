"""From mixtures of images back to the images.

Taught in: notebooks/08_differential_privacy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradinv_helpers.errors import InputError

_LEAST = 0.02  # share of a label that is more than an error


def mixing_weights(label_shares: Tensor) -> Tensor:
    r"""Read the weights of a batch that was mixed in pairs off its labels.

    A mixture that is mostly of class a and for the rest of class b was made of the one
    image of class a and of the one of class b. So every class has to be the larger part
    of exactly one mixture; the weight is the mean of the larger parts.

    Args:
        label_shares: Class probabilities (N, K) of the mixtures, each of two classes,
            as ``map_estimate`` finds them.

    Returns:
        Weights (N, N): row i says how much of every image is in mixture i. Image i is
        the larger part of mixture i.

    Raises:
        InputError: Two mixtures have the same larger part, or one has a smaller part
            that is the larger one of none.

    Taught in: notebooks/08_differential_privacy.
    """
    if label_shares.dim() != 2 or label_shares.shape[1] < 2:
        expected = "shape (N, classes)"
        raise InputError("label_shares", expected, tuple(label_shares.shape))
    parts, classes = label_shares.double().topk(2, dim=1)
    owners = {int(label): i for i, label in enumerate(classes[:, 0])}
    missing = [i for i, label in enumerate(classes[:, 1]) if int(label) not in owners]
    if len(owners) < len(classes) or missing or bool((parts[:, 1] < _LEAST).any()):
        raise InputError(
            "label_shares",
            "mixtures of two classes, each the larger part of exactly one",
            classes.tolist(),
            "labels alone do not tell which images were mixed",
        )
    weight = float((parts[:, 0] / parts.sum(1)).mean())
    weights = weight * torch.eye(len(classes), dtype=torch.float64)
    for i, label in enumerate(classes[:, 1].tolist()):
        weights[i, owners[label]] = 1 - weight
    return weights


def unmix(mixtures: Tensor, weights: Tensor) -> Tensor:
    r"""Take mixtures of images apart, where the weights of all of them are known.

    Mixtures :math:`m = W x` give the images back by least squares if W has full rank.
    A batch that was mixed within itself with one weight :math:`\lambda` does, unless
    its cycle of pairs is even and :math:`\lambda = 1/2`; so do two rounds that mix the
    same pair with different weights. One mixture of two images does not: half of it is
    missing.

    Args:
        mixtures: Shape (M, C, H, W).
        weights: Shape (M, N): how much of every image is in every mixture.

    Returns:
        Images (N, C, H, W), not clamped.

    Raises:
        InputError: The shapes do not fit, or the weights leave images open.

    Taught in: notebooks/08_differential_privacy.
    """
    if weights.dim() != 2 or len(weights) != len(mixtures):
        expected = f"shape ({len(mixtures)}, images)"
        raise InputError("weights", expected, tuple(weights.shape))
    system = weights.double()
    rank = int(torch.linalg.matrix_rank(system))
    if rank < weights.shape[1]:
        raise InputError(
            "weights",
            f"rank {weights.shape[1]}, one equation for every image",
            rank,
            "another round that mixes the same images with other weights adds one",
        )
    flat = mixtures.double().flatten(1)
    solved = torch.linalg.lstsq(system.to(flat.device), flat).solution
    return solved.view(-1, *mixtures.shape[1:]).to(mixtures)
