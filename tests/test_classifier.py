"""The judge learns, repeats itself, and leaves the caller's things as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradinv_helpers.classifier import Classifier, accuracy, train_classifier
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError


def _blobs(count=40, side=8):
    """Two classes that differ in brightness."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    pixels = 0.2 + 0.5 * labels[:, None, None, None].float()
    noise = 0.1 * torch.rand(count, 1, side, side, generator=generator)
    return Images(pixels + noise, labels, ("dark", "bright"))


@pytest.fixture(scope="module")
def judge():
    return train_classifier(load_images("digits", split="train"), epochs=6)


def test_default_judge_reads_digits(judge):
    assert accuracy(judge, load_images("digits", split="test")) > 0.93
    assert judge.history[-1].loss < judge.history[0].loss
    assert [report.epoch for report in judge.history] == [1, 2, 3, 4, 5, 6]
    assert not judge.model.training


def test_features_feed_the_last_layer(judge):
    images = load_images("digits", split="test")[:300]  # more than one chunk
    features = judge.features(images)
    last = [m for m in judge.model.modules() if isinstance(m, nn.Linear)][-1]
    assert features.shape == (300, last.in_features)
    with torch.no_grad():
        labels = last(features).argmax(dim=1)
    assert torch.equal(labels, judge.predict(images.pixels))


def test_features_of_any_model_that_ends_in_a_linear_layer():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 2))
    images = _blobs(3)
    with torch.no_grad():
        expected = model[:3](images.pixels)
    torch.testing.assert_close(Classifier(model).features(images), expected)
    assert not model[3]._forward_pre_hooks
    with pytest.raises(InputError, match="model: expected a model whose last layer"):
        Classifier(nn.Sequential(nn.Conv2d(1, 2, 3))).features(images)


@pytest.mark.parametrize("name", ["mlp", "convnet", "lenet"])
def test_training_repeats_itself_and_leaves_the_random_state(name):
    images = _blobs()
    state = torch.random.get_rng_state()
    runs = [train_classifier(images, model=name, epochs=2, seed=4) for _ in range(2)]
    assert torch.equal(state, torch.random.get_rng_state())
    other = train_classifier(images, model=name, epochs=2, seed=5)
    first, second, third = (r.model.state_dict() for r in (*runs, other))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)


def test_a_given_module_is_copied_and_dropout_is_seeded():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 2)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options = {"model": model, "epochs": 30, "lr": 0.05}
    runs = [train_classifier(_blobs(), **options) for _ in range(2)]
    assert not model.training
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert torch.equal(runs[0].model[2].weight, runs[1].model[2].weight)
    assert accuracy(runs[0], _blobs()) > 0.9


def test_batch_normalisation_never_meets_a_batch_of_one():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 2))
    train_classifier(_blobs(33), model=model, epochs=1, batch_size=32)


def test_accuracy_restores_the_mode_of_every_submodule():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(64, 2)).train()
    model[1].eval()
    images = _blobs()
    with torch.no_grad():
        right = model[2](images.pixels.flatten(1)).argmax(dim=1) == images.labels
    assert accuracy(model, images) == pytest.approx(right.float().mean().item())
    assert [m.training for m in model.modules()] == [True, True, False, True]


def test_progress_reports():
    seen = []
    result = train_classifier(_blobs(), model="mlp", epochs=3, on_epoch=seen.append)
    assert tuple(seen) == result.history
    assert seen[-1].epochs == 3 and 0 <= seen[-1].accuracy <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected an integer of at least 1"),
        ({"batch_size": -1}, "batch_size: expected an integer of at least 1"),
        ({"lr": 0.0}, "lr: expected a finite number > 0"),
        ({"model": "vgg"}, "model: expected one of lenet"),
        ({"seed": -1}, "seed: expected an integer of at least 0"),
        ({"lr": 1e30, "model": "mlp"}, "lr: expected a finite training loss"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        train_classifier(_blobs(), **{"epochs": 2, **options})


def test_images_must_be_square():
    images = Images(torch.rand(2, 1, 8, 9), torch.tensor([0, 1]), ("a", "b"))
    with pytest.raises(InputError, match="images: expected square images, got 8 x 9"):
        train_classifier(images)
    with pytest.raises(InputError, match="images: expected shape"):
        Classifier(nn.Linear(2, 2)).predict(torch.zeros(3, 2))
