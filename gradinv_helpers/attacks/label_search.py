"""Labels of an update: given, counted, or found by the likelihood of its messages.

Taught in: notebooks/08_differential_privacy.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv_helpers.attacks.labels import infer_labels
from gradinv_helpers.attacks.last_layer import last_linear, parameter_name
from gradinv_helpers.attacks.likelihood import likelihoods_of
from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.errors import InputError
from gradinv_helpers.priors.gaussian import ImagePrior
from gradinv_helpers.updates import SharedUpdate

_LEVEL = 0.03  # what the mean image leaves open of the last layer's gradient
_MOST_CHANGES = 50


def choose_labels(
    update: SharedUpdate, prior: ImagePrior, given: Tensor | None = None
) -> tuple[Tensor, str]:
    """Find the labels that an attack under a prior starts with.

    They are counted in the update where its numbers are what the client computed.
    Where an encoding hides that, or noise the sign of the last bias, the likelihood of
    the messages finds them.

    Args:
        update: What the server saw.
        prior: What is known of images.
        given: True labels (N,), if the attacker has them.

    Returns:
        Labels (N,), int64, and in words where they come from.

    Raises:
        InputError: The labels given are not one per image, or none can be found.

    Taught in: notebooks/08_differential_privacy.
    """
    if given is not None:
        if tuple(given.shape) != (update.num_samples,):
            expected = f"shape ({update.num_samples},)"
            raise InputError("labels", expected, tuple(given.shape))
        return given, "given (upper bound)"
    hidden = update.encoding is not None and not update.encoding.exact
    if not hidden:
        try:
            return infer_labels(update), "inferred (counts)"
        except InputError:
            if not update.noise_std:
                raise
    return infer_encoded_labels(update, prior), "inferred (likelihood)"


def infer_encoded_labels(update: SharedUpdate, prior: ImagePrior) -> Tensor:
    """Find labels with which the prior's mean image explains the last layer best.

    What the last layer sends depends on the labels far more than on the images. The
    labels that the numbers show at face value are changed one at a time, as long as the
    messages of the last layer become likelier.

    Args:
        update: What the server saw, encoded.
        prior: Whose mean image stands for all of them.

    Returns:
        Labels (N,), int64, in ascending order.

    Raises:
        InputError: The model does not end with a linear layer.

    Taught in: notebooks/08_differential_privacy.
    """
    plain = dataclasses.replace(update, encoding=None)
    try:
        labels = infer_labels(plain)
    except InputError:
        labels = torch.zeros(update.num_samples, dtype=torch.int64)
    posterior = Posterior(update, prior, labels, order="averaged")
    layer = last_linear(update)
    last = [parameter_name(layer, part) for part in ("weight", "bias")]
    count, classes = len(labels), posterior.num_classes
    lowest = float(_surprise(posterior, labels[None], last)[0])
    for _ in range(_MOST_CHANGES):
        places = torch.arange(count).repeat_interleave(classes)
        trials = labels.repeat(count * classes, 1)
        trials[torch.arange(len(trials)), places] = torch.arange(classes).repeat(count)
        found = _surprise(posterior, trials, last)
        if not float(found.min()) < lowest:
            break
        lowest, labels = float(found.min()), trials[int(found.argmin())]
    return labels.sort().values


@torch.no_grad()
def _surprise(posterior: Posterior, labels: Tensor, last: list[str]) -> Tensor:
    """-2 log likelihood (T,) of the last layer for labels (T, N) of mean images."""
    like = posterior.like
    mean = posterior.prior.decode(
        like.new_zeros(1, posterior.num_samples, posterior.prior.size)
    )
    names = list(posterior.update.tensors)
    laws = likelihoods_of(posterior.update.encoding, names)
    variances = posterior.variances(_LEVEL)
    parts = []
    for some in labels.to(like.device).split(posterior.together):
        classes = F.one_hot(some, posterior.num_classes).to(like)
        computed, _ = posterior.map(mean.expand(len(some), -1, -1, -1, -1), classes)
        total = like.new_zeros(len(some), dtype=torch.float64)
        rows = zip(names, laws, computed, posterior.targets, variances, strict=False)
        for name, law, gradient, target, variance in rows:
            if name in last:
                total = total + law.energy(gradient, target, variance)[0]
        parts.append(total)
    return torch.cat(parts)
