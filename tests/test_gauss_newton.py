"""Gauss-Newton with conjugate gradients, against dense matrices and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.gauss_newton import (
    ConjugateGradients,
    GaussNewton,
    ResidualJacobian,
    has_sweeps,
    is_sum_of_squares,
)
from gradinv_helpers.attacks.last_layer import last_layer_input
from gradinv_helpers.attacks.map_search import map_estimate
from gradinv_helpers.attacks.optimise import TrialState
from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.attacks.reconstruction import Step
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.priors.gaussian import SpectrumPrior, spectrum_prior
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

SIDE, LEVEL = 8, 1e-3


def images_of(count: int = 2) -> Images:
    pool = load_images("digits", image_size=SIDE)
    return pool[torch.arange(0, 37 * count, 37)]


def network(slope: type[nn.Module] = nn.Sigmoid) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        slope(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 12),
        nn.Tanh(),
        nn.Linear(12, 10),
    )


class Wrapped(nn.Module):
    """The same function, which is no plain chain."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def posterior_of(
    model: nn.Module, training: LocalTraining | None = None, *, features: bool = False
) -> Posterior:
    images = images_of()
    update = local_update(model, images, training)
    read = last_layer_input(model, images.pixels).detach() if features else None
    prior = spectrum_prior(images.shape)
    return Posterior(update, prior, images.labels, read).double()


def point_of(posterior: Posterior, scale: float = 0.1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(posterior.size, generator=generator, dtype=torch.float64)
    return scale * noise


def dense(posterior: Posterior, point: Tensor, level: float) -> Tensor:
    """The Jacobian of the whitened residual, by torch's own automatic derivative."""
    scales = [1 / math.sqrt(v) for v in posterior.variances(level)]
    model = posterior.model

    def residual(latents: Tensor) -> Tensor:
        images = posterior.prior.decode(latents.view(posterior.num_samples, -1))
        loss = F.cross_entropy(model(images), posterior.labels)
        weights = list(model.parameters())
        found = torch.autograd.grad(loss, weights, create_graph=True)
        parts = [s * g.flatten() for s, g in zip(scales, found, strict=True)]
        if posterior.features is not None:
            known = posterior.features.double()
            unit = math.sqrt(known.numel() * float(posterior.features.var()))
            parts.append(last_layer_input(model, images).flatten() / unit / level)
        return torch.cat(parts)

    return torch.autograd.functional.jacobian(residual, point)


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts], 1)


def go_on(trial: int, state: TrialState) -> str:
    return "long enough" if len(state.trace) > 40 else ""


# --- products -----------------------------------------------------------------------


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_products_are_those_of_the_jacobian(features: bool, wrapped: bool) -> None:
    model = Wrapped(network()) if wrapped else network()
    posterior = posterior_of(model, features=features)
    assert has_sweeps(posterior) != wrapped
    points = torch.stack([point_of(posterior, seed=s) for s in (1, 2)])
    found = ResidualJacobian(posterior, points, LEVEL)
    directions = torch.stack([point_of(posterior, seed=s) for s in (3, 4)])
    moved = flat(found.along(directions))
    back = found.normal(directions)
    for row in range(2):
        matrix = dense(posterior, points[row], LEVEL)
        expected = matrix @ directions[row]
        tolerance = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(moved[row], expected, rtol=1e-6, atol=tolerance)
        expected = matrix.T @ (matrix @ directions[row])
        tolerance = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(back[row], expected, rtol=1e-6, atol=tolerance)


def test_products_of_a_delta_are_adjoint() -> None:
    training = LocalTraining(sends="delta", lr=0.1, epochs=2)
    posterior = posterior_of(network(), training)
    assert posterior.steps == 2 and not has_sweeps(posterior)
    points = point_of(posterior)[None]
    jacobian = ResidualJacobian(posterior, points, LEVEL)
    one, other = (point_of(posterior, seed=s)[None] for s in (1, 2))
    moved = jacobian.along(one)
    left = float((flat(moved) * flat(jacobian.along(other))).sum())
    right = float((jacobian.back(moved) * other).sum())
    assert left == pytest.approx(right, rel=1e-6)
    # The slope of the energy is 2 (J^T r + u).
    energy, slope = posterior.energy(points, LEVEL)
    gaps = [
        gap / math.sqrt(v)
        for gap, v in zip(
            posterior.gaps(
                posterior.map(posterior.images(points), posterior.classes[None])[0]
            ),
            posterior.variances(LEVEL),
            strict=True,
        )
    ]
    expected = 2 * (jacobian.back(gaps) + points)
    torch.testing.assert_close(slope, expected, rtol=1e-8, atol=1e-6)
    total = flat(gaps).square().sum() + points.square().sum()
    assert float(energy) == pytest.approx(float(total), rel=1e-10)


def test_conjugate_gradients_solve() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(30, 40, generator=generator, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(30, dtype=torch.float64)
    right = torch.randn(30, generator=generator, dtype=torch.float64)
    system = ConjugateGradients(lambda v: matrix @ v, right)
    falls = []
    while not system.solved:
        system.advance(5)
        falls.append(system.fall)
        assert system.products <= 100
        model = system.step @ matrix @ system.step - 2 * right @ system.step
        assert system.fall == pytest.approx(-float(model), rel=1e-9)
    expected = torch.linalg.solve(matrix, right)
    torch.testing.assert_close(system.step, expected, rtol=1e-8, atol=1e-9)
    gains = torch.tensor(falls).diff()
    assert float(gains.min()) > -1e-6 and len(falls) > 2


def test_nothing_to_solve() -> None:
    system = ConjugateGradients(lambda v: v, torch.zeros(3, dtype=torch.float64))
    system.advance(2)
    assert system.solved and system.products == 0 and not system.step.any()


# --- steps --------------------------------------------------------------------------


def test_a_linear_model_ends_at_the_posterior_mean() -> None:
    """A model of zeros, whose gradient is linear in the images."""
    images = images_of()
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 10))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    update = local_update(model, images)
    posterior = Posterior(update, spectrum_prior(images.shape), images.labels).double()
    prior = posterior.prior
    assert isinstance(prior, SpectrumPrior)
    state = GaussNewton(posterior, point_of(posterior, 1.0), 0.05, inspect=go_on).run()
    shares = ((0.1 - F.one_hot(images.labels, 10).double()) / 2).T
    eye = torch.eye(prior.size, dtype=torch.float64)
    root = (prior.decode(eye) - prior.mean).flatten(1)
    mapped = torch.kron(shares.contiguous(), root.T.contiguous())
    sent = update.tensors["1.weight"].double()
    rest = (sent - shares.sum(1, keepdim=True) * prior.mean).flatten()
    variance = posterior.variances(0.05)[0]
    normal = mapped.T @ mapped / variance
    normal.diagonal().add_(1)
    expected = torch.linalg.solve(normal, mapped.T @ rest / variance)
    torch.testing.assert_close(state.point, expected, rtol=0, atol=1e-8)
    assert state.stopped == "the loss is at a minimum"


def test_a_sigmoid_network_ends_where_the_slope_is_zero() -> None:
    posterior = posterior_of(network(), features=True)
    state = GaussNewton(posterior, point_of(posterior), 1e-2, inspect=go_on).run()
    _, slope = posterior.energy(state.point[None], 1e-2)
    _, before = posterior.energy(point_of(posterior)[None], 1e-2)
    assert float(slope.norm()) < 1e-5 * float(before.norm())
    assert state.trace == sorted(state.trace, reverse=True)


def test_a_start_without_a_finite_energy() -> None:
    posterior = posterior_of(network())
    start = torch.full((posterior.size,), math.nan, dtype=torch.float64)
    state = GaussNewton(posterior, start, LEVEL, inspect=go_on).run()
    assert "not finite" in state.stopped


# --- where it applies ---------------------------------------------------------------


def test_kinks_and_signs_are_left_to_others() -> None:
    kinked = posterior_of(network(nn.ReLU))
    assert not is_sum_of_squares(kinked)
    with pytest.raises(InputError, match="a Gaussian likelihood of a smooth network"):
        ResidualJacobian(kinked, point_of(kinked)[None], LEVEL)
    assert is_sum_of_squares(posterior_of(network()))


def update_of() -> SharedUpdate:
    return local_update(network(), images_of())


def test_the_solver_is_a_choice() -> None:
    with pytest.raises(InputError, match="solver"):
        map_estimate(update_of(), solver="newton")
    settings = {"iterations": 8, "restarts": 1, "labels": images_of().labels}
    asked, other = (
        map_estimate(update_of(), solver=solver, **settings)
        for solver in ("gauss-newton", "lbfgs")
    )
    assert not torch.equal(asked.latents, other.latents)
    assert asked.reconstruction.reason.endswith("L-BFGS and Gauss-Newton")
    assert other.reconstruction.reason.endswith("L-BFGS")
    kinked = local_update(network(nn.ReLU), images_of())
    found = map_estimate(kinked, solver="gauss-newton", **settings)
    assert "cosine" in found.reconstruction.reason


def test_ctrl_c_in_the_middle_of_a_step() -> None:
    seen: list[Step] = []

    def stop(step: Step) -> None:
        seen.append(step)
        if len(seen) == 14:
            raise KeyboardInterrupt

    given = {"solver": "gauss-newton", "labels": images_of().labels, "restarts": 1}
    found = map_estimate(update_of(), iterations=40, on_step=stop, **given)
    assert found.reconstruction.stopped == "interrupted"
    assert len(found.reconstruction.losses) == 14
    assert found.stages[-1].level < 2e-3
