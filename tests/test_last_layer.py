"""What the last layer says, against autograd and torch's own optimisers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradinv_helpers.attacks.last_layer import (
    NUM_DUMMIES,
    dummy_features,
    dummy_images,
    gains,
    groups_of,
    last_linear,
    mean_gain,
    mean_gradient,
    read_last_layer,
)
from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate, normalize
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

NAMES = tuple("abcde")


def images_of(*labels: int) -> Images:
    generator = torch.Generator().manual_seed(sum(labels))
    pixels = torch.rand(len(labels), 1, 8, 8, generator=generator)
    return Images(pixels, torch.tensor(labels), NAMES)


def small_model(name: str = "mlp") -> nn.Module:
    return build_model(name, in_channels=1, image_size=8, num_classes=5).double()


def last_gradient(model: nn.Module, images: Images) -> tuple[torch.Tensor, ...]:
    loss = F.cross_entropy(model(images.pixels.double()), images.labels)
    layer = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    return torch.autograd.grad(loss, [layer.weight, layer.bias])


@pytest.mark.parametrize(
    "recipe",
    [
        LocalTraining(),
        LocalTraining("delta", lr=0.3),
        LocalTraining("delta", lr=0.3, optimiser="momentum", weight_decay=0.2),
    ],
)
@pytest.mark.parametrize("name", ["lenet", "mlp", "vit"])
def test_mean_gradient_of_one_step_is_the_gradient(name: str, recipe) -> None:
    model, images = small_model(name), images_of(0, 3, 3)
    update = local_update(model, images, recipe)
    found = mean_gradient(update, read_last_layer(update), (3,))
    for one, other in zip(found, last_gradient(model, images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimiser", ["sgd", "momentum"])
def test_mean_gradient_of_small_steps_is_nearly_the_gradient(optimiser) -> None:
    """Steps that change nothing repeat one gradient; gains count how often."""
    model, images = small_model(), images_of(0, 3, 3, 4)
    recipe = LocalTraining("delta", lr=1e-7, epochs=6, optimiser=optimiser)
    update = local_update(model, images, recipe)
    found = mean_gradient(update, read_last_layer(update), (4,))
    for one, other in zip(found, last_gradient(model, images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_normalised_changes_point_along_the_gradient() -> None:
    model, images = small_model(), images_of(1, 2)
    for sends in ("gradient", "delta"):
        update = normalize(local_update(model, images, LocalTraining(sends)))
        weight, _ = mean_gradient(update, read_last_layer(update), (2,))
        cosine = F.cosine_similarity(
            weight.flatten(), last_gradient(model, images)[0].flatten(), dim=0
        )
        assert float(cosine) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("optimiser", ["sgd", "momentum"])
def test_gains_are_those_of_the_optimiser(optimiser: str, steps: int) -> None:
    """The end of torch's SGD on made-up gradients, one at a time."""
    expected = []
    for marked in range(steps):
        weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
        momentum = 0.9 if optimiser == "momentum" else 0.0
        sgd = torch.optim.SGD([weight], lr=1.0, momentum=momentum)
        for step in range(steps):
            weight.grad = torch.tensor(float(step == marked)).double()
            sgd.step()
        expected.append(-float(weight.detach()))
    recipe = LocalTraining("delta", optimiser=optimiser)
    assert gains(recipe, steps).tolist() == pytest.approx(expected)


def test_mean_gain_weighs_clients_by_their_samples() -> None:
    recipe = LocalTraining("delta", batch_size=2, epochs=3)
    assert mean_gain(recipe, (2, 6)) == pytest.approx((2 * 3 + 6 * 9) / 8)


def test_adam_and_normalised_decay_hide_the_gradient() -> None:
    model, images = small_model(), images_of(1, 2)
    adam = local_update(model, images, LocalTraining("delta", optimiser="adam"))
    decay = local_update(model, images, LocalTraining("delta", weight_decay=0.1))
    for update, what in ((adam, "Adam"), (normalize(decay), "normalised weight dec")):
        with pytest.raises(InputError, match=f"of known scale, got a change by {what}"):
            mean_gradient(update, read_last_layer(update), (2,))


def test_groups() -> None:
    model = small_model()
    both = aggregate([local_update(model, images_of(*x)) for x in ((1,), (2, 3))])
    assert groups_of(both, 3) == (1, 2)
    assert groups_of(both, 5) == (5,)


def test_layer_is_the_last_one_that_is_trained() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 5))
    assert last_linear(local_update(model, images_of(1))) == "2"
    model[2].requires_grad_(False)
    assert last_linear(local_update(model, images_of(1))) == "1"
    alone = nn.Linear(8, 5)
    update = SharedUpdate(
        model=alone,
        tensors={"weight": torch.ones(5, 8), "bias": torch.ones(5)},
        num_samples=1,
        image_shape=(1, 1, 8),
    )
    assert last_linear(update) == ""
    assert read_last_layer(update).sent_bias is not None


def test_dummy_images_are_images_and_repeatable() -> None:
    update = local_update(small_model(), images_of(1, 2))
    images = dummy_images(update, seed=0)
    assert images.shape == (NUM_DUMMIES, 1, 8, 8)
    assert images.dtype == torch.float64
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    assert torch.equal(images, dummy_images(update, seed=0))
    assert not torch.equal(images, dummy_images(update, seed=1))


@pytest.mark.parametrize("name", ["lenet", "resnet20", "vit"])
def test_dummy_features_make_the_logits_of_dummy_images(name: str) -> None:
    model = small_model(name)
    update = local_update(model, images_of(1, 2))
    layer = read_last_layer(update)
    logits = dummy_features(update, seed=0) @ layer.weight.T + layer.bias
    with torch.no_grad():
        expected = model(dummy_images(update, seed=0))
    torch.testing.assert_close(logits, expected)
