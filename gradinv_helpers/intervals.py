"""Confidence intervals for means, medians and shares over images.

An attack is measured on a few images; the intervals say how far the mean over these
may lie from the mean over all images of the kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
    check_seed,
)

Statistic = Literal["mean", "median"]

_DRAWN_AT_ONCE = 2_000_000  # random indices held in memory
_NORMAL = NormalDist()


def bootstrap_interval(
    values: Sequence[float] | Tensor,
    *,
    statistic: Statistic = "mean",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Compute a bootstrap confidence interval of a mean or a median.

    The mean gets the bias-corrected and accelerated interval (BCa). Its acceleration
    comes from the jackknife, which fails for the median; so the median gets the
    percentile interval, as does a mean whose correction is not finite.

    Args:
        values: At least one finite number, one for each image.
        statistic: ``mean`` or ``median``.
        level: Wanted probability that the interval covers the true value, in (0, 1).
        resamples: Number of samples drawn with replacement.
        seed: Seed of the draws.

    Returns:
        Lower and upper end. Equal values give an interval of length zero; a single
        value tells nothing about the spread and gives (NaN, NaN).

    Raises:
        InputError: No values, a value that is not finite, or a bad option.

    Source: Efron and Tibshirani (1993), An introduction to the bootstrap, ch. 13-14.
    Taught in: notebooks/03_stronger_matching

    >>> bootstrap_interval([2.0, 2.0, 2.0])
    (2.0, 2.0)
    """
    check_choice("statistic", statistic, ("mean", "median"))
    check_count("resamples", resamples)
    check_seed("seed", seed)
    _check_level(level)
    sample = torch.as_tensor(values, dtype=torch.float64).detach().cpu().flatten()
    if not len(sample) or not sample.isfinite().all():
        got = "a value that is not finite" if len(sample) else "none"
        raise InputError("values", "at least one finite number", got)
    if len(sample) == 1:
        return math.nan, math.nan
    if (sample == sample[0]).all():
        return sample[0].item(), sample[0].item()
    drawn = _resampled(sample, statistic, resamples, seed)
    tails = ((1 - level) / 2, (1 + level) / 2)
    if statistic == "mean":
        tails = _bca_tails(sample, drawn, tails)
    low, high = drawn.quantile(drawn.new_tensor(tails)).tolist()
    return low, high


def share_interval(
    successes: int, trials: int, *, level: float = 0.95
) -> tuple[float, float]:
    """Compute the Wilson score interval of a share.

    It stays inside [0, 1] and keeps a length when all or none of the trials succeed,
    where a bootstrap interval would shrink to a point.

    Args:
        successes: Number of successes, from 0 to ``trials``.
        trials: Number of trials, at least 1.
        level: Wanted probability that the interval covers the true share, in (0, 1).

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        InputError: A count or the level is out of range.

    Source: Wilson (1927), Probable inference, the law of succession, and statistical
    inference.
    Taught in: notebooks/03_stronger_matching

    >>> low, high = share_interval(10, 10)
    >>> round(low, 3), high
    (0.722, 1.0)
    """
    check_count("trials", trials)
    check_count("successes", successes, minimum=0, maximum=trials)
    z = _NORMAL.inv_cdf((1 + _check_level(level)) / 2)
    share, shrink = successes / trials, z * z / trials
    centre = (share + shrink / 2) / (1 + shrink)
    spread = z * math.sqrt(share * (1 - share) / trials + shrink / (4 * trials))
    half = spread / (1 + shrink)
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def _resampled(sample: Tensor, statistic: str, resamples: int, seed: int) -> Tensor:
    """Return the statistic of samples drawn with replacement, (resamples,)."""
    generator = torch.Generator().manual_seed(seed)
    count = len(sample)
    chunk = max(1, _DRAWN_AT_ONCE // count)
    found = []
    for start in range(0, resamples, chunk):
        shape = (min(chunk, resamples - start), count)
        drawn = sample[torch.randint(count, shape, generator=generator)]
        found.append(
            drawn.mean(dim=1) if statistic == "mean" else drawn.quantile(0.5, dim=1)
        )
    return torch.cat(found)


def _bca_tails(
    sample: Tensor, drawn: Tensor, tails: tuple[float, float]
) -> tuple[float, float]:
    """Move the tail probabilities of a mean for bias and skewness, where finite."""
    centre = sample.mean()
    below = (drawn < centre).double().mean() + 0.5 * (drawn == centre).double().mean()
    if not 0 < below < 1:
        return tails
    bias = _NORMAL.inv_cdf(below.item())
    # Leaving value i out moves the mean by (mean - value_i) / (n - 1).
    pull = sample - centre
    pull = pull / pull.abs().max()  # tiny values would underflow in the powers
    skew = pull.pow(3).sum() / (6 * pull.square().sum().pow(1.5))
    moved = []
    for tail in tails:
        shifted = bias + _NORMAL.inv_cdf(tail)
        stretch = 1 - skew.item() * shifted
        if not stretch > 0:
            return tails
        moved.append(_NORMAL.cdf(bias + shifted / stretch))
    return moved[0], moved[1]


def _check_level(level: float) -> float:
    """Return the level if it is a probability strictly between 0 and 1."""
    if check_number("level", level, exclusive=True) >= 1:
        raise InputError("level", "a probability in (0, 1)", level)
    return level
