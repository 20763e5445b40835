"""Histograms and distances against counting by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.heterogeneity import (
    label_histograms,
    total_variation,
    update_similarity,
)
from gradinv_helpers.models import build_model
from gradinv_helpers.partition import Client, partition
from gradinv_helpers.updates import local_update

mixes = st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any)


def images(labels: list[int], classes: int = 3) -> Images:
    names = tuple(map(str, range(classes)))
    return Images(torch.rand(len(labels), 1, 8, 8), torch.tensor(labels), names)


def test_histograms_count_every_label_once() -> None:
    clients = [Client(images([0, 2, 2])), Client(images([1]))]
    assert label_histograms(clients).tolist() == [[1, 0, 2], [0, 1, 0]]
    parts = partition(images([0, 1, 2] * 20), clients=4, scheme="dirichlet", alpha=0.2)
    assert label_histograms(parts).sum(0).tolist() == [20, 20, 20]


@given(mixes, mixes)
def test_total_variation_is_the_largest_difference_of_any_event(one, other) -> None:
    p, q = (torch.tensor(mix).double() / sum(mix) for mix in (one, other))
    events = [
        abs(float(sum((p - q)[k] for k in range(4) if event >> k & 1)))
        for event in range(16)
    ]
    found = float(total_variation(torch.tensor(one), torch.tensor(other)))
    assert found == pytest.approx(max(events), abs=1e-12)
    assert 0 <= found <= 1 + 1e-12


def test_similarity_of_equal_and_opposed_updates() -> None:
    model = build_model("mlp", in_channels=1, image_size=8, num_classes=3)
    update = local_update(model, images([0, 1]))
    opposed = update.replace_tensors({n: -t for n, t in update.tensors.items()})
    assert update_similarity([update, update]) == pytest.approx(1)
    assert update_similarity([update, opposed]) == pytest.approx(-1)
    assert update_similarity([update, update, opposed]) == pytest.approx(-1 / 3)


def test_bad_input_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="clients: expected at least one"):
        label_histograms([])
    with pytest.raises(InputError, match="images of 3 classes"):
        label_histograms([Client(images([0])), Client(images([0], 4))])
    with pytest.raises(InputError, match="shares: expected non-negative"):
        total_variation(torch.zeros(3), torch.ones(3))
    with pytest.raises(InputError, match="others: expected non-negative"):
        total_variation(torch.ones(2), torch.tensor([2.0, -1.0]))
    with pytest.raises(InputError, match="at least two updates"):
        update_similarity([])
