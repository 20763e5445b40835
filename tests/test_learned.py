"""Attacks under a prior, by name."""

from __future__ import annotations

import pytest
import torch

from gradinv_helpers.attacks.invert import invert
from gradinv_helpers.attacks.learned import DEFAULT_PRIORS, prior_for
from gradinv_helpers.attacks.plan import ATTACKS
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.defences import GaussianNoise, defend
from gradinv_helpers.errors import InputError
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.priors.gaussian import spectrum_prior
from gradinv_helpers.priors.library import load_prior
from gradinv_helpers.priors.vae import SoftVAEPrior, VAEPrior
from gradinv_helpers.updates import SharedUpdate, local_update

SIZE = 16
# Iterations that are enough for one digit; steps where a diffusion model is followed.
SHORT = {
    "gaussian-map": 4,
    "vae-map": 4,
    "vae-posterior": 3,
    "diffusion-latent": 25,
    "diffusion-posterior": 15,
    "gradinvdiff": 10,
}


@pytest.fixture(scope="module")
def victim() -> Images:
    return load_images("digits", split="test", image_size=SIZE)[[5]]


@pytest.fixture(scope="module")
def update(victim: Images) -> SharedUpdate:
    model = build_model("lenet", in_channels=1, image_size=SIZE, num_classes=10)
    return local_update(model, victim)


def test_every_name_is_an_attack() -> None:
    assert set(SHORT) == set(DEFAULT_PRIORS) < set(ATTACKS)


@pytest.mark.parametrize("attack", SHORT)
def test_one_digit_comes_back(attack: str, update: SharedUpdate, victim) -> None:
    told = []
    found = invert(
        update,
        attack=attack,
        iterations=SHORT[attack],
        restarts=1,
        on_step=told.append,
    )
    assert found.attack == attack
    assert found.label_source.startswith("inferred")
    assert torch.equal(found.snapshots[-1], found.images)
    assert told
    result = score(found, victim)
    assert result.psnr[0] > max(floor.psnr[0] for floor in result.floors.values()) + 3
    again = invert(update, attack=attack, iterations=SHORT[attack], restarts=1)
    assert torch.equal(again.images, found.images)


def test_given_labels_are_an_upper_bound(update: SharedUpdate, victim) -> None:
    for attack, iterations in SHORT.items():
        found = invert(
            update,
            attack=attack,
            labels=victim.labels,
            iterations=min(2, iterations),
            restarts=1,
        )
        assert found.label_source.startswith("given"), attack


def test_the_default_vae_reaches_what_its_decoder_misses() -> None:
    shape = (1, SIZE, SIZE)
    assert isinstance(prior_for("vae-map", None, shape), SoftVAEPrior)
    assert isinstance(prior_for("vae-map", "vae-digits", shape), VAEPrior)


def test_noise_needs_no_tempering(update: SharedUpdate) -> None:
    std = 0.01 * max(float(t.std()) for t in update.tensors.values())
    noisy = defend(update, GaussianNoise(std), generator=torch.Generator())
    prior = load_prior("vae-digits")
    settings = {"attack": "vae-posterior", "prior": prior, "iterations": 2}
    assert "tempered" in invert(update, **settings).reason
    assert "tempered" not in invert(noisy, **settings).reason


@pytest.mark.parametrize(
    ("attack", "prior", "message"),
    [
        ("diffusion-posterior", "vae-digits", "prior: expected a diffusion model"),
        ("vae-map", spectrum_prior((3, 8, 8)), "prior: expected images of shape"),
        ("vae-map", "vae-digit", "expected one of"),
        ("vae-map", "vae-photos", r"\(3, 32, 32\)"),
    ],
)
def test_priors_that_do_not_fit(attack: str, prior, message: str, update) -> None:
    with pytest.raises(InputError, match=message):
        invert(update, attack=attack, prior=prior)


def test_settings_of_other_attacks_are_refused(update: SharedUpdate) -> None:
    with pytest.raises(InputError, match="attack: expected another one"):
        invert(update, attack="vae-map", tv_weight=0.1)
