"""The matching loss and the normalised aggregate against naive formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from gradinv_helpers.attacks.gradients import gradient_map
from gradinv_helpers.attacks.matching import (
    absolute_error,
    cosine_distance,
    gaussian_likelihood,
    laplace_likelihood,
    layerwise_squared_error,
    normalized_groups,
    only_layers,
    squared_error,
    squared_norm,
    top_k,
    weighted,
)
from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate, normalize
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import local_update

MODEL = build_model("lenet", in_channels=1, image_size=6, num_classes=4).double()


def random_gradients(trials: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(trials, 4, 3), (trials, 4), (trials, 2, 3, 2, 2)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def batch(trials: int, images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(trials, images, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.rand(trials, images, 4, generator=generator, dtype=torch.float64)
    return x, torch.softmax(y, -1)


def test_squared_norm_per_trial() -> None:
    gradients = random_gradients(3, 0)
    for trial in range(3):
        flat = torch.cat([g[trial].flatten() for g in gradients])
        assert float(squared_norm(gradients)[trial]) == pytest.approx(
            float(flat @ flat), rel=1e-12
        )


def test_squared_error_and_its_derivative() -> None:
    dummy = [g.requires_grad_() for g in random_gradients(3, 1)]
    target = random_gradients(3, 2)
    loss, derivatives = squared_error(dummy, target)
    naive = torch.stack(
        [
            sum(
                (d[t] - g[t]).square().sum() for d, g in zip(dummy, target, strict=True)
            )
            / sum(g[t].square().sum() for g in target)
            for t in range(3)
        ]
    )
    assert torch.allclose(loss, naive, rtol=1e-12)
    expected = torch.autograd.grad(naive.sum(), dummy)
    for ours, theirs in zip(derivatives, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12)


def test_meaning_of_the_loss() -> None:
    """1 for the zero gradient, 0 for the true one, and free of units."""
    target = random_gradients(2, 3)
    zeros = [torch.zeros_like(g) for g in target]
    assert torch.allclose(squared_error(zeros, target)[0], torch.ones(2).double())
    assert float(squared_error(target, target)[0].abs().max()) == 0
    dummy = random_gradients(2, 4)
    loss, _ = squared_error(dummy, target)
    scaled, _ = squared_error([1e3 * g for g in dummy], [1e3 * g for g in target])
    assert torch.allclose(loss, scaled, rtol=1e-12)


# --- normalised clients -----------------------------------------------------------


def naive_aggregate(images: Tensor, targets: Tensor, sizes) -> list[Tensor]:
    """One trial: every client's gradient, divided by its norm, weighted by samples."""
    weights = {
        n: p.detach().clone().requires_grad_() for n, p in MODEL.named_parameters()
    }
    mean: list[Tensor] | None = None
    start = 0
    for size in sizes:
        x, y = images[start : start + size], targets[start : start + size]
        start += size
        logits = functional_call(MODEL, weights, (x,))
        loss = -(y * F.log_softmax(logits, 1)).sum(1).mean()
        found = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        norm = torch.cat([g.flatten() for g in found]).norm()
        parts = [size / sum(sizes) * g / norm for g in found]
        mean = (
            parts if mean is None else [m + p for m, p in zip(mean, parts, strict=True)]
        )
    assert mean is not None
    return mean


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (2, 1, 3), (4,)])
def test_normalised_groups_against_a_loop(sizes) -> None:
    x, y = batch(3, sum(sizes))
    gradients, pullback = normalized_groups(gradient_map(MODEL), sizes)(x, y)
    v = [torch.randn_like(g) for g in random_like(gradients)]
    to_images, to_targets = pullback(v)
    for trial in range(3):
        own_x = x[trial].clone().requires_grad_()
        own_y = y[trial].clone().requires_grad_()
        expected = naive_aggregate(own_x, own_y, sizes)
        for ours, theirs in zip(gradients, expected, strict=True):
            assert torch.allclose(ours[trial], theirs, rtol=1e-10, atol=1e-13)
        product = sum((g * t[trial]).sum() for g, t in zip(expected, v, strict=True))
        back = torch.autograd.grad(product, [own_x, own_y])
        assert torch.allclose(to_images[trial], back[0], rtol=1e-9, atol=1e-11)
        gap = to_targets[trial] - back[1]
        assert torch.allclose(
            gap, gap.mean(-1, keepdim=True).expand_as(gap), atol=1e-10
        )


def random_like(gradients: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.empty_like(g) for g in gradients]


def test_true_images_give_the_normalised_aggregate() -> None:
    """What the attacker computes for the truth is what the server saw."""
    sizes = (2, 1, 3)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(6, 1, 6, 6, generator=generator)
    labels = torch.tensor([0, 3, 1, 2, 2, 0])
    images = Images(pixels, labels, tuple("abcd"))
    parts = [images[[0, 1]], images[[2]], images[[3, 4, 5]]]
    update = aggregate([normalize(local_update(MODEL, part)) for part in parts])
    assert update.group_sizes == sizes
    mapped = normalized_groups(gradient_map(MODEL), sizes)
    targets = F.one_hot(labels, 4).double()
    gradients, _ = mapped(pixels.double()[None], targets[None])
    for ours, theirs in zip(gradients, update.tensors.values(), strict=True):
        assert torch.allclose(ours[0], theirs, rtol=1e-10, atol=1e-13)
    loss, _ = squared_error(gradients, [t[None] for t in update.tensors.values()])
    assert float(loss) < 1e-24


# --- the other distances ------------------------------------------------------------

SIGMAS = [0.5, 2.0, 3.0]


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in gradients], 1)


def layers(gradients: list[Tensor]) -> list[Tensor]:
    return [g.flatten(1) for g in gradients]


def naive_layerwise(dummy: list[Tensor], target: list[Tensor]) -> Tensor:
    shares = [
        (d - t).square().sum(1) / t.square().sum(1)
        for d, t in zip(layers(dummy), layers(target), strict=True)
    ]
    return sum(shares) / len(shares)


def naive_gaussian(dummy: list[Tensor], target: list[Tensor]) -> Tensor:
    logs = [
        torch.distributions.Normal(t, s).log_prob(d)
        - torch.distributions.Normal(t, s).log_prob(t)
        for d, t, s in zip(layers(dummy), layers(target), SIGMAS, strict=True)
    ]
    return -sum(part.sum(1) for part in logs)


def naive_laplace(dummy: list[Tensor], target: list[Tensor]) -> Tensor:
    logs = [
        torch.distributions.Laplace(t, s).log_prob(d)
        - torch.distributions.Laplace(t, s).log_prob(t)
        for d, t, s in zip(layers(dummy), layers(target), SIGMAS, strict=True)
    ]
    return -sum(part.sum(1) for part in logs)


def naive_top(dummy: list[Tensor], target: list[Tensor]) -> Tensor:
    d, t = flat(dummy), flat(target)
    values = []
    for row in range(len(d)):
        kept = t[row].abs().argsort(descending=True)[: round(0.25 * t.shape[1])]
        values.append((d[row] - t[row])[kept].square().sum() / t[row][kept].norm() ** 2)
    return torch.stack(values)


def naive_weighted(dummy: list[Tensor], target: list[Tensor]) -> Tensor:
    above = below = 0
    for d, t, w in zip(layers(dummy), layers(target), (1.0, 0.0, 5.0), strict=True):
        above = above + w * (d - t).square().sum(1)
        below = below + w * t.square().sum(1)
    return above / below


NAIVE = {
    "absolute": (
        absolute_error,
        lambda d, t: (flat(d) - flat(t)).abs().sum(1) / flat(t).abs().sum(1),
    ),
    "layerwise": (layerwise_squared_error, naive_layerwise),
    "gaussian": (gaussian_likelihood(SIGMAS), naive_gaussian),
    "laplace": (laplace_likelihood(SIGMAS), naive_laplace),
    "weighted": (weighted(squared_error, [1.0, 0.0, 5.0]), naive_weighted),
    "top k": (top_k(squared_error, 0.25), naive_top),
    "some layers": (
        only_layers(cosine_distance, [0, 2]),
        lambda d, t: 1 - torch.cosine_similarity(flat(d[::2]), flat(t[::2]), dim=1),
    ),
}


@pytest.mark.parametrize("name", NAIVE)
def test_a_distance_and_its_derivative_against_autograd(name: str) -> None:
    distance, naive = NAIVE[name]
    dummy = [g.requires_grad_() for g in random_gradients(3, 5)]
    target = random_gradients(3, 6)
    expected = naive(dummy, target)
    slopes = torch.autograd.grad(expected.sum(), dummy, allow_unused=True)
    value, derivatives = distance([g.detach() for g in dummy], target)
    torch.testing.assert_close(value, expected.detach())
    for ours, theirs, like in zip(derivatives, slopes, dummy, strict=True):
        wanted = torch.zeros_like(like) if theirs is None else theirs
        torch.testing.assert_close(ours, wanted)


def test_a_standard_deviation_per_entry_is_a_diagonal_covariance() -> None:
    dummy, target = random_gradients(2, 7), random_gradients(2, 8)
    generator = torch.Generator().manual_seed(9)
    stds = [torch.rand(t.shape[1:], generator=generator) + 0.5 for t in target]
    covariance = torch.diag(torch.cat([s.flatten() for s in stds]).double().square())
    error = flat(dummy) - flat(target)
    expected = 0.5 * (error @ torch.linalg.inv(covariance) * error).sum(1)
    value, _ = gaussian_likelihood(stds)(dummy, target)
    torch.testing.assert_close(value, expected)


def test_a_layer_without_gradient_does_not_break_the_layerwise_distance() -> None:
    dummy, target = random_gradients(2, 1), random_gradients(2, 2)
    target[1] = torch.zeros_like(target[1])
    value, derivatives = layerwise_squared_error(dummy, target)
    assert bool(value.isfinite().all())
    assert all(bool(d.isfinite().all()) for d in derivatives)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gaussian_likelihood(0.0), "std: expected finite numbers above 0"),
        (lambda: laplace_likelihood([1.0, -1.0]), "scale: expected finite numbers"),
        (lambda: weighted(squared_error, [0.0, 0.0]), "weights: expected at least one"),
        (lambda: weighted(squared_error, [-1.0]), "weights: expected a finite number"),
        (lambda: only_layers(squared_error, []), "kept: expected at least one"),
        (lambda: top_k(squared_error, 0.0), "share: expected a number above 0"),
        (lambda: top_k(squared_error, 1.5), "share: expected a number above 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    "distance",
    [
        gaussian_likelihood([1.0]),
        laplace_likelihood([1.0, 2.0]),
        weighted(squared_error, [1.0]),
        only_layers(squared_error, [3]),
    ],
)
def test_settings_for_another_model_are_refused(distance) -> None:
    with pytest.raises(InputError, match="parameters"):
        distance(random_gradients(1, 0), random_gradients(1, 1))
