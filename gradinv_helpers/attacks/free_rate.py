r"""The learning rate of a client as one more unknown of its images' posterior.

Near a rate :math:`\eta`, the change that images cause is linear in the logarithm of the
rate: :math:`\Delta(u) + \delta J`, with J a difference of two trainings. The best
:math:`\delta` is the vertex of a parabola, and putting it in leaves an energy of the
latents alone, whose slope is that at the best rate (variable projection). A joint
descent of both is slow instead: images can make up for much of a wrong rate. J stays as
it is while a level is minimised; then the rate takes its step, and J is computed anew.

Source: Golub and Pereyra (1973), for the projection.
Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from gradinv_helpers.attacks.gradients import Gradients
from gradinv_helpers.attacks.likelihood import Gaussian

if TYPE_CHECKING:
    from gradinv_helpers.attacks.posterior import Posterior

_WIDTH = 0.5  # standard deviation of the logarithm of the rate
_FARTHEST = 0.5  # that it moves within a level
_STEP = 1e-2  # of the finite difference, in the logarithm


@dataclass(frozen=True)
class FreeRate:
    """What a posterior needs to fit the rate along.

    Args:
        first: The rate that is expected before images are fitted.
        rate: The rate that J belongs to.
        directions: J, the slope of every tensor (1, ...) of the computed change by
            the logarithm of the rate.
        level: Tempering, as a share of every layer's norm.

    Taught in: notebooks/04_aggregated_gradients.
    """

    first: float
    rate: float
    directions: Gradients
    level: float

    def moves(self, posterior: Posterior, computed: Gradients) -> Tensor:
        """Where the logarithm of the rate fits best (A,), from the rate of J."""
        precision = 2 / _WIDTH**2
        curvature, far = precision, math.log(self.rate / self.first)
        slope = computed[0].new_full((len(computed[0]),), precision * far).double()
        variances = posterior.variances(self.level)
        rows = zip(computed, posterior.targets, self.directions, variances, strict=True)
        for change, target, direction, variance in rows:
            pull = ((change - target) * direction).flatten(1).sum(1).double()
            slope = slope + 2 / variance * pull
            curvature += 2 / variance * float(direction.square().sum())
        return (-slope / curvature).clamp(-_FARTHEST, _FARTHEST)

    def fitted(
        self, posterior: Posterior, computed: Gradients
    ) -> tuple[Gradients, Tensor]:
        """Changes (A, ...) at their best rates, and -2 log density (A,) of these."""
        moves = self.moves(posterior, computed)
        rows = zip(computed, self.directions, strict=True)
        there = [
            change + moves.to(change).view(-1, *(1,) * (change.dim() - 1)) * direction
            for change, direction in rows
        ]
        return there, ((math.log(self.rate / self.first) + moves) / _WIDTH).square()


def can_free_rate(posterior: Posterior) -> bool:
    """Whether the energy is a sum of squares of the change, as a projection needs.

    Taught in: notebooks/04_aggregated_gradients.
    """
    gaussian = all(isinstance(law, Gaussian) for law in posterior.likelihoods)
    update = posterior.update
    length = update.kind == "delta" and not update.normalized
    return gaussian and length and posterior.features is None


def with_free_rate(
    posterior: Posterior, point: Tensor, level: float, first: float
) -> Posterior:
    """The same posterior at one level, with the rate as an unknown beside its latents.

    Args:
        posterior: Of a weight change, at a rate near the right one.
        point: Latents (1, size) at which J is taken.
        level: Tempering, as a share of every layer's norm.
        first: The rate that is expected before images are fitted.

    Taught in: notebooks/04_aggregated_gradients.
    """
    other = copy.copy(posterior)
    rate = posterior.training.rate
    other.free_rate = FreeRate(first, rate, _directions(posterior, point), level)
    return other


def with_fitted_rate(posterior: Posterior, point: Tensor) -> Posterior:
    """The posterior at the rate that fits latents (1, size) best, no longer free.

    Taught in: notebooks/04_aggregated_gradients.
    """
    free = posterior.free_rate
    assert free is not None
    move = float(free.moves(posterior, _computed(posterior, point)))
    other = posterior.with_rate(free.rate * math.exp(move))
    other.free_rate = None
    return other


def _directions(posterior: Posterior, point: Tensor) -> Gradients:
    if not posterior.as_sent:  # the change is rate times gradient
        weights = dict(posterior.model.named_parameters())
        decay = posterior.training.weight_decay
        rows = zip(_computed(posterior, point), posterior.update.tensors, strict=True)
        return [g + decay * weights[name].detach() for g, name in rows]
    rate = posterior.training.rate
    above, below = (
        _computed(posterior.with_rate(rate * math.exp(move)), point)
        for move in (_STEP, -_STEP)
    )
    return [(a - b) / (2 * _STEP) for a, b in zip(above, below, strict=True)]


def _computed(posterior: Posterior, point: Tensor) -> Gradients:
    classes = posterior.label_shares(point)
    return posterior.map(posterior.images(point), classes)[0]
