"""How the numbers that travel stand for what a client computed.

A defence that prunes, rounds or mixes is a protocol: the server has to know it to read
the update, and so does the attacker. Taught in: notebooks/08_differential_privacy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from gradinv_helpers.errors import InputError, check_choice, check_count, check_number

EncodingKind = Literal["pruned", "sign", "quantised", "mixed"]
ENCODINGS: tuple[EncodingKind, ...] = ("pruned", "sign", "quantised", "mixed")

_SLACK = 1e-5  # relative: the numbers were computed in single precision


@dataclass(frozen=True)
class Encoding:
    """What a defence makes public of how it encodes an update.

    ========== =======================================================================
    kind       what the tensors named in ``scales`` hold
    ========== =======================================================================
    pruned     Entries as computed, but zeros were not sent. The scale is the largest
               magnitude that an entry can have which was not sent; infinity where
               nothing is known of it.
    sign       Plus or minus the scale, by the sign of the entry.
    quantised  Multiples of the scale: every entry was rounded at random to one of the
               two next to it, such that its mean is right.
    mixed      Nothing is encoded and ``scales`` is empty: images and labels were
               mixed in pairs before the update was computed (mixup).
    ========== =======================================================================

    Noise that the update states was added before it was encoded.

    Args:
        kind: One of ``ENCODINGS``.
        scales: One number of at least 0 for every encoded tensor, by its name; other
            tensors were sent as computed.
        bits: Bits per entry of ``quantised``.

    Raises:
        InputError: An unknown kind, or numbers that do not fit it.

    Taught in: notebooks/08_differential_privacy.
    """

    kind: EncodingKind
    scales: Mapping[str, float] = field(default_factory=dict)
    bits: int | None = None

    def __post_init__(self) -> None:
        check_choice("encoding.kind", self.kind, ENCODINGS)
        if not isinstance(self.scales, Mapping):
            got = type(self.scales).__name__
            raise InputError("encoding.scales", "a mapping from names to numbers", got)
        if bool(self.scales) == (self.kind == "mixed"):
            expected = "no tensors" if self.kind == "mixed" else "at least one tensor"
            raise InputError("encoding.scales", expected, list(self.scales))
        for name, scale in self.scales.items():
            if not (self.kind == "pruned" and scale == math.inf):
                check_number(f"encoding.scales[{name!r}]", scale)
        if self.kind == "quantised":
            check_count("encoding.bits", self.bits, minimum=2, maximum=32)
        elif self.bits is not None:
            expected = f"None for kind {self.kind!r}"
            raise InputError("encoding.bits", expected, self.bits)
        object.__setattr__(self, "scales", MappingProxyType(dict(self.scales)))

    def __reduce__(self) -> tuple[object, ...]:
        # Read-only mappings cannot be pickled.
        return (Encoding, (self.kind, dict(self.scales), self.bits))

    @property
    def exact(self) -> bool:
        """Whether the tensors are what the client computed, all entries of them."""
        return not self.scales

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Make sure that an update can have been encoded so.

        Raises:
            InputError: A scale belongs to no tensor, or entries contradict it.
        """
        for name, scale in self.scales.items():
            if name not in tensors:
                raise InputError("encoding.scales", "names of tensors", repr(name))
            bad = int(self._contradicted(tensors[name], scale).sum())
            if bad:
                raise InputError(
                    f"tensors[{name!r}]",
                    f"{_MEANING[self.kind]} {scale:g}",
                    f"{bad} other entries",
                    "an encoding is the last thing that happens to an update",
                )

    def num_bytes(self, tensors: Mapping[str, Tensor]) -> int:
        """Bytes that the tensors take when they travel encoded.

        Pruned tensors send the entries that are left and say where they belong, by
        their indices or by one bit per entry, whichever is shorter. Signs take one bit
        and quantised entries ``bits`` of them, and a scale is sent along.
        """
        return sum(self._num_bytes(name, tensor) for name, tensor in tensors.items())

    def _contradicted(self, tensor: Tensor, scale: float) -> Tensor:
        sizes = tensor.detach().double().abs()
        if self.kind == "pruned":
            least = 0.0 if math.isinf(scale) else scale * (1 - _SLACK)
            return (sizes != 0) & (sizes < least)
        if self.kind == "sign":
            return (sizes - scale).abs() > _SLACK * scale
        counts = sizes / scale if scale else sizes
        levels = 2 ** ((self.bits or 2) - 1) - 1 if scale else 0
        return ((counts - counts.round()).abs() > _SLACK * levels) | (
            counts > levels * (1 + _SLACK)
        )

    def _num_bytes(self, name: str, tensor: Tensor) -> int:
        entries, size = tensor.numel(), tensor.element_size()
        if name not in self.scales:
            return entries * size
        if self.kind == "pruned":
            left = int((tensor != 0).sum())
            index = max(1, math.ceil(math.log2(entries)))
            return left * size + math.ceil(min(left * index, entries) / 8)
        bits = self.bits if self.kind == "quantised" and self.bits else 1
        return math.ceil(entries * bits / 8) + size


_MEANING: dict[str, str] = {
    "pruned": "zeros and entries of at least",
    "sign": "plus or minus",
    "quantised": "few multiples of",
}
