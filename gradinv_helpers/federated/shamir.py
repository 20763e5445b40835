"""Secret sharing: any t of n shares give a secret back, fewer say nothing of it.

Taught in: notebooks/09_secure_aggregation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from gradinv_helpers.errors import InputError, check_count

PRIME = 2**255 - 19
SHARE_BYTES = 32


def split_secret(
    secret: int,
    holders: Sequence[int],
    *,
    threshold: int,
    draw: Callable[[int], bytes],
    prime: int = PRIME,
) -> dict[int, int]:
    r"""Give every holder one point of a random polynomial through the secret.

    The polynomial :math:`f(x) = s + a_1 x + \dots + a_{t-1} x^{t-1} \bmod p` has
    uniform coefficients; holder x gets :math:`f(x)`. Any t points determine it, and
    t - 1 points fit every secret equally well.

    Args:
        secret: The number s to share, 0 to ``prime - 1``.
        holders: Points x, different integers from 1 to ``prime - 1``.
        threshold: How many shares give the secret back: t, 1 to the number of
            holders.
        draw: Source of random bytes: ``draw(count)``.
        prime: Size p of the field.

    Returns:
        The share of every holder.

    Raises:
        InputError: The secret or a holder lies outside the field, a holder stands
            there twice, or the threshold cannot be met.

    Source: Shamir (1979). Taught in: notebooks/09_secure_aggregation.
    """
    _check_points(holders, prime)
    check_count("threshold", threshold, maximum=len(holders))
    check_count("secret", secret, minimum=0, maximum=prime - 1)
    # 16 bytes more than the prime has: the remainder is uniform up to 2**-128.
    width = (prime.bit_length() + 7) // 8 + 16
    slopes = [int.from_bytes(draw(width)) % prime for _ in range(threshold - 1)]
    shares = {}
    for x in holders:
        value = 0
        for coefficient in (*reversed(slopes), secret):  # Horner's scheme
            value = (value * x + coefficient) % prime
        shares[x] = value
    return shares


def lagrange_weights(holders: Sequence[int], prime: int = PRIME) -> dict[int, int]:
    r"""Weights that turn shares into the secret: :math:`s = \sum_x w_x f(x)`.

    They depend on the holders alone:
    :math:`w_x = \prod_{y \ne x} y / (y - x) \bmod p`.

    Args:
        holders: Points x, different integers from 1 to ``prime - 1``.
        prime: Size p of the field.

    Returns:
        The weight of every holder.

    Raises:
        InputError: A holder lies outside the field or stands there twice.

    Source: Shamir (1979). Taught in: notebooks/09_secure_aggregation.
    """
    _check_points(holders, prime)
    weights = {}
    for x in holders:
        above, below = 1, 1
        for y in holders:
            if y != x:
                above = above * y % prime
                below = below * (y - x) % prime
        weights[x] = above * pow(below, -1, prime) % prime
    return weights


def recover_secret(
    shares: Mapping[int, int], *, threshold: int, prime: int = PRIME
) -> int:
    """Give the secret back from at least ``threshold`` shares.

    Args:
        shares: Holders and their shares; the first ``threshold`` of them are used.
        threshold: The threshold that the secret was split with.
        prime: Size of the field.

    Returns:
        The secret. Shares that were changed give another number.

    Raises:
        InputError: Too few shares, or a holder outside the field.

    Source: Shamir (1979). Taught in: notebooks/09_secure_aggregation.
    """
    check_count("threshold", threshold)
    if len(shares) < threshold:
        raise InputError("shares", f"at least {threshold}", len(shares))
    weights = lagrange_weights(list(shares)[:threshold], prime)
    return sum(w * shares[x] for x, w in weights.items()) % prime


def _check_points(holders: Iterable[int], prime: int) -> None:
    """Refuse points outside the field, zero (the secret itself) and repeated ones."""
    seen = set()
    for x in holders:
        check_count("holders", x, minimum=1, maximum=prime - 1)
        if x in seen:
            raise InputError("holders", "every holder once", f"{x} twice")
        seen.add(x)
