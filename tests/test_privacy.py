"""Accountants against opacus and closed forms; the mechanism by hypothesis tests."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.data import Images
from gradinv_helpers.defences import defend
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate
from gradinv_helpers.models import build_model
from gradinv_helpers.priors.gaussian import spectrum_prior
from gradinv_helpers.privacy import (
    PrivateNoise,
    clipping_factors,
    epsilon_spent,
    gaussian_delta,
    gaussian_epsilon,
    noise_multiplier_for,
    per_sample_gradients,
    privacy_profile,
    private_aggregate,
    private_update,
)
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

DELTA = 1e-5
LEVEL = 1e-3  # of the hypothesis tests; seeds are fixed, so they pass or fail for good


def some_images(count: int, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 1, 8, 8, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    return Images(pixels, labels, tuple("abcd"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model("lenet", in_channels=1, image_size=8, num_classes=4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(update: SharedUpdate) -> Tensor:
    return torch.cat([t.flatten().double() for t in update.tensors.values()])


# --- accountants ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rdp", "prv"])
@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [(1.0, 1.0, 1), (0.7, 0.05, 100), (2.0, 0.2, 40), (5.0, 1.0, 25)],
)
def test_epsilon_is_that_of_opacus(
    name: str, noise: float, rate: float, steps: int
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant, RDPAccountant

        theirs = RDPAccountant() if name == "rdp" else PRVAccountant()
        for _ in range(steps):
            theirs.step(noise_multiplier=noise, sample_rate=rate)
        expected = theirs.get_epsilon(delta=DELTA)
    ours = epsilon_spent(
        noise_multiplier=noise,
        sample_rate=rate,
        steps=steps,
        delta=DELTA,
        accountant=name,
    )
    assert ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 9])
def test_without_sampling_it_is_the_gaussian_mechanism(
    noise: float, steps: int
) -> None:
    def spent(accountant: str) -> float:
        return epsilon_spent(
            noise_multiplier=noise,
            sample_rate=1.0,
            steps=steps,
            delta=DELTA,
            accountant=accountant,
        )

    exact = spent("gaussian")
    assert exact <= spent("prv") <= exact + 0.025  # twice its error of 0.01
    assert exact <= spent("rdp") <= 1.2 * exact + 0.1


@settings(deadline=None, max_examples=60)
@given(st.floats(0.02, 30.0), st.floats(1e-9, 0.1))
def test_gaussian_epsilon_solves_its_equation(shift: float, delta: float) -> None:
    epsilon = gaussian_epsilon(shift, delta=delta)
    normal = stats.norm(scale=1)
    if epsilon == 0:  # one threshold test tells the two apart by less than delta
        assert normal.cdf(shift / 2) - normal.cdf(-shift / 2) <= delta * (1 + 1e-9)
        return
    # The likelihood ratio exceeds e^epsilon beyond this threshold.
    threshold = epsilon / shift + shift / 2
    lost = epsilon + normal.logsf(threshold)
    found = normal.sf(threshold - shift) - math.exp(lost)
    assert found == pytest.approx(delta, rel=1e-6)


def test_gaussian_delta_is_the_best_of_all_thresholds() -> None:
    normal = stats.norm()
    for shift, epsilon in ((0.5, 0.1), (1.0, 1.0), (3.0, 2.0)):
        thresholds = torch.linspace(-10, 10, 20_001).numpy()
        gains = normal.sf(thresholds - shift) - math.exp(epsilon) * normal.sf(
            thresholds
        )
        assert gaussian_delta(shift, epsilon=epsilon) == pytest.approx(
            gains.max(), abs=1e-6
        )


def test_nothing_spent_and_no_noise() -> None:
    asked = {"sample_rate": 0.1, "delta": DELTA}
    assert epsilon_spent(noise_multiplier=1.0, steps=0, **asked) == 0
    assert epsilon_spent(noise_multiplier=0.0, steps=1, **asked) == math.inf
    assert gaussian_epsilon(0.0, delta=DELTA) == 0


@pytest.mark.parametrize("name", ["rdp", "prv", "gaussian"])
@pytest.mark.parametrize("epsilon", [0.5, 3.0, 12.0])
def test_noise_for_a_budget(name: str, epsilon: float) -> None:
    asked = {"sample_rate": 1.0, "steps": 4, "delta": DELTA, "accountant": name}
    noise = noise_multiplier_for(epsilon=epsilon, **asked)
    assert epsilon_spent(noise_multiplier=noise, **asked) <= epsilon
    assert epsilon_spent(noise_multiplier=noise / 1.005, **asked) > epsilon


def test_noise_for_a_budget_is_that_of_opacus() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants.utils import get_noise_multiplier

        theirs = get_noise_multiplier(
            target_epsilon=2.0,
            target_delta=DELTA,
            sample_rate=0.1,
            steps=100,
            epsilon_tolerance=1e-4,
        )
    ours = noise_multiplier_for(epsilon=2.0, delta=DELTA, sample_rate=0.1, steps=100)
    assert ours == pytest.approx(theirs, rel=2e-3)


@settings(deadline=None, max_examples=8)
@given(st.floats(0.4, 5.0), st.floats(0.01, 1.0), st.integers(1, 200))
def test_more_noise_fewer_steps_and_rarer_samples_cost_less(
    noise: float, rate: float, steps: int
) -> None:
    def spent(noise: float, rate: float, steps: int) -> float:
        return epsilon_spent(
            noise_multiplier=noise, sample_rate=rate, steps=steps, delta=DELTA
        )

    here = spent(noise, rate, steps)
    assert spent(1.5 * noise, rate, steps) <= here * (1 + 1e-9)
    assert spent(noise, rate, steps + 1) >= here
    assert spent(noise, rate / 2, steps) <= here * (1 + 1e-9)


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_the_profile_is_an_upper_bound_close_to_the_closed_form(noise: float) -> None:
    epsilons, deltas = privacy_profile(noise_multiplier=noise, sample_rate=1.0, steps=1)
    assert bool((epsilons.diff() > 0).all())
    for wanted in (0.1, 1.0, 3.0):
        place = int((epsilons - wanted).abs().argmin())
        epsilon, found = float(epsilons[place]), float(deltas[place])
        exact = gaussian_delta(1 / noise, epsilon=epsilon)
        assert exact <= found <= exact * 1.02 + 5e-3


def test_too_little_noise_for_the_memory_is_said() -> None:
    with pytest.raises(InputError, match="noise_multiplier: expected more noise for"):
        epsilon_spent(
            noise_multiplier=0.01,
            sample_rate=1.0,
            steps=30,
            delta=DELTA,
            accountant="prv",
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", -1.0),
        ("sample_rate", 0.0),
        ("sample_rate", 1.5),
        ("steps", -1),
        ("delta", 0.0),
        ("delta", 1.0),
        ("accountant", "moments"),
    ],
)
def test_bad_numbers(name: str, value: object) -> None:
    asked = {"noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 1, "delta": DELTA}
    with pytest.raises(InputError, match=name):
        epsilon_spent(**(asked | {name: value}))


def test_the_closed_form_is_for_full_batches() -> None:
    with pytest.raises(InputError, match="sample_rate: expected 1"):
        epsilon_spent(
            noise_multiplier=1.0,
            sample_rate=0.5,
            steps=1,
            delta=DELTA,
            accountant="gaussian",
        )


# --- gradients of samples ---------------------------------------------------------


def test_per_sample_gradients_are_those_of_opacus(model: nn.Module) -> None:
    images = some_images(5)
    found = per_sample_gradients(model, images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule

        wrapped = GradSampleModule(copy.deepcopy(model).train(), loss_reduction="sum")
        logits = wrapped(images.pixels)
        F.cross_entropy(logits, images.labels, reduction="sum").backward()
        parameters = wrapped._module.named_parameters()
        expected = {name: p.grad_sample for name, p in parameters}
    assert list(found) == list(expected)
    for name, gradients in found.items():
        torch.testing.assert_close(gradients, expected[name], atol=1e-6, rtol=1e-5)


def test_chunks_change_nothing(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = some_images(5)
    whole = per_sample_gradients(model, images)
    monkeypatch.setattr("gradinv_helpers.privacy._CHUNK_ENTRIES", 1)
    for name, gradients in per_sample_gradients(model, images).items():
        torch.testing.assert_close(gradients, whole[name])


def test_frozen_weights_have_no_gradient() -> None:
    network = build_model("mlp", in_channels=1, image_size=8, num_classes=4)
    network[1].weight.requires_grad_(False)
    found = per_sample_gradients(network, some_images(2))
    assert "1.weight" not in found
    assert found["1.bias"].shape == (2, 256)


def test_batch_norm_mixes_samples() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 4)
    )
    with pytest.raises(InputError, match="BatchNorm in eval mode"):
        per_sample_gradients(network, some_images(2))
    assert len(per_sample_gradients(network.eval(), some_images(2))["0.weight"]) == 2


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-3, 1e3), st.integers(0, 100))
def test_clipped_gradients_are_within_the_norm_and_keep_their_direction(
    bound: float, seed: int
) -> None:
    drawn = torch.randn(4, 3, 2, generator=seeded(seed)).double()
    gradients = {"a": drawn, "b": 10 * drawn[:, 0]}
    factors = clipping_factors(gradients, bound)
    norms = torch.cat([g.flatten(1) for g in gradients.values()], 1).norm(dim=1)
    clipped = norms * factors
    assert bool((clipped <= bound * (1 + 1e-12)).all())
    assert bool(((factors == 1) | (norms > bound)).all())
    torch.testing.assert_close(clipped, norms.clamp_max(bound))


# --- the mechanism ----------------------------------------------------------------


def test_local_noise_is_gaussian_with_the_stated_size(model: nn.Module) -> None:
    images = some_images(3)
    clean = local_update(model, images, LocalTraining(clip_norm=0.5))
    noisy = private_update(
        model, images, clip_norm=0.5, noise_multiplier=2.0, generator=seeded()
    )
    assert noisy.noise_std == pytest.approx(2.0 * 0.5 / 3)
    assert noisy.training.clip_norm == 0.5
    drawn = ((flat(noisy) - flat(clean)) / noisy.noise_std).numpy()
    assert stats.kstest(drawn, "norm").pvalue > LEVEL
    squares = (drawn**2).sum()  # chi2 with as many degrees of freedom as entries
    tails = stats.chi2(len(drawn)).cdf(squares)
    assert LEVEL < tails < 1 - LEVEL
    pairs = stats.pearsonr(drawn[:-1], drawn[1:])  # entries are independent
    assert pairs.pvalue > LEVEL


def test_the_tests_would_notice_noise_of_another_size(model: nn.Module) -> None:
    """Their power: five percent of deviation do not pass."""
    images = some_images(3)
    clean = local_update(model, images, LocalTraining(clip_norm=0.5))
    noisy = private_update(
        model, images, clip_norm=0.5, noise_multiplier=2.1, generator=seeded()
    )
    drawn = ((flat(noisy) - flat(clean)) / (2.0 * 0.5 / 3)).numpy()
    tails = stats.chi2(len(drawn)).cdf((drawn**2).sum())
    assert not LEVEL < tails < 1 - LEVEL


def test_the_mean_of_private_updates_is_the_clipped_mean(model: nn.Module) -> None:
    images = some_images(2)
    clean = flat(local_update(model, images, LocalTraining(clip_norm=1.0)))
    generator, count = seeded(1), 50
    draws = [
        flat(
            private_update(
                model,
                images,
                clip_norm=1.0,
                noise_multiplier=1.0,
                generator=generator,
            )
        )
        for _ in range(count)
    ]
    gap = (torch.stack(draws).mean(0) - clean) / (1.0 / 2 / math.sqrt(count))
    assert stats.kstest(gap.numpy(), "norm").pvalue > LEVEL


def test_one_sample_moves_the_sum_by_at_most_the_norm(model: nn.Module) -> None:
    """The sensitivity that the accountants assume, for every sample taken out."""
    images, bound = some_images(6), 0.7
    recipe = LocalTraining(clip_norm=bound)
    whole = 6 * flat(local_update(model, images, recipe))
    for left_out in range(6):
        rest = [i for i in range(6) if i != left_out]
        part = 5 * flat(local_update(model, images[rest], recipe))
        assert float((whole - part).norm()) <= bound * (1 + 1e-5)


def test_the_attacker_gets_the_mechanism_for_its_likelihood(model: nn.Module) -> None:
    """At the true images, the residual in units of the noise is chi2."""
    images = some_images(2)
    update = private_update(
        model, images, clip_norm=0.5, noise_multiplier=0.1, generator=seeded(3)
    )
    posterior = Posterior(update, spectrum_prior((1, 8, 8)), images.labels)
    one_hot = F.one_hot(images.labels, 4).float()
    gradients, _ = posterior.map(images.pixels[None], one_hot[None])
    pairs = zip(gradients, posterior.targets, posterior.variances(0.0), strict=True)
    total = sum(float((g - t).square().sum()) / v for g, t, v in pairs)
    entries = len(flat(update))
    assert LEVEL < stats.chi2(entries).cdf(total) < 1 - LEVEL


def test_the_same_generator_gives_the_same_update(model: nn.Module) -> None:
    def once(seed: int) -> Tensor:
        return flat(
            private_update(
                model,
                some_images(2),
                clip_norm=1.0,
                noise_multiplier=1.0,
                generator=seeded(seed),
            )
        )

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))


def test_noise_as_a_defence(model: nn.Module) -> None:
    images, recipe = some_images(4), LocalTraining(clip_norm=0.5)
    clipped = local_update(model, images, recipe)
    asked = {"clip_norm": 0.5, "noise_multiplier": 3.0}
    one = defend(clipped, PrivateNoise(3.0), generator=seeded(8))
    other = private_update(model, images, generator=seeded(8), **asked)
    assert torch.equal(flat(one), flat(other))
    assert one.noise_std == other.noise_std == pytest.approx(3.0 * 0.5 / 4)
    with pytest.raises(InputError, match="update: expected gradients of samples"):
        defend(local_update(model, images), PrivateNoise(3.0), generator=seeded())
    with pytest.raises(InputError, match="noise_multiplier"):
        PrivateNoise(-1.0)


def test_statistics_without_noise_are_refused() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 4)
    )
    update = local_update(network, some_images(3))
    with pytest.raises(InputError, match="no statistics of BatchNorm"):
        private_aggregate(
            [update],
            clip_norm=1.0,
            noise_multiplier=1.0,
            generator=seeded(),
            unit="client",
        )


def test_a_weight_change_is_refused(model: nn.Module) -> None:
    with pytest.raises(InputError, match="clip_norm"):
        private_update(
            model,
            some_images(2),
            clip_norm=1.0,
            noise_multiplier=1.0,
            generator=seeded(),
            training=LocalTraining(sends="delta"),
        )


# --- central privacy --------------------------------------------------------------


def test_central_noise_is_added_once_to_the_mean_of_samples(model: nn.Module) -> None:
    recipe = LocalTraining(clip_norm=0.5)
    updates = [local_update(model, some_images(n, seed=n), recipe) for n in (1, 2, 3)]
    noisy = private_aggregate(
        updates, clip_norm=0.5, noise_multiplier=1.5, generator=seeded(5)
    )
    assert noisy.noise_std == pytest.approx(1.5 * 0.5 / 6)
    assert noisy.num_samples == 6
    assert noisy.training.clip_norm == 0.5
    drawn = ((flat(noisy) - flat(aggregate(updates))) / noisy.noise_std).numpy()
    assert stats.kstest(drawn, "norm").pvalue > LEVEL


def test_local_noise_of_k_clients_is_root_k_times_as_large(model: nn.Module) -> None:
    clients = [some_images(2, seed=seed) for seed in range(4)]
    generator = seeded()
    local = aggregate(
        [
            private_update(
                model, c, clip_norm=1.0, noise_multiplier=1.0, generator=generator
            )
            for c in clients
        ]
    )
    clean = [local_update(model, c, LocalTraining(clip_norm=1.0)) for c in clients]
    central = private_aggregate(
        clean, clip_norm=1.0, noise_multiplier=1.0, generator=generator
    )
    assert local.noise_std == pytest.approx(2 * central.noise_std)
    spread = (flat(local) - flat(aggregate(clean))).numpy() / local.noise_std
    assert stats.kstest(spread, "norm").pvalue > LEVEL


def test_clipping_whole_clients(model: nn.Module) -> None:
    updates = [local_update(model, some_images(3, seed=seed)) for seed in range(4)]
    bound = 0.5 * float(flat(updates[0]).norm())
    mean = private_aggregate(
        updates,
        clip_norm=bound,
        noise_multiplier=0.0,
        generator=seeded(),
        unit="client",
    )
    parts = [flat(update) for update in updates]
    expected = sum(p * min(1.0, bound / float(p.norm())) for p in parts) / 4
    torch.testing.assert_close(flat(mean), expected, atol=1e-7, rtol=1e-5)
    noisy = private_aggregate(
        updates,
        clip_norm=bound,
        noise_multiplier=3.0,
        generator=seeded(),
        unit="client",
    )
    assert noisy.noise_std == pytest.approx(3.0 * bound / 4)


def test_clients_of_one_sample_are_samples(model: nn.Module) -> None:
    images = [some_images(1, seed=seed) for seed in range(3)]
    plain = [local_update(model, i) for i in images]
    clipped = [local_update(model, i, LocalTraining(clip_norm=0.3)) for i in images]
    asked = {"clip_norm": 0.3, "noise_multiplier": 1.0}
    by_client = private_aggregate(plain, generator=seeded(), unit="client", **asked)
    by_sample = private_aggregate(clipped, generator=seeded(), **asked)
    torch.testing.assert_close(flat(by_client), flat(by_sample), atol=1e-6, rtol=1e-5)
    assert by_client.training.clip_norm == by_sample.training.clip_norm == 0.3
    assert by_client.noise_std == pytest.approx(by_sample.noise_std)


def test_samples_must_be_clipped_before_noise_on_their_sum(model: nn.Module) -> None:
    asked = {"clip_norm": 0.5, "noise_multiplier": 1.0, "generator": seeded()}
    with pytest.raises(InputError, match="expected gradients of samples clipped"):
        private_aggregate([local_update(model, some_images(2))], **asked)
    wide = local_update(model, some_images(2), LocalTraining(clip_norm=5.0))
    with pytest.raises(InputError, match="got clipping to 5"):
        private_aggregate([wide], **asked)


def test_noise_is_not_added_twice_and_weights_are_equal(model: nn.Module) -> None:
    asked = {"clip_norm": 0.5, "noise_multiplier": 1.0, "generator": seeded()}
    noisy = private_update(model, some_images(2), **asked)
    with pytest.raises(InputError, match="expected no noise yet"):
        private_aggregate([noisy], **asked)
    unequal = [local_update(model, some_images(n)) for n in (1, 2)]
    with pytest.raises(InputError, match="equal numbers of samples"):
        private_aggregate(unequal, unit="client", **asked)
