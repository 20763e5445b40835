"""The learning rate of a client, from what it sent."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradinv_helpers as gi
from gradinv_helpers.attacks.free_rate import with_fitted_rate, with_free_rate
from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

CLASSES = 5


def images(count: int = 1, seed: int = 0, labels: list[int] | None = None) -> Images:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 2, 2, generator=generator)
    pixels = nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")
    drawn = torch.randint(0, CLASSES, (count,), generator=generator)
    chosen = drawn if labels is None else torch.tensor(labels)
    return Images(pixels, chosen, tuple(str(k) for k in range(CLASSES)))


def network(seed: int = 0, *, bias: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    last = nn.Linear(32, CLASSES, bias=bias)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), last)


def sent(images: Images, model: nn.Module | None = None, **recipe) -> SharedUpdate:
    """A weight change whose recipe says nothing of the rate."""
    usual = {"sends": "delta", "lr": 0.2}
    update = local_update(
        model or network(), images, LocalTraining(**usual | recipe), seed=3
    )
    blank = dataclasses.replace(update.training, lr=None)
    return update.replace_tensors(update.tensors, training=blank)


# --- one step ---------------------------------------------------------------------


def test_closed_form_by_hand() -> None:
    """Two classes, zero weights: the prediction is 1/2, so the rate is twice the bias.

    With h = 3 and label 1, one step of rate 0.4 moves the bias by -+0.2 and the
    weights by -+0.6.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    tensors = {
        "1.weight": torch.tensor([[-0.6], [0.6]]),
        "1.bias": torch.tensor([-0.2, 0.2]),
    }
    recipe = LocalTraining(sends="delta", lr=None)
    update = SharedUpdate(
        model=model,
        tensors=tensors,
        num_samples=1,
        image_shape=(1, 1, 1),
        training=recipe,
    )
    found = gi.infer_learning_rate(update)
    assert found.lr == pytest.approx(0.4, rel=1e-6)
    assert found.labels.tolist() == [1]
    assert found.source == "last layer"


@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("lr", [1e-3, 0.2, 3.0])
def test_one_step_on_one_image_is_exact(optimiser: str, lr: float) -> None:
    found = gi.infer_learning_rate(
        sent(images(), lr=lr, optimiser=optimiser), refine=False
    )
    assert found.lr == pytest.approx(lr, rel=1e-3)
    assert found.labels.tolist() == images().labels.tolist()


def test_weight_decay_is_taken_off() -> None:
    update = sent(images(), lr=0.1, weight_decay=0.3)
    assert gi.infer_learning_rate(update).lr == pytest.approx(0.1, rel=0.02)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 100), st.integers(0, 50))
def test_the_rate_scales_with_the_change(factor: float, seed: int) -> None:
    update = sent(images(2, seed), network(seed))
    scaled = update.replace_tensors({n: factor * t for n, t in update.tensors.items()})
    one, other = (gi.infer_learning_rate(u, refine=False) for u in (update, scaled))
    assert other.lr == pytest.approx(factor * one.lr, rel=1e-4)
    assert other.labels.tolist() == one.labels.tolist()


def test_a_rate_in_the_recipe_is_ignored() -> None:
    blank = sent(images(), lr=0.2)
    wrong = dataclasses.replace(blank.training, lr=7.0)
    misled = blank.replace_tensors(blank.tensors, training=wrong)
    assert gi.infer_learning_rate(misled).lr == gi.infer_learning_rate(blank).lr


def test_labels_and_rate_of_a_batch_come_together() -> None:
    batch = images(4, labels=[0, 2, 2, 4])
    found = gi.infer_learning_rate(sent(batch, lr=0.05), refine=False)
    assert found.labels.tolist() == [0, 2, 2, 4]
    assert found.lr == pytest.approx(0.05, rel=0.02)


def test_no_bias_in_the_last_layer() -> None:
    model = network(bias=False)
    update = sent(images(labels=[1]), model, lr=0.1)
    found = gi.infer_learning_rate(update, labels=[1])
    assert found.lr == pytest.approx(0.1, rel=0.3)


# --- several steps ----------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        {"epochs": 4},
        {"epochs": 2, "batch_size": 1},
        {"epochs": 3, "optimiser": "momentum", "lr": 0.05},
        {"epochs": 3, "optimiser": "adam", "lr": 0.003},
    ],
)
def test_several_steps(recipe: dict) -> None:
    update = sent(images(2, labels=[1, 3]), **recipe)
    true = recipe.get("lr", 0.2)
    found = gi.infer_learning_rate(update, refine=False)
    assert found.labels.tolist() == [1, 3]
    assert found.lr == pytest.approx(true, rel=0.1)


def test_images_refine_the_rate() -> None:
    """Features move: the last layer alone is off, images and rate together are not."""
    model = network()
    with torch.no_grad():
        model[3].weight.mul_(6)
    update = sent(images(labels=[2]), model, lr=0.2, epochs=5)
    found = gi.infer_learning_rate(update)
    assert found.source == "last layer, then images"
    assert abs(found.first / 0.2 - 1) > 0.02
    assert found.lr == pytest.approx(0.2, rel=0.01)
    assert found.misfit < 0.05


def test_several_clients() -> None:
    first, second = (images(2, seed, labels=[1, 3]) for seed in (0, 1))
    recipe = LocalTraining(sends="delta", lr=0.1, epochs=2)
    model = network()
    both = gi.aggregate([local_update(model, x, recipe) for x in (first, second)])
    found = gi.infer_learning_rate(both, refine=False)
    assert found.lr == pytest.approx(0.1, rel=0.05)
    assert sorted(found.labels.tolist()) == [1, 1, 3, 3]


def test_profile_is_lowest_at_the_true_rate() -> None:
    update = sent(images(labels=[2]), lr=0.2, epochs=3)
    rates = [0.1, 0.15, 0.2, 0.3, 0.4]
    misfits = gi.learning_rate_profile(update, rates, labels=[2], iterations=2)
    assert int(misfits.argmin()) == 2
    assert misfits.dtype == torch.float64


def test_the_same_call_gives_the_same_rate() -> None:
    update = sent(images(), epochs=2)
    one, other = (gi.infer_learning_rate(update, seed=4) for _ in range(2))
    assert one.lr == other.lr


# --- posterior at another rate ----------------------------------------------------


@pytest.mark.parametrize("recipe", [{}, {"weight_decay": 0.3}, {"epochs": 2}])
def test_posterior_with_another_rate(recipe: dict) -> None:
    update = dataclasses.replace(sent(images(), **recipe), noise_std=1e-3)
    prior = gi.spectrum_prior((1, 8, 8))
    labels = images().labels

    def at(rate: float) -> Posterior:
        training = dataclasses.replace(update.training, lr=rate)
        return Posterior(
            update.replace_tensors(update.tensors, training=training), prior, labels
        )

    there, moved = at(0.3), at(0.1).with_rate(0.3)
    point = torch.randn(1, there.size, generator=torch.Generator().manual_seed(0))
    for one, other in zip(
        there.energy(point, 0.1), moved.energy(point, 0.1), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# --- a rate that is fitted along --------------------------------------------------


def drawn(rate: float, **recipe) -> tuple[Posterior, torch.Tensor]:
    """A posterior at some rate, and latents behind an update of rate 0.2."""
    prior = gi.spectrum_prior((1, 8, 8)).to(torch.zeros(1))
    labels = torch.tensor([1, 3])
    point = 0.2 * torch.randn(1, 2 * prior.size, generator=torch.manual_seed(0))
    truth = images(2, labels=[1, 3])
    truth = dataclasses.replace(truth, pixels=prior.decode(point.view(1, 2, -1))[0])
    update = sent(truth, **recipe)
    known = dataclasses.replace(update.training, lr=rate)
    update = update.replace_tensors(update.tensors, training=known)
    return Posterior(update, prior, labels, order="sequential"), point


RECIPES = [
    {},
    {"weight_decay": 0.3},
    {"epochs": 3},
    {"epochs": 2, "optimiser": "momentum", "weight_decay": 0.1},
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_rate_that_fits_the_right_images_is_the_right_one(recipe: dict) -> None:
    posterior, point = drawn(0.19, **recipe)
    for _ in range(3):
        free = with_free_rate(posterior, point, 1e-3, first=0.19)
        posterior = with_fitted_rate(free, point)
    assert posterior.free_rate is None
    assert posterior.training.rate == pytest.approx(0.2, rel=1e-4)
    assert float(posterior.misfit(point)[0].sqrt()) < 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
def test_energy_is_the_lowest_of_all_rates(recipe: dict) -> None:
    """At the latents of J: against energies at many rates, computed one by one."""
    posterior, point = drawn(0.2, **recipe)
    level, first, reach = 0.05, 0.18, 0.02
    other = point + 0.05 * torch.ones_like(point)
    found = with_free_rate(posterior, other, level, first).energy(other, level)[0]
    energies = []
    for move in torch.linspace(-0.3, 0.3, 121).tolist():
        rate = 0.2 * math.exp(move)
        there = posterior.with_rate(rate)
        ratio = 1.0 if posterior.as_sent else rate / 0.2  # of the units of its energy
        change = there.map(there.images(other), there.classes[None])[0]
        energy = float(other.square().sum()) + 4 * math.log(rate / first) ** 2
        for tensor, target, norm in zip(
            change, there.targets, posterior.norms, strict=True
        ):
            gap = float(((tensor - target) * ratio).square().sum())
            energy += gap / (level**2 * norm)
        energies.append(energy)
    assert float(found[0]) == pytest.approx(min(energies), rel=reach)


def test_slope_is_that_of_the_projected_energy() -> None:
    posterior, point = drawn(0.22, epochs=2)
    free = with_free_rate(posterior.double(), point.double(), 0.05, first=0.2)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(point.shape, generator=generator).double()
    way = torch.randn(point.shape, generator=generator).double()
    _, slope = free.energy(start, 0.05)
    ends = [float(free.energy(start + h * way, 0.05)[0][0]) for h in (1e-5, -1e-5)]
    expected = (ends[0] - ends[1]) / 2e-5
    assert float((slope * way).sum()) == pytest.approx(expected, rel=1e-5)


def test_annealing_ends_at_the_true_rate() -> None:
    """It sets out from a rate that is off by more."""
    model = network()
    with torch.no_grad():
        model[3].weight.mul_(6)
    update = sent(images(labels=[2]), model, lr=0.2, epochs=5)
    found = gi.map_estimate(
        update, labels=torch.tensor([2]), iterations=12, last_level=1e-3
    )
    first = gi.infer_learning_rate(update, labels=[2], refine=False)
    assert abs(first.lr / 0.2 - 1) > 0.02
    assert found.learning_rate == pytest.approx(0.2, rel=1e-3)
    assert f"learning rate {found.learning_rate:.4g}" in found.reconstruction.reason


def test_an_interrupted_annealing_goes_on_with_its_rate(tmp_path: Path) -> None:
    update = sent(images(labels=[2]), epochs=2)
    options = {"labels": torch.tensor([2]), "iterations": 12, "last_level": 1e-2}
    whole = gi.map_estimate(update, **options)
    file = tmp_path / "annealing.safetensors"

    def stop(step: gi.Step) -> None:
        if file.exists():
            raise KeyboardInterrupt

    cut = gi.map_estimate(update, **options, checkpoint=file, on_step=stop)
    assert cut.reconstruction.stopped == "interrupted"
    again = gi.map_estimate(update, **options, checkpoint=file)
    assert again.learning_rate == pytest.approx(whole.learning_rate, rel=1e-4)


# --- attacks go on with it --------------------------------------------------------


@pytest.mark.parametrize("attack", ["auto", "dlg", "gaussian-map"])
def test_invert_says_that_it_has_inferred_the_rate(attack: str) -> None:
    truth = images()
    found = gi.invert(sent(truth), attack=attack, iterations=20, restarts=1)
    assert "learning rate 0.2 inferred" in found.reason
    assert found.labels.tolist() == truth.labels.tolist()


def test_map_estimate_with_and_without_the_rate() -> None:
    update = sent(images(), epochs=2)
    known = dataclasses.replace(update.training, lr=0.2)
    told = update.replace_tensors(update.tensors, training=known)
    options = {"iterations": 4, "restarts": 1, "last_level": 1e-2}
    blind, sighted = (gi.map_estimate(u, **options) for u in (update, told))
    assert "inferred" in blind.reconstruction.reason
    assert "inferred" not in sighted.reconstruction.reason
    assert blind.learning_rate == pytest.approx(0.2, rel=5e-3)
    assert sighted.learning_rate is None
    gap = blind.reconstruction.images - sighted.reconstruction.images
    assert float(gap.square().mean().sqrt()) < 0.02


def test_steps_carry_the_number_of_their_client() -> None:
    updates = [sent(images(1, seed)) for seed in (0, 1)]
    told: list[int] = []
    found = gi.invert_clients(
        updates,
        attack="dlg",
        iterations=2,
        restarts=1,
        on_step=lambda step: told.append(step.client),
    )
    assert len(found) == 2
    assert sorted(set(told)) == [0, 1]


def test_explanation_of_an_unknown_rate() -> None:
    update = sent(images())
    assert gi.explain_update(update).num_samples == 1


def test_a_gradient_needs_no_rate() -> None:
    update = local_update(network(), images(), LocalTraining(lr=None))
    found = gi.invert(update, attack="gaussian-map", iterations=2, restarts=1)
    assert "learning rate" not in found.reason


def test_a_change_is_applied_without_a_rate() -> None:
    model, update = network(), sent(images())
    before = model[3].bias.detach().clone()
    gi.apply_update(model, update)
    torch.testing.assert_close(model[3].bias, before + update.tensors["3.bias"])


# --- bad input --------------------------------------------------------------------


def test_what_needs_a_rate_says_so() -> None:
    blank = LocalTraining(sends="delta", lr=None)
    with pytest.raises(InputError, match=r"training\.lr: .*infer_learning_rate"):
        local_update(network(), images(), blank)
    with pytest.raises(InputError, match=r"training\.lr"):
        sent(images()).gradient()
    with pytest.raises(InputError, match=r"training\.lr"):
        gi.infer_labels(sent(images(2), epochs=2))
    gradient = local_update(network(), images(), LocalTraining(lr=None))
    with pytest.raises(InputError, match=r"training\.lr"):
        gi.apply_update(network(), gradient)


def test_updates_whose_length_says_nothing() -> None:
    gradient = local_update(network(), images())
    with pytest.raises(InputError, match="a gradient"):
        gi.infer_learning_rate(gradient)
    with pytest.raises(InputError, match="normalised"):
        gi.infer_learning_rate(gi.normalize(sent(images())))
    generator = torch.Generator().manual_seed(0)
    signs = gi.defend(sent(images()), gi.Sign(), generator=generator)
    with pytest.raises(InputError, match="encoded"):
        gi.infer_learning_rate(signs)


@pytest.mark.parametrize("labels", [[0, 1], [CLASSES], [-1], [0.5]])
def test_bad_labels(labels: list) -> None:
    with pytest.raises(InputError, match="labels"):
        gi.infer_learning_rate(sent(images()), labels=labels)


def test_zero_update() -> None:
    update = sent(images())
    zero = update.replace_tensors({n: 0 * t for n, t in update.tensors.items()})
    with pytest.raises(InputError, match="zero"):
        gi.infer_learning_rate(zero)


def test_profile_needs_rates() -> None:
    with pytest.raises(InputError, match="rates"):
        gi.learning_rate_profile(sent(images()), [], labels=[0])


@pytest.mark.parametrize("lr", [0, -0.1, math.nan])
def test_rates_out_of_range(lr: float) -> None:
    with pytest.raises(InputError, match="lr"):
        LocalTraining(lr=lr)
