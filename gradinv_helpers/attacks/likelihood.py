r"""What a message says about the entry that it stands for.

An entry g of an update is computed, a Gaussian error of variance v is added (the noise
that the protocol states, or the tempering of an attack), and the sum is encoded. The
message m that travels then has the likelihood :math:`p(m \mid g)`, and every encoding
has its own:

- nothing encoded: :math:`N(m; g, v)`;
- pruned, and not sent: :math:`P(|g + e| \le b)` with the largest magnitude b that is
  not sent, or 1 where nothing is known of it;
- a sign: :math:`\Phi(m g / \sqrt v)`, the probit. The scale that is sent along is the
  mean magnitude of all entries of the tensor, which is one more equation;
- rounded at random to multiples of a step h: the convolution of the Gaussian with the
  triangle :math:`\max(0, 1 - |g + e - m| / h) / h`.

But for the scale all of them are log-concave in g, so that none adds minima of its own.
An attacker who ignores the encoding takes the first one for all.

Taught in: notebooks/08_differential_privacy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradinv_helpers.attacks.matching import squared_norm
from gradinv_helpers.encoding import Encoding

_FINE = 1e-2  # steps and bounds below this share of the error are one more Gaussian
_ROOT_2PI = math.sqrt(2 * math.pi)


class Likelihood(Protocol):
    """What the messages of one tensor say about its entries."""

    def energy(
        self, computed: Tensor, sent: Tensor, variance: float
    ) -> tuple[Tensor, Tensor]:
        """-2 log likelihood (A,) of entries (A, ...), and its slope (A, ...)."""

    def gap(self, computed: Tensor, sent: Tensor) -> Tensor:
        """How far entries (A, ...) are from the nearest that agree with the message."""

    def squared_norm(self, sent: Tensor) -> float:
        """Squared L2 norm of the entries behind messages, as far as it is known."""

    def spread(self, sent: Tensor, variance: float) -> Tensor | float:
        """Standard deviation of a message around its entry; infinite where unsent."""


@dataclass(frozen=True)
class Gaussian:
    """Entries as they were computed, up to the error."""

    def energy(
        self, computed: Tensor, sent: Tensor, variance: float
    ) -> tuple[Tensor, Tensor]:
        """Squared distance in units of the variance."""
        gap = computed - sent
        return squared_norm([gap]).double() / variance, gap * (2 / variance)

    def gap(self, computed: Tensor, sent: Tensor) -> Tensor:
        """The difference."""
        return computed - sent

    def squared_norm(self, sent: Tensor) -> float:
        """That of the messages."""
        return float(squared_norm([sent]).sum())

    def spread(self, sent: Tensor, variance: float) -> float:
        """That of the error."""
        return math.sqrt(variance)


@dataclass(frozen=True)
class Pruned:
    """Entries of zero were not sent.

    Args:
        bound: Largest magnitude of an entry that was not sent.
    """

    bound: float

    def energy(
        self, computed: Tensor, sent: Tensor, variance: float
    ) -> tuple[Tensor, Tensor]:
        """Squares where something was sent; a censored Gaussian elsewhere."""
        here = (sent != 0).to(computed)
        gap = (computed - sent) * here
        energy, slope = squared_norm([gap]).double() / variance, gap * (2 / variance)
        if math.isinf(self.bound) or bool(here.all()):
            return energy, slope
        unsent, steepness = _within(computed.double(), self.bound, math.sqrt(variance))
        empty = 1 - here
        energy = energy + (unsent * empty).flatten(1).sum(1)
        return energy, slope + steepness.to(slope) * empty

    def gap(self, computed: Tensor, sent: Tensor) -> Tensor:
        """The difference; for unsent entries, what exceeds the bound."""
        beyond = computed - computed.clamp(-self.bound, self.bound)
        return torch.where(sent != 0, computed - sent, beyond)

    def squared_norm(self, sent: Tensor) -> float:
        """That of the messages; unsent entries lie anywhere below the bound."""
        norm = float(squared_norm([sent]).sum())
        if math.isinf(self.bound):
            return norm
        return norm + int((sent == 0).sum()) * self.bound**2 / 3

    def spread(self, sent: Tensor, variance: float) -> Tensor:
        """That of the error; the bound is left out."""
        stds = torch.full_like(sent, math.sqrt(variance))
        return stds.masked_fill(sent == 0, math.inf)


@dataclass(frozen=True)
class Sign:
    """Only the sign of every entry was sent, and the mean magnitude of all of them."""

    def energy(
        self, computed: Tensor, sent: Tensor, variance: float
    ) -> tuple[Tensor, Tensor]:
        """Minus twice the logarithm of the normal law; the scale is one more square."""
        std, signs = math.sqrt(variance), torch.sign(sent).double()
        x = signs * computed.double() / std
        energy = -2 * torch.special.log_ndtr(x).flatten(1).sum(1)
        slope = (_hazard(x) * (-2 / std) * signs).to(computed)
        excess = (computed.abs() - sent.abs()).flatten(1).mean(1)
        energy = energy + excess.double().square() * (computed[0].numel() / variance)
        excess = excess.view(-1, *(1,) * (computed.dim() - 1))
        return energy, slope + excess * (2 / variance) * torch.sign(computed)

    def gap(self, computed: Tensor, sent: Tensor) -> Tensor:
        """The entry, where it has the other sign."""
        return torch.where(computed * sent < 0, computed, torch.zeros_like(computed))

    def squared_norm(self, sent: Tensor) -> float:
        """That of the messages."""
        return float(squared_norm([sent]).sum())

    def spread(self, sent: Tensor, variance: float) -> float:
        """Not defined: the message is no sum of the entry and an error."""
        raise NotImplementedError


@dataclass(frozen=True)
class Quantised:
    """Entries were rounded at random to one of the neighbouring multiples of a step.

    Args:
        step: The step, at least 0.
    """

    step: float

    def energy(
        self, computed: Tensor, sent: Tensor, variance: float
    ) -> tuple[Tensor, Tensor]:
        """Minus twice the logarithm of a triangle that the error smooths."""
        std = math.sqrt(variance)
        if self.step < _FINE * std:
            whole = variance + self.step**2 / 6  # the variance of the triangle
            return Gaussian().energy(computed, sent, whole)
        gap = (computed - sent).double()
        energy, slope = _triangle(gap, self.step, std)
        return energy.flatten(1).sum(1), slope.to(computed)

    def gap(self, computed: Tensor, sent: Tensor) -> Tensor:
        """The part of the difference that exceeds a step."""
        difference = computed - sent
        return difference - difference.clamp(-self.step, self.step)

    def squared_norm(self, sent: Tensor) -> float:
        """That of the messages."""
        return float(squared_norm([sent]).sum())

    def spread(self, sent: Tensor, variance: float) -> float:
        """That of error and rounding together."""
        return math.sqrt(variance + self.step**2 / 6)


def likelihoods_of(encoding: Encoding | None, names: Sequence[str]) -> list[Likelihood]:
    """The likelihood of every tensor, in the order of their names.

    Args:
        encoding: What the update says of itself.
        names: Names of its tensors.
    """
    return [_likelihood_of(encoding, name) for name in names]


def _likelihood_of(encoding: Encoding | None, name: str) -> Likelihood:
    if encoding is None or name not in encoding.scales:
        return Gaussian()
    scale = encoding.scales[name]
    if encoding.kind == "sign":
        return Sign()
    return Pruned(scale) if encoding.kind == "pruned" else Quantised(scale)


def _hazard(x: Tensor) -> Tensor:
    """Density of the normal law at x over the probability of what lies below."""
    return math.sqrt(2 / math.pi) / torch.special.erfcx(-x / math.sqrt(2))


def _within(value: Tensor, bound: float, std: float) -> tuple[Tensor, Tensor]:
    """-2 log P(|value + error| <= bound) per entry, up to a constant; its slope."""
    if bound < _FINE * std:
        variance = std**2 + bound**2 / 3
        return value.square() / variance, 2 * value / variance
    size = value.abs()
    upper, lower = (bound - size) / std, (-bound - size) / std
    first = torch.special.log_ndtr(upper)
    second = torch.special.log_ndtr(lower)
    missing = torch.exp(second - first)  # share of what lies below the upper end
    pull = (_hazard(upper) - missing * _hazard(lower)) / (1 - missing)
    log_share = first + torch.log1p(-missing)
    return -2 * log_share, (2 / std) * pull * torch.sign(value)


def _triangle(gap: Tensor, step: float, std: float) -> tuple[Tensor, Tensor]:
    """-2 log of the smoothed triangle at a distance, and its slope.

    With G the second integral of the normal density, in units of the error the law is
    G(u + k) - 2 G(u) + G(u - k), and its slope the same of the first integral. For
    u >= 0 both are written by tails of the normal law, over the density at u - k where
    that is the largest.
    """
    u, k = gap.abs() / std, step / std
    inside = (k - u).clamp_min(0)  # distance to the end of the triangle
    base = (u - k).clamp_min(0)
    # Weights of the three tails relative to the density at ``base``.
    near, middle, far = (
        torch.exp((base - x) * (base + x) / 2) for x in ((u - k).abs(), u, u + k)
    )
    share = (
        near * _second_tail((u - k).abs())
        - 2 * middle * _second_tail(u)
        + far * _second_tail(u + k)
        + inside * _ROOT_2PI
    ).clamp_min(1e-300)
    turned = torch.where(u < k, near, -near)
    slope = (
        turned * _first_tail((u - k).abs())
        + 2 * middle * _first_tail(u)
        - far * _first_tail(u + k)
        - torch.where(u < k, _ROOT_2PI, 0.0)
    )
    energy = base.square() - 2 * torch.log(share * std / step / _ROOT_2PI)
    return energy, (-2 / std) * (slope / share) * torch.sign(gap)


def _first_tail(x: Tensor) -> Tensor:
    """Upper tail of the normal law at x >= 0 over exp(-x²/2) / sqrt(2 pi)."""
    return math.sqrt(math.pi / 2) * torch.special.erfcx(x / math.sqrt(2))


def _second_tail(x: Tensor) -> Tensor:
    """Integral of the upper tail from x >= 0, over exp(-x²/2) / sqrt(2 pi)."""
    far = 1 / (x.square() + 3).clamp_min(1e-300)
    return torch.where(x > 1e4, far, 1 - x * _first_tail(x))
