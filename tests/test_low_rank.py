"""Batches behind a linear layer and ReLU: exact, certified, and honest if not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F

import gradinv_helpers as gi
from gradinv_helpers.attacks.analytic import linear_front
from gradinv_helpers.attacks.certificate import HIGHEST_CONDITION
from gradinv_helpers.attacks.low_rank import (
    _bends,
    _confirm,
    _count,
    _factorise,
    _independent,
    _inner_gram,
    _jacobian_rank,
    _parallel_rows,
    _Rows,
    invert_low_rank,
)
from gradinv_helpers.data import Images
from gradinv_helpers.federated.aggregation import normalize
from gradinv_helpers.models import Normalize
from gradinv_helpers.updates import SharedUpdate


@pytest.fixture(scope="module")
def digits() -> gi.Images:
    return gi.load_images("digits", split="test")


@pytest.fixture(scope="module")
def photos() -> gi.Images:
    return gi.load_images("photos", split="test", image_size=16)


def choose(images: gi.Images, count: int, seed: int = 0) -> gi.Images:
    generator = torch.Generator().manual_seed(seed)
    return images[torch.randperm(len(images), generator=generator)[:count].tolist()]


def mlp(images: gi.Images, *widths: int, seed: int = 0, front: tuple = ()):
    torch.manual_seed(seed)
    layers: list[nn.Module] = [*front, nn.Flatten()]
    last = images.pixels[0].numel()
    for width in widths:
        layers += [nn.Linear(last, width), nn.ReLU()]
        last = width
    return nn.Sequential(*layers, nn.Linear(last, 10))


def standardised(images: gi.Images) -> Normalize:
    moments = images.pixels.mean((0, 2, 3)), images.pixels.std((0, 2, 3))
    return Normalize(*(m.tolist() for m in moments))


def errors(images: torch.Tensor, labels: torch.Tensor, truth: gi.Images) -> float:
    """Largest error of a pixel, images matched to the truth; labels must be right."""
    assert images.shape == truth.pixels.shape
    found, true = (x.double().flatten(1) for x in (images, truth.pixels))
    distance = torch.cdist(found, true)
    rows, columns = linear_sum_assignment(distance.numpy())
    assert labels[rows].tolist() == truth.labels[columns].tolist()
    return float((found[rows] - true[columns]).abs().max())


@pytest.mark.parametrize("count", [2, 4, 8, 12, 16])
@pytest.mark.parametrize("raw", [True, False])
def test_batches_are_taken_apart(photos: gi.Images, count: int, raw: bool) -> None:
    victims = choose(photos, count, seed=count)
    model = mlp(photos, 400, 200, front=() if raw else (standardised(photos),))
    update = gi.local_update(model, victims)
    images, labels, certificate = invert_low_rank(update)
    assert images.dtype == torch.float64
    assert errors(images, labels, victims) < 1e-4  # of a float32 gradient
    assert certificate.exact
    assert certificate.method == "low rank"
    assert certificate.rank == certificate.unknowns == victims.pixels.numel()
    assert certificate.residual < 1e-10
    assert 1 <= certificate.condition < 1e4


def test_double_precision_gives_double_precision(photos: gi.Images) -> None:
    victims = choose(photos, 8)
    update = gi.local_update(mlp(photos, 400, 200).double(), victims)
    images, labels, certificate = invert_low_rank(update)
    assert errors(images, labels, victims) < 1e-10
    assert certificate.residual < 1e-20


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(2, 5))
def test_any_data(seed: int, count: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 2, 4, 5, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    truth = Images(pixels.sigmoid(), labels, tuple("abcde"[:classes]))
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(40, 150), nn.ReLU(), nn.Linear(150, classes)
    )
    found, given_, certificate = invert_low_rank(gi.local_update(model, truth))
    # A failure must be confessed, and is rare with so many units.
    assert certificate.exact
    assert errors(found, given_, truth) < 1e-3


def test_the_order_of_the_samples_does_not_matter(digits: gi.Images) -> None:
    victims = choose(digits, 5)
    model = mlp(digits, 200).double()
    one, labels, _ = invert_low_rank(gi.local_update(model, victims))
    other, _, _ = invert_low_rank(gi.local_update(model, victims[[3, 1, 4, 0, 2]]))
    assert labels.tolist() == sorted(victims.labels.tolist())
    assert errors(one, labels, victims) < 1e-9
    assert errors(other, labels, victims) < 1e-9


def test_given_labels_fix_the_order(digits: gi.Images) -> None:
    victims = digits[[3, 1, 4, 15, 9]]
    update = gi.local_update(mlp(digits, 200), victims)
    images, labels, _ = invert_low_rank(update, labels=victims.labels)
    assert labels.tolist() == victims.labels.tolist()
    for k, label in enumerate(victims.labels):
        if int((victims.labels == label).sum()) == 1:
            assert float((images[k] - victims.pixels[k]).abs().max()) < 1e-4


def test_same_call_same_result(digits: gi.Images) -> None:
    update = gi.local_update(mlp(digits, 200), choose(digits, 8, seed=2))
    one, other = (invert_low_rank(update, seed=5) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert one[2] == other[2]


def test_anything_may_follow(photos: gi.Images) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(768, 512),
        nn.ReLU(inplace=True),
        nn.Unflatten(1, (8, 8, 8)),
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(144, 10),
    ).eval()
    victims = choose(photos, 6)
    images, labels, certificate = invert_low_rank(gi.local_update(model, victims))
    assert certificate.exact
    assert errors(images, labels, victims) < 1e-4


def test_weight_changes_and_aggregates(photos: gi.Images) -> None:
    victims, model = choose(photos, 6), mlp(photos, 400, 200)
    recipe = gi.LocalTraining(sends="delta", lr=0.5)
    images, labels, certificate = invert_low_rank(
        gi.local_update(model, victims, recipe)
    )
    assert certificate.exact
    assert errors(images, labels, victims) < 1e-2
    parts = [gi.local_update(model, victims[k]) for k in ([0, 1, 2, 3], [4, 5])]
    images, labels, certificate = invert_low_rank(gi.aggregate(parts))
    assert certificate.exact
    assert errors(images, labels, victims) < 1e-4


def test_repeated_images_are_counted(photos: gi.Images) -> None:
    victims = photos[[0, 30, 30, 30, 60, 90, 90]]
    update = gi.local_update(mlp(photos, 400, 200), victims)
    images, labels, certificate = invert_low_rank(update)
    assert errors(images, labels, victims) < 1e-4
    assert certificate.exact
    assert certificate.unknowns == 4 * 768


def test_the_number_of_samples_may_be_an_upper_bound(photos: gi.Images) -> None:
    victims = choose(photos, 5)
    update = gi.local_update(mlp(photos, 400, 200), victims)
    update = update.replace_tensors(update.tensors, num_samples=9, group_sizes=None)
    images, labels, certificate = invert_low_rank(update)
    assert errors(images, labels, victims) < 1e-4
    assert certificate.exact


def test_one_sample_is_a_batch_too(digits: gi.Images) -> None:
    update = gi.local_update(mlp(digits, 50), digits[[7]])
    images, labels, certificate = invert_low_rank(update)
    assert errors(images, labels, digits[[7]]) < 1e-5
    assert certificate.exact


# --- where it cannot be exact -----------------------------------------------------


@pytest.mark.parametrize("share", [1e-5, 1e-4])
def test_a_little_noise_does_little(photos: gi.Images, share: float) -> None:
    victims = choose(photos, 4)
    clean = gi.local_update(mlp(photos, 400, 200), victims)
    noise = gi.GaussianNoise(share, relative=True)
    noisy = gi.defend(clean, noise, generator=torch.Generator().manual_seed(1))
    images, labels, certificate = invert_low_rank(noisy)
    assert errors(images, labels, victims) < 300 * share
    assert certificate.rank == certificate.unknowns


def test_much_noise_is_confessed(photos: gi.Images) -> None:
    victims = choose(photos, 4)
    clean = gi.local_update(mlp(photos, 400, 200), victims)
    noise = gi.GaussianNoise(0.1, relative=True)
    noisy = gi.defend(clean, noise, generator=torch.Generator().manual_seed(1))
    images, _, certificate = invert_low_rank(noisy)
    assert bool(torch.isfinite(images).all())
    assert not certificate.exact


def test_too_few_units_are_confessed(digits: gi.Images) -> None:
    victims = choose(digits, 10)
    update = gi.local_update(mlp(digits, 20), victims)
    images, _, certificate = invert_low_rank(update, rounds=8)
    assert len(images) == 10
    assert not certificate.exact
    assert not certificate.determined
    assert "layer 1 leaves its input open" in str(certificate)


def test_a_search_without_rounds_confirms_what_needs_none(digits: gi.Images) -> None:
    """Samples that have units of their own are exact, the others are open."""
    victims = choose(digits, 16, seed=1)
    update = gi.local_update(mlp(digits, 256).double(), victims)
    images, _, certificate = invert_low_rank(update, rounds=0)
    nearest = torch.cdist(images.flatten(1), victims.pixels.double().flatten(1))
    right = int((nearest.min(1).values < 1e-8).sum())
    assert 1 <= right < 16
    assert certificate.rank == right * 64
    assert certificate.unknowns == 16 * 64
    assert not certificate.exact


# --- its parts --------------------------------------------------------------------


def small(units: int, seed: int, bias: float | None = None):
    """A small network with three inputs, their classes, and their errors."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, units), nn.ReLU(), nn.Linear(units, 3)
    ).double()
    if bias is not None:
        nn.init.constant_(model[1].bias, bias)
    inputs = torch.rand(3, 6, dtype=torch.float64)
    classes = torch.tensor([0, 1, 1])
    outputs = model[1](inputs).detach().requires_grad_()
    loss = F.cross_entropy(model[3](F.relu(outputs)), classes)
    (error,) = torch.autograd.grad(loss, outputs)
    return model, inputs, classes, error


def whole_jacobian(model: nn.Sequential, inputs: torch.Tensor, classes: torch.Tensor):
    """The first layer's gradient by all pixels: (parameters, 3, 6)."""

    def gradient(x: torch.Tensor) -> torch.Tensor:
        weight, bias = model[1].weight, model[1].bias
        loss = F.cross_entropy(model[3](F.relu(F.linear(x, weight, bias))), classes)
        both = torch.autograd.grad(loss, (weight, bias), create_graph=True)
        return torch.cat([g.flatten() for g in both])

    return torch.autograd.functional.jacobian(gradient, inputs)


@pytest.mark.parametrize(("units", "seed"), [(4, 1), (6, 2), (12, 3), (40, 4)])
def test_moves_within_the_span_of_the_samples(units: int, seed: int) -> None:
    model, inputs, classes, error = small(units, seed)
    front, shares = linear_front(model), torch.full((3,), 1 / 3, dtype=torch.float64)
    spans, _ = torch.linalg.qr((inputs[1:] - inputs[0]).T)
    bends = _bends(front, inputs, classes, shares, spans.T)
    moves = (whole_jacobian(model, inputs, classes) @ spans).flatten(1)
    found = _inner_gram(inputs, error, spans.T, bends)
    assert torch.allclose(found, moves.T @ moves, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("units", "seed", "bias"),
    [
        (3, 0, None),
        (4, 1, None),
        (6, 2, None),
        (12, 3, None),
        (40, 4, None),
        (12, 5, 100.0),
        (40, 6, 100.0),
    ],
)
def test_rank_is_that_of_the_whole_jacobian(
    units: int, seed: int, bias: float | None
) -> None:
    """Where all units are on, E has few directions, and less is determined."""
    model, inputs, classes, error = small(units, seed, bias)
    sizes = torch.linalg.svdvals(whole_jacobian(model, inputs, classes).flatten(1))
    true = int((sizes > sizes[0] / HIGHEST_CONDITION).sum())
    counts = torch.ones(3, dtype=torch.long)
    rank, condition = _jacobian_rank(
        linear_front(model), inputs, error, classes, counts
    )
    if int(torch.linalg.matrix_rank(error, rtol=1e-7)) == 3:
        assert rank == true
    assert rank <= true
    if rank == 18:
        assert float(sizes[0] / sizes[-1]) / 30 < condition < math.inf
    else:
        assert condition == math.inf


def test_factors_give_rank_noise_and_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    x = torch.cat([x, torch.ones(3, 1, dtype=torch.float64)], 1)
    e[:10] = 0  # units that are off for all
    noise = 1e-6 * torch.randn(60, 41, generator=generator, dtype=torch.float64)
    noise[:10] *= 1e-3
    gradient = e @ x + noise
    layer = nn.Linear(40, 60).double()
    rows = _factorise(gradient[:, :-1], gradient[:, -1], layer, 5, generator)
    assert rows.rank == 3
    assert rows.values.shape == (50, 3)
    assert torch.allclose(rows.values @ rows.basis, (e @ x)[10:], atol=1e-5)
    assert float(rows.noise.median()) == pytest.approx(1e-6, rel=0.2)
    own = torch.cat([layer.weight, layer.bias[:, None]], 1)[10:]
    p = x @ rows.basis.T
    assert torch.allclose(p @ rows.outputs.T, (own @ x.T).T, atol=1e-5)


def test_a_candidate_is_confirmed_by_its_silent_units(photos: gi.Images) -> None:
    victims = choose(photos, 4)
    model = mlp(photos, 400).double()
    update = gi.local_update(model, victims)
    generator = torch.Generator().manual_seed(0)
    tensors = update.tensors["1.weight"], update.tensors["1.bias"]
    rows = _factorise(*tensors, model[1], 4, generator)
    pixels = victims.pixels.double().flatten(1)
    inputs = torch.cat([pixels, torch.ones(4, 1, dtype=torch.float64)], 1)
    p = inputs @ rows.basis.T
    right = _confirm(rows, 7 * p, precise=True)  # at any scale
    assert torch.allclose(right.inputs(rows), pixels, atol=1e-9)
    assert bool(right.exact.all())
    # A blend of two foretells most units; the direction it leads to is precise.
    blend = _confirm(rows, 0.97 * p[:1] + 0.03 * p[1:2])
    assert len(blend.q) == 1
    assert not bool(blend.exact.any())
    assert torch.allclose(blend.q.abs(), right.q[:1].abs(), atol=1e-9)
    off = model[1](pixels[0]) < 0
    assert float(blend.errors(rows)[0, off].abs().max()) < 1e-12
    # Others are not confirmed: a wide blend, and what is no image at all.
    assert not len(_confirm(rows, p[:1] + p[1:2]).q)
    wide = _confirm(rows, 0.8 * p[:1] + 0.2 * p[1:2], precise=True)
    assert not bool(wide.exact.any())
    noise = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    assert not len(_confirm(rows, noise).q)
    # What is known to be exact replaces what is not.
    assert bool(blend.merge(right).exact.all())
    assert torch.allclose(blend.merge(right).inputs(rows), pixels, atol=1e-9)


def test_rows_that_miss_a_dimension_by_accident() -> None:
    """Seven clearly silent rows, but three directions: no sample is off in all."""
    torch.manual_seed(0)
    e = torch.randn(20, 4, dtype=torch.float64)
    e[:3] = torch.tensor([1.0, 0, 0, 0])
    e[3:6] = torch.tensor([0, 1.0, 0, 0])
    e[6] = torch.tensor([0, 0, 1.0, 2.0])
    values = e @ torch.randn(4, 4, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64))
    candidate = torch.randn(1, 4, dtype=torch.float64)
    candidate = candidate / (candidate @ basis[-1])
    silent = torch.ones(20, 1, dtype=torch.float64)
    silent[:7], silent[7:13] = -1, -0.01
    outputs = silent * candidate / candidate.square().sum()
    noise = torch.full((20,), 1e-12, dtype=torch.float64)
    rows = _Rows(basis.T, values, values, noise, outputs)
    assert not len(_confirm(rows, candidate).q)


def test_parallel_rows_are_found_once() -> None:
    e = torch.zeros(12, 3, dtype=torch.float64)
    e[0:4, 0] = torch.tensor([1.0, -2.0, 3.0, 0.5])
    e[4:6, 1] = torch.tensor([1.0, 5.0])
    torch.manual_seed(0)
    e[6:] = torch.randn(6, 3)
    x = torch.cat([torch.randn(3, 20), torch.ones(3, 1)], 1).double()
    gradient = e @ x
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(20, 12).double()
    rows = _factorise(gradient[:, :-1], gradient[:, -1], layer, 3, generator)
    heads = _parallel_rows(rows) @ rows.basis
    heads = heads / heads[:, -1:]
    assert torch.allclose(heads, x[:2], atol=1e-9)


def test_independent_rows() -> None:
    rows = torch.tensor([[1.0, 0, 0], [2, 0, 0], [1, 1, 0], [0, 3, 0], [1, 1, 1]])
    assert _independent(rows.double()) == [0, 2, 4]


@pytest.mark.parametrize(
    ("shares", "stated", "counts"),
    [
        ([0.25, 0.25, 0.25, 0.25], 4, [1, 1, 1, 1]),
        ([0.5, 0.25, 0.25], 4, [2, 1, 1]),
        ([1 / 3, 2 / 3], 3, [1, 2]),
        ([0.5, 0.5], 9, [1, 1]),  # an upper bound
        ([0.9, 0.4], 4, [1, 1]),  # makes no sense
    ],
)
def test_counts(shares: list[float], stated: int, counts: list[int]) -> None:
    found = _count(torch.tensor(shares, dtype=torch.float64), stated)
    assert found.tolist() == counts


# --- what it refuses --------------------------------------------------------------


def test_other_models(photos: gi.Images) -> None:
    def refused(message: str, *layers: nn.Module) -> None:
        model = nn.Sequential(nn.Flatten(), *layers)
        with pytest.raises(gi.InputError, match=message):
            invert_low_rank(gi.local_update(model, photos[[0, 20]]))

    last = nn.Linear(20, 10)
    refused(
        "ReLU directly behind layer 1, got Sigmoid",
        nn.Linear(768, 20),
        nn.Sigmoid(),
        last,
    )
    refused("ReLU directly behind layer 1, got nothing", nn.Linear(768, 10))
    without = nn.Linear(768, 20, bias=False)
    refused("layer 1 without a bias", without, nn.ReLU(), last)


def test_other_updates(digits: gi.Images) -> None:
    model, victims = mlp(digits, 100), choose(digits, 4)
    update = gi.local_update(model, victims)
    with pytest.raises(gi.InputError, match="known length, got a normalised one"):
        invert_low_rank(normalize(update))
    steps = gi.LocalTraining(sends="delta", epochs=2)
    with pytest.raises(gi.InputError, match="one SGD step, got the change of 2"):
        invert_low_rank(gi.local_update(model, victims, steps))
    fewer = update.replace_tensors(update.tensors, num_samples=3, group_sizes=None)
    with pytest.raises(gi.InputError, match="rank 3 at most.* got one of higher rank"):
        invert_low_rank(fewer)
    nothing: SharedUpdate = update.replace_tensors(
        {name: torch.zeros_like(t) for name, t in update.tensors.items()}
    )
    with pytest.raises(gi.InputError, match="first layer, got zeros or noise alone"):
        invert_low_rank(nothing)


@pytest.mark.parametrize("bad", [{"rounds": -1}, {"rounds": 1.5}, {"seed": -1}])
def test_bad_numbers(digits: gi.Images, bad: dict) -> None:
    update = gi.local_update(mlp(digits, 50), digits[[0, 1]])
    with pytest.raises(gi.InputError, match=f"{next(iter(bad))}: expected an integer"):
        invert_low_rank(update, **bad)
