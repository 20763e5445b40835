"""Few bits per entry. Taught in: notebooks/08_differential_privacy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradinv_helpers.defences.common import check_unencoded
from gradinv_helpers.encoding import Encoding
from gradinv_helpers.errors import check_count
from gradinv_helpers.updates import SharedUpdate


@dataclass(frozen=True)
class Sign:
    """Send the sign of every entry, and one scale for each tensor.

    The scale is the mean magnitude of the tensor's entries, which keeps the length of
    a server's step. An entry of zero is sent as positive.

    Source: Bernstein et al. (2018) for signSGD; Karimireddy et al. (2019) for the
    scale.
    Taught in: notebooks/08_differential_privacy.
    """

    def __call__(
        self, update: SharedUpdate, *, generator: torch.Generator | None
    ) -> SharedUpdate:
        """The signs, each times its tensor's scale; nothing is random."""
        check_unencoded(update)
        scales = {name: float(t.abs().mean()) for name, t in update.tensors.items()}
        signs = {
            name: torch.full_like(t, scales[name]).copysign(t + 0.0)
            for name, t in update.tensors.items()
        }
        return update.replace_tensors(signs, encoding=Encoding("sign", scales))


@dataclass(frozen=True)
class StochasticQuantisation:
    """Round every entry at random to one of a few levels, right on average.

    The levels of a tensor are the multiples of a step from minus to plus its largest
    magnitude. An entry between two of them takes the upper one with the probability
    that makes its mean the entry itself. Two bits leave three levels, as TernGrad has.

    Args:
        bits: Bits per entry, from 2 to 16.

    Raises:
        InputError: The number of bits is out of range.

    Source: Alistarh et al. (2017), QSGD, whose levels are shares of the L2 norm; Wen
    et al. (2017), TernGrad, for the largest magnitude.
    Taught in: notebooks/08_differential_privacy.
    """

    bits: int

    def __post_init__(self) -> None:
        check_count("bits", self.bits, minimum=2, maximum=16)

    def __call__(
        self, update: SharedUpdate, *, generator: torch.Generator | None
    ) -> SharedUpdate:
        """The rounded update, with the step of every tensor."""
        check_unencoded(update)
        levels = 2 ** (self.bits - 1) - 1
        steps = {n: float(t.abs().max()) / levels for n, t in update.tensors.items()}
        rounded = {
            name: _rounded(t, steps[name], levels, generator)
            for name, t in update.tensors.items()
        }
        encoding = Encoding("quantised", steps, bits=self.bits)
        return update.replace_tensors(rounded, encoding=encoding)


def _rounded(
    tensor: Tensor, step: float, levels: int, generator: torch.Generator | None
) -> Tensor:
    """Multiples of a step whose mean is the tensor."""
    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    if step == 0:
        return torch.zeros_like(tensor)
    counts = torch.floor(tensor.double() / step + drawn.to(tensor.device))
    return (counts.clamp(-levels, levels) * step).to(tensor)
