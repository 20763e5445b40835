"""Labels of encoded updates: those that make the messages of the last layer likely."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from gradinv_helpers.attacks.label_search import choose_labels, infer_encoded_labels
from gradinv_helpers.attacks.labels import infer_labels
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.defences import (
    Defence,
    GaussianNoise,
    Sign,
    StochasticQuantisation,
    TopK,
    defend,
)
from gradinv_helpers.errors import InputError
from gradinv_helpers.models import build_model
from gradinv_helpers.priors.gaussian import spectrum_prior
from gradinv_helpers.updates import SharedUpdate, local_update

PRIOR = spectrum_prior((1, 8, 8))


def encoded(defence: Defence, count: int, seed: int) -> tuple[SharedUpdate, Images]:
    pool = load_images("digits", split="test")
    generator = torch.Generator().manual_seed(seed)
    images = pool[torch.randperm(len(pool), generator=generator)[:count]]
    model = build_model("lenet", in_channels=1, image_size=8, num_classes=10, seed=seed)
    return defend(local_update(model, images), defence, generator=generator), images


def right(found: torch.Tensor, truth: torch.Tensor) -> int:
    return sum((Counter(found.tolist()) & Counter(truth.tolist())).values())


@pytest.mark.parametrize(
    "defence", [TopK(0.1), Sign(), StochasticQuantisation(2)], ids=str
)
def test_single_images(defence: Defence) -> None:
    for seed in range(4):
        update, images = encoded(defence, 1, seed)
        found = infer_encoded_labels(update, PRIOR)
        assert found.tolist() == images.labels.tolist()
        assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("defence", "least"),
    [(TopK(0.1), 24), (Sign(), 21), (StochasticQuantisation(2), 24)],
    ids=str,
)
def test_batches_better_than_at_face_value(defence: Defence, least: int) -> None:
    hits, face = 0, 0
    for seed in range(6):
        update, images = encoded(defence, 4, seed)
        found = infer_encoded_labels(update, PRIOR)
        assert torch.equal(found, found.sort().values)
        hits += right(found, images.labels)
        plain = dataclasses.replace(update, encoding=None)
        face += right(infer_labels(plain), images.labels)
    assert hits >= least  # of 24
    assert hits >= face


def test_a_model_without_a_last_linear_layer() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 8), torch.nn.Flatten())
    pixels = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = Images(pixels, torch.tensor([1]), tuple("abcd"))
    update = defend(local_update(model, images), Sign())
    with pytest.raises(InputError, match="ends with a trainable torch.nn.Linear"):
        infer_encoded_labels(update, PRIOR)


def test_where_the_labels_come_from() -> None:
    update, images = encoded(Sign(), 4, 0)
    found, source = choose_labels(update, PRIOR)
    assert torch.equal(found, infer_encoded_labels(update, PRIOR))
    assert source == "inferred (likelihood)"
    plain = local_update(update.model, images)
    found, source = choose_labels(plain, PRIOR)
    assert found.tolist() == images.labels.sort().values.tolist()
    assert source == "inferred (counts)"
    found, source = choose_labels(plain, PRIOR, images.labels)
    assert torch.equal(found, images.labels)
    assert source == "given (upper bound)"
    with pytest.raises(InputError, match=r"labels.*shape \(4,\)"):
        choose_labels(plain, PRIOR, images.labels[:3])


def test_noise_that_hides_a_sign_leaves_the_labels_to_the_likelihood() -> None:
    fell_back = 0
    for seed in range(6):
        plain, images = encoded(TopK(1.0), 1, seed)
        plain = dataclasses.replace(plain, encoding=None)
        generator = torch.Generator().manual_seed(seed)
        noisy = defend(plain, GaussianNoise(0.3), generator=generator)
        try:
            infer_labels(noisy)
        except InputError:
            fell_back += 1
        found, _ = choose_labels(noisy, PRIOR)
        assert found.tolist() == images.labels.tolist()
    assert fell_back
