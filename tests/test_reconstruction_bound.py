"""The bound is reached by the best test, and by no attack exceeded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import nn

from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.models import build_model
from gradinv_helpers.privacy import gaussian_epsilon, private_update
from gradinv_helpers.reconstruction_bound import (
    candidate_bound,
    candidate_likelihoods,
    reconstruction_bound,
    reconstruction_bound_of_epsilon,
)
from gradinv_helpers.updates import LocalTraining, local_update

LEVEL = 1e-3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("kappa", "noise"), [(0.05, 1.0), (0.01, 0.5), (0.3, 3.0)])
def test_the_best_test_reaches_the_bound(kappa: float, noise: float) -> None:
    """Neyman and Pearson, simulated in three dimensions: level kappa, power gamma."""
    draws = 40_000
    direction = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) / 3  # of norm C = 1
    drawn = noise * torch.randn(2, draws, 3, generator=seeded(), dtype=torch.float64)
    without, with_sample = drawn[0], drawn[1] + direction
    threshold = noise * stats.norm.isf(kappa)
    false, true = (
        int((sums @ direction > threshold).sum()) for sums in (without, with_sample)
    )
    assert stats.binomtest(false, draws, kappa).pvalue > LEVEL
    bound = reconstruction_bound(kappa, noise_multiplier=noise)
    assert stats.binomtest(true, draws, bound).pvalue > LEVEL
    assert stats.binomtest(true, draws, 0.95 * bound).pvalue < LEVEL  # its power


@pytest.mark.parametrize("steps", [4, 25])
def test_several_sums_are_one_with_less_noise(steps: int) -> None:
    """Their mean is all that counts: the same test on it, simulated."""
    noise, kappa, draws = 5.0, 0.02, 20_000
    drawn = noise * torch.randn(draws, steps, generator=seeded(1), dtype=torch.float64)
    means = (1 + drawn).mean(1)
    threshold = noise / math.sqrt(steps) * stats.norm.isf(kappa)
    hits = int((means > threshold).sum())
    bound = reconstruction_bound(kappa, noise_multiplier=noise, steps=steps)
    assert stats.binomtest(hits, draws, bound).pvalue > LEVEL


@pytest.mark.parametrize("candidates", [2, 30, 360])
@pytest.mark.parametrize("noise", [0.25, 1.0])
def test_guessing_among_orthogonal_candidates_stays_below(
    candidates: int, noise: float
) -> None:
    """Success of the best guess among M orthogonal signals, by quadrature."""

    def density(x: float) -> float:
        return stats.norm.pdf(x - 1 / noise) * stats.norm.cdf(x) ** (candidates - 1)

    success, _ = integrate.quad(density, -12, 12 + 1 / noise)
    bound = reconstruction_bound(1 / candidates, noise_multiplier=noise)
    assert success <= bound
    assert success > 0.7 * bound  # and comes close


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_sampling_by_simulation(rate: float) -> None:
    kappa, noise, draws = 0.05, 0.5, 40_000
    there = torch.rand(draws, generator=seeded(2)) < rate
    sums = there + noise * torch.randn(draws, generator=seeded(3), dtype=torch.float64)
    hits = int((sums > noise * stats.norm.isf(kappa)).sum())
    bound = reconstruction_bound(kappa, noise_multiplier=noise, sample_rate=rate)
    assert stats.binomtest(hits, draws, bound).pvalue > LEVEL


def test_sampling_over_steps_by_simulation() -> None:
    """The likelihood ratio test of several sampled sums reaches the composed bound."""
    kappa, noise, rate, steps, draws = 0.05, 1.0, 0.2, 10, 40_000
    drawn = noise * torch.randn(
        2, draws, steps, generator=seeded(4), dtype=torch.float64
    )
    there = torch.rand(draws, steps, generator=seeded(5)) < rate
    drawn[1] += there

    def ratio(sums: torch.Tensor) -> torch.Tensor:
        with_sample = ((sums - 0.5) / noise**2).exp()
        return (1 - rate + rate * with_sample).log().sum(1)

    threshold = ratio(drawn[0]).quantile(1 - kappa)
    found = float((ratio(drawn[1]) > threshold).double().mean())
    bound = reconstruction_bound(
        kappa, noise_multiplier=noise, sample_rate=rate, steps=steps
    )
    assert found == pytest.approx(bound, rel=0.04)


def test_composition_agrees_with_the_closed_forms() -> None:
    """By duality over the privacy profile; its error is about one percent."""
    for kappa in (1 / 360, 0.1, 0.6):
        nearly = reconstruction_bound(
            kappa, noise_multiplier=1.0, sample_rate=1 - 1e-9, steps=4
        )
        exact = reconstruction_bound(kappa, noise_multiplier=1.0, steps=4)
        assert exact * 0.999 <= nearly <= exact * 1.03


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-6, 0.999), st.floats(0.05, 50.0), st.floats(0.01, 1.0))
def test_shape(kappa: float, noise: float, rate: float) -> None:
    bound = reconstruction_bound(kappa, noise_multiplier=noise, sample_rate=rate)
    assert kappa <= bound * (1 + 1e-12)
    assert bound <= 1
    more = reconstruction_bound(kappa, noise_multiplier=2 * noise, sample_rate=rate)
    assert more <= bound * (1 + 1e-12)
    wider = reconstruction_bound(
        min(0.9995, 1.5 * kappa), noise_multiplier=noise, sample_rate=rate
    )
    assert wider >= bound * (1 - 1e-12)


@settings(deadline=None, max_examples=40)
@given(st.floats(1e-4, 0.5), st.floats(0.1, 20.0), st.floats(1e-8, 1e-2))
def test_epsilon_alone_promises_less(kappa: float, noise: float, delta: float) -> None:
    epsilon = gaussian_epsilon(1 / noise, delta=delta)
    loose = reconstruction_bound_of_epsilon(kappa, epsilon=epsilon, delta=delta)
    tight = reconstruction_bound(kappa, noise_multiplier=noise)
    assert tight <= loose * (1 + 1e-9)


def test_no_noise_promises_nothing() -> None:
    assert reconstruction_bound(0.1, noise_multiplier=0.0) == 1
    half = reconstruction_bound(0.1, noise_multiplier=0.0, sample_rate=0.5)
    assert half == pytest.approx(0.5 + 0.5 * 0.1)
    assert reconstruction_bound_of_epsilon(0.1, epsilon=math.inf, delta=1e-5) == 1
    assert reconstruction_bound_of_epsilon(0.1, epsilon=1e6, delta=1e-5) == 1


@pytest.mark.parametrize("kappa", [0.0, 1.0, -0.1])
def test_bad_prior_success(kappa: float) -> None:
    with pytest.raises(InputError, match="prior_success"):
        reconstruction_bound(kappa, noise_multiplier=1.0)


# --- the informed adversary -------------------------------------------------------


def some_images(count: int, seed: int = 0) -> Images:
    pixels = torch.rand(count, 1, 8, 8, generator=seeded(seed))
    labels = torch.randint(4, (count,), generator=seeded(seed + 1))
    return Images(pixels, labels, tuple("abcd"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model("lenet", in_channels=1, image_size=8, num_classes=4)


@pytest.mark.parametrize("count", [1, 3])
def test_without_noise_the_sample_is_named(model: nn.Module, count: int) -> None:
    pool = some_images(20)
    for target in (2, 11):
        mine = [target, *(i for i in range(20) if i != target)][:count]
        update = local_update(model, pool[mine], LocalTraining(clip_norm=0.5))
        known = pool[mine[1:]] if count > 1 else None
        found = candidate_likelihoods(update, pool, known=known)
        assert int(found.argmax()) == target
        assert float(found.max()) == 0


def test_likelihoods_are_those_of_the_mechanism(model: nn.Module) -> None:
    pool = some_images(6)
    update = private_update(
        model, pool[[1, 4]], clip_norm=0.5, noise_multiplier=0.05, generator=seeded()
    )
    found = candidate_likelihoods(update, pool, known=pool[[4]])
    expected = []
    for i in range(6):
        clean = local_update(model, pool[[i, 4]], LocalTraining(clip_norm=0.5))
        noise = torch.distributions.Normal(0.0, update.noise_std)
        expected.append(
            sum(
                float(noise.log_prob(update.tensors[n] - t).double().sum())
                for n, t in clean.tensors.items()
            )
        )
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, wanted - wanted.max(), atol=2e-2, rtol=1e-3)


def test_the_attack_stays_below_the_bound(model: nn.Module) -> None:
    """Many noisy updates of every candidate: empirical success against the bound."""
    pool, noise, hits, trials = some_images(8), 1.0, 0, 200
    generator = seeded(7)
    for trial in range(trials):
        update = private_update(
            model,
            pool[[trial % 8]],
            clip_norm=0.5,
            noise_multiplier=noise,
            generator=generator,
        )
        hits += int(candidate_likelihoods(update, pool).argmax()) == trial % 8
    bound = reconstruction_bound(1 / 8, noise_multiplier=noise)
    less = stats.binomtest(hits, trials, bound, alternative="greater").pvalue
    assert less > LEVEL
    above_chance = stats.binomtest(hits, trials, 1 / 8, alternative="greater").pvalue
    assert above_chance < LEVEL


def pairs_of_classes(seed: int = 0) -> Images:
    """Two images of every class."""
    pixels = torch.rand(8, 1, 8, 8, generator=seeded(seed))
    return Images(pixels, torch.arange(4).repeat(2), tuple("abcd"))


def test_two_candidates_of_a_class_are_told_apart_as_well_as_can_be(
    model: nn.Module,
) -> None:
    """Half of their distance in units of the noise: then the bound is exact."""
    pool, noise, bound = pairs_of_classes(), 0.02, 0.5
    recipe = LocalTraining(clip_norm=bound)
    flat = torch.stack(
        [
            torch.cat([t.flatten() for t in update.tensors.values()])
            for update in (local_update(model, pool[[i]], recipe) for i in range(8))
        ]
    )
    gaps = (flat[:4] - flat[4:]).norm(dim=1).double()
    expected = stats.norm.cdf((gaps / (2 * noise * bound)).numpy()).mean()
    found = candidate_bound(model, pool, clip_norm=bound, noise_multiplier=noise)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_no_attack_names_candidates_more_often(model: nn.Module, noise: float) -> None:
    pool, hits, trials = pairs_of_classes(1), 0, 160
    generator = seeded(11)
    for trial in range(trials):
        update = private_update(
            model,
            pool[[trial % 8]],
            clip_norm=0.5,
            noise_multiplier=noise,
            generator=generator,
        )
        hits += int(candidate_likelihoods(update, pool).argmax()) == trial % 8
    bound = candidate_bound(model, pool, clip_norm=0.5, noise_multiplier=noise)
    assert bound < 1
    less = stats.binomtest(hits, trials, bound, alternative="greater").pvalue
    assert less > LEVEL


def test_the_only_candidate_of_its_class_may_be_named(model: nn.Module) -> None:
    pool = pairs_of_classes()[:4]
    assert candidate_bound(model, pool, clip_norm=0.5, noise_multiplier=9.0) == 1


def test_what_does_not_fit(model: nn.Module) -> None:
    pool = some_images(4)
    delta = local_update(model, pool[:1], LocalTraining(sends="delta"))
    with pytest.raises(InputError, match="update: expected a gradient"):
        candidate_likelihoods(delta, pool)
    pair = local_update(model, pool[:2])
    with pytest.raises(InputError, match="known: expected 1 images, got 0"):
        candidate_likelihoods(pair, pool)
