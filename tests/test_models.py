"""The models: LeNet exactly as in DLG, and seeds that touch nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradinv_helpers.errors import InputError
from gradinv_helpers.models import MODELS, build_model


def lenet(seed: int = 0, **changes) -> nn.Module:
    shape = {"in_channels": 3, "image_size": 32, "num_classes": 10} | changes
    return build_model("lenet", **shape, seed=seed)


def test_lenet_layers() -> None:
    layers = list(lenet())
    assert [type(layer) for layer in layers] == [
        nn.Conv2d,
        nn.Sigmoid,
        nn.Conv2d,
        nn.Sigmoid,
        nn.Conv2d,
        nn.Sigmoid,
        nn.Flatten,
        nn.Linear,
    ]
    convolutions = layers[0:6:2]
    assert [c.stride for c in convolutions] == [(2, 2), (2, 2), (1, 1)]
    assert [c.kernel_size for c in convolutions] == [(5, 5)] * 3
    assert [c.padding for c in convolutions] == [(2, 2)] * 3
    assert [c.in_channels for c in convolutions] == [3, 12, 12]
    assert [c.out_channels for c in convolutions] == [12] * 3
    assert all(c.bias is not None and c.groups == 1 for c in convolutions)
    assert (layers[-1].in_features, layers[-1].out_features) == (12 * 8 * 8, 10)
    assert layers[-1].bias is not None


def test_lenet_parameter_count() -> None:
    by_hand = (3 * 25 + 1) * 12 + 2 * (12 * 25 + 1) * 12 + (12 * 8 * 8 + 1) * 10
    assert by_hand == 15_826
    assert sum(p.numel() for p in lenet().parameters()) == by_hand


def test_lenet_weights_are_uniform() -> None:
    """Mean, variance and the empirical distribution, weights and biases together."""
    seeds = [torch.cat([p.flatten() for p in lenet(s).parameters()]) for s in range(6)]
    values = torch.cat(seeds).detach().double().sort().values
    n = len(values)
    assert -0.5 <= float(values[0]) < -0.4999
    assert 0.4999 < float(values[-1]) <= 0.5
    assert abs(float(values.mean())) < 4 / math.sqrt(12 * n)
    assert abs(float(values.var()) - 1 / 12) < 4 / math.sqrt(180 * n)
    expected = torch.linspace(-0.5, 0.5, n, dtype=torch.float64)
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is passed with probability 0.001.
    assert float((values - expected).abs().max()) < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("name", ["0.bias", "2.bias", "7.bias", "7.weight"])
def test_lenet_rule_holds_for_every_parameter(name: str) -> None:
    """PyTorch's own rule would keep these far inside of [-0.5, 0.5]."""
    largest = max(
        float(dict(lenet(seed).named_parameters())[name].detach().abs().max())
        for seed in range(20)
    )
    assert 0.45 < largest <= 0.5


@pytest.mark.parametrize("size", [1, 5, 8, 16, 25, 28, 32, 33, 64])
def test_lenet_takes_any_size(size: int) -> None:
    model = lenet(image_size=size, in_channels=1, num_classes=3)
    assert model(torch.rand(2, 1, size, size)).shape == (2, 3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 25)])
def test_logits_of_every_model(name: str, channels: int, size: int) -> None:
    model = build_model(name, in_channels=channels, image_size=size, num_classes=7)
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    images = torch.rand(3, channels, size, size)
    logits = model(images)
    assert logits.shape == (3, 7)
    assert torch.isfinite(logits).all()
    # Images of a batch do not see each other.
    assert torch.allclose(model(images[1:2]), logits[1:2], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("mlp", [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]),
        (
            "convnet",
            [
                *[nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.MaxPool2d] * 2,
                nn.Flatten,
                nn.Linear,
            ],
        ),
    ],
)
def test_layers_of_the_small_models(name: str, layers: list) -> None:
    model = build_model(name, in_channels=1, image_size=8, num_classes=3)
    assert [type(layer) for layer in model] == layers


def test_resnet_stem_follows_the_image_size() -> None:
    small = build_model("resnet18", in_channels=1, image_size=32, num_classes=5)
    assert small.conv1.kernel_size == (3, 3)
    assert small.conv1.stride == (1, 1)
    assert isinstance(small.maxpool, nn.Identity)
    large = build_model("resnet18", in_channels=1, image_size=64, num_classes=5)
    assert large.conv1.kernel_size == (7, 7)
    assert large.conv1.in_channels == 1
    assert isinstance(large.maxpool, nn.MaxPool2d)
    # torchvision's own count for 1000 classes is 11,689,512.
    usual = build_model("resnet18", in_channels=3, image_size=64, num_classes=1000)
    assert sum(p.numel() for p in usual.parameters()) == 11_689_512


@pytest.mark.parametrize("name", MODELS)
def test_seed_decides_the_weights(name: str) -> None:
    def flat(seed: int) -> torch.Tensor:
        model = build_model(name, in_channels=1, image_size=8, num_classes=3, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(flat(3), flat(3))
    assert not torch.equal(flat(3), flat(4))


@pytest.mark.parametrize("name", MODELS)
def test_global_random_state_is_left_alone(name: str) -> None:
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    build_model(name, in_channels=1, image_size=8, num_classes=3, seed=5)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "lenett"}, "model: .*lenet, mlp, convnet, resnet18, .* 'lenet'"),
        ({"in_channels": 0}, "in_channels: expected an integer of at least 1, got 0"),
        ({"image_size": -1}, "image_size: expected an integer of at least 1, got -1"),
        ({"image_size": 8.0}, "image_size: .*got 8.0"),
        ({"num_classes": 1}, "num_classes: expected an integer of at least 2, got 1"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"seed": 2**64}, "seed: expected an integer of at most 4294967295, got"),
        ({"name": "convnet", "image_size": 3}, "image_size: expected at least 4"),
    ],
)
def test_bad_requests(changes: dict, message: str) -> None:
    arguments = {
        "name": "lenet",
        "in_channels": 1,
        "image_size": 8,
        "num_classes": 3,
        "seed": 0,
    }
    arguments |= changes
    with pytest.raises(InputError, match=message):
        build_model(arguments.pop("name"), **arguments)
