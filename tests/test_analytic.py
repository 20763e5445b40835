"""The closed form of a linear layer is exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradinv_helpers.attacks.analytic import (
    class_fits,
    closed_form_image,
    linear_front,
    linear_layer_input,
)
from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate, normalize
from gradinv_helpers.models import Normalize, build_model
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update


def some_images(count: int, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 1, 5, 5, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    return Images(pixels, labels, tuple("abcd"))


def mlp(activation: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(25, 9), activation or nn.ReLU(), nn.Linear(9, 4)
    ).double()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.Tanh()])
def test_first_layer_gives_the_pixels(activation: nn.Module, seed: int) -> None:
    images = some_images(1, seed)
    found = linear_layer_input(local_update(mlp(activation), images))
    assert found.shape == (25,)
    assert torch.allclose(found, images.pixels.double().flatten(), atol=1e-10, rtol=0)


def test_a_named_layer_gives_its_features() -> None:
    model, images = mlp(), some_images(1)
    hidden = model[2](model[1](images.pixels.double().flatten(1)))[0]
    found = linear_layer_input(local_update(model, images), "3")
    assert torch.allclose(found, hidden, atol=1e-10, rtol=0)


def test_float32_is_close() -> None:
    images = some_images(1)
    found = linear_layer_input(local_update(mlp().float(), images))
    assert torch.allclose(found, images.pixels.flatten(), atol=1e-4)


def test_last_layer_of_lenet_gives_its_features() -> None:
    model = build_model("lenet", in_channels=1, image_size=5, num_classes=4).double()
    images = some_images(1)
    features = model[:-1](images.pixels.double())[0]
    found = linear_layer_input(local_update(model, images))
    assert torch.allclose(found, features, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "recipe",
    [
        LocalTraining("delta", lr=0.3),
        LocalTraining("delta", lr=0.3, optimiser="momentum", weight_decay=0.2),
    ],
)
def test_change_after_one_step(recipe: LocalTraining) -> None:
    images = some_images(1)
    found = linear_layer_input(local_update(mlp(), images, recipe))
    assert torch.allclose(found, images.pixels.double().flatten(), atol=1e-8, rtol=0)


def test_normalised_update() -> None:
    images = some_images(1)
    found = linear_layer_input(normalize(local_update(mlp(), images)))
    assert torch.allclose(found, images.pixels.double().flatten(), atol=1e-10, rtol=0)


def test_several_samples_mix_with_signed_weights() -> None:
    """Least squares over all rows: x = W^T b / |b|^2, here from its definition."""
    model, images = mlp(nn.Sigmoid()), some_images(3)
    single = [local_update(model, images[[i]]) for i in range(3)]
    deltas = torch.stack([u.tensors["1.bias"] for u in single])  # (3, 9)
    total = deltas.mean(0)
    weights = deltas @ total / 3 / (total @ total)
    pixels = images.pixels.double().flatten(1)
    found = linear_layer_input(aggregate(single))
    assert torch.allclose(found, weights @ pixels, atol=1e-10, rtol=0)
    assert float(weights.sum()) == pytest.approx(1)


def test_model_that_is_a_bare_linear_layer() -> None:
    model = nn.Linear(4, 3).double()
    x, delta = torch.rand(4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    update = SharedUpdate(
        model=model,
        tensors={"weight": torch.outer(delta, x), "bias": delta},
        num_samples=1,
        image_shape=(1, 2, 2),
    )
    assert torch.allclose(linear_layer_input(update), x, atol=1e-12)


# --- what it refuses --------------------------------------------------------------


@pytest.mark.parametrize("layer", ["0", "2", "7", "", "weight"])
def test_unknown_layer(layer: str) -> None:
    message = "layer: expected a torch.nn.Linear with a bias: 1, 3, got "
    with pytest.raises(InputError, match=message):
        linear_layer_input(local_update(mlp(), some_images(1)), layer)


def test_no_linear_layer_with_a_bias() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 4, bias=False))
    with pytest.raises(InputError, match="with a bias: there is none, got None"):
        linear_layer_input(local_update(model, some_images(1)))


def test_frozen_layers_are_passed_over() -> None:
    model, images = mlp(), some_images(1)
    model[1].weight.requires_grad_(False)
    hidden = model[2](model[1](images.pixels.double().flatten(1)))[0]
    update = local_update(model, images)
    assert torch.allclose(linear_layer_input(update), hidden, atol=1e-10, rtol=0)
    with pytest.raises(InputError, match="layer: .*with a bias: 3, got '1'"):
        linear_layer_input(update, "1")


def test_no_active_unit() -> None:
    model = mlp()
    with torch.no_grad():
        model[1].bias.fill_(-100.0)
    message = "a non-zero bias gradient in layer '1', got all zeros; no unit of this"
    with pytest.raises(InputError, match=message):
        linear_layer_input(local_update(model, some_images(1)))


@pytest.mark.parametrize("optimiser", ["sgd", "momentum"])
def test_several_steps_on_one_image_cancel(optimiser: str) -> None:
    """Every step adds a multiple of the same pixels to the first layer."""
    recipe = LocalTraining("delta", lr=0.2, epochs=5, optimiser=optimiser)
    images = some_images(1)
    found = linear_layer_input(local_update(mlp(), images, recipe))
    assert torch.allclose(found, images.pixels.double().flatten(), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        ({"optimiser": "adam"}, "1 adam steps"),
        ({"epochs": 2, "weight_decay": 0.1}, "2 sgd steps"),
    ],
)
def test_changes_that_are_no_multiple_of_the_pixels(recipe: dict, what: str) -> None:
    update = local_update(mlp(), some_images(1), LocalTraining("delta", **recipe))
    with pytest.raises(InputError, match=f"one SGD step, got the change of {what}"):
        linear_layer_input(update)


# --- models that begin with a linear layer ----------------------------------------


def test_front_of_a_model() -> None:
    last = nn.Linear(9, 4)
    first = nn.Linear(25, 9)
    inner = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), first)
    model = nn.Sequential(Normalize([0.5], [0.2]), inner, nn.GELU(), last).eval()
    front = linear_front(model)
    assert front.name == "1.2"
    assert front.layer is first
    assert [type(m) for m in front.before] == [Normalize, nn.Dropout, nn.Flatten]
    assert list(front.after) == [model[2], last]
    images = some_images(3).pixels
    inputs = front.inputs(images)
    assert torch.allclose(inputs, ((images - 0.5) / 0.2).flatten(1), atol=1e-6)
    assert torch.allclose(front.images(inputs, (1, 5, 5)), images, atol=1e-6)
    assert torch.allclose(front.after(first(inputs)), model(images))


def test_front_of_other_models() -> None:
    def refused(message: str, model: nn.Module) -> None:
        with pytest.raises(InputError, match=message):
            linear_front(model)

    first, last = nn.Linear(25, 9), nn.Linear(9, 4)

    class Twice(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    refused("got Twice", Twice(nn.Flatten(), first, last))
    refused("got Linear", first)
    refused("no Flatten before layer 0", nn.Sequential(first, last))
    refused("got no layer", nn.Sequential(nn.Flatten()))
    refused("layer 0: Conv2d", nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), last))
    refused("layer 0: Flatten", nn.Sequential(nn.Flatten(2), first, last))
    refused("layer 0: Dropout", nn.Sequential(nn.Dropout(), nn.Flatten(), first))
    square = nn.Linear(25, 25)
    refused("layer 1 used twice", nn.Sequential(nn.Flatten(), square, square))
    tied = nn.Linear(25, 25)
    tied.weight = square.weight
    refused("layer 1 used twice", nn.Sequential(nn.Flatten(), square, tied))
    without = nn.Linear(25, 9, bias=False)
    refused("layer 1 without a bias", nn.Sequential(nn.Flatten(), without, last))
    hooked = nn.Sequential(nn.Flatten(), nn.Linear(25, 9), last)
    hooked[1].register_forward_hook(lambda module, inputs, output: output * 2)
    refused("got hooks", hooked)
    first.bias.requires_grad_(False)
    refused("frozen weights in layer 1", nn.Sequential(nn.Flatten(), first, last))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_image_in_closed_form(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        Normalize([0.3], [0.4]), nn.Flatten(), nn.Linear(25, 9), nn.GELU()
    )
    model = nn.Sequential(*model, nn.Linear(9, 4)).to(dtype)
    images = some_images(1)
    found = closed_form_image(local_update(model, images))
    assert found.shape == (1, 1, 5, 5)
    assert found.dtype == torch.float64
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    assert float((found - images.pixels).abs().max()) < bound
    with pytest.raises(InputError, match="one of 2 samples"):
        closed_form_image(local_update(model, some_images(2)))


@pytest.mark.parametrize("seed", range(3))
def test_errors_fit_their_own_class(seed: int) -> None:
    torch.manual_seed(0)
    layers = (nn.Flatten(), nn.Linear(25, 40), nn.ReLU(), nn.Linear(40, 4))
    images = some_images(6, seed)
    front = linear_front(nn.Sequential(*layers).double())
    inputs = images.pixels.double().flatten(1)
    outputs = front.layer(inputs).detach().requires_grad_()
    weights = torch.tensor([0.1, 0.2, 0.3, 0.05, 0.15, 0.2], dtype=torch.float64)
    losses = nn.functional.cross_entropy(
        front.after(outputs), images.labels, reduction="none"
    )
    (errors,) = torch.autograd.grad((losses * weights).sum(), outputs)
    fits, found = class_fits(front, inputs, errors)
    assert fits.argmax(1).tolist() == images.labels.tolist()
    own = torch.arange(6), images.labels
    assert torch.allclose(fits[own], torch.ones(6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found[own], weights, atol=1e-12)
    assert float(fits.max()) <= 1 + 1e-12
