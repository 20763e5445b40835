"""Samplers against closed forms, limits, simulation and known autocorrelations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.alignment import align_images, reorder
from gradinv_helpers.attacks.analytic import closed_form_image
from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.attacks.sampling import (
    CalibrationRanks,
    calibration_ranks,
    effective_sample_size,
    exchangeable,
    sample_posterior,
    split_r_hat,
)
from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate, normalize
from gradinv_helpers.priors.gaussian import spectrum_prior
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

NUM_CLASSES = 3
SMALL = (1, 3, 3)
BINS = 8


@dataclass(frozen=True)
class TanhPrior:
    """Images 0.5 + 0.4 tanh(A u) of a few latents."""

    matrix: Tensor  # (pixels, size)
    image_shape: tuple[int, int, int]
    name: str = "tanh"

    @property
    def size(self) -> int:
        return self.matrix.shape[1]

    def decode(self, latents: Tensor) -> Tensor:
        flat = 0.5 + 0.4 * torch.tanh(latents @ self.matrix.T)
        return flat.unflatten(-1, self.image_shape)

    def pull_back(self, latents: Tensor, slopes: Tensor) -> Tensor:
        slope = 0.4 * (1 - torch.tanh(latents @ self.matrix.T).square())
        return (slopes.flatten(-3) * slope) @ self.matrix

    def encode(self, images: Tensor) -> Tensor:
        flat = torch.atanh(((images.flatten(-3) - 0.5) / 0.4).clamp(-0.99, 0.99))
        return flat @ torch.linalg.pinv(self.matrix).T

    def given(self, labels: Tensor) -> TanhPrior:
        return self

    def to(self, like: Tensor) -> TanhPrior:
        return TanhPrior(self.matrix.to(like), self.image_shape)


def tanh_prior(side: int = 8, size: int = 3) -> TanhPrior:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(side * side, size, generator=generator).double()
    return TanhPrior(matrix / size**0.5, (1, side, side))


def mlp(side: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(side**2, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES)
    )


def flat_model(pixels: int) -> nn.Module:
    """With weights of zero, the gradient is linear in the images."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, NUM_CLASSES))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def drawn(shape: tuple[int, int, int], labels: list[int], seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(len(labels), *shape, generator=generator)
    names = tuple(str(k) for k in range(max(labels) + 1))
    return Images(pixels, torch.tensor(labels), names)


def noisy(update: SharedUpdate, std: float, seed: int = 0) -> SharedUpdate:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: t + std * torch.randn(t.shape, generator=generator)
        for name, t in update.tensors.items()
    }
    return update.replace_tensors(tensors, noise_std=std)


# --- where the posterior is Gaussian --------------------------------------------------


@pytest.fixture(scope="module")
def linear() -> tuple[SharedUpdate, Tensor, Tensor]:
    """An update, and mean and precision of its latents by linear algebra."""
    labels = [0, 2]
    update = noisy(local_update(flat_model(9), drawn(SMALL, labels)), 0.05)
    prior = spectrum_prior(SMALL)
    root = (prior.decode(torch.eye(9).double()) - prior.mean).flatten(1)
    # Row k of the weight's gradient: the mean of (1 / K - [label = k]) x.
    shares = torch.full((2, NUM_CLASSES), 1 / NUM_CLASSES, dtype=torch.float64)
    shares[[0, 1], labels] -= 1
    shares = (shares.T / 2).contiguous()
    mapped = torch.kron(shares, root.T.contiguous())
    rest = update.tensors["1.weight"].double()
    rest = rest - shares.sum(1, keepdim=True) * prior.mean
    precision = torch.eye(18).double() + mapped.T @ mapped / 0.05**2
    mean = torch.linalg.solve(precision, mapped.T @ rest.flatten() / 0.05**2)
    return update, mean, precision


@pytest.mark.parametrize(
    ("method", "start", "precondition", "warmup", "draws"),
    [
        ("mala", "map", True, 100, 400),
        ("mala", "prior", False, 300, 900),
        ("hmc", "map", False, 100, 150),
        ("hmc", "prior", True, 100, 150),
    ],
)
def test_mean_and_covariance_of_a_gaussian(
    linear, method, start, precondition, warmup, draws
) -> None:
    update, mean, precision = linear
    found = sample_posterior(
        update,
        labels=torch.tensor([0, 2]),
        chains=64,
        warmup=warmup,
        draws=draws,
        method=method,
        start=start,
        precondition=precondition,
        leapfrog=5,
    )
    white = (found.latents.double().flatten(2) - mean) @ torch.linalg.cholesky(
        precision
    )
    white = white.flatten(0, 1)
    assert float(found.effective.min()) > 1500
    assert float(found.r_hat.max()) < 1.03
    assert float(white.mean(0).abs().max()) < 0.08  # 3 standard errors or more
    moments = white.T @ white / len(white) - torch.eye(18)
    assert float(moments.abs().max()) < 0.1
    target = 0.574 if method == "mala" else 0.8
    assert float((found.acceptance - target).abs().mean()) < 0.12
    assert (found.laplace is None) == (start == "prior")
    if found.laplace is not None:  # it is exact here
        torch.testing.assert_close(
            found.laplace.covariance(), torch.linalg.inv(precision)
        )
        torch.testing.assert_close(found.laplace.latents.flatten(), mean)
        ratio = found.std / found.laplace.pixel_std()
        assert float((ratio - 1).abs().max()) < 0.08


def test_without_information_the_prior_comes_back() -> None:
    prior = tanh_prior(4)
    update = local_update(mlp(4), drawn((1, 4, 4), [0, 2]))
    update = update.replace_tensors(update.tensors, noise_std=1e6)
    found = sample_posterior(
        update,
        prior=prior,
        labels=torch.tensor([0, 2]),
        chains=50,
        warmup=50,
        draws=20,
        thin=2,
        method="hmc",
        leapfrog=6,
        seed=2,
    )
    latents = found.latents.flatten(0, 1).flatten(1).double()
    assert found.laplace is not None
    assert found.laplace.bits < 1e-6
    for column in latents.T:
        assert scipy.stats.kstest(column.numpy(), "norm").pvalue > 1e-3
        wide = scipy.stats.kstest(1.4 * column.numpy(), "norm").pvalue
        assert wide < 1e-3  # what the test can tell apart
    covariance = torch.cov(latents.T)
    assert float((covariance - torch.eye(6)).abs().max()) < 0.2


def test_without_noise_the_closed_form_is_met() -> None:
    shape = (1, 4, 4)
    images = drawn(shape, [1])
    update = noisy(local_update(mlp(4), images), 1e-6)
    found = sample_posterior(
        update, labels=images.labels, chains=2, warmup=100, draws=100
    )
    exact = closed_form_image(update).float()
    torch.testing.assert_close(found.mean, exact, rtol=0, atol=2e-3)
    assert float(found.std.max()) < 2e-3
    assert float((exact - images.pixels).abs().max()) < 1e-2
    blind = spectrum_prior(shape).mean.float()
    assert float((exact - blind).abs().mean()) > 0.1


# --- simulation-based calibration ---------------------------------------------------


def ranks(temperature: float = 1.0, **more) -> CalibrationRanks:
    settings = {
        "labels": torch.tensor([0, 2]),
        "noise_std": 0.03,
        "replicates": 128,
        "warmup": 120,
        "draws": 31,
        "thin": 3,
        "leapfrog": 6,
        "seed": 1,
    }
    prior = tanh_prior(8, 2)
    return calibration_ranks(
        mlp(8), prior, temperature=temperature, **(settings | more)
    )


def test_truths_have_even_ranks() -> None:
    found = ranks()
    assert found.names == (*(f"latent {k}" for k in range(4)), "energy", "squared norm")
    assert found.ranks.shape == (128, 6)
    assert found.counts(BINS).sum(1).tolist() == [128] * 6
    assert float(found.p_values(BINS).min()) > 1e-3
    assert float(found.p_values(BINS).max()) <= 1


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_factor_of_two_in_the_energy_is_found(temperature: float) -> None:
    found = ranks(temperature)
    assert float(found.p_values(BINS)[-2]) < 1e-6  # of the energy
    if temperature < 1:  # too narrow: truths lie outside
        counts = found.counts(BINS)[:4].sum(0)
        assert int(counts[[0, -1]].sum()) > 1.2 * 2 / BINS * int(counts.sum())


def test_p_values_are_those_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(0, 32, (100, 3), generator=generator)
    found = CalibrationRanks(made, 31, ("a", "b", "c"))
    for counts, p_value in zip(found.counts(4), found.p_values(4), strict=True):
        expected = scipy.stats.chisquare(counts.numpy()).pvalue
        assert float(p_value) == pytest.approx(float(expected))
    with pytest.raises(InputError, match="bins"):
        found.counts(5)


# --- images of one class ------------------------------------------------------------


def of_one_class(seed: int = 0, **more):
    images = drawn((1, 4, 4), [1, 1, 0])
    update = noisy(local_update(mlp(4), images), 1e-2)
    return sample_posterior(
        update,
        prior=tanh_prior(4),
        labels=images.labels,
        chains=3,
        warmup=40,
        draws=30,
        seed=seed,
        **more,
    )


def test_exchanging_images_of_a_class_changes_nothing() -> None:
    """A start with both exchanged gives the same law, and the same summaries."""
    generator = torch.Generator().manual_seed(4)
    point = torch.randn(3, 3, generator=generator).double()
    found = of_one_class(start=point)
    assert found.labels.tolist() == [1, 1, 0]
    apart = found.latents.flatten(0, 1)
    mixed = apart.clone()
    mixed[::2] = mixed[::2][:, [1, 0, 2]]
    prior = tanh_prior(4).to(mixed)
    images = prior.decode(mixed)
    kinds = torch.tensor([1, 1, 0])
    again = reorder(images, align_images(images, found.reference, kinds))
    torch.testing.assert_close(again.mean(0), found.mean)
    torch.testing.assert_close(again.std(0), found.std)
    blurred = images.std(0)
    assert float((blurred[:2] - found.std[:2]).abs().max()) > 0.02


def test_draws_lie_nearest_to_the_reference() -> None:
    found = of_one_class()
    flat = found.images.flatten(0, 1)
    swapped = flat[:, [1, 0, 2]]
    own = (flat - found.reference).square().flatten(1).sum(1)
    other = (swapped - found.reference).square().flatten(1).sum(1)
    assert bool((own <= other + 1e-6).all())


def test_what_may_change_places() -> None:
    images = drawn((1, 4, 4), [1, 1, 0, 1])
    prior, labels, model = tanh_prior(4), images.labels, mlp(4)

    def partners(update: SharedUpdate, order: object = "sequential") -> list[int]:
        kinds = exchangeable(Posterior(update, prior, labels, order=order))
        return [int((kinds == kind).sum()) for kind in kinds]

    assert partners(local_update(model, images)) == [3, 3, 1, 3]
    parts = [local_update(model, images[p]) for p in ([0, 1], [2, 3])]
    assert partners(aggregate(parts)) == [3, 3, 1, 3]
    units = aggregate([normalize(part) for part in parts])
    assert partners(units) == [2, 2, 1, 1]
    recipe = LocalTraining(sends="delta", lr=0.1, batch_size=2)
    steps = local_update(model, images, recipe)
    assert partners(steps) == [1, 1, 1, 1]
    assert partners(steps, "averaged") == [3, 3, 1, 3]


# --- diagnostics ----------------------------------------------------------------------


def autoregressive(rho: float, chains: int = 4, length: int = 20_000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(chains, length, generator=generator).double()
    noise[:, 1:] *= math.sqrt(1 - rho**2)
    rows = [noise[:, 0]]
    for k in range(1, length):
        rows.append(rho * rows[-1] + noise[:, k])
    return torch.stack(rows, 1)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, -0.3])
def test_effective_size_of_autoregressive_chains(rho: float) -> None:
    found = float(effective_sample_size(autoregressive(rho)))
    assert found == pytest.approx(80_000 * (1 - rho) / (1 + rho), rel=0.12)


def test_r_hat_tells_chains_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4, 500, 2, generator=generator)
    assert split_r_hat(draws).shape == (2,)
    assert float(split_r_hat(draws).max()) < 1.01
    shifted = draws + torch.tensor([0.0, 0.0, 0.0, 2.0])[:, None, None]
    assert float(split_r_hat(shifted).min()) > 1.2
    assert float(effective_sample_size(shifted).max()) < 30
    drifting = draws + torch.linspace(-2, 2, 500)[:, None]
    assert float(split_r_hat(drifting).min()) > 1.2  # each chain with itself
    with pytest.raises(InputError, match="draws"):
        split_r_hat(draws[:, :3])


# --- the call -----------------------------------------------------------------------


def test_same_call_same_draws() -> None:
    first, again, other = of_one_class(1), of_one_class(1), of_one_class(2)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert first.images.shape == (3, 30, 3, 1, 4, 4)
    assert first.energies.shape == (3, 30)
    assert not first.tempered
    assert first.noise == pytest.approx(1e-2)


def test_energies_are_those_of_the_posterior() -> None:
    found = of_one_class(method="hmc", leapfrog=3)
    images = drawn((1, 4, 4), [1, 1, 0])
    update = noisy(local_update(mlp(4), images), 1e-2)
    posterior = Posterior(update, tanh_prior(4), images.labels).double()
    points = found.latents[1].double().flatten(1)
    expected, _ = posterior.energy(points, 0.0)
    torch.testing.assert_close(found.energies[1], expected, rtol=1e-4, atol=1e-4)


def test_residuals_tell_whether_the_prior_explains_the_update() -> None:
    prior = tanh_prior(4)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 3, generator=generator).double()
    inside = Images(prior.decode(latents).float(), torch.tensor([0, 2]), tuple("abc"))
    outside = drawn((1, 4, 4), [0, 2])
    found = []
    for images in (inside, outside):
        update = noisy(local_update(mlp(4), images), 1e-3)
        settings = {"labels": images.labels, "chains": 4, "warmup": 30, "draws": 10}
        samples = sample_posterior(update, prior=prior, **settings)
        entries = sum(t.numel() for t in update.tensors.values())
        norms = samples.latents.square().flatten(2).sum(2)
        misfit = (samples.energies - norms) / entries
        torch.testing.assert_close(samples.residuals.float(), misfit.float())
        found.append(float(samples.residuals.mean()))
    assert 0.7 < found[0] < 1.3  # chi-square of 171 entries
    assert found[1] > 3


def test_noise_free_updates_need_a_level() -> None:
    images = drawn((1, 4, 4), [1, 0])
    update = local_update(mlp(4), images)
    settings = {"prior": tanh_prior(4), "chains": 2, "warmup": 5, "draws": 4}
    with pytest.raises(InputError, match="level"):
        sample_posterior(update, **settings)
    with pytest.raises(InputError, match="level"):
        sample_posterior(update, level=0.0, **settings)
    found = sample_posterior(update, level=1e-2, start="prior", **settings)
    assert found.tempered
    assert found.level == 1e-2
    assert found.labels.tolist() == [0, 1]  # read off the update
    assert found.label_source == "inferred (counts)"


@pytest.mark.parametrize(("stop", "kept"), [(25, 4), (21, None)])
def test_an_interrupt_keeps_the_draws_so_far(stop: int, kept: int | None) -> None:
    told = []

    def on_step(step) -> None:
        told.append(step)
        if step.iteration == stop:
            raise KeyboardInterrupt

    images = drawn((1, 4, 4), [1, 0])
    update = noisy(local_update(mlp(4), images), 1e-2)

    def run():
        return sample_posterior(
            update,
            prior=tanh_prior(4),
            labels=images.labels,
            start="prior",
            chains=2,
            warmup=20,
            draws=50,
            on_step=on_step,
        )

    if kept is None:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        found = run()
        assert found.stopped == "interrupted"
        assert found.images.shape[1] == kept
        assert [step.iteration for step in told] == list(range(1, stop + 1))
        assert {step.iterations for step in told} == {70}


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"chains": 0}, "chains"),
        ({"draws": 0}, "draws"),
        ({"warmup": -1}, "warmup"),
        ({"thin": 0}, "thin"),
        ({"method": "nuts"}, "method"),
        ({"leapfrog": 0}, "leapfrog"),
        ({"start": "truth"}, "start"),
        ({"start": torch.zeros(5)}, "start"),
        ({"prior": tanh_prior(8)}, "prior"),
        ({"level": -1.0}, "level"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_input_is_named(changes: dict, argument: str) -> None:
    images = drawn((1, 4, 4), [1, 0])
    update = noisy(local_update(mlp(4), images), 1e-2)
    given = {"prior": tanh_prior(4), "labels": images.labels} | changes
    with pytest.raises(InputError, match=argument):
        sample_posterior(update, **given)


@pytest.mark.parametrize(
    "changes", [{"noise_std": 0.0}, {"replicates": 0}, {"temperature": 0.0}]
)
def test_bad_calibration_is_named(changes: dict) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        ranks(**changes)
