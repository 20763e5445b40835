"""Architectures of torchvision, as examples of modules that readers bring along."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import models

from gradinv_helpers.attacks.gradients import _AutogradMap, gradient_map
from gradinv_helpers.attacks.invert import invert
from gradinv_helpers.data import Images
from gradinv_helpers.updates import local_update

CLASSES = 5


def densenet() -> nn.Module:
    return models.DenseNet(8, (2, 3), 16, num_classes=CLASSES)


def vision_transformer() -> nn.Module:
    model = models.VisionTransformer(32, 8, 2, 2, 32, 48, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight, std=0.2)  # zeros hide all layers below
    return model


def swin_transformer() -> nn.Module:
    return models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
    )


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v3_small": lambda: models.mobilenet_v3_small(num_classes=CLASSES),
    "squeezenet1_1": lambda: models.squeezenet1_1(num_classes=CLASSES),
    "shufflenet_v2_x0_5": lambda: models.shufflenet_v2_x0_5(num_classes=CLASSES),
    "densenet": densenet,
    "vision_transformer": vision_transformer,
    "swin_transformer": swin_transformer,
}


def brought(name: str) -> nn.Module:
    """A model in evaluation mode with weights and statistics as if it were trained.

    With the statistics that BatchNorm starts from, signals would fade from layer to
    layer until nothing is left to compare.
    """
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        model.train()(torch.rand(16, 3, 32, 32))
    return model.eval()


def batch_norms_in_training(model: nn.Module) -> nn.Module:
    for module in model.modules():
        module.train(isinstance(module, nn.BatchNorm2d))
    return model


class HardSigmoid(nn.Module):
    """The definition, in operations that torch differentiates twice."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 3).clamp(0, 6) / 6


def with_plain_layers(module: nn.Module) -> nn.Module:
    """Replace the layers that torch can differentiate only once."""
    for name, child in module.named_children():
        if isinstance(child, nn.Hardsigmoid):
            setattr(module, name, HardSigmoid())
        with_plain_layers(child)
    for name in ("activation", "scale_activation"):  # squeeze and excitation
        if isinstance(getattr(module, name, None), nn.Hardsigmoid):
            setattr(module, name, HardSigmoid())
    return module


@sdpa_kernel(SDPBackend.MATH)
def double_backward(
    model: nn.Module, images: Tensor, targets: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Gradients and the derivative of half their squares, trial after trial."""
    rows, back = [], []
    for x, y in zip(images, targets, strict=True):
        worker = with_plain_layers(copy.deepcopy(model))
        x = x.clone().requires_grad_()
        loss = -(y * F.log_softmax(worker(x), 1)).sum(1).mean()
        found = torch.autograd.grad(
            loss, list(worker.parameters()), create_graph=True, materialize_grads=True
        )
        half = sum(g.square().sum() for g in found) / 2
        back.append(torch.autograd.grad(half, x)[0])
        rows.append([g.detach() for g in found])
    return [torch.stack(column) for column in zip(*rows, strict=True)], torch.stack(
        back
    )


def random_batches(trials: int, images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    kind = {"generator": generator, "dtype": torch.float64}
    x = torch.rand(trials, images, 3, 32, 32, **kind)
    return x, torch.softmax(torch.randn(trials, images, CLASSES, **kind), -1)


def assert_close(ours: Tensor, theirs: Tensor, scale: float) -> None:
    assert float((ours - theirs).abs().max()) <= 1e-8 * scale


def assert_double_backward(model: nn.Module, images: Tensor, targets: Tensor) -> None:
    mapped = gradient_map(model)
    gradients, pullback = mapped(images, targets)
    to_images = pullback(gradients)[0]
    expected, back = double_backward(model, images, targets)
    assert all(float(g.abs().max()) > 0 for g in (expected[0], expected[-1], back))
    scale = max(float(g.abs().max()) for g in expected)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert_close(ours, theirs, scale)
    assert_close(to_images, back, float(back.abs().max()))
    # Only batch statistics need the slower loop over trials.
    assert isinstance(mapped, _AutogradMap)
    assert mapped.use_vmap == (not mapped.training)


@pytest.mark.parametrize("trials", [1, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_map_is_double_backward(name: str, trials: int) -> None:
    assert_double_backward(brought(name).double(), *random_batches(trials, 1))


@pytest.mark.parametrize("name", ["densenet", "squeezenet1_1"])
def test_batches_in_training_mode(name: str) -> None:
    model = batch_norms_in_training(brought(name)).double()
    state = copy.deepcopy(model.state_dict())
    assert_double_backward(model, *random_batches(2, 3))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize(
    ("name", "training"),
    [
        *((name, False) for name in ARCHITECTURES),
        ("densenet", True),  # the others are left with one value per channel
        ("squeezenet1_1", True),
    ],
)
def test_invert_lowers_its_loss(name: str, training: bool) -> None:
    model = brought(name)
    if training:
        model = batch_norms_in_training(model)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(1, 3, 32, 32, generator=generator)
    update = local_update(model, Images(pixels, torch.tensor([3]), tuple("abcde")))
    found = invert(
        update, attack="inverting-gradients", labels=[3], iterations=1, restarts=1
    )
    assert found.images.shape == (1, 3, 32, 32)
    assert torch.isfinite(found.images).all()
    assert 0 <= float(found.images.min()) and float(found.images.max()) <= 1
    assert found.losses[-1] < 0.98 * found.losses[0]
