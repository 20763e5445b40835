"""Assignments within groups, against all permutations."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradinv_helpers.attacks.alignment import align_images, reorder
from gradinv_helpers.errors import InputError


@settings(deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_the_best_of_all_orders_within_groups(seed: int, groups: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    count, kinds = len(groups), torch.tensor(groups)
    samples = torch.randn(3, count, 2, 2, generator=generator)
    reference = torch.randn(count, 2, 2, generator=generator)
    order = align_images(samples, reference, kinds)
    found = reorder(samples, order)
    for s in range(3):
        assert bool((kinds[order[s]] == kinds).all())
        costs = [
            float((samples[s][list(p)] - reference).square().sum())
            for p in itertools.permutations(range(count))
            if bool((kinds[list(p)] == kinds).all())
        ]
        cost = float((found[s] - reference).square().sum())
        assert cost == pytest.approx(min(costs), rel=1e-5)


def test_shapes_must_go_together() -> None:
    samples = torch.zeros(2, 3, 4)
    with pytest.raises(InputError, match="samples"):
        align_images(samples, torch.zeros(3, 5), torch.zeros(3))
    with pytest.raises(InputError, match="groups"):
        align_images(samples, torch.zeros(3, 4), torch.zeros(2))
