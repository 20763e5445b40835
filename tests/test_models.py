"""The models: LeNet exactly as in DLG, and seeds that touch nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradinv_helpers.errors import InputError
from gradinv_helpers.models import MODELS, Normalize, build_model


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


def test_resnet20_is_the_published_network() -> None:
    """Layers, sizes and the 0.27 million parameters of its table of results."""
    model = build_model("resnet20", in_channels=3, image_size=32, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 19  # and one linear layer
    assert [m.out_channels for m in convolutions] == [16] * 7 + [32] * 6 + [64] * 6
    assert all(m.kernel_size == (3, 3) and m.bias is None for m in convolutions)
    assert [m.stride[0] for m in convolutions].count(2) == 2
    # By hand: fan-in of the second stage's convolutions is 32 * 9.
    spread = torch.cat([m.weight.detach().flatten() for m in convolutions[8:13]])
    assert float(spread.std()) == pytest.approx(math.sqrt(2 / 288), rel=0.02)


def test_resnet20_shortcuts_have_no_weights() -> None:
    """With silent convolutions a block is the rectified shortcut."""
    model = build_model("resnet20", in_channels=3, image_size=8, num_classes=4)
    blocks = list(model)[3:12]
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64]
    for block, channels in zip(blocks, widths, strict=True):
        nn.init.zeros_(block.bn2.weight)
        x = torch.randn(2, channels, 7, 7)
        out = block(x)
        step = 1 if out.shape[2] == 7 else 2
        assert torch.equal(out[:, :channels], x[:, :, ::step, ::step].relu())
        assert not out[:, channels:].any()


def test_vit_layers() -> None:
    model = build_model("vit", in_channels=1, image_size=32, num_classes=7)
    assert model.conv_proj.in_channels == 1
    assert model.conv_proj.kernel_size == model.conv_proj.stride == (4, 4)
    assert model.encoder.pos_embedding.shape == (1, 64 + 1, 128)
    assert len(model.encoder.layers) == 4
    assert model.heads.head.weight.shape == (7, 128)
    # The spread is torchvision's own for three channels: one over the square root
    # of the fan-in.
    for channels in (1, 3):
        model = build_model("vit", in_channels=channels, image_size=8, num_classes=7)
        spread = float(model.conv_proj.weight.detach().std())
        assert spread == pytest.approx(1 / math.sqrt(16 * channels), rel=0.15)


@pytest.mark.parametrize("size", [1, 5, 8, 25, 28, 64])
def test_every_pixel_counts_in_the_vit(size: int) -> None:
    """Also those of the last rows, where the side is no multiple of the patch."""
    model = build_model("vit", in_channels=3, image_size=size, num_classes=4)
    images = torch.rand(1, 3, size, size, requires_grad=True)
    logits = model(images)
    assert logits.shape == (1, 4)
    (slope,) = torch.autograd.grad(logits[0, 0], images)
    assert bool(slope.any(1).all())


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_gradient(name: str) -> None:
    """A head of zeros, for one, would cut off everything below it."""
    model = build_model(name, in_channels=1, image_size=8, num_classes=3)
    loss = F.cross_entropy(model(torch.rand(2, 1, 8, 8)), torch.tensor([0, 2]))
    for gradient in torch.autograd.grad(loss, list(model.parameters())):
        assert gradient.any()


# --- normalisation ----------------------------------------------------------------

MEAN, STD = (0.5, 0.25, 0.1), (0.2, 0.5, 2.0)


def test_normalize_by_hand() -> None:
    layer = Normalize(MEAN, STD)
    pixels = torch.rand(2, 3, 4, 5)
    out = layer(pixels)
    for channel in range(3):
        expected = (pixels[:, channel] - MEAN[channel]) / STD[channel]
        assert torch.allclose(out[:, channel], expected)
    assert not list(layer.parameters())
    assert {n: tuple(b.shape) for n, b in layer.named_buffers()} == {
        "mean": (1, 3, 1, 1),
        "std": (1, 3, 1, 1),
    }
    assert "channels=3" in repr(layer)
    assert layer.double()(pixels.double()).dtype == torch.float64


@pytest.mark.parametrize("name", MODELS)
def test_normalize_in_front_of_every_model(name: str) -> None:
    shape = {"in_channels": 3, "image_size": 9, "num_classes": 4, "seed": 3}
    plain = build_model(name, **shape)
    model = build_model(name, **shape, mean=MEAN, std=list(STD))
    assert type(model) is nn.Sequential and isinstance(model[0], Normalize)
    assert not any(type(layer) is nn.Sequential for layer in model)
    assert not model.training
    pixels = torch.rand(2, 3, 9, 9)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    assert torch.allclose(model(pixels), plain((pixels - mean) / std), atol=1e-6)


@pytest.mark.parametrize("name", ["lenet", "resnet20"])
def test_normalize_adds_one_layer_to_a_chain(name: str) -> None:
    shape = {"in_channels": 3, "image_size": 8, "num_classes": 4}
    plain = build_model(name, **shape)
    model = build_model(name, **shape, mean=MEAN, std=STD)
    assert [type(layer) for layer in model] == [
        Normalize,
        *[type(layer) for layer in plain],
    ]


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (0.5, 0.2, "mean: expected one number per channel, got 0.5"),
        ("abc", (1,), "mean: expected one number per channel, got 'abc'"),
        ((), (), r"mean: expected one finite number per channel, got \(\)"),
        ((0.5,), (float("nan"),), "std: expected one finite number per channel"),
        ((0.5,), (0.0,), r"std: expected positive numbers, got \(0.0,\)"),
        ((0.5,), (0.2, 0.2), "mean and std: expected equal lengths, got 1 and 2"),
    ],
)
def test_bad_statistics(mean, std, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Normalize(mean, std)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.5,)}, "mean and std: expected both or neither, got no std"),
        ({"std": (0.5,)}, "mean and std: expected both or neither, got no mean"),
        ({"mean": MEAN, "std": STD}, "mean: expected 1 numbers, .*, got 3"),
    ],
)
def test_statistics_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model("mlp", in_channels=1, image_size=8, num_classes=3, **changes)


# --- seeds and requests -----------------------------------------------------------


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
