"""Intervals agree with scipy, cover what they promise, and survive odd samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradinv_helpers.errors import InputError
from gradinv_helpers.intervals import bootstrap_interval, share_interval

NUMBERS = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


@pytest.mark.parametrize("size", [8, 30])
@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_bootstrap_agrees_with_scipy(size, level, statistic):
    values = np.random.default_rng(size).lognormal(size=size)
    found = bootstrap_interval(
        values, statistic=statistic, level=level, resamples=40_000
    )
    expected = stats.bootstrap(
        (values,),
        getattr(np, statistic),
        n_resamples=40_000,
        confidence_level=level,
        method="BCa" if statistic == "mean" else "percentile",
        random_state=1,
    ).confidence_interval
    width = expected.high - expected.low
    assert found == pytest.approx(tuple(expected), abs=0.03 * width)


def test_bca_of_a_skewed_sample_is_not_the_percentile_interval():
    values = np.random.default_rng(3).lognormal(sigma=1.5, size=15)
    low, high = bootstrap_interval(values, resamples=20_000)
    plain = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", random_state=1
    ).confidence_interval
    assert low > plain.low and high > plain.high + 0.1 * (plain.high - plain.low)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_bootstrap_covers_the_truth_about_as_often_as_it_says(statistic):
    draws = np.random.default_rng(0).normal(size=(300, 25))
    intervals = [
        bootstrap_interval(x, statistic=statistic, resamples=500) for x in draws
    ]
    covered = sum(low <= 0 <= high for low, high in intervals) / len(draws)
    assert 0.89 <= covered <= 0.98


def test_bootstrap_depends_on_the_seed_alone():
    values = [1.0, 2.0, 4.0, 8.0]
    state = torch.random.get_rng_state()
    found = [bootstrap_interval(values, resamples=50, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert torch.equal(state, torch.random.get_rng_state())


def test_bootstrap_takes_tensors_and_many_values():
    values = torch.linspace(0, 1, 3000)
    low, high = bootstrap_interval(values, resamples=1500)  # drawn in several parts
    half = 1.96 * values.std().item() / math.sqrt(3000)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.1 * half)
    assert bootstrap_interval(values.tolist(), resamples=1500) == (low, high)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(values=NUMBERS, statistic=st.sampled_from(["mean", "median"]))
def test_bootstrap_stays_inside_the_sample(values, statistic):
    low, high = bootstrap_interval(values, statistic=statistic, resamples=100)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


@settings(derandomize=True, max_examples=60, deadline=None)
@given(values=NUMBERS)
def test_a_higher_level_gives_a_wider_interval(values):
    narrow = bootstrap_interval(values, level=0.5, resamples=100)
    wide = bootstrap_interval(values, level=0.9, resamples=100)
    assert wide[0] <= narrow[0] + 1e-9 and narrow[1] <= wide[1] + 1e-9


def test_bootstrap_follows_a_change_of_units():
    values = np.random.default_rng(5).normal(size=20)
    low, high = bootstrap_interval(values)
    scaled = bootstrap_interval(3 * values + 7)
    assert scaled == pytest.approx((3 * low + 7, 3 * high + 7))
    tiny = bootstrap_interval(1e-150 * values)  # whose powers underflow
    assert tiny == pytest.approx((1e-150 * low, 1e-150 * high), rel=1e-9, abs=0)
    mirrored = bootstrap_interval(-values)
    assert mirrored == pytest.approx((-high, -low), abs=0.05 * (high - low))


def test_degenerate_samples():
    assert bootstrap_interval([5.0, 5.0, 5.0]) == (5.0, 5.0)
    assert all(map(math.isnan, bootstrap_interval([5.0])))
    low, high = bootstrap_interval([0.0] * 11 + [1.0], statistic="median")
    assert low == 0.0 and high <= 1.0
    low, high = bootstrap_interval([0.0] * 11 + [1.0])
    assert 0.0 <= low < 1 / 12 < high <= 1.0
    low, high = bootstrap_interval([1.0, 2.0], resamples=1)
    assert 1.0 <= low == high <= 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": []}, "values: expected at least one finite number, got none"),
        ({"values": [1.0, math.nan]}, "got a value that is not finite"),
        ({"values": [1.0, math.inf]}, "got a value that is not finite"),
        (
            {"statistic": "means"},
            "statistic: expected one of mean, median, got 'means'",
        ),
        ({"level": 1.0}, "level: expected a probability in \\(0, 1\\), got 1.0"),
        ({"level": 0}, "level: expected a finite number > 0"),
        ({"resamples": 0}, "resamples: expected an integer of at least 1"),
        ({"seed": -1}, "seed: expected an integer of at least 0"),
    ],
)
def test_bad_bootstrap_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        bootstrap_interval(**({"values": [1.0, 2.0]} | options))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(trials=st.integers(1, 500), share=st.floats(0, 1), level=st.floats(0.01, 0.999))
def test_wilson_agrees_with_scipy(trials, share, level):
    successes = round(share * trials)
    expected = stats.binomtest(successes, trials).proportion_ci(level, "wilson")
    found = share_interval(successes, trials, level=level)
    assert found == pytest.approx(tuple(expected), abs=1e-9)
    assert 0 <= found[0] <= successes / trials <= found[1] <= 1


def test_wilson_keeps_a_length_at_both_ends():
    assert share_interval(0, 5)[0] == 0.0 and share_interval(0, 5)[1] > 0.3
    assert share_interval(5, 5)[1] == 1.0 and share_interval(5, 5)[0] < 0.7


@pytest.mark.parametrize(
    ("successes", "trials", "level", "message"),
    [
        (1, 0, 0.95, "trials: expected an integer of at least 1"),
        (6, 5, 0.95, "successes: expected an integer of at most 5, got 6"),
        (-1, 5, 0.95, "successes: expected an integer of at least 0"),
        (0.5, 5, 0.95, "successes: expected an integer of at least 0"),
        (1, 5, 95, "level: expected a probability"),
    ],
)
def test_bad_shares_are_refused(successes, trials, level, message):
    with pytest.raises(InputError, match=message):
        share_interval(successes, trials, level=level)
