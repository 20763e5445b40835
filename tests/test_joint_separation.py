"""Features solved jointly are the true ones, or there are none."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradinv_helpers.attacks.joint_separation import feature_starts, separate_jointly
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
NONE_FOUND = "labels: expected labels with which one set of features explains"
WRONG_RANK = "a last layer's gradient that holds"


def model_for_digits(name: str = "lenet", seed: int = 0) -> nn.Module:
    return build_model(name, in_channels=1, image_size=8, num_classes=10, seed=seed)


def last_inputs(model: nn.Module, images: Images) -> Tensor:
    """What the last layer is fed, computed by the layers before it."""
    first = next(model.parameters())
    with torch.no_grad():
        return model[:-1](images.pixels.to(first.dtype)).double()


def distance(found: Tensor, true: Tensor) -> float:
    """Largest distance of a feature from its nearest, in units of their spread."""
    apart = torch.cdist(found, true)
    spread = (true - true.mean(0)).norm(dim=1).mean()
    return float(torch.maximum(apart.amin(0).max(), apart.amin(1).max()) / spread)


def check(
    update: SharedUpdate, model: nn.Module, images: Images, tol: float, **options
) -> None:
    found = separate_jointly(update, images.labels, **options)
    assert found.labels.tolist() == sorted(images.labels.tolist())
    features = last_inputs(model, images)
    for label in images.labels.unique():
        own = found.labels == label
        assert distance(found.features, features) < tol
        true = features[images.labels == label].to(model[-1].weight)
        true = model[-1](true).detach()
        sums = found.probabilities[own].sum(0) - true.softmax(1).sum(0)
        assert float(sums.abs().max()) < tol


@pytest.mark.parametrize("first", [0, 60])
@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_single_precision_up_to_one_sample_less_than_classes(first, size) -> None:
    model, images = model_for_digits("mlp", first), DIGITS[first : first + size]
    if size == 1:
        found = separate_jointly(local_update(model, images), images.labels)
        true = last_inputs(model, images)
        assert torch.allclose(found.features, true, rtol=1e-3, atol=1e-4)
    else:
        check(local_update(model, images), model, images, tol=5e-3)


def test_agrees_with_the_separation_that_knows_no_labels() -> None:
    update = local_update(model_for_digits().double(), DIGITS[[5, 9, 22, 31]])
    other = separate_batch(update)
    found = separate_jointly(update, other.labels)
    assert distance(found.features, other.features) < 1e-4


def test_every_sample_of_one_class() -> None:
    threes = torch.nonzero(DIGITS.labels == 3).flatten()[:4].tolist()
    model, images = model_for_digits().double(), DIGITS[threes]
    check(local_update(model, images), model, images, tol=1e-4)


def test_a_trained_model() -> None:
    data = load_images("digits", split="train")
    model = train_classifier(data, model="mlp", epochs=3).model.double()
    images = DIGITS[20:26]
    check(local_update(model, images), model, images, tol=1e-3)


@pytest.mark.parametrize(
    "recipe",
    [
        LocalTraining("delta", lr=0.05),
        LocalTraining("delta", lr=0.05, optimiser="momentum", weight_decay=0.1),
    ],
)
def test_weight_change_of_one_step(recipe: LocalTraining) -> None:
    model, images = model_for_digits().double(), DIGITS[:7]
    check(local_update(model, images, recipe), model, images, tol=1e-3)


def test_aggregate_of_two_clients() -> None:
    model, images = model_for_digits().double(), DIGITS[:6]
    update = aggregate(
        [local_update(model, images[[0, 1]]), local_update(model, images[[2, 3, 4, 5]])]
    )
    check(update, model, images, tol=1e-4)


def test_more_classes_than_samples_by_far() -> None:
    model = build_model("mlp", in_channels=1, image_size=8, num_classes=24, seed=4)
    images = DIGITS[:10]
    check(local_update(model, images), model, images, tol=5e-3)


def test_given_starts() -> None:
    model, images = model_for_digits(), DIGITS[:6]
    truth = last_inputs(model, images)[images.labels.argsort(stable=True)]
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(2, *truth.shape, generator=generator)
    check(local_update(model, images), model, images, tol=5e-3, starts=truth + noise)


def test_same_call_same_result() -> None:
    update, labels = local_update(model_for_digits(), DIGITS[:7]), DIGITS.labels[:7]
    one = separate_jointly(update, labels, seed=3)
    other = separate_jointly(update, labels.flip(0), seed=3)
    assert torch.equal(one.features, other.features)


def test_mean_features_of_classes_that_look_the_same() -> None:
    """Small weights: what tells images of a class apart is lost in rounding."""
    threes = torch.nonzero(DIGITS.labels == 3).flatten()[:3].tolist()
    model, images = model_for_digits(), DIGITS[[*threes, 0, 1]]
    with torch.no_grad():
        model[-1].weight *= 1e-6
    update = local_update(model, images)
    with pytest.raises(InputError, match=WRONG_RANK):
        separate_jointly(update, images.labels)
    found = separate_jointly(update, images.labels, per_class=True)
    assert found.labels.tolist() == images.labels.unique().tolist()
    assert len(found.labels) < len(images)
    features = last_inputs(model, images)
    means = [features[images.labels == k].mean(0) for k in found.labels]
    deviation = float((found.features - torch.stack(means)).norm(dim=1).max())
    assert deviation < 5e-3 * float((features - features.mean(0)).norm(dim=1).mean())


# --- what it refuses --------------------------------------------------------------


@settings(max_examples=4, deadline=None)
@given(
    st.lists(st.integers(0, len(DIGITS) - 1), min_size=2, max_size=4, unique=True),
    st.integers(0, 9),
    st.integers(0, 5),
)
def test_wrong_labels(indices, label, place) -> None:
    model, images = model_for_digits(), DIGITS[indices]
    labels = images.labels.clone()
    labels[place % len(labels)] = label
    if sorted(labels.tolist()) == sorted(images.labels.tolist()):
        return
    with pytest.raises(InputError, match=NONE_FOUND):
        separate_jointly(local_update(model, images), labels)


def test_wrong_number_of_labels() -> None:
    update, labels = local_update(model_for_digits(), DIGITS[:5]), DIGITS.labels
    for wrong in (4, 6):
        with pytest.raises(InputError, match=WRONG_RANK):
            separate_jointly(update, labels[:wrong])
    with pytest.raises(InputError, match="fewer samples than the 10 classes, got 10"):
        separate_jointly(update, labels[:10])


@pytest.mark.parametrize("noise_std", [1e-6, 1e-5, 1e-3, 1e-1])
def test_noise_gives_near_features_or_none(noise_std: float) -> None:
    model, images = model_for_digits(), DIGITS[:6]
    update = local_update(model, images)
    generator = torch.Generator().manual_seed(1)
    noisy = defend(update, GaussianNoise(noise_std), generator=generator)
    try:
        found = separate_jointly(noisy, images.labels)
    except InputError:
        assert noise_std > 1e-6
        return
    assert noise_std < 1e-3
    assert distance(found.features, last_inputs(model, images)) < 0.1


def test_equal_samples() -> None:
    update = local_update(model_for_digits(), DIGITS[[7, 7]])
    with pytest.raises(InputError, match=WRONG_RANK):
        separate_jointly(update, DIGITS.labels[[7, 7]])


def test_a_gradient_of_other_features() -> None:
    """Noise in the right row space keeps the rank, but nothing explains it."""
    model, images = model_for_digits().double(), DIGITS[:5]
    update = local_update(model, images)
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(10) + 0.05 * torch.randn(10, 10, generator=generator)
    tensors = dict(update.tensors)
    last = [name for name in tensors if tensors[name].shape[0] == 10][-2:]
    for name in last:
        tensors[name] = mix.double() @ tensors[name]
    changed = SharedUpdate(
        model=model, tensors=tensors, num_samples=5, image_shape=update.image_shape
    )
    with pytest.raises(InputError, match=NONE_FOUND):
        separate_jointly(changed, images.labels)


def without_bias(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model[-1].bias = None
    return model


def test_updates_of_another_kind() -> None:
    model, images = model_for_digits(), DIGITS[:2]
    several = local_update(model, images, LocalTraining("delta", epochs=2))
    for update, what in (
        (local_update(without_bias(model), images), "one without a bias"),
        (normalize(local_update(model, images)), "normalised clients"),
        (several, "several local steps, or Adam"),
    ):
        with pytest.raises(InputError, match=what):
            separate_jointly(update, images.labels)


@pytest.mark.parametrize(
    "labels",
    [[1, 2], torch.tensor([0.5, 1]), torch.tensor([[1]]), torch.tensor([1, 10])],
)
def test_bad_labels(labels) -> None:
    with pytest.raises(InputError, match="labels: expected class"):
        separate_jointly(local_update(model_for_digits(), DIGITS[:2]), labels)


def test_bad_starts() -> None:
    update = local_update(model_for_digits(), DIGITS[:2])
    with pytest.raises(InputError, match=r"starts: expected features \(T, 2, "):
        separate_jointly(update, DIGITS.labels[:2], starts=torch.zeros(3, 4))


# --- starting points --------------------------------------------------------------


def test_starts_are_features_of_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # features are pixels
    starts = feature_starts(model, (1, 8, 8), 3, 50, seed=1)
    assert starts.shape == (50, 3, 64)
    assert torch.equal(starts, feature_starts(model, (1, 8, 8), 3, 50, seed=1))
    assert not torch.equal(starts, feature_starts(model, (1, 8, 8), 3, 50, seed=2))
    images = starts.view(-1, 8, 8)
    assert math.isclose(float(images.mean()), 0.47, abs_tol=0.05)
    neighbours = (images[:, 1:] - images[:, :-1]).square().mean()
    assert float(neighbours) < float(images.var())  # twice that if unrelated


def test_starts_leave_model_and_random_state_alone() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(64, 10)
    ).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    feature_starts(model, (1, 8, 8), 2, 3)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_starts_need_a_linear_layer_fed_with_vectors() -> None:
    with pytest.raises(InputError, match=r"a last layer of type torch\.nn\.Linear"):
        feature_starts(nn.Flatten(), (1, 8, 8), 2, 3)
    with pytest.raises(InputError, match="one vector per image"):
        feature_starts(nn.Linear(8, 10), (1, 8, 8), 2, 3)


def test_inferred_labels_lead_to_features() -> None:
    model, images = model_for_digits(), DIGITS[:6]
    update = local_update(model, images)
    labels = infer_labels(update)
    found = separate_jointly(update, labels)
    assert distance(found.features, last_inputs(model, images)) < 5e-3
