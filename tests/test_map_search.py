"""Annealed MAP estimates: small batches, noise, weight changes, and the way there."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks import map_search
from gradinv_helpers.attacks.invert import invert
from gradinv_helpers.attacks.map_search import MapEstimate, map_estimate
from gradinv_helpers.attacks.reconstruction import Step
from gradinv_helpers.attacks.replay import local_batches
from gradinv_helpers.classifier import train_classifier
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.metrics import LeakageScore, score
from gradinv_helpers.models import build_model
from gradinv_helpers.priors.gaussian import fit_gaussian, spectrum_prior
from gradinv_helpers.privacy import private_update
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

SIDE = 16
SHUFFLE = 0  # of the client; its second epoch is the first one turned round


def drawn(
    dataset: str = "digits", count: int = 2, seed: int = 0, split: str = "train"
) -> Images:
    pool = load_images(dataset, split=split, image_size=SIDE)
    generator = torch.Generator().manual_seed(seed)
    return pool[torch.randperm(len(pool), generator=generator)[:count]]


def lenet(images: Images, seed: int = 0) -> nn.Module:
    return build_model(
        "lenet", in_channels=images.shape[0], image_size=SIDE, num_classes=10, seed=seed
    )


def relu_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )


def of(images: Images, training: LocalTraining | None = None, **more) -> SharedUpdate:
    return local_update(lenet(images), images, training, **more)


def spoilt(update: SharedUpdate, share: float) -> tuple[SharedUpdate, float]:
    """Noise of a share of the entries' size, which the update does not state."""
    sent = torch.cat([t.flatten() for t in update.tensors.values()])
    std = share * float(sent.square().mean().sqrt())
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: t + std * torch.randn(t.shape, generator=generator)
        for name, t in update.tensors.items()
    }
    return update.replace_tensors(tensors), std


def gains(result: LeakageScore) -> list[float]:
    """PSNR of every image above the best of its floors, in dB."""
    floors = zip(*(floor.psnr for floor in result.floors.values()), strict=True)
    return [psnr - max(low) for psnr, low in zip(result.psnr, floors, strict=True)]


def mean_psnr(estimate: MapEstimate, truth: Images) -> float:
    values = score(estimate.reconstruction, truth).psnr
    return sum(values) / len(values)


# --- what comes back --------------------------------------------------------------


def test_two_images_come_back() -> None:
    images = drawn("photos")
    estimate = map_estimate(of(images), iterations=8)
    found = estimate.reconstruction
    result = score(found, images)
    assert min(gains(result)) > 8
    assert all(result.label_correct)
    assert estimate.separated
    assert estimate.noise == 0
    assert found.label_source.startswith("inferred")
    levels = [stage.level for stage in estimate.stages]
    assert levels[0] == pytest.approx(1e-2)
    assert levels[-1] == pytest.approx(1e-5)
    assert levels == sorted(levels, reverse=True)
    misfits = [stage.misfit for stage in estimate.stages]
    assert misfits[-1] < 0.1 * misfits[0]
    assert estimate.stages[-1].iterations <= 8
    torch.testing.assert_close(found.images, estimate.stages[-1].images)


def test_images_of_one_class_need_several_starts() -> None:
    """Without the features of every image, the starts are compared."""
    pool = load_images("photos", image_size=SIDE)
    same = (pool.labels == pool.labels[0]).nonzero()[:2, 0]
    images = pool[same]
    estimate = map_estimate(of(images), labels=images.labels, iterations=14)
    assert min(gains(score(estimate.reconstruction, images))) > 2
    assert estimate.reconstruction.label_source.startswith("given")


def test_kinked_network() -> None:
    images = drawn("digits")
    update = local_update(relu_network(), images)
    estimate = map_estimate(update, iterations=10)
    result = score(estimate.reconstruction, images)
    assert min(gains(result)) > 8
    assert all(result.label_correct)
    assert "cosine" in estimate.reconstruction.reason
    # The length of the gradient is not used.
    longer = update.replace_tensors({k: 3 * v for k, v in update.tensors.items()})
    other = map_estimate(longer, labels=images.labels, iterations=10)
    assert min(gains(score(other.reconstruction, images))) > 8


# --- noise ------------------------------------------------------------------------


def test_unknown_noise_is_found() -> None:
    images = drawn("digits")
    update, std = spoilt(of(images), 1e-2)
    estimate = map_estimate(update, iterations=24)
    assert estimate.noise == pytest.approx(std, rel=0.3)
    assert min(gains(score(estimate.reconstruction, images))) > 8
    # Annealing stops where the noise is the larger part.
    sizes = [float(t.square().sum().sqrt()) for t in update.tensors.values()]
    assert estimate.stages[-1].level * max(sizes) < 0.6 * estimate.noise


def test_stated_noise_helps() -> None:
    images = drawn("photos")
    update, std = spoilt(of(images), 1e-2)
    stated = update.replace_tensors(update.tensors, noise_std=std)
    without, known = (map_estimate(u, iterations=8) for u in (update, stated))
    assert known.noise == pytest.approx(std)
    assert mean_psnr(known, images) > mean_psnr(without, images) - 0.1
    assert min(gains(score(known.reconstruction, images))) > 2


def test_huge_noise_leaves_the_mean_image() -> None:
    images = drawn("digits")
    update = of(images)
    nothing = update.replace_tensors(update.tensors, noise_std=1e5)
    prior = fit_gaussian(load_images("digits", split="train", image_size=SIDE).pixels)
    for given, mean in (("spectrum", 0.47), (prior, float(prior.mean))):
        found = map_estimate(
            nothing, prior=given, labels=images.labels, iterations=5, restarts=1
        ).reconstruction
        expected = torch.full_like(found.images, mean)
        torch.testing.assert_close(found.images, expected, rtol=0, atol=1e-3)


def test_linear_model_ends_at_the_closed_form() -> None:
    """A model of zeros, whose gradient is linear in the images."""
    images, std = drawn("digits"), 0.01
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 10))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    generator = torch.Generator().manual_seed(1)
    update = local_update(model, images)
    tensors = {
        name: t + std * torch.randn(t.shape, generator=generator)
        for name, t in update.tensors.items()
    }
    update = update.replace_tensors(tensors, noise_std=std)
    estimate = map_estimate(update, labels=images.labels, iterations=40, restarts=1)
    # Row k of the weight's gradient: the mean of (1 / 10 - [label = k]) x.
    shares = ((0.1 - F.one_hot(images.labels, 10).double()) / 2).T
    prior = spectrum_prior(images.shape)
    eye = torch.eye(prior.size, dtype=torch.float64)
    root = (prior.decode(eye) - prior.mean).flatten(1)  # latents to pixels
    mapped = torch.kron(shares.contiguous(), root.T.contiguous())
    sent = update.tensors["1.weight"].double()
    rest = (sent - shares.sum(1, keepdim=True) * prior.mean).flatten()
    variance = estimate.stages[-1].level ** 2 * float(sent.square().sum()) + std**2
    normal = mapped.T @ mapped / variance
    normal.diagonal().add_(1)
    best = torch.linalg.solve(normal, mapped.T @ rest / variance).view(2, -1)
    expected = prior.decode(best).clamp(0, 1).float()
    found = estimate.reconstruction.images
    off = float((found - expected).square().mean().sqrt())
    assert off < 0.1 * float((expected - images.pixels).square().mean().sqrt()), off


# --- weight changes ---------------------------------------------------------------


class Watched(map_search._Annealing):
    """Keeps the last search."""

    last: Watched

    def run(self, label_source: str) -> MapEstimate:
        Watched.last = self
        return super().run(label_source)


def test_order_of_a_shuffled_client_is_found(monkeypatch) -> None:
    monkeypatch.setattr(map_search, "_Annealing", Watched)
    images = drawn("photos")
    training = LocalTraining(sends="delta", lr=0.03, epochs=2, batch_size=1)
    true = [int(batch) for batch in local_batches(2, training, seed=SHUFFLE)]
    assert true[:2] == true[3:1:-1]  # not as it begins: twice the same
    update = of(images, training, seed=SHUFFLE)
    estimate = map_estimate(update, iterations=8, restarts=1, last_level=1e-3)
    result = score(estimate.reconstruction, images)
    order = Watched.last.posterior.order
    assert not isinstance(order, str)
    place = {found: image for image, found in enumerate(result.assignment)}
    assert [place[int(batch)] for batch in order] == true
    assert all(result.label_correct)
    assert min(gains(result)) > 3


def test_given_order_and_labels_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(map_search, "_Annealing", Watched)
    images = drawn("photos")
    training = LocalTraining(sends="delta", lr=0.03, epochs=2, batch_size=1)
    order = local_batches(2, training, seed=SHUFFLE)
    found = map_estimate(
        of(images, training, seed=SHUFFLE),
        labels=images.labels,
        order=order,
        iterations=6,
        last_level=1e-3,
    ).reconstruction
    assert Watched.last.posterior.order is order
    assert torch.equal(found.labels, images.labels)
    result = score(found, images)
    assert result.assignment == (0, 1)  # labels and order are by place
    assert min(gains(result)) > 3


# --- how it runs ------------------------------------------------------------------


def test_same_seed_same_result() -> None:
    update, std = spoilt(of(drawn()), 1e-3)
    update = update.replace_tensors(update.tensors, noise_std=std)
    one, two, other = (
        map_estimate(update, iterations=2, restarts=1, seed=seed).reconstruction
        for seed in (4, 4, 5)
    )
    assert torch.equal(one.images, two.images)
    assert one.losses == two.losses
    assert not torch.equal(one.images, other.images)


@pytest.mark.parametrize("kinked", [False, True])
def test_ctrl_c_returns_the_best_so_far(kinked: bool) -> None:
    images = drawn()
    update = local_update(relu_network() if kinked else lenet(images), images)
    seen: list[Step] = []

    def stop(step: Step) -> None:
        seen.append(step)
        if len(seen) == 3:
            raise KeyboardInterrupt

    found = map_estimate(update, iterations=20, client=5, on_step=stop).reconstruction
    assert found.stopped == "interrupted"
    assert len(seen) == len(found.losses) == 3
    assert found.losses[-1] == seen[-1].loss < seen[0].loss
    assert seen[0].client == 5
    assert found.images.shape == images.pixels.shape
    assert min(score(found, images).psnr) > 5


def test_iterations_are_the_most() -> None:
    found = map_estimate(of(drawn()), iterations=9, restarts=1).reconstruction
    assert found.snapshot_iterations[-1] <= 9
    assert found.stopped == "all iterations used"
    assert len(found.snapshots) == len(found.snapshot_iterations)
    assert found.iterations == tuple(range(len(found.losses)))
    assert all(math.isfinite(loss) for loss in found.losses)


def test_invert_takes_it_for_batches() -> None:
    images = drawn()
    update = of(images)
    asked = invert(update, attack="gaussian-map", iterations=3)
    auto = invert(update, iterations=3)
    assert asked.attack == auto.attack == "gaussian-map"
    assert torch.equal(asked.images, auto.images)
    single = invert(of(drawn(count=1)), attack="gaussian-map", iterations=8)
    assert single.attack == "gaussian-map"
    assert min(gains(score(single, drawn(count=1)))) > 8


@pytest.mark.parametrize(
    "setting", [{"distance": "cosine"}, {"tv_weight": 0.1}, {"optimiser": "adam"}]
)
def test_invert_refuses_what_it_does_not_use(setting: dict) -> None:
    update = of(drawn())
    with pytest.raises(InputError, match="attack: expected another one"):
        invert(update, attack="gaussian-map", iterations=1, **setting)
    assert invert(update, iterations=1, restarts=1, **setting).attack != "gaussian-map"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations"),
        ({"restarts": 0}, "restarts"),
        ({"seed": -1}, "seed"),
        ({"prior": "photos"}, "prior"),
        ({"prior": spectrum_prior((3, SIDE, SIDE))}, "prior: expected images of shape"),
    ],
)
def test_bad_input(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        map_estimate(of(drawn()), **settings)


def test_an_update_of_zeros() -> None:
    images = drawn()
    update = of(images)
    zeros: dict[str, Tensor] = {k: 0 * v for k, v in update.tensors.items()}
    with pytest.raises(InputError, match="a non-zero update"):
        map_estimate(update.replace_tensors(zeros), labels=images.labels)


def test_an_order_that_was_found_can_change_again() -> None:
    """Orders of batches of several images are compared as a whole."""
    images = load_images("photos", split="test", image_size=16)[[0, 1, 2, 3]]
    model = build_model("lenet", in_channels=3, image_size=16, num_classes=10)
    recipe = LocalTraining(sends="delta", epochs=3, batch_size=2, lr=0.01)
    update = local_update(model, images, recipe, seed=3)
    found = map_estimate(update, iterations=8, restarts=1, last_level=5e-3)
    assert len(found.stages) >= 3


def test_trained_networks_need_the_features_first(monkeypatch) -> None:
    """From grey images alone the search ends far from the update."""
    train = load_images("photos", image_size=SIDE)
    truth = drawn("photos", split="test")
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIDE**2, 64), nn.Sigmoid(), nn.Linear(64, 10)
    )
    model = train_classifier(train, model=network, epochs=1, lr=1e-2, seed=0).model
    update = local_update(model, truth)
    found = map_estimate(update, iterations=12)
    assert found.stages[-1].misfit < 1e-2
    assert min(gains(score(found.reconstruction, truth))) > 15
    monkeypatch.setattr(
        map_search._Annealing, "_fit_features", lambda self, point: point
    )
    assert map_estimate(update, iterations=12).stages[-1].misfit > 0.1


@pytest.mark.parametrize("noise", [0.03, 0.1])
def test_labels_of_a_noisy_private_message(noise: float) -> None:
    """Where noise has spoilt the signs of the last bias, the likelihood tells."""
    hits = 0
    for seed in range(4):
        victim = drawn(count=1, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        how = {"clip_norm": 1.0, "noise_multiplier": noise}
        model = lenet(victim, seed)
        update = private_update(model, victim, **how, generator=generator)
        found = map_estimate(update, iterations=1, restarts=1).reconstruction
        hits += int(found.labels[0] == victim.labels[0])
    assert hits >= 3


def test_noise_below_rounding_is_none() -> None:
    victims = drawn(count=4, seed=1)
    update = local_update(lenet(victims), victims)
    entries = torch.cat([part.flatten() for part in update.tensors.values()])
    rms = float(entries.square().mean().sqrt())
    for share, taken_apart in ((1e-8, True), (1e-2, False)):
        stated = update.replace_tensors(update.tensors, noise_std=share * rms)
        found = map_estimate(stated, iterations=1, restarts=1).reconstruction
        assert ("taken apart" in found.label_source) == taken_apart
