"""Counts by each method, against closed forms, brute force and the published loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradinv_helpers.attacks.label_counts import (
    certain_counts,
    counts_by_llg,
    counts_by_moments,
    counts_by_signs,
    dummy_impact,
    nearest_counts,
    with_bias,
)
from gradinv_helpers.attacks.last_layer import LastLayer, read_last_layer
from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.updates import local_update

CLASSES = 5
counts_lists = st.lists(st.integers(0, 6), min_size=CLASSES, max_size=CLASSES).filter(
    lambda counts: sum(counts) > 0
)
seeds = st.integers(0, 1000)


def gradient_of(
    probabilities: Tensor, features: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean of (p - y) h^T and of p - y, sample by sample."""
    weight = torch.zeros(probabilities.shape[1], features.shape[1]).double()
    bias = torch.zeros(probabilities.shape[1]).double()
    for p, h, y in zip(probabilities, features, labels, strict=True):
        error = p.clone()
        error[y] -= 1
        weight += torch.outer(error, h) / len(labels)
        bias += error / len(labels)
    return weight, bias


def random_batch(counts: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Arbitrary probabilities (N, K), positive features (N, 7) and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor(counts))
    logits = 4 * torch.randn(len(labels), CLASSES, generator=generator).double()
    features = torch.rand(len(labels), 7, generator=generator).double()
    return logits.softmax(1), features, labels


def of_uniform_model(counts: list[int]) -> Tensor:
    """Weight gradient (K, 1) if every prediction is 1 / K and every feature is 1."""
    shares = torch.tensor(counts).double() / sum(counts)
    return (1 / len(counts) - shares)[:, None]


# --- whole numbers ----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-4, 6), min_size=3, max_size=3),
    st.integers(1, 6),
)
def test_nearest_counts_are_nearest(estimate, total) -> None:
    """No other whole numbers of this sum are nearer, among all there are."""
    target = torch.tensor(estimate, dtype=torch.float64)
    found = nearest_counts(target, total)
    assert int(found.sum()) == total
    assert int(found.min()) >= 0
    every = [
        torch.tensor(counts).double()
        for counts in itertools.product(range(total + 1), repeat=3)
        if sum(counts) == total
    ]
    best = min(float((counts - target).norm()) for counts in every)
    assert float((found - target).norm()) <= best + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=4, max_size=4),
    st.lists(st.integers(0, 5), min_size=4, max_size=4),
    st.integers(0, 30),
)
def test_nearest_counts_respect_what_is_certain(estimate, lowest, more) -> None:
    bounds = torch.tensor(lowest)
    found = nearest_counts(torch.tensor(estimate), sum(lowest) + more, bounds)
    assert int(found.sum()) == sum(lowest) + more
    assert bool((found >= bounds).all())


@given(counts_lists)
def test_nearest_counts_of_counts(counts) -> None:
    exact = torch.tensor(counts)
    assert nearest_counts(exact.double(), sum(counts)).tolist() == counts
    assert nearest_counts(exact + 0.3, sum(counts)).tolist() == counts


def test_counts_of_what_is_not_a_number() -> None:
    estimate = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    assert int(nearest_counts(estimate, 9).sum()) == 9


# --- bounds -----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(counts_lists, seeds)
def test_bounds_are_never_above_the_truth(counts, seed) -> None:
    """Whatever the model predicts: predictions are not negative."""
    _, bias = gradient_of(*random_batch(counts, seed))
    lowest = certain_counts(bias, sum(counts), noise=0.0)
    assert bool((lowest <= torch.tensor(counts)).all())
    assert int(lowest.min()) >= 0


@pytest.mark.parametrize("counts", [[1, 0, 0, 0, 0], [2, 1, 1, 0, 0], [0, 0, 4, 0, 0]])
def test_small_batches_of_an_unsure_model_are_proven(counts) -> None:
    """With N p < 1 for every class, rounding up -N g gives the counts themselves."""
    bias = of_uniform_model(counts).flatten()
    assert certain_counts(bias, sum(counts), noise=0.0).tolist() == counts


def test_noise_takes_the_proof_away() -> None:
    bias = of_uniform_model([2, 1, 1, 0, 0]).flatten()
    assert certain_counts(bias, 4, noise=0.01).tolist() == [2, 1, 1, 0, 0]
    assert certain_counts(bias, 4, noise=0.1).tolist() == [0, 0, 0, 0, 0]
    contradiction = torch.tensor([-3.0, -2.0, 5.0])
    assert certain_counts(contradiction, 2, noise=0.0).tolist() == [0, 0, 0]


# --- signs ------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, CLASSES - 1), min_size=1), seeds)
def test_signs_find_the_classes_of_a_batch_without_repeats(classes, seed) -> None:
    """With equal predictions only rows of classes in the batch hold negative values."""
    counts = [int(k in classes) for k in range(CLASSES)]
    _, features, labels = random_batch(counts, seed)
    features = features.clamp_min(0.2)
    spiked = features.clone()
    spiked[torch.arange(len(labels)), torch.arange(len(labels))] += 20
    even = torch.full((len(labels), CLASSES), 1 / CLASSES).double()
    weight, _ = gradient_of(even, spiked, labels)
    assert counts_by_signs(weight, len(labels)).tolist() == counts


# --- LLG --------------------------------------------------------------------------


def llg_with_a_stale_index(weight: Tensor, num_samples: int) -> list[int]:
    """The loop as one public tool has it: stage 2 subtracts at the index that the
    loop of stage 1 left behind, not at the class that was just picked."""
    sums = weight.sum(1).clone()
    impact = float(sums[sums < 0].sum()) * (1 + 1 / len(sums)) / num_samples
    labels = []
    for index in range(len(sums)):
        if sums[index] < 0:
            labels.append(index)
            sums[index] -= impact
    while len(labels) < num_samples:
        labels.append(int(sums.argmin()))
        sums[index] -= impact
    return [labels.count(k) for k in range(len(sums))]


@pytest.mark.parametrize(
    "counts",
    [
        [3, 3, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 2, 0, 0, 2, 0, 0, 2, 0, 0],
        [0, 0, 0, 4, 0, 2, 0, 0, 0, 0],
    ],
)
def test_llg_subtracts_at_the_class_it_picked(counts) -> None:
    weight = of_uniform_model(counts)
    assert counts_by_llg(weight, sum(counts)).tolist() == counts
    assert llg_with_a_stale_index(weight, sum(counts)) != counts


@settings(max_examples=60, deadline=None)
@given(counts_lists)
def test_llg_with_the_true_impact_and_offset_is_exact(counts) -> None:
    """Where predictions are equal, impact is -1/N and offset is 1/K."""
    total = sum(counts)
    offset = torch.full((CLASSES,), 1 / CLASSES).double()
    # Half a label off the exact value, so that rounding decides no tie.
    found = counts_by_llg(
        of_uniform_model(counts), total, impact=-1 / total, offset=offset
    )
    assert found.tolist() == counts


@settings(max_examples=60, deadline=None)
@given(counts_lists, seeds)
def test_llg_always_returns_n_labels(counts, seed) -> None:
    probabilities, features, labels = random_batch(counts, seed)
    weight, _ = gradient_of(probabilities, features - 0.5, labels)
    found = counts_by_llg(weight, sum(counts))
    assert int(found.sum()) == sum(counts)
    assert int(found.min()) >= 0


def test_impact_and_offset_are_those_of_dummy_batches() -> None:
    """Averages of what LLG* defines: batches whose labels are all the same class."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(32, 7, generator=generator).double()
    weight = torch.randn(CLASSES, 7, generator=generator).double()
    layer = LastLayer(weight, torch.zeros(CLASSES).double(), weight, None)
    probabilities = (features @ weight.T).softmax(1)
    own, others = [], torch.zeros(CLASSES).double()
    for k in range(CLASSES):
        labels = torch.full((32,), k)
        sums = gradient_of(probabilities, features, labels)[0].sum(1)
        own.append(float(sums[k]))
        sums[k] = 0
        others += sums / (CLASSES - 1)
    impact, offset = dummy_impact(layer, features, num_samples=8)
    expected = sum(own) / CLASSES / 8 * (1 + 1 / CLASSES)
    assert impact == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(offset, others)


# --- moments ----------------------------------------------------------------------


def constant_model(classes: int, seed: int, bias: bool = True) -> nn.Module:
    """A model whose last layer has no weights: it predicts the same for any image."""
    torch.manual_seed(seed)
    head = nn.Linear(16, classes, bias=bias)
    nn.init.zeros_(head.weight)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.Sigmoid(), head).double()


def images_of(counts: list[int], seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    pixels = torch.rand(len(labels), 1, 3, 3, generator=generator)
    return Images(pixels, labels, tuple("abcdefgh"[: len(counts)]))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=CLASSES, max_size=CLASSES).filter(sum), seeds
)
def test_moments_are_exact_where_all_predictions_are_equal(counts, seed) -> None:
    """Then n = N (softmax(b) - g) holds whatever the images are."""
    with torch.random.fork_rng():
        model = constant_model(CLASSES, seed)
    update = local_update(model, images_of(counts, seed))
    layer = read_last_layer(update)
    found = counts_by_moments(update, layer, sum(counts), seed=0)
    assert found.tolist() == counts


def test_two_classes() -> None:
    with torch.random.fork_rng():
        model = constant_model(2, seed=0)
    update = local_update(model, images_of([3, 5], seed=0))
    found = counts_by_moments(update, read_last_layer(update), 8, seed=0)
    assert found.tolist() == [3, 5]


def test_a_missing_bias_is_measured_along_the_mean_dummy_feature() -> None:
    features = torch.tensor([[2.0, 0.0], [2.0, 2.0]])
    weight = torch.tensor([[4.0, 2.0], [-4.0, -2.0]])
    _, bias = with_bias(weight, None, features)
    assert bias.tolist() == [2.0, -2.0]  # (4 * 2 + 2 * 1) / (2^2 + 1^2)
    with pytest.raises(InputError, match="non-zero gradient in the last layer"):
        with_bias(torch.zeros(2, 2), None, features)
