"""Any t shares give the secret back, and t - 1 of them fit every secret."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.shamir import (
    PRIME,
    lagrange_weights,
    recover_secret,
    split_secret,
)


def seeded(seed: int = 0) -> Callable[[int], bytes]:
    return np.random.default_rng(seed).bytes


def fixed(values: tuple[int, ...]) -> Callable[[int], bytes]:
    """Hands out given coefficients instead of random ones."""
    rest: Iterator[int] = iter(values)
    return lambda count: next(rest).to_bytes(count)


def test_prime_is_the_one_of_curve25519() -> None:
    assert PRIME == 2**255 - 19
    for base in (2, 3, 5, 7, 11):  # Fermat
        assert pow(base, PRIME - 1, PRIME) == 1


def test_shares_are_points_of_the_polynomial() -> None:
    """5 + 3 x + 2 x^2 modulo 13, by hand."""
    shares = split_secret(5, [1, 2, 3], threshold=3, draw=fixed((3, 2)), prime=13)
    assert shares == {1: 10, 2: 19 % 13, 3: 32 % 13}


@pytest.mark.parametrize("count", range(1, 7))
def test_every_subset_of_enough_shares_gives_the_secret(count: int) -> None:
    secret = int.from_bytes(seeded(count)(31))
    holders = [3 * k + 1 for k in range(count)]
    for threshold in range(1, count + 1):
        shares = split_secret(
            secret, holders, threshold=threshold, draw=seeded(threshold)
        )
        for size in range(threshold, count + 1):
            for chosen in combinations(holders, size):
                some = {x: shares[x] for x in chosen}
                assert recover_secret(some, threshold=threshold) == secret


@pytest.mark.parametrize("threshold", [2, 3])
def test_too_few_shares_fit_every_secret_equally_often(threshold: int) -> None:
    """All polynomials over a field of 7 elements: perfect secrecy, exactly."""
    prime, holders = 7, [1, 3, 4]
    for chosen in combinations(holders, threshold - 1):
        seen = set()
        for secret in range(prime):
            views = Counter()
            for slopes in product(range(prime), repeat=threshold - 1):
                shares = split_secret(
                    secret,
                    holders,
                    threshold=threshold,
                    draw=fixed(slopes),
                    prime=prime,
                )
                views[tuple(shares[x] for x in chosen)] += 1
            seen.add(frozenset(views.items()))
        (same,) = seen
        assert len(same) == prime ** (threshold - 1)


def test_one_share_more_would_tell() -> None:
    """The test above can fail: with t shares the views differ."""
    views = {
        secret: frozenset(
            tuple(
                split_secret(
                    secret, [1, 3], threshold=2, draw=fixed((a,)), prime=7
                ).values()
            )
            for a in range(7)
        )
        for secret in range(7)
    }
    assert len(set(views.values())) == 7


@given(
    secret=st.integers(0, PRIME - 1),
    holders=st.lists(st.integers(1, 10_000), min_size=1, max_size=12, unique=True),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_round_trip(secret: int, holders: list[int], data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, len(holders)))
    shares = split_secret(secret, holders, threshold=threshold, draw=seeded())
    kept = data.draw(st.permutations(holders))[:threshold]
    assert recover_secret({x: shares[x] for x in kept}, threshold=threshold) == secret
    changed = {x: shares[x] for x in kept}
    changed[kept[0]] = (changed[kept[0]] + 1) % PRIME
    assert recover_secret(changed, threshold=threshold) != secret


@given(st.integers(0, PRIME - 1), st.integers(0, PRIME - 1))
@settings(max_examples=20, deadline=None)
def test_shares_add_up(one: int, other: int) -> None:
    a = split_secret(one, [1, 2, 5], threshold=2, draw=seeded(1))
    b = split_secret(other, [1, 2, 5], threshold=2, draw=seeded(2))
    both = {x: (a[x] + b[x]) % PRIME for x in (2, 5)}
    assert recover_secret(both, threshold=2) == (one + other) % PRIME


def test_weights_interpolate_every_polynomial() -> None:
    holders = [1, 4, 9, 11]
    weights = lagrange_weights(holders, 101)
    for power in range(4):
        value = sum(w * x**power for x, w in weights.items()) % 101
        assert value == (1 if power == 0 else 0)


def test_coefficients_are_drawn_anew() -> None:
    draw = seeded()
    first = split_secret(1, [1, 2], threshold=2, draw=draw)
    assert first != split_secret(1, [1, 2], threshold=2, draw=draw)
    assert first == split_secret(1, [1, 2], threshold=2, draw=seeded())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"secret": PRIME}, "secret: expected an integer of at most"),
        ({"secret": -1}, "secret: expected an integer of at least 0"),
        ({"holders": [0, 1]}, "holders: expected an integer of at least 1"),
        ({"holders": [2, 2]}, "holders: expected every holder once, got 2 twice"),
        ({"holders": [1, PRIME]}, "holders: expected an integer of at most"),
        ({"threshold": 3}, "threshold: expected an integer of at most 2"),
        ({"threshold": 0}, "threshold: expected an integer of at least 1"),
    ],
)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    arguments = {"secret": 1, "holders": [1, 2], "threshold": 2} | changes
    secret, holders = arguments.pop("secret"), arguments.pop("holders")
    with pytest.raises(InputError, match=message):
        split_secret(secret, holders, draw=seeded(), **arguments)


def test_too_few_shares_are_refused() -> None:
    with pytest.raises(InputError, match="shares: expected at least 3, got 2"):
        recover_secret({1: 5, 2: 6}, threshold=3)
