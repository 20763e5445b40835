"""How a server combines updates. Taught in: notebooks/01_fl_guarantees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from gradinv_helpers.encoding import Encoding
from gradinv_helpers.errors import InputError, check_choice
from gradinv_helpers.updates import SharedUpdate


def aggregate(
    updates: Sequence[SharedUpdate], *, rule: Literal["mean"] = "mean"
) -> SharedUpdate:
    r"""Combine updates of one round into the one that the server applies.

    The weighted mean is :math:`\sum_k (n_k / N)\, g_k` with :math:`N = \sum_k n_k`,
    so that every image counts the same, whichever client holds it. Independent
    Gaussian noise adds up in variance: :math:`\sigma^2 = \sum_k (n_k/N)^2 \sigma_k^2`.

    A mean of encoded updates is a number like any other: it carries no encoding, not
    even where all clients have the same. Means of mixed images say that they are.

    Args:
        updates: Updates of the same model with the same recipe.
        rule: ``mean``, weighted by the numbers of samples.

    Returns:
        One update of all N samples; ``group_sizes`` keeps the clients' counts.

    Raises:
        InputError: No updates, or updates that do not belong together.

    Source: McMahan et al. (2017), Algorithm 1 (server).
    Taught in: notebooks/01_fl_guarantees.
    """
    check_choice("rule", rule, ("mean",))
    check_same_round(updates)
    first = updates[0]
    total = sum(u.num_samples for u in updates)
    weights = [u.num_samples / total for u in updates]

    def mean(name: str, field: str) -> torch.Tensor:
        parts = [getattr(u, field)[name] for u in updates]
        if not parts[0].is_floating_point():  # BatchNorm counts its batches
            return parts[0]
        return sum(w * part for w, part in zip(weights, parts, strict=True))

    sends_buffers = all(u.buffers is not None for u in updates)
    return SharedUpdate(
        model=first.model,
        tensors={name: mean(name, "tensors") for name in first.tensors},
        num_samples=total,
        image_shape=first.image_shape,
        training=first.training,
        group_sizes=tuple(n for u in updates for n in u.group_sizes or ()),
        normalized=first.normalized,
        noise_std=math.hypot(
            *(w * u.noise_std for w, u in zip(weights, updates, strict=True))
        ),
        buffers=(
            {name: mean(name, "buffers") for name in first.buffers}
            if sends_buffers and first.buffers is not None
            else None
        ),
        encoding=_encoding_of_mean(updates),
    )


def _encoding_of_mean(updates: Sequence[SharedUpdate]) -> Encoding | None:
    """What is left of the clients' encodings: that images were mixed, if nothing else.

    A client that mixes nothing is one that mixes with weight 1.
    """
    stated = [u.encoding for u in updates if u.encoding is not None]
    exact = all(encoding.exact for encoding in stated)
    return stated[0] if stated and exact else None


def normalize(update: SharedUpdate) -> SharedUpdate:
    """Scale all tensors of one client together to unit L2 norm.

    The direction is kept, the length is not sent. The update says so
    (``normalized``), because the rule is part of the protocol.

    Raises:
        InputError: The update is zero, or is already an aggregate.

    Taught in: notebooks/01_fl_guarantees.
    """
    if len(update.group_sizes or ()) != 1:
        raise InputError("update", "the update of one client", "an aggregate")
    if update.encoding is not None and not update.encoding.exact:
        hint = "normalise first: an encoding is the last thing that happens"
        raise InputError("update", "one that is not encoded", "an encoding", hint)
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in _floats(update)))
    if norm == 0:
        raise InputError("update", "a non-zero update", "all zeros")
    return update.replace_tensors(
        {name: t / norm for name, t in update.tensors.items()},
        normalized=True,
        noise_std=update.noise_std / norm,
    )


def apply_update(
    model: nn.Module, update: SharedUpdate, *, lr: float | None = None
) -> None:
    """Move ``model`` by one aggregated update, in place: the server's step.

    A gradient is applied as ``weights -= lr * gradient``; a weight change is added.
    Buffers that came with the update are taken over.

    Args:
        model: The server's model.
        update: An update of this model.
        lr: Step size for a gradient; the recipe's own where ``None``.

    Source: McMahan et al. (2017), Section 2. Taught in: notebooks/01_fl_guarantees.
    """
    scale = 1.0
    if update.kind == "gradient":
        scale = -(update.training.rate if lr is None else lr)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in update.tensors:
                change = update.tensors[name].to(parameter.device, parameter.dtype)
                parameter.add_(change, alpha=scale)
        for name, buffer in model.named_buffers():
            if update.buffers is not None:
                buffer.copy_(update.buffers[name])


def check_same_round(updates: Sequence[SharedUpdate]) -> None:
    """Make sure that all updates answer the same model with the same recipe.

    Raises:
        InputError: They do not, or there are none.
    """
    if len(updates) == 0:
        raise InputError("updates", "at least one update", "none")
    first = updates[0]
    state = first.model.state_dict()
    for number, other in enumerate(updates[1:], start=1):
        protocol = ("training", "normalized", "image_shape")
        for field in protocol:
            if getattr(other, field) != getattr(first, field):
                raise InputError(
                    "updates", f"the same {field} in all", f"another in number {number}"
                )
        theirs = other.model.state_dict()
        same = state.keys() == theirs.keys() and all(
            torch.equal(state[name], theirs[name]) for name in state
        )
        if not same:
            raise InputError(
                "updates", "updates of one model", f"another model in number {number}"
            )


def _floats(update: SharedUpdate) -> list[torch.Tensor]:
    return [t for t in update.tensors.values() if t.is_floating_point()]
