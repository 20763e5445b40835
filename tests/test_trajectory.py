"""Counts after several local steps, against torch's optimisers and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradinv_helpers.attacks.labels import infer_label_counts
from gradinv_helpers.attacks.trajectory import (
    _change_by_adam,
    _cheapest,
    _interpolated,
    _label_shares,
)
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.defences import GaussianNoise, defend
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import LocalTraining, local_update

DIGITS = load_images("digits", split="test")


def model_for_digits(name: str = "mlp") -> nn.Module:
    return build_model(name, in_channels=1, image_size=8, num_classes=10)


def batch(size: int, seed: int, dominant: float = 0.0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(DIGITS), generator=generator)
    own = order[DIGITS.labels[order] == seed % 10][: round(dominant * size)]
    return DIGITS[torch.cat([own, order[: size - len(own)]]).tolist()]


def truth(images: Images) -> Tensor:
    return images.labels.bincount(minlength=10)


def right(counts: Tensor, images: Images) -> float:
    return float(torch.minimum(counts, truth(images)).sum()) / len(images)


def delta(**options) -> LocalTraining:
    return LocalTraining("delta", **({"lr": 0.01, "batch_size": 8} | options))


@pytest.mark.parametrize(
    "recipe",
    [
        delta(),
        delta(epochs=5),
        delta(epochs=5, batch_size=None),
        delta(epochs=5, weight_decay=0.1),
        delta(epochs=2, optimiser="momentum"),
    ],
)
@pytest.mark.parametrize("name", ["lenet", "mlp", "convnet"])
def test_sgd_on_untrained_models(name: str, recipe: LocalTraining) -> None:
    for dominant in (0.0, 0.75):
        images = batch(32, seed=1, dominant=dominant)
        update = local_update(model_for_digits(name), images, recipe, seed=0)
        assert right(infer_label_counts(update), images) >= 0.9


@pytest.mark.parametrize(
    ("optimiser", "lr", "epochs"),
    [("sgd", 0.1, 3), ("sgd", 0.1, 10), ("sgd", 0.3, 3), ("momentum", 0.03, 10)],
)
def test_large_steps_are_followed(optimiser: str, lr: float, epochs: int) -> None:
    """Predictions move far; those of the server's model alone miscount."""
    recipe = delta(lr=lr, epochs=epochs, batch_size=None, optimiser=optimiser)
    images = batch(24, seed=3, dominant=0.5)
    model = model_for_digits()
    update = local_update(model, images, recipe)
    weight = {"sgd": epochs, "momentum": sum(10 * (1 - 0.9**k) for k in range(1, 11))}
    with torch.no_grad():
        start = model(images.pixels).softmax(1).mean(0)  # better than any guess of it
    naive = 24 * (start + update.tensors["3.bias"] / lr / weight[optimiser])
    error = float((infer_label_counts(update) - truth(images)).abs().sum())
    assert error <= 2
    assert float((naive - truth(images)).abs().sum()) > error + 3


@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("label", [0, 7])
def test_one_sample(optimiser: str, label: int) -> None:
    images = DIGITS[[int(torch.nonzero(DIGITS.labels == label)[0])]]
    recipe = delta(epochs=4, optimiser=optimiser, lr=1e-3)
    update = local_update(model_for_digits(), images, recipe)
    assert right(infer_label_counts(update), images) == 1


@pytest.mark.parametrize("epochs", [3, 5])
def test_adam_beats_equal_counts(epochs: int) -> None:
    recipe = delta(epochs=epochs, optimiser="adam", lr=1e-3)
    for dominant, floor in ((0.0, 0.8), (0.75, 0.35)):
        images = batch(32, seed=5, dominant=dominant)
        update = local_update(model_for_digits(), images, recipe, seed=0)
        assert right(infer_label_counts(update), images) > floor + 0.1


def test_one_step_of_adam_sends_signs_only_and_still_counts_to_n() -> None:
    images = batch(8, seed=2)
    recipe = delta(optimiser="adam", batch_size=None, lr=1e-3)
    counts = infer_label_counts(local_update(model_for_digits(), images, recipe))
    assert int(counts.sum()) == 8
    assert right(counts, images) > 0.5


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_clients_of_equal_and_unequal_size(optimiser: str) -> None:
    recipe = delta(optimiser=optimiser, batch_size=4, epochs=2, lr=1e-3)
    images, model = batch(24, seed=4), model_for_digits()
    for parts, share in (((8, 8, 8), 0.75), ((4, 8, 12), 0.7)):
        updates = [
            local_update(model, own, recipe, seed=0)
            for own in map(DIGITS.__class__.__getitem__, [images] * 3, pieces(parts))
        ]
        counts = infer_label_counts(aggregate(updates))
        assert int(counts.sum()) == 24
        assert right(counts, images) >= share


def pieces(sizes: tuple[int, ...]) -> list[slice]:
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_noise_never_breaks_it(optimiser: str) -> None:
    update = local_update(model_for_digits(), batch(16, 0), delta(optimiser=optimiser))
    generator = torch.Generator().manual_seed(0)
    for std in (1e-3, 1.0):
        noisy = defend(update, GaussianNoise(std), generator=generator)
        counts = infer_label_counts(noisy)
        assert int(counts.sum()) == 16
        assert int(counts.min()) >= 0


def test_same_seed_same_counts() -> None:
    update = local_update(model_for_digits(), batch(16, 0), delta(optimiser="adam"))
    one, other = (infer_label_counts(update, seed=7) for _ in range(2))
    assert torch.equal(one, other)


# --- parts ------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.integers(0, 10_000))
def test_cheapest_counts_are_cheapest(total: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(3, total + 1, generator=generator)
    found = _cheapest(costs)
    every = [
        counts
        for counts in itertools.product(range(total + 1), repeat=3)
        if sum(counts) == total
    ]
    best = min(every, key=lambda c: sum(float(costs[k, n]) for k, n in enumerate(c)))
    assert tuple(found.tolist()) == best


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_simulated_adam_is_torchs_adam(weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(1, 9, 1, generator=generator).double()
    weight = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=0.05, weight_decay=weight_decay)
    for step in range(9):
        weight.grad = gradient[0, step, 0].clone()
        adam.step()
    recipe = delta(optimiser="adam", lr=0.05, weight_decay=weight_decay)
    found = _change_by_adam(recipe, gradient, torch.tensor(0.4).double())
    assert float(found) == pytest.approx(float(weight.detach()) - 0.4, rel=1e-6)


def test_label_shares_are_those_of_shuffled_batches() -> None:
    recipe = delta(batch_size=4, epochs=3)
    (first, small), (second, large) = _label_shares(recipe, (4, 10), seed=0)
    assert (first, second) == (4 / 14, 10 / 14)
    assert small.shape[1:] == (3, 15)
    assert large.shape[1:] == (9, 15)
    for shares in (small, large):
        assert float(shares[..., 0].abs().max()) == 0  # no sample of the class
        torch.testing.assert_close(shares[..., -1], torch.ones_like(shares[..., -1]))
        assert bool((shares.diff(dim=-1) >= 0).all())
    # Every sample is used once per epoch: its shares, times batch sizes, add up.
    sizes = torch.tensor([4.0, 4.0, 2.0] * 3).double()
    used = (large * sizes[:, None]).sum(1)[:, -1]
    torch.testing.assert_close(used, torch.full_like(used, 30.0))


@pytest.mark.parametrize("steps", [1, 2, 5, 60])
def test_interpolation_of_a_straight_line(steps: int) -> None:
    chosen = torch.linspace(0, steps - 1, min(steps, 24)).round().long()
    line = torch.arange(steps, dtype=torch.float64)[:, None] * torch.tensor([1.0, -2.0])
    torch.testing.assert_close(_interpolated(line[chosen], chosen, steps), line)


# --- what it refuses --------------------------------------------------------------


def test_a_gradient_is_no_way() -> None:
    update = local_update(model_for_digits(), batch(4, 0))
    with pytest.raises(
        InputError, match="known scale for method 'trajectory', got a g"
    ):
        infer_label_counts(update, method="trajectory")


def test_frozen_bias() -> None:
    model = model_for_digits()
    model[3].bias.requires_grad_(False)
    update = local_update(model, batch(4, 0), delta(epochs=2))
    with pytest.raises(InputError, match="a change of the last layer's bias, got no b"):
        infer_label_counts(update, method="trajectory")
