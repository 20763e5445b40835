"""Models whose updates the book attacks. Taught in: notebooks/01_fl_guarantees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.errors import InputError, check_choice, check_count, check_seed


class Normalize(nn.Module):
    """First layer that standardises images: (x - mean) / std, channel by channel.

    With it inside the model, images stay in [0, 1] everywhere else: in the data, in
    the attack and in the scores.

    Args:
        mean: One number per channel.
        std: One positive number per channel.

    Raises:
        InputError: Unequal lengths, no channels, or a value out of range.

    Taught in: notebooks/03_stronger_matching.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        means, stds = _checked_statistics(mean, std)
        self.register_buffer("mean", torch.tensor(means).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(stds).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Standardise images (N, C, H, W)."""
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        """The channels, as ``print(model)`` shows them."""
        return f"channels={self.mean.shape[1]}"


def _checked_statistics(
    mean: Sequence[float], std: Sequence[float]
) -> tuple[list[float], list[float]]:
    lists = []
    for name, given in (("mean", mean), ("std", std)):
        try:
            values = [float(value) for value in given]
        except (TypeError, ValueError) as error:
            raise InputError(name, "one number per channel", repr(given)) from error
        if not values or not all(math.isfinite(value) for value in values):
            raise InputError(name, "one finite number per channel", repr(given))
        lists.append(values)
    if len(lists[0]) != len(lists[1]):
        lengths = f"{len(lists[0])} and {len(lists[1])}"
        raise InputError("mean and std", "equal lengths", lengths)
    if min(lists[1]) <= 0:
        raise InputError("std", "positive numbers", repr(std))
    return lists[0], lists[1]


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


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without weights (option A).

    Where the block halves the image, the shortcut takes every second pixel and fills
    the new channels with zeros.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(out + shortcut)


def _resnet20(
    in_channels: int, image_size: int, num_classes: int, width: int = 16
) -> nn.Module:
    """The CIFAR ResNet of 20 layers: three stages of three blocks, 16-32-64 wide.

    Source: He et al. (2016), Section 4.2; weights as in He et al. (2015).
    """
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    before = width
    for stage in range(3):
        for block in range(3):
            channels, stride = width * 2**stage, 2 if stage and not block else 1
            layers.append(_BasicBlock(before, channels, stride))
            before = channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def _vit(in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """torchvision's vision transformer, small: 4x4 patches, 4 layers of 128 wide.

    Class token, learned positions, 4 heads, MLPs of 256. Images whose side is no
    multiple of 4 get zeros at the right and the bottom. The head starts with small
    random weights instead of zeros: with zeros, no layer below it would have a
    gradient.

    Source: Dosovitskiy et al. (2021), Section 3.1.
    """
    from torchvision.models import VisionTransformer

    padding = -image_size % 4
    model = VisionTransformer(
        image_size=image_size + padding,
        patch_size=4,
        num_layers=4,
        num_heads=4,
        hidden_dim=128,
        mlp_dim=256,
        num_classes=num_classes,
    )
    if in_channels != 3:
        model.conv_proj = nn.Conv2d(in_channels, 128, 4, stride=4)
        nn.init.trunc_normal_(model.conv_proj.weight, std=(16 * in_channels) ** -0.5)
        nn.init.zeros_(model.conv_proj.bias)
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    if padding:
        return nn.Sequential(nn.ZeroPad2d((0, padding, 0, padding)), model)
    return model


_BUILDERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "lenet": _lenet,
    "mlp": _mlp,
    "convnet": _convnet,
    "resnet18": _resnet18,
    "resnet20": _resnet20,
    "vit": _vit,
}
MODELS: tuple[str, ...] = tuple(_BUILDERS)


def build_model(
    name: str,
    *,
    in_channels: int,
    image_size: int,
    num_classes: int,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Build a classifier with random weights drawn from ``seed``.

    Args:
        name: ``lenet`` (exactly the network of DLG), ``mlp``, ``convnet``,
            ``resnet18``, ``resnet20`` (for small images, 16-32-64 wide) or ``vit`` (a
            small vision transformer).
        in_channels: Channels of the images, 1 for grey and 3 for colour.
        image_size: Height and width of the square images, in pixels.
        num_classes: Number of classes, at least 2.
        seed: Seed of the weights; torch's global random state is left as it was.
        mean: With ``std``: one number per channel for a ``Normalize`` layer in front.
            The weights are the same with and without it.
        std: As ``mean``; positive.

    Returns:
        A module in evaluation mode that maps (N, C, H, W) to logits (N, K).

    Raises:
        InputError: Unknown name, a count that is too small, or a mean or standard
            deviation that does not fit.

    Source: Zhu et al. (2019) for ``lenet``; He et al. (2016) for ``resnet18`` and
    ``resnet20``; Dosovitskiy et al. (2021) for ``vit``.
    Taught in: notebooks/01_fl_guarantees.
    """
    builder = _BUILDERS[check_choice("model", name, MODELS)]
    check_count("in_channels", in_channels)
    check_count("image_size", image_size)
    check_count("num_classes", num_classes, minimum=2)
    check_seed("seed", seed)
    front = _front(mean, std, in_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = builder(in_channels, image_size, num_classes)
    if front is not None:  # a plain chain stays one
        layers = model if type(model) is nn.Sequential else [model]
        model = nn.Sequential(front, *layers)
    return model.eval()


def _front(
    mean: Sequence[float] | None, std: Sequence[float] | None, in_channels: int
) -> Normalize | None:
    """The layer in front of a model, if statistics were given."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        missing = "mean" if mean is None else "std"
        raise InputError("mean and std", "both or neither", f"no {missing}")
    front = Normalize(mean, std)
    if front.mean.shape[1] != in_channels:
        expected = f"{in_channels} numbers, one per channel"
        raise InputError("mean", expected, front.mean.shape[1])
    return front
