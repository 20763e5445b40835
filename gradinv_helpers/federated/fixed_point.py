"""Real numbers as whole ones that add up without any rounding.

Taught in: notebooks/09_secure_aggregation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradinv_helpers.errors import InputError, check_count, check_number

Residues: TypeAlias = NDArray[np.unsignedinteger[Any]]

WORD_SIZES = (16, 32, 64)


@dataclass(frozen=True)
class FixedPoint:
    r"""Weighted values of several clients as numbers modulo :math:`2^b`.

    Client k sends :math:`q_k = \mathrm{round}(n_k g_k / s) \bmod 2^b`. The step s is
    the smallest power of two for which the sum cannot leave the range: with
    :math:`|g_k| \le B` and :math:`N = \sum_k n_k`,

    .. math:: N B / s + K \le 2^{b-1} - 1,

    where the K clients have one unit each for their rounding. A power of two keeps
    the division by s exact; it leaves up to half of the range as headroom.

    Args:
        total: The sum N of all weights.
        clients: The number K of summands at most.
        bits: The width b of a number: 16, 32 or 64.
        bound: The bound B on the absolute value of every entry.

    Raises:
        InputError: A number is out of range, or so many clients leave no room.

    Taught in: notebooks/09_secure_aggregation.
    """

    total: int
    clients: int
    bits: int = 32
    bound: float = 16.0

    def __post_init__(self) -> None:
        check_count("total", self.total)
        check_count("clients", self.clients)
        check_bits(self.bits)
        check_number("bound", self.bound, exclusive=True)
        if self.clients >= self._largest:
            raise InputError(
                "bits", f"more for {self.clients} clients", self.bits, "take 32 or 64"
            )

    @property
    def _largest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def step(self) -> float:
        """The value s of one unit, a power of two."""
        reach = self.total * self.bound
        step = 2.0 ** math.floor(math.log2(reach / self._largest))
        while reach / step + self.clients > self._largest:
            step *= 2
        return step

    @property
    def dtype(self) -> np.dtype[Any]:
        """Unsigned little-endian integers of this width."""
        return np.dtype(f"<u{self.bits // 8}")

    def encode(
        self,
        values: NDArray[np.float64],
        weight: int,
        *,
        rng: np.random.Generator | None = None,
    ) -> Residues:
        """Weight, scale and round the values of one client.

        Args:
            values: Entries of any shape, finite, of absolute value up to ``bound``.
            weight: The client's weight, a positive integer.
            rng: Rounds up or down at random, without bias; to the nearest number
                where ``None``.

        Returns:
            Numbers modulo 2**bits, of the same shape.

        Raises:
            InputError: An entry is too large or not finite.
        """
        check_count("weight", weight, maximum=self.total)
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= self.bound:
            raise InputError(
                "values",
                f"entries of absolute value up to bound={self.bound:g}",
                f"{largest:g}",
                "raise the bound for all clients, or clip before sending",
            )
        scaled = np.asarray(values, np.float64) * weight / self.step
        whole = np.rint(scaled)
        if rng is not None:
            whole = np.floor(scaled)
            whole += rng.random(scaled.shape) < scaled - whole
        return whole.astype(np.int64).astype(self.dtype)

    def decode(self, residues: Residues) -> NDArray[np.float64]:
        """The sum of weighted values that a sum of encoded ones stands for."""
        signed = residues.astype(self.dtype).view(f"<i{self.bits // 8}")
        return signed.astype(np.float64) * self.step

    def rounding_std(self, clients: int, *, stochastic: bool = False) -> float:
        r"""Standard deviation of the rounding error of a sum.

        Rounding to the nearest number errs uniformly, with variance
        :math:`s^2 / 12`; rounding at random with :math:`s^2 / 6` on average.

        Args:
            clients: Number of summands.
            stochastic: Whether they were rounded at random.
        """
        check_count("clients", clients)
        return self.step * math.sqrt(clients / (6 if stochastic else 12))


def check_bits(bits: object) -> None:
    """Refuse widths that no machine word has."""
    if bits not in WORD_SIZES or isinstance(bits, bool):
        raise InputError("bits", "16, 32 or 64", repr(bits))
