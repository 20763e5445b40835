"""Whole numbers add up without rounding, and never leave their range."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.fixed_point import FixedPoint


@given(
    weights=st.lists(st.integers(1, 500), min_size=1, max_size=20),
    bits=st.sampled_from([16, 32, 64]),
    bound=st.floats(1e-6, 1e6),
    stochastic=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_sum_of_extreme_values_does_not_wrap(weights, bits, bound, stochastic) -> None:
    code = FixedPoint(sum(weights), len(weights), bits, bound)
    rng = np.random.default_rng(0) if stochastic else None
    for sign in (-1, 1):
        total = np.zeros(3, code.dtype)
        for weight in weights:
            total += code.encode(np.full(3, sign * bound), weight, rng=rng)
        # Exact arithmetic beside the one modulo 2**bits.
        exact = sign * sum(weights) * Fraction(bound)
        found = [Fraction(value) for value in code.decode(total)]
        room = len(weights) * Fraction(code.step) + abs(exact) / 2**50
        assert all(abs(value - exact) <= room for value in found)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize(("total", "clients"), [(1, 1), (7, 3), (1000, 100), (128, 16)])
def test_step_is_the_smallest_power_of_two_that_fits(bits, total, clients) -> None:
    code = FixedPoint(total, clients, bits, bound=16.0)
    exponent = math.log2(code.step)
    assert exponent == round(exponent)
    largest = 2 ** (bits - 1) - 1
    reach = Fraction(total) * 16 / Fraction(code.step)
    assert reach + clients <= largest
    assert 2 * reach + clients > largest


def test_known_values() -> None:
    code = FixedPoint(total=2, clients=2, bits=16, bound=1.0)
    assert code.step == 2.0**-13  # 2 * 2**14 + 2 would leave 2**15 - 1
    encoded = code.encode(np.array([0.0, 1.0, -1.0, 2**-13, -(2**-14) * 1.2]), 1)
    assert encoded.tolist() == [0, 2**13, 2**16 - 2**13, 1, 2**16 - 1]
    assert encoded.dtype == np.uint16
    assert code.encode(np.array([0.5]), 2).tolist() == [2**13]
    assert code.decode(encoded).tolist() == [0.0, 1.0, -1.0, 2**-13, -(2.0**-13)]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_sum_is_exact(bits: int) -> None:
    rng = np.random.default_rng(1)
    weights = [3, 1, 4, 1, 5]
    code = FixedPoint(sum(weights), 5, bits, bound=4.0)
    values = [rng.uniform(-4, 4, 50) for _ in weights]
    encoded = [code.encode(v, w) for v, w in zip(values, weights, strict=True)]
    # Python's integers as the reference: round each, add without a modulus.
    by_hand = [
        sum(round(Fraction(v[i]) * w / Fraction(code.step)) for v, w in pairs)
        for i in range(50)
        for pairs in [list(zip(values, weights, strict=True))]
    ]
    total = np.zeros(50, code.dtype)
    for part in encoded:
        total += part
    if bits < 64:  # float64 holds these products exactly enough to round alike
        assert [int(x) % 2**bits for x in total] == [x % 2**bits for x in by_hand]
    exact = [float(Fraction(x) * Fraction(code.step)) for x in by_hand]
    assert code.decode(total) == pytest.approx(exact, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("stochastic", [False, True])
def test_rounding_error_has_the_stated_size(stochastic: bool) -> None:
    rng = np.random.default_rng(2)
    code = FixedPoint(total=12, clients=4, bits=16, bound=2.0)
    total, exact = np.zeros(20_000, code.dtype), np.zeros(20_000)
    for k in range(4):
        values = rng.normal(0, 0.3, 20_000)
        exact += 3 * values
        chooser = np.random.default_rng(k) if stochastic else None
        total += code.encode(values, 3, rng=chooser)
    error = code.decode(total) - exact
    stated = code.rounding_std(4, stochastic=stochastic)
    assert float(error.std()) == pytest.approx(stated, rel=0.03)
    assert abs(float(error.mean())) < 4 * stated / math.sqrt(20_000)


def test_stochastic_rounding_is_unbiased() -> None:
    code = FixedPoint(total=1, clients=1, bits=16, bound=1.0)
    value = 10.3 * code.step
    draws = code.encode(np.full(20_000, value), 1, rng=np.random.default_rng(3))
    assert set(draws.tolist()) == {10, 11}
    up = int((draws == 11).sum())
    assert stats.binomtest(up, 20_000, 0.3).pvalue > 1e-3
    nearest = code.encode(np.full(10, value), 1)
    assert set(nearest.tolist()) == {10}


@pytest.mark.parametrize("entry", [1.01, -1.01, math.inf, math.nan])
def test_overflow_is_an_error(entry: float) -> None:
    code = FixedPoint(total=4, clients=2, bits=32, bound=1.0)
    with pytest.raises(InputError, match="absolute value up to bound=1, got .*raise"):
        code.encode(np.array([0.5, entry]), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": 0, "clients": 1}, "total: expected an integer of at least 1"),
        ({"total": 1, "clients": 0}, "clients: expected an integer of at least 1"),
        ({"total": 1, "clients": 1, "bits": 24}, "bits: expected 16, 32 or 64, got 24"),
        ({"total": 1, "clients": 1, "bound": 0.0}, "bound: expected a finite number >"),
        (
            {"total": 40_000, "clients": 40_000, "bits": 16},
            "bits: expected more for 40000 clients, got 16; take 32 or 64",
        ),
    ],
)
def test_bad_input(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FixedPoint(**arguments)


def test_weight_beyond_the_total() -> None:
    with pytest.raises(InputError, match="weight: expected an integer of at most 3"):
        FixedPoint(total=3, clients=2).encode(np.zeros(1), 4)
