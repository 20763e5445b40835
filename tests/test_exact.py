"""The layer-by-layer attack: exact where it says so, and honest where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import gradinv_helpers as gi
from gradinv_helpers.attacks.exact import invert_layer_by_layer


@pytest.fixture(scope="module")
def photos() -> gi.Images:
    return gi.load_images("photos", split="test", image_size=16)


def lenet(seed: int = 0, activation: Callable[[], nn.Module] | None = None):
    model = gi.build_model(
        "lenet", in_channels=3, image_size=16, num_classes=10, seed=seed
    )
    if activation is not None:
        for place, layer in enumerate(model):
            if isinstance(layer, nn.Sigmoid):
                model[place] = activation()
    return model


def error(image: torch.Tensor, truth: gi.Images) -> float:
    return float((image - truth.pixels.to(image)).abs().max())


@pytest.mark.parametrize("index", [0, 1, 5, 6])
@pytest.mark.parametrize("activation", [None, nn.Tanh])
def test_one_image_is_computed(
    photos: gi.Images, index: int, activation: type[nn.Module] | None
) -> None:
    victim = photos[[index]]
    update = gi.local_update(lenet(index, activation), victim)
    image, label, certificate = invert_layer_by_layer(update)
    assert error(image, victim) < 1e-3  # float32 gradients, magnified by conditioning
    assert label.tolist() == victim.labels.tolist()
    assert certificate.exact
    assert certificate.residual < 1e-9


def test_double_precision_gives_double_precision(photos: gi.Images) -> None:
    update = gi.local_update(lenet().double(), photos[[0]])
    image, _, certificate = invert_layer_by_layer(update)
    assert error(image, photos[[0]]) < 1e-8
    assert certificate.residual < 1e-18


def test_relu_where_too_many_units_are_off_is_not_called_exact() -> None:
    photos = gi.load_images("photos", split="test", image_size=32)
    model = gi.build_model("lenet", in_channels=3, image_size=32, num_classes=10)
    for place, layer in enumerate(model):
        if isinstance(layer, nn.Sigmoid):
            model[place] = nn.ReLU()
    image, _, certificate = invert_layer_by_layer(gi.local_update(model, photos[[0]]))
    assert error(image, photos[[0]]) > 0.1
    assert not certificate.exact
    assert not certificate.determined
    assert "leaves its input open" in str(certificate)


@pytest.mark.parametrize(("share", "exact"), [(1e-6, True), (3e-2, False)])
def test_noise_shows_in_the_residual(
    photos: gi.Images, share: float, exact: bool
) -> None:
    noisy = gi.defend(
        gi.local_update(lenet(), photos[[0]]),
        gi.GaussianNoise(share, relative=True),
        generator=torch.Generator().manual_seed(0),
    )
    _, _, certificate = invert_layer_by_layer(noisy)
    assert certificate.exact is exact
    if not exact:
        assert "amplified" in str(certificate)


def test_an_mlp_and_strides_and_dilation(photos: gi.Images) -> None:
    victim = photos[[3]]
    mlp = gi.build_model("mlp", in_channels=3, image_size=16, num_classes=10)
    image, _, certificate = invert_layer_by_layer(gi.local_update(mlp, victim))
    assert error(image, victim) < 1e-4
    assert certificate.exact
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=1, padding=2, dilation=2),
        nn.Tanh(),
        nn.Conv2d(8, 16, (3, 5), stride=(2, 1), padding=(1, 0)),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(16 * 8 * 12, 10),
    )
    image, _, certificate = invert_layer_by_layer(gi.local_update(model, victim))
    assert certificate.determined
    assert error(image, victim) < 1e-2


def test_invert_carries_the_certificate(photos: gi.Images) -> None:
    victim = photos[[2]]
    found = gi.invert(gi.local_update(lenet(), victim), attack="exact")
    assert found.attack == "exact"
    assert found.certificate is not None
    assert found.certificate.exact
    assert found.loss == found.certificate.residual
    assert gi.score(found, victim).psnr[0] > 80
    clients = [gi.local_update(lenet(), photos[[i]]) for i in (0, 1)]
    for k, one in enumerate(gi.invert_clients(clients, attack="exact")):
        assert gi.score(one, photos[[k]]).psnr[0] > 80


def test_a_weight_change_of_one_step_will_do(photos: gi.Images) -> None:
    recipe = gi.LocalTraining(sends="delta", lr=0.5)
    found = gi.invert(gi.local_update(lenet(), photos[[0]], recipe), attack="exact")
    assert gi.score(found, photos[[0]]).psnr[0] > 60


@pytest.mark.parametrize(
    ("name", "message"), [("convnet", "MaxPool2d"), ("resnet18", "ResNet")]
)
def test_other_models_are_refused(photos: gi.Images, name: str, message: str) -> None:
    model = gi.build_model(name, in_channels=3, image_size=16, num_classes=10)
    with pytest.raises(gi.InputError, match=message):
        gi.invert(gi.local_update(model, photos[[0]]), attack="exact")


def test_other_updates_are_refused(photos: gi.Images) -> None:
    with pytest.raises(gi.InputError, match="of 2 samples"):
        gi.invert(gi.local_update(lenet(), photos[[0, 1]]), attack="exact")
    with pytest.raises(gi.InputError, match="labels"):
        gi.invert(gi.local_update(lenet(), photos[[0]]), attack="exact", labels=[0])
    without_bias = nn.Sequential(nn.Flatten(), nn.Linear(768, 10, bias=False))
    with pytest.raises(gi.InputError, match="biases"):
        gi.invert(gi.local_update(without_bias, photos[[0]]), attack="exact")


def test_chains_that_are_more_than_their_layers_are_refused(photos: gi.Images) -> None:
    class Twice(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    layers = [nn.Flatten(), nn.Linear(768, 20), nn.Sigmoid(), nn.Linear(20, 10)]
    frozen = nn.Sequential(*layers)
    update = gi.local_update(Twice(*layers), photos[[0]])
    with pytest.raises(gi.InputError, match="Twice"):
        gi.invert(update, attack="exact")
    frozen[1].bias.requires_grad_(False)
    with pytest.raises(gi.InputError, match="frozen"):
        gi.invert(gi.local_update(frozen, photos[[0]]), attack="exact")


def test_an_activation_used_twice_counts_twice(photos: gi.Images) -> None:
    torch.manual_seed(0)
    tanh = nn.Tanh()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        tanh,
        nn.Conv2d(8, 8, 3, padding=1),
        tanh,
        nn.Flatten(),
        nn.Linear(8 * 16 * 16, 10),
    )
    image, _, certificate = invert_layer_by_layer(gi.local_update(model, photos[[0]]))
    assert certificate.exact
    assert error(image, photos[[0]]) < 1e-2
