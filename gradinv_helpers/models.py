"""Models whose updates the book attacks. Taught in: notebooks/01_fl_guarantees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gradinv_helpers.errors import InputError, check_choice, check_count, check_seed


def _lenet(in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """The network of DLG: three 5x5 convolutions of 12 channels, sigmoid, one linear.

    Sigmoids make the loss twice differentiable everywhere, which gradient matching
    by L-BFGS relies on. All weights and biases are uniform in [-0.5, 0.5].

    Source: Zhu et al. (2019), Section 4.1, and the weight rule of its released code.
    """
    side = (image_size + 3) // 4  # two convolutions of stride 2 with padding 2
    model = nn.Sequential(
        nn.Conv2d(in_channels, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=1, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(12 * side * side, num_classes),
    )
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def _mlp(in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """One hidden ReLU layer of 256 units, PyTorch's default weights."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_channels * image_size**2, 256),
        nn.ReLU(),
        nn.Linear(256, num_classes),
    )


def _convnet(in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """Four 3x3 ReLU convolutions (32-64-64-64), two poolings, one linear layer."""
    side = image_size // 2 // 2
    if side < 1:
        raise InputError("image_size", "at least 4 for 'convnet'", image_size)
    return nn.Sequential(
        nn.Conv2d(in_channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * side * side, num_classes),
    )


def _resnet18(in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """torchvision's ResNet-18 with the usual small-image stem below 64 pixels.

    The stem is one 3x3 convolution of stride 1 and no max-pooling, so that 32x32
    images are not shrunk to 8x8 before the first block.
    """
    from torchvision.models import resnet18

    model = resnet18(weights=None, num_classes=num_classes)
    if image_size < 64:
        model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    return model


_BUILDERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "lenet": _lenet,
    "mlp": _mlp,
    "convnet": _convnet,
    "resnet18": _resnet18,
}
MODELS: tuple[str, ...] = tuple(_BUILDERS)


def build_model(
    name: str,
    *,
    in_channels: int,
    image_size: int,
    num_classes: int,
    seed: int = 0,
) -> nn.Module:
    """Build a classifier with random weights drawn from ``seed``.

    Args:
        name: ``lenet`` (exactly the network of DLG), ``mlp``, ``convnet`` or
            ``resnet18``.
        in_channels: Channels of the images, 1 for grey and 3 for colour.
        image_size: Height and width of the square images, in pixels.
        num_classes: Number of classes, at least 2.
        seed: Seed of the weights; torch's global random state is left as it was.

    Returns:
        A module in evaluation mode that maps (N, C, H, W) to logits (N, K).

    Raises:
        InputError: Unknown name or a count that is too small.

    Source: Zhu et al. (2019) for ``lenet``; He et al. (2016) for ``resnet18``.
    Taught in: notebooks/01_fl_guarantees.
    """
    builder = _BUILDERS[check_choice("model", name, MODELS)]
    check_count("in_channels", in_channels)
    check_count("image_size", image_size)
    check_count("num_classes", num_classes, minimum=2)
    check_seed("seed", seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builder(in_channels, image_size, num_classes).eval()
