"""Sending the largest entries only. Taught in: notebooks/08_differential_privacy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradinv_helpers.defences.common import check_unencoded
from gradinv_helpers.encoding import Encoding
from gradinv_helpers.errors import InputError, check_number
from gradinv_helpers.updates import SharedUpdate


@dataclass(frozen=True)
class TopK:
    """Send the entries of largest magnitude only, over all tensors together.

    The others arrive as zeros. That they are no larger than the smallest entry that
    was sent is public, and so is which they are.

    Args:
        share: Share of the entries that are sent, above 0 and at most 1; at least one
            entry is.

    Raises:
        InputError: The share is out of range.

    Source: Aji and Heafield (2017) for the compression, Zhu et al. (2019), Section 5,
    for its use as a defence.
    Taught in: notebooks/08_differential_privacy.
    """

    share: float

    def __post_init__(self) -> None:
        if check_number("share", self.share, exclusive=True) > 1:
            raise InputError("share", "a number above 0 and at most 1", self.share)

    def __call__(
        self, update: SharedUpdate, *, generator: torch.Generator | None
    ) -> SharedUpdate:
        """The pruned update; nothing is random."""
        check_unencoded(update)
        tensors = dict(update.tensors)
        flat = torch.cat([t.flatten() for t in tensors.values()])
        count = max(1, round(self.share * len(flat)))
        largest = flat.abs().topk(count)
        kept = torch.zeros_like(flat)
        kept[largest.indices] = flat[largest.indices]
        parts = kept.split([t.numel() for t in tensors.values()])
        pruned = {
            name: part.view_as(t)
            for (name, t), part in zip(tensors.items(), parts, strict=True)
        }
        bound = float(largest.values[-1])
        return update.replace_tensors(
            pruned, encoding=Encoding("pruned", dict.fromkeys(tensors, bound))
        )
