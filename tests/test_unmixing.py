"""Mixtures are taken apart exactly where their weights leave nothing open."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradinv_helpers.attacks.unmixing import mixing_weights, unmix
from gradinv_helpers.errors import InputError


def cycle(weight: float, partner: list[int]) -> torch.Tensor:
    """Weights of a batch mixed with its partners."""
    eye = torch.eye(len(partner), dtype=torch.float64)
    return weight * eye + (1 - weight) * eye[partner]


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(2, 6),
    weight=st.floats(0.55, 0.98),
    seed=st.integers(0, 1000),
)
def test_a_batch_mixed_within_itself(count: int, weight: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 3, 3, generator=generator, dtype=torch.float64)
    order = torch.randperm(count, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    labels = torch.randperm(8, generator=generator)[:count]
    hard = torch.nn.functional.one_hot(labels, 8).double()
    shares = weight * hard + (1 - weight) * hard[partner]
    weights = mixing_weights(shares)
    torch.testing.assert_close(weights, cycle(weight, partner.tolist()))
    mixtures = weight * images + (1 - weight) * images[partner]
    torch.testing.assert_close(unmix(mixtures, weights), images)


def test_an_odd_cycle_of_halves_can_be_taken_apart_and_an_even_one_cannot() -> None:
    images = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    weights = cycle(0.5, [1, 2, 0])
    mixtures = torch.einsum("mn,nchw->mchw", weights.float(), images)
    torch.testing.assert_close(unmix(mixtures, weights), images)
    with pytest.raises(InputError, match=r"rank 2.*got 1; another round"):
        unmix(images[:2], cycle(0.5, [1, 0]))


def test_two_rounds_of_one_pair() -> None:
    images = torch.rand(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    one = torch.tensor([[0.7, 0.3]])
    with pytest.raises(InputError, match="rank 2"):
        unmix(torch.einsum("mn,nchw->mchw", one, images), one)
    both = torch.tensor([[0.7, 0.3], [0.4, 0.6]])
    found = unmix(torch.einsum("mn,nchw->mchw", both, images), both)
    torch.testing.assert_close(found, images)


@pytest.mark.parametrize(
    "shares",
    [
        [[0.7, 0.3, 0.0], [0.7, 0.3, 0.0]],  # both mostly of one class
        [[0.7, 0.3, 0.0], [0.0, 0.3, 0.7]],  # partners that are nobody's larger part
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],  # nothing was mixed
    ],
)
def test_labels_that_do_not_tell(shares: list[list[float]]) -> None:
    with pytest.raises(InputError, match="mixtures of two classes"):
        mixing_weights(torch.tensor(shares))


def test_bad_shapes() -> None:
    with pytest.raises(InputError, match="label_shares: expected shape"):
        mixing_weights(torch.rand(3))
    with pytest.raises(InputError, match=r"weights: expected shape \(2, images\)"):
        unmix(torch.rand(2, 1, 2, 2), torch.eye(3))
