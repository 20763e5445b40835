"""Which images every local step takes, by exchanges that lower the residual.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.attacks.replay import Order, local_batches
from gradinv_helpers.updates import SharedUpdate

# An exchange counts if it leaves this share of the squared residual, or less.
_MOST_EXCHANGES, _WORTH_IT = 30, 0.9


@dataclass(frozen=True)
class _Arrangement:
    """Latents (N, d) and labels (N,) of the images, and the images of every step."""

    latents: Tensor
    labels: Tensor
    order: Order


def rearranged(posterior: Posterior, point: Tensor) -> tuple[Posterior, Tensor]:
    """Find which images every local step takes.

    Two images are exchanged at a time, as long as the residual falls by a tenth.

    Args:
        posterior: Of a weight change after several local steps.
        point: Latents (1, size) of its images.

    Returns:
        The posterior with the arrangement that fits best, the same object where that
        is its own, and the latents (1, size) in their new places.

    Taught in: notebooks/04_aggregated_gradients.
    """
    order = posterior.order
    if order == "averaged" and posterior.several_batches:
        order = _in_sequence(posterior.update)
    latents = point.view(posterior.num_samples, -1)
    state = _Arrangement(latents, posterior.labels, order)
    lowest = _residual(posterior, state)
    for _ in range(_MOST_EXCHANGES):
        moves = list(_moves(posterior, state))
        if not moves:
            break
        found = [_residual(posterior, move) for move in moves]
        if not min(found) < _WORTH_IT * lowest:
            break
        lowest = min(found)
        state = moves[found.index(lowest)]
    reordered = as_lists(state.order) != as_lists(posterior.order)
    if reordered or not torch.equal(state.labels, posterior.labels):
        posterior = posterior.rearranged(state.labels, state.order)
    return posterior, state.latents.reshape(1, -1)


def _residual(posterior: Posterior, state: _Arrangement) -> float:
    trial = posterior.rearranged(state.labels, state.order)
    return float(trial.misfit(state.latents.reshape(1, -1))[0])


def _moves(posterior: Posterior, state: _Arrangement) -> Iterator[_Arrangement]:
    """Arrangements that differ in one exchange."""
    update, count = posterior.update, posterior.num_samples
    sizes = update.group_sizes or (count,)
    if not isinstance(state.order, str):
        for order in _exchanges(state.order, update):
            yield replace(state, order=order)
    if len(sizes) > 1:
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        for first, second in itertools.combinations(range(count), 2):
            if owner[first] != owner[second]:
                places = torch.arange(count)
                places[first], places[second] = second, first
                yield replace(
                    state,
                    latents=state.latents[places.to(state.latents.device)],
                    labels=state.labels[places],
                )


def _in_sequence(update: SharedUpdate) -> Order:
    """The images of every local step for clients that never shuffle."""
    clients = [local_batches(n, update.training) for n in update.group_sizes or ()]
    return clients if len(clients) > 1 else clients[0]


def _exchanges(order: Order, update: SharedUpdate) -> Iterator[Order]:
    """Orders in which two images, or two whole batches, of an epoch change places.

    Exchanges within a batch change nothing.
    """
    sizes = update.group_sizes or ()
    clients: list[Any] = [list(order)] if len(sizes) == 1 else [list(o) for o in order]
    for k, batches in enumerate(clients):
        for changed in _exchanges_of_client(batches, update.training.epochs):
            alone = len(sizes) == 1
            yield changed if alone else [*clients[:k], changed, *clients[k + 1 :]]


def _exchanges_of_client(batches: list[Tensor], epochs: int) -> Iterator[list[Tensor]]:
    steps = len(batches) // epochs
    for a, b in itertools.combinations(range(len(batches)), 2):
        if a // steps != b // steps:
            continue
        if len(batches[a]) == len(batches[b]) > 1:
            swapped = list(batches)
            swapped[a], swapped[b] = batches[b], batches[a]
            yield swapped
        for i, j in itertools.product(range(len(batches[a])), range(len(batches[b]))):
            changed = [batch.clone() for batch in batches]
            changed[a][i], changed[b][j] = batches[b][j], batches[a][i]
            yield changed


def as_lists(order: Any) -> Any:
    """An order without tensors, for JSON and for comparing."""
    if isinstance(order, str):
        return order
    return order.tolist() if isinstance(order, Tensor) else [*map(as_lists, order)]


def as_tensors(order: Any) -> Any:
    """Batches as they were before ``as_lists``: the innermost lists are tensors."""
    if isinstance(order, str):
        return order
    if order and isinstance(order[0], int):
        return torch.tensor(order)
    return [as_tensors(part) for part in order]
