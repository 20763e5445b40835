"""A separated batch is the true one, or there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradinv_helpers.attacks.labels import infer_labels
from gradinv_helpers.attacks.separation import separate_batch
from gradinv_helpers.classifier import train_classifier
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.defences import GaussianNoise, defend
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate, normalize
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

DIGITS = load_images("digits", split="test")
REFUSED = "a batch that the gradient of the last layer separates"


def model_for_digits(name: str = "mlp") -> nn.Module:
    return build_model(name, in_channels=1, image_size=8, num_classes=10)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    images = load_images("digits", split="train")
    return train_classifier(images, model="mlp", epochs=12).model


def seen_by_last_layer(model: nn.Module, images: Images) -> tuple[Tensor, Tensor]:
    """Features and probabilities of every image, by a hook."""
    seen = []
    handle = model[-1].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        first = next(model.parameters())
        probabilities = model(images.pixels.to(first.dtype)).softmax(1)
    handle.remove()
    return seen[0].double(), probabilities.double()


def check(update: SharedUpdate, model: nn.Module, images: Images, tol: float) -> None:
    found = separate_batch(update)
    assert found.labels.tolist() == sorted(images.labels.tolist())
    features, probabilities = seen_by_last_layer(model, images)
    left = list(range(len(images)))
    for label, feature, probability in zip(
        found.labels, found.features, found.probabilities, strict=True
    ):
        own = [i for i in left if images.labels[i] == label]
        nearest = min(own, key=lambda i: float((features[i] - feature).norm()))
        left.remove(nearest)
        error = (features[nearest] - feature).norm() / features[nearest].norm()
        assert float(error) < tol
        assert float((probabilities[nearest] - probability).abs().max()) < tol


@pytest.mark.parametrize("indices", [(0, 1), (5, 9, 22), (3, 50, 51, 70)])
@pytest.mark.parametrize("name", ["lenet", "mlp"])
def test_labels_probabilities_and_features_of_untrained_models(name, indices) -> None:
    model, images = model_for_digits(name).double(), DIGITS[list(indices)]
    check(local_update(model, images), model, images, tol=1e-5)


@pytest.mark.parametrize("first", [0, 40, 80, 120, 160])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_trained_models_in_single_precision(trained, first: int, size: int) -> None:
    images = DIGITS[first : first + size]
    check(local_update(trained, images), trained, images, tol=0.05)


def test_same_label_twice(trained) -> None:
    threes = torch.nonzero(DIGITS.labels == 3).flatten()[:3].tolist()
    images = DIGITS[[*threes, 0]]
    check(local_update(trained.double(), images), trained, images, tol=1e-3)


@pytest.mark.parametrize(
    "recipe",
    [
        LocalTraining("delta", lr=0.05),
        LocalTraining("delta", lr=0.05, optimiser="momentum", weight_decay=0.1),
    ],
)
def test_weight_change_of_one_step(recipe: LocalTraining) -> None:
    model, images = model_for_digits().double(), DIGITS[[1, 2, 3]]
    check(local_update(model, images, recipe), model, images, tol=1e-5)


def test_normalised_client_and_aggregate_of_two() -> None:
    model, images = model_for_digits().double(), DIGITS[[1, 2, 3]]
    check(normalize(local_update(model, images)), model, images, tol=1e-5)
    halves = [local_update(model, images[[0]]), local_update(model, images[[1, 2]])]
    check(aggregate(halves), model, images, tol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(0, len(DIGITS) - 1), min_size=2, max_size=4, unique=True),
    st.integers(1, 3),
)
def test_never_wrong(indices, gain) -> None:
    """Sharper last layers make surer models; what is returned is right."""
    model, images = model_for_digits().double(), DIGITS[indices]
    with torch.no_grad():
        model[3].weight *= 10.0**gain
    try:
        found = separate_batch(local_update(model, images))
    except InputError:
        return
    assert found.labels.tolist() == sorted(images.labels.tolist())


def test_same_call_same_result() -> None:
    update = local_update(model_for_digits(), DIGITS[[4, 5, 6]])
    one, other = separate_batch(update, seed=3), separate_batch(update, seed=3)
    assert torch.equal(one.features, other.features)


# --- what it refuses --------------------------------------------------------------


def test_more_samples_than_half_the_classes() -> None:
    update = local_update(model_for_digits(), DIGITS[:6])
    with pytest.raises(InputError, match=f"{REFUSED}, got 6 samples of 10 classes"):
        separate_batch(update)


def test_wrong_number_of_samples() -> None:
    update = local_update(model_for_digits(), DIGITS[:3])
    for wrong in (2, 4):
        with pytest.raises(InputError, match=REFUSED):
            separate_batch(update, num_samples=wrong)


def test_equal_samples() -> None:
    update = local_update(model_for_digits(), DIGITS[[7, 7]])
    with pytest.raises(InputError, match=REFUSED):
        separate_batch(update)


def test_several_steps() -> None:
    recipe = LocalTraining("delta", epochs=2)
    with pytest.raises(InputError, match=REFUSED):
        separate_batch(local_update(model_for_digits(), DIGITS[:2], recipe))


def test_noise() -> None:
    update = local_update(model_for_digits(), DIGITS[:4])
    generator = torch.Generator().manual_seed(0)
    noisy = defend(update, GaussianNoise(0.3, relative=True), generator=generator)
    with pytest.raises(InputError, match=REFUSED):
        separate_batch(noisy)
    assert len(infer_labels(noisy)) == 4  # another method takes over


def test_nothing_sent() -> None:
    update = local_update(model_for_digits(), DIGITS[:2])
    empty = update.replace_tensors({n: 0 * t for n, t in update.tensors.items()})
    with pytest.raises(InputError, match=REFUSED):
        separate_batch(empty)


def test_bad_arguments() -> None:
    update = local_update(model_for_digits(), DIGITS[:2])
    with pytest.raises(InputError, match="num_samples: expected an integer"):
        separate_batch(update, num_samples=0)
    with pytest.raises(InputError, match="seed: expected an integer"):
        separate_batch(update, seed=-1)
