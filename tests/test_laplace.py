"""The Laplace approximation against dense algebra, automatic derivatives and limits."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from gradinv_helpers.attacks import laplace as module
from gradinv_helpers.attacks.laplace import (
    LaplaceApproximation,
    LatentJacobian,
    laplace_approximation,
)
from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate, normalize
from gradinv_helpers.priors.gaussian import spectrum_prior
from gradinv_helpers.updates import LocalTraining, local_update

SHAPE, NUM_CLASSES = (1, 4, 4), 3
LABELS = torch.tensor([0, 2, 2])
NOISE = 1e-3


@dataclasses.dataclass(frozen=True)
class TanhPrior:
    """Images 0.5 + 0.4 tanh(A u) of a few latents."""

    matrix: Tensor  # (pixels, size)
    name: str = "tanh"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return SHAPE

    @property
    def size(self) -> int:
        return self.matrix.shape[1]

    def decode(self, latents: Tensor) -> Tensor:
        flat = 0.5 + 0.4 * torch.tanh(latents @ self.matrix.T)
        return flat.unflatten(-1, SHAPE)

    def pull_back(self, latents: Tensor, slopes: Tensor) -> Tensor:
        slope = 0.4 * (1 - torch.tanh(latents @ self.matrix.T).square())
        return (slopes.flatten(-3) * slope) @ self.matrix

    def encode(self, images: Tensor) -> Tensor:
        flat = torch.atanh(((images.flatten(-3) - 0.5) / 0.4).clamp(-0.99, 0.99))
        return flat @ torch.linalg.pinv(self.matrix).T

    def given(self, labels: Tensor) -> TanhPrior:
        return self

    def to(self, like: Tensor) -> TanhPrior:
        return TanhPrior(self.matrix.to(like))


def tanh_prior(size: int = 3) -> TanhPrior:
    generator = torch.Generator().manual_seed(1)
    return TanhPrior(torch.randn(16, size, generator=generator).double() / 2)


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    extra = [nn.BatchNorm2d(4)] if norm else []
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        *extra,
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.Tanh(),
        nn.Linear(6, NUM_CLASSES),
    )


def private() -> Images:
    generator = torch.Generator().manual_seed(2)
    return Images(torch.rand(3, *SHAPE, generator=generator), LABELS, tuple("abc"))


def posterior_of(kind: str = "gradient", noise: float = NOISE, prior=None) -> Posterior:
    images, model = private(), network(kind.startswith("batch"))
    if kind == "normalised":
        parts = [local_update(model, images[p]) for p in ([0], [1, 2])]
        update = aggregate([normalize(part) for part in parts])
    elif kind == "replay":
        recipe = LocalTraining(sends="delta", lr=0.5, epochs=2, optimiser="momentum")
        update = local_update(model, images, recipe)
    else:
        update = local_update(model, images)
    if kind == "batch":  # whose statistics are not sent
        update = update.replace_tensors(update.tensors, buffers=None)
    update = update.replace_tensors(update.tensors, noise_std=noise)
    return Posterior(update, prior or tanh_prior(), LABELS)


def some_point(posterior: Posterior, seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(posterior.size, generator=generator).double()


def plain_jacobian(posterior: Posterior, point: Tensor, level: float) -> Tensor:
    """By automatic differentiation of the plain gradient; whitened (m, n)."""
    model = network().double()
    names = [name for name, _ in model.named_parameters()]
    prior = posterior.prior.to(point)
    variances = posterior.double().variances(level)

    def update(latents: Tensor) -> Tensor:
        pixels = prior.decode(latents.view(3, -1))

        def loss(weights: tuple[Tensor, ...]) -> Tensor:
            named = dict(zip(names, weights, strict=True))
            return F.cross_entropy(functional_call(model, named, (pixels,)), LABELS)

        found = torch.func.grad(loss)(tuple(p.detach() for p in model.parameters()))
        pairs = zip(found, variances, strict=True)
        return torch.cat([g.flatten() / v**0.5 for g, v in pairs])

    return jacrev(update)(point)


@pytest.fixture(scope="module")
def case() -> tuple[LaplaceApproximation, Tensor]:
    """An approximation, and its matrix H by automatic differentiation."""
    posterior = posterior_of()
    point = some_point(posterior)
    dense = plain_jacobian(posterior, point, 1e-2)
    normal = torch.eye(posterior.size).double() + dense.T @ dense
    return laplace_approximation(posterior, point, level=1e-2), normal


# --- the Jacobian -----------------------------------------------------------------


def test_products_are_those_of_automatic_differentiation() -> None:
    posterior = posterior_of()
    point = some_point(posterior)
    expected = plain_jacobian(posterior, point, 1e-2)
    jacobian = LatentJacobian(posterior, point, 1e-2)
    assert (jacobian.equations, jacobian.unknowns) == expected.shape
    torch.testing.assert_close(jacobian.dense(), expected)
    right = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).double()
    left = jacobian.along(right)
    torch.testing.assert_close(left, right @ expected.T)
    torch.testing.assert_close(jacobian.back(left), left @ expected)
    jacobian.parts = []  # then by differences
    difference = (jacobian.along(right) - left).norm() / left.norm()
    assert 0 < float(difference) < 1e-7


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("gradient", 3),
        ("batch", 1),
        ("batch, sent", 0),
        ("normalised", 0),
        ("replay", 0),
    ],
)
def test_both_products_belong_to_one_matrix(kind: str, parts: int) -> None:
    posterior = posterior_of(kind)
    jacobian = LatentJacobian(posterior, some_point(posterior), 0.0)
    assert len(jacobian.parts) == parts
    dense = jacobian.dense()
    eye = torch.eye(jacobian.equations).double()
    scale = float(dense.abs().max())
    torch.testing.assert_close(jacobian.back(eye), dense, rtol=0, atol=1e-7 * scale)


# --- bits, directions, spread -----------------------------------------------------


def test_bits_and_directions_are_those_of_the_dense_matrix(case) -> None:
    found, normal = case
    assert found.exact
    assert found.bits_error == 0
    expected = float(torch.linalg.slogdet(normal)[1]) / math.log(4)
    assert found.bits == pytest.approx(expected, rel=1e-9)
    assert found.identifiable == int((torch.linalg.eigvalsh(normal) > 2).sum())
    assert 0 < found.identifiable < 9  # level and noise leave some to the prior
    torch.testing.assert_close(found.covariance(), torch.linalg.inv(normal))


def test_bits_of_one_image(case) -> None:
    found, normal = case
    covariance = torch.linalg.inv(normal)
    for k in range(3):
        own = slice(3 * k, 3 * k + 3)
        hidden = -float(torch.linalg.slogdet(covariance[own, own])[1]) / math.log(4)
        alone = float(torch.linalg.slogdet(normal[own, own])[1]) / math.log(4)
        assert float(found.image_bits[k]) == pytest.approx(hidden, rel=1e-8)
        assert float(found.image_bits_alone[k]) == pytest.approx(alone, rel=1e-8)
    assert bool((found.image_bits < found.image_bits_alone).all())
    assert float(found.image_bits.sum()) < found.bits


def test_spread_of_pixels_is_that_of_the_linearised_decoder(case) -> None:
    found, normal = case
    prior = found.prior
    rows = jacrev(lambda u: prior.decode(u.view(3, -1)).flatten())(
        found.latents.flatten()
    )
    variance = (rows @ torch.linalg.inv(normal) @ rows.T).diagonal()
    torch.testing.assert_close(found.pixel_std().flatten(), variance.sqrt())


def test_draws_have_the_mean_and_the_covariance(case) -> None:
    found, normal = case
    drawn = found.sample(20_000, seed=3).flatten(1)
    assert torch.equal(drawn, found.sample(20_000, seed=3).flatten(1))
    assert not torch.equal(drawn, found.sample(20_000, seed=4).flatten(1))
    # Whitened, they are standard normal: 9 means and 45 second moments.
    white = (drawn - found.latents.flatten()) @ torch.linalg.cholesky(normal)
    assert float(white.mean(0).abs().max()) < 4 / 20_000**0.5
    moments = white.T @ white / len(white) - torch.eye(9)
    assert float(moments.abs().max()) < 5 * 2**0.5 / 20_000**0.5
    images = found.sample_images(2, seed=3)
    assert images.shape == (2, 3, *SHAPE)


def test_gaussian_posterior_is_met_exactly() -> None:
    """With weights of zero a linear layer's gradient is linear in the images."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, NUM_CLASSES))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    update = local_update(model, private())
    update = update.replace_tensors(update.tensors, noise_std=0.02)
    posterior = Posterior(update, spectrum_prior(SHAPE), LABELS).double()
    found = laplace_approximation(posterior, some_point(posterior))
    # A quadratic energy: its slope moves by 2 H v wherever one stands.
    here, there = some_point(posterior, 8), some_point(posterior, 9)
    slopes = [posterior.energy(x[None], 0.0)[1][0] for x in (here, there)]
    expected = 2 * torch.linalg.solve(found.covariance(), there - here)
    torch.testing.assert_close(slopes[1] - slopes[0], expected)


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-5, 1e2), st.floats(1.01, 100))
def test_more_noise_tells_less(noise: float, factor: float) -> None:
    prior = tanh_prior()
    low, high = (
        laplace_approximation(p, some_point(p))
        for p in (posterior_of(noise=s, prior=prior) for s in (noise, factor * noise))
    )
    assert 0 < high.bits < low.bits
    assert high.identifiable <= low.identifiable
    assert bool((high.image_bits <= low.image_bits + 1e-9).all())
    assert bool((high.pixel_std() >= low.pixel_std() - 1e-9).all())
    scaled = low.scaled(factor**2)
    assert scaled.bits == pytest.approx(high.bits, rel=1e-4)  # but for the rounding
    assert scaled.noise == pytest.approx(high.noise)


def test_without_information_the_prior_is_left() -> None:
    posterior = posterior_of(noise=1e6)
    found = laplace_approximation(posterior, torch.zeros(posterior.size))
    assert found.bits < 1e-6
    assert found.identifiable == 0
    torch.testing.assert_close(found.covariance(), torch.eye(9).double())


def test_small_eigenvalues_survive_large_ones() -> None:
    generator = torch.Generator().manual_seed(5)
    orthogonal = torch.linalg.qr(torch.randn(8, 8, generator=generator).double())[0]
    left = torch.linalg.qr(torch.randn(30, 8, generator=generator).double())[0]
    values = torch.logspace(8, -2, 8).double()
    found, rows = module._all_directions(left * values @ orthogonal)
    torch.testing.assert_close(found, values.square(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(rows @ rows.T, torch.eye(8).double())
    torch.testing.assert_close((rows @ orthogonal.T).abs(), torch.eye(8).double())


# --- where not all directions are computed --------------------------------------------


def test_leading_directions_are_those_of_the_whole() -> None:
    posterior = posterior_of(prior=spectrum_prior(SHAPE))
    point = 0.3 * some_point(posterior)
    whole = laplace_approximation(posterior, point)
    part = laplace_approximation(posterior, point, rank=32)
    assert not part.exact
    assert len(part.eigenvalues) == 32
    leading = whole.eigenvalues[:32]
    assert bool((part.eigenvalues <= leading * (1 + 1e-9)).all())  # interlacing
    torch.testing.assert_close(part.eigenvalues[:4], leading[:4], rtol=1e-6, atol=0)
    assert part.bits == pytest.approx(whole.bits, rel=0.15)  # from eight probes
    assert 0 < part.bits_error < 0.1 * part.bits
    assert bool((part.image_bits <= whole.image_bits + 1e-9).all())
    # What is not known keeps the spread of the prior.
    assert bool((part.pixel_std() >= whole.pixel_std() - 1e-9).all())
    rows = part.directions
    torch.testing.assert_close(rows @ rows.T, torch.eye(32).double())
    kept = torch.eye(48).double() - rows.T @ (part._share()[:, None] * rows)
    torch.testing.assert_close(part.covariance(), kept)


def test_all_leading_directions_are_the_whole() -> None:
    posterior = posterior_of()
    point = some_point(posterior)
    whole = laplace_approximation(posterior, point)
    part = laplace_approximation(posterior, point, rank=9)
    torch.testing.assert_close(part.eigenvalues, whole.eigenvalues)
    torch.testing.assert_close(part.covariance(), whole.covariance())
    torch.testing.assert_close(part.image_bits, whole.image_bits)
    assert part.bits == pytest.approx(whole.bits, rel=0.15)


# --- input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"point": torch.zeros(4)}, "point"),
        ({"level": -1.0}, "level"),
        ({"rank": 0}, "rank"),
        ({"rank": 10}, "rank"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_input_is_named(changes: dict, argument: str) -> None:
    given = {"point": torch.zeros(9)} | changes
    with pytest.raises(InputError, match=argument):
        laplace_approximation(posterior_of(), **given)
