"""The number of samples: right where the rank tells, and never too sure."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradinv_helpers.attacks.batch_size import infer_num_samples
from gradinv_helpers.classifier import train_classifier
from gradinv_helpers.data import load_images
from gradinv_helpers.defences import GaussianNoise, defend
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate, normalize
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

DIGITS = load_images("digits", split="test")


def model_for_digits(name: str = "mlp") -> nn.Module:
    return build_model(name, in_channels=1, image_size=8, num_classes=10)


def hidden(update: SharedUpdate) -> SharedUpdate:
    """The same update with a wrong number of samples."""
    return update.replace_tensors(update.tensors, num_samples=77, group_sizes=None)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("name", ["lenet", "mlp", "convnet", "resnet20", "vit"])
def test_small_batches_by_the_rank_of_the_last_layer(name: str, size: int) -> None:
    update = hidden(local_update(model_for_digits(name), DIGITS[:size]))
    found = infer_num_samples(update)
    assert (found.estimate, found.lowest) == (size, size)
    assert "rank of layer" in found.reason


@pytest.mark.parametrize("size", [9, 20, 40])
def test_an_mlp_shows_more_samples_than_classes(size: int) -> None:
    update = hidden(local_update(model_for_digits(), DIGITS[:size]))
    assert infer_num_samples(update).estimate == size


@pytest.mark.parametrize("size", [12, 20, 32])
def test_whole_label_counts_beyond_the_rank(size: int) -> None:
    update = hidden(local_update(model_for_digits("convnet"), DIGITS[:size]))
    found = infer_num_samples(update)
    assert found.estimate == size
    assert found.lowest == 9
    assert "whole label counts" in found.reason
    assert infer_num_samples(update, maximum=size - 1).estimate is None


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, len(DIGITS) - 1), min_size=1, max_size=30),
    st.sampled_from(["lenet", "mlp", "convnet"]),
    st.floats(0, 0.2),
)
def test_the_lower_bound_is_never_too_high(indices, name, noise) -> None:
    """Not with repeated images, and not with noise of which nothing is said."""
    update = local_update(model_for_digits(name), DIGITS[indices])
    generator = torch.Generator().manual_seed(0)
    noisy = defend(update, GaussianNoise(noise, relative=True), generator=generator)
    silent = noisy.replace_tensors(noisy.tensors, noise_std=0.0)
    assert infer_num_samples(silent).lowest <= len(indices)


def test_equal_images_count_once() -> None:
    update = local_update(model_for_digits(), DIGITS[[4, 4, 9]])
    assert infer_num_samples(update).estimate == 2


@pytest.mark.parametrize("optimiser", ["sgd", "momentum"])
@pytest.mark.parametrize("size", [3, 30])
def test_several_steps_of_a_layer_that_is_fed_the_images(optimiser, size) -> None:
    recipe = LocalTraining("delta", lr=0.05, epochs=4, optimiser=optimiser)
    update = local_update(model_for_digits(), DIGITS[:size], recipe)
    assert infer_num_samples(update).estimate == size


def test_one_step_with_decay_aggregates_and_normalised_clients() -> None:
    model = model_for_digits().double()
    decay = LocalTraining("delta", lr=0.05, weight_decay=0.3)
    assert infer_num_samples(local_update(model, DIGITS[:6], decay)).estimate == 6
    parts = [local_update(model, part) for part in (DIGITS[:3], DIGITS[3:8])]
    assert infer_num_samples(aggregate(parts)).estimate == 8
    assert infer_num_samples(normalize(parts[1])).estimate == 5


def test_trained_models_of_many_samples_are_not_guessed() -> None:
    images = load_images("digits", split="train")
    model = train_classifier(images, model="lenet", epochs=12).model
    found = infer_num_samples(local_update(model, DIGITS[:40]))
    assert found.estimate is None
    assert found.lowest <= 40
    assert "differ too much" in found.reason


def test_nothing_sent() -> None:
    update = local_update(model_for_digits(), DIGITS[:2])
    empty = update.replace_tensors({n: 0 * t for n, t in update.tensors.items()})
    found = infer_num_samples(empty)
    assert found.estimate is None
    assert found.lowest == 1


# --- what it refuses --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("mlp", LocalTraining("delta", optimiser="adam")),
        ("mlp", LocalTraining("delta", epochs=2, weight_decay=0.1)),
        ("lenet", LocalTraining("delta", epochs=2)),
    ],
)
def test_changes_whose_rank_counts_steps(name: str, recipe: LocalTraining) -> None:
    update = local_update(model_for_digits(name), DIGITS[:3], recipe)
    with pytest.raises(InputError, match="or a first linear layer that is fed the im"):
        infer_num_samples(update)


def test_bad_arguments() -> None:
    update = local_update(model_for_digits(), DIGITS[:2])
    with pytest.raises(InputError, match="maximum: expected an integer"):
        infer_num_samples(update, maximum=0)
    model = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    with pytest.raises(InputError, match="ends with a trainable torch.nn.Linear"):
        infer_num_samples(local_update(model, DIGITS[:2]))
