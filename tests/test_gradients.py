"""Both gradient maps against plain double backward, for every kind of model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.gradients import _AutogradMap, _ChainMap, gradient_map
from gradinv_helpers.models import build_model

NUM_CLASSES = 4
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


def batch(
    trials: int, images: int, channels: int = 1, size: int = 6, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Images around [0, 1] and soft labels, as they occur on the way."""
    generator = torch.Generator().manual_seed(seed)
    shape = (trials, images, channels, size, size)
    x = 0.5 + 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    logits = torch.randn(
        trials, images, NUM_CLASSES, generator=generator, dtype=torch.float64
    )
    return x, torch.softmax(2 * logits, -1)


def cotangents(gradients: list[Tensor], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in gradients]


def reference(
    model: nn.Module, images: Tensor, targets: Tensor, v: list[Tensor] | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Double backward by torch.autograd, one trial after the other."""
    rows, to_images, to_targets = [], [], []
    for trial, (x, y) in enumerate(zip(images, targets, strict=True)):
        worker = copy.deepcopy(model)
        weights = [p for p in worker.parameters() if p.requires_grad]
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        loss = -(y * F.log_softmax(worker(x), 1)).sum(1).mean()
        found = torch.autograd.grad(
            loss, weights, create_graph=True, materialize_grads=True
        )
        rows.append([g.detach() for g in found])
        direction = cotangents_of(rows[-1]) if v is None else [t[trial] for t in v]
        product = sum((g * d).sum() for g, d in zip(found, direction, strict=True))
        back = torch.autograd.grad(product, [x, y], materialize_grads=True)
        to_images.append(back[0])
        to_targets.append(back[1])
    gradients = [torch.stack(column) for column in zip(*rows, strict=True)]
    return gradients, torch.stack(to_images), torch.stack(to_targets)


def cotangents_of(gradients: list[Tensor]) -> list[Tensor]:
    return [torch.ones_like(g) for g in gradients]


def assert_right(mapped, model: nn.Module, images: Tensor, targets: Tensor) -> None:
    gradients, pullback = mapped(images, targets)
    v = cotangents(gradients)
    found = pullback(v)
    expected, to_images, to_targets = reference(model, images, targets, v)
    assert len(gradients) == len(expected)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.shape == theirs.shape
        assert not ours.requires_grad
        assert torch.allclose(ours, theirs, **TOLERANCE)
    assert torch.allclose(found[0], to_images, **TOLERANCE)
    # Targets lie on the simplex: what the softmax ignores does not matter.
    assert torch.allclose(
        found[1] - found[1].mean(-1, keepdim=True),
        to_targets - to_targets.mean(-1, keepdim=True),
        **TOLERANCE,
    )


# --- models -----------------------------------------------------------------------


def built(name: str) -> nn.Module:
    return build_model(name, in_channels=1, image_size=6, num_classes=NUM_CLASSES)


def chain_of_everything() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(
            nn.Conv2d(1, 3, (3, 2), stride=(1, 2), padding=(2, 1)), nn.Tanh()
        ),
        nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        nn.Dropout(0.5).eval(),
        nn.Conv2d(3, 2, 2, dilation=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(5),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(5, NUM_CLASSES, bias=False),
    )


def overlapping_pool() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.MaxPool2d(2, stride=1), nn.Flatten(), nn.Linear(32, 4)
    )


def no_biases() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(48, NUM_CLASSES, bias=False),
    )


def one_linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, NUM_CLASSES))


def shared_activation() -> nn.Module:
    act = nn.Sigmoid()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 7), act, nn.Linear(7, 6), act, nn.Linear(6, 4)
    )


def tied_weights() -> nn.Module:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()
    )
    model.append(nn.Linear(8, 8)).append(nn.Linear(8, 4))
    model[5].weight = model[3].weight
    return model


def same_layer_twice() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), layer, nn.Sigmoid(), layer, nn.Linear(8, 4)
    )


def frozen_layer() -> nn.Module:
    model = built("lenet")
    model[2].weight.requires_grad_(False)
    model[7].bias.requires_grad_(False)
    return model


class Rescaling(nn.Sequential):
    """A Sequential that does more than its layers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.3) / 0.2)


def rescaling() -> nn.Module:
    return Rescaling(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 4))


def rescaling_inside() -> nn.Module:
    return nn.Sequential(rescaling(), nn.Tanh(), nn.Linear(4, 4))


def loose_parameter() -> nn.Module:
    model = one_linear()
    model.register_parameter("loose", nn.Parameter(torch.ones(3)))
    return model


def with_hook() -> nn.Module:
    model = one_linear()
    model[0].register_forward_hook(lambda module, inputs, output: output * 3)
    return model


def with_pre_hook() -> nn.Module:
    model = one_linear()
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] ** 2,))
    return model


def parametrised() -> nn.Module:
    model = one_linear()
    nn.utils.parametrizations.weight_norm(model[1])
    return model


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=2, padding="same"),
        nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def other_flatten() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Flatten(2), nn.Flatten(1), nn.Linear(32, 4)
    )


def late_activation() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh())


class Residual(nn.Module):
    """A model that is no chain, with an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.head = nn.Linear(72, NUM_CLASSES)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.one(x))
        x = x + F.softplus(self.two(x))
        return self.head(x.flatten(1))


class Norm(nn.Module):
    """A model with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3)
        self.head = nn.Linear(48, NUM_CLASSES)
        nn.init.uniform_(self.frozen.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(torch.tanh(self.norm(self.conv(x))))
        return self.head(torch.sigmoid(x).flatten(1))


def norm_in_training() -> nn.Module:
    model = Norm().train()
    model.frozen.eval()
    return model


def norm_in_training_below_eval() -> nn.Module:
    model = Norm().eval()
    model.norm.train()
    return model


CHAINS: list[Callable[[], nn.Module]] = [
    chain_of_everything,
    overlapping_pool,
    no_biases,
    one_linear,
    shared_activation,
]
OTHERS: list[Callable[[], nn.Module]] = [
    tied_weights,
    same_layer_twice,
    frozen_layer,
    rescaling,
    rescaling_inside,
    loose_parameter,
    with_hook,
    with_pre_hook,
    parametrised,
    grouped,
    other_flatten,
    late_activation,
    Residual,
    lambda: Norm().eval(),
    norm_in_training,
    norm_in_training_below_eval,
]


def double(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().double()
    model(torch.zeros(2, 1, 6, 6, dtype=torch.float64))  # fills lazy layers
    return model


# --- against autograd -------------------------------------------------------------


@pytest.mark.parametrize("make", [*CHAINS, *OTHERS])
@pytest.mark.parametrize(("trials", "images"), [(1, 1), (1, 3), (4, 1), (3, 2)])
def test_any_model(make, trials: int, images: int) -> None:
    model = double(make)
    x, y = batch(trials, images)
    assert_right(gradient_map(model), model, x, y)


@pytest.mark.parametrize("name", ["lenet", "mlp", "convnet"])
@pytest.mark.parametrize(("trials", "images"), [(1, 1), (3, 1), (1, 4), (3, 2)])
def test_our_chains(name: str, trials: int, images: int) -> None:
    model = built(name).double()
    mapped = gradient_map(model)
    assert isinstance(mapped, _ChainMap)
    assert_right(mapped, model, *batch(trials, images))
    assert_right(_AutogradMap(model), model, *batch(trials, images))


def test_lenet_of_colour_images() -> None:
    model = build_model("lenet", in_channels=3, image_size=9, num_classes=4).double()
    assert_right(gradient_map(model), model, *batch(2, 3, channels=3, size=9))


@pytest.mark.parametrize("training", [False, True])
def test_resnet18(training: bool) -> None:
    model = built("resnet18").double().train(training)
    mapped = gradient_map(model)
    assert isinstance(mapped, _AutogradMap)
    assert_right(mapped, model, *batch(2, 2))


@pytest.mark.parametrize("make", CHAINS)
def test_chains_are_recognised(make) -> None:
    assert isinstance(gradient_map(double(make)), _ChainMap)


@pytest.mark.parametrize("make", OTHERS)
def test_what_is_no_plain_chain(make) -> None:
    assert isinstance(gradient_map(double(make)), _AutogradMap)


def test_active_dropout_is_no_chain() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 4)).train()
    assert isinstance(gradient_map(model), _AutogradMap)
    assert isinstance(gradient_map(model.eval()), _ChainMap)


@pytest.mark.parametrize("make", [lambda: built("lenet"), Residual, Norm])
def test_float32_is_close(make) -> None:
    model = double(make)
    x, y = batch(3, 2)
    gradients, pullback = gradient_map(model)(x, y)
    single, single_pullback = gradient_map(copy.deepcopy(model).float())(
        x.float(), y.float()
    )
    for ours, theirs in zip(single, gradients, strict=True):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    v = cotangents(gradients)
    back = single_pullback([t.float() for t in v])[0].double()
    assert torch.allclose(back, pullback(v)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [*CHAINS, *OTHERS])
def test_the_model_is_not_changed(make) -> None:
    model = double(make)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    gradients, pullback = gradient_map(model)(*batch(2, 2))
    pullback(cotangents(gradients))
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("make", [lambda: built("lenet"), Residual])
def test_inputs_are_not_changed(make) -> None:
    model = double(make)
    x, y = batch(2, 2)
    before = x.clone(), y.clone()
    gradients, pullback = gradient_map(model)(x, y)
    v = cotangents(gradients)
    kept = [t.clone() for t in v]
    pullback(v)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    assert all(torch.equal(a, b) for a, b in zip(v, kept, strict=True))
    assert not x.requires_grad


# --- properties -------------------------------------------------------------------

LENET = built("lenet").double()
RESIDUAL = double(Residual)


@given(
    order=st.permutations(range(4)),
    seed=st.integers(0, 1000),
    chain=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_order_of_the_images_does_not_matter(order, seed, chain) -> None:
    mapped = gradient_map(LENET if chain else RESIDUAL)
    x, y = batch(2, 4, seed=seed)
    order = torch.tensor(order)
    gradients, pullback = mapped(x, y)
    v = cotangents(gradients)
    to_images, _ = pullback(v)
    permuted, permuted_pullback = mapped(x[:, order], y[:, order])
    for one, other in zip(gradients, permuted, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    assert torch.allclose(
        permuted_pullback(v)[0], to_images[:, order], rtol=1e-9, atol=1e-12
    )


@given(seed=st.integers(0, 1000), chain=st.booleans())
@settings(max_examples=15, deadline=None)
def test_trials_do_not_see_each_other(seed, chain) -> None:
    mapped = gradient_map(LENET if chain else RESIDUAL)
    x, y = batch(3, 2, seed=seed)
    gradients, pullback = mapped(x, y)
    v = cotangents(gradients)
    back = pullback(v)
    for trial in range(3):
        own = slice(trial, trial + 1)
        alone, alone_pullback = mapped(x[own], y[own])
        for one, other in zip(alone, gradients, strict=True):
            assert torch.allclose(one, other[own], rtol=1e-10, atol=1e-12)
        alone_back = alone_pullback([t[own] for t in v])
        assert torch.allclose(alone_back[0], back[0][own], rtol=1e-9, atol=1e-12)
    x[1], y[1] = float("nan"), 0.25
    with_nan, _ = mapped(x, y)
    for one, other in zip(with_nan, gradients, strict=True):
        assert torch.allclose(one[::2], other[::2], rtol=1e-10, atol=1e-12)


@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_pullback_is_the_derivative(seed) -> None:
    """Against central differences of <g, v>, with no autograd at all."""
    mapped = gradient_map(LENET)
    x, y = batch(1, 2, seed=seed)
    gradients, pullback = mapped(x, y)
    v = cotangents(gradients, seed)
    to_images, to_targets = pullback(v)
    dx, dy = batch(1, 2, seed=seed + 1)
    dy = dy - dy.mean(-1, keepdim=True)

    def product(step: float) -> float:
        moved, _ = mapped(x + step * dx, y + step * dy)
        return sum(float((g * t).sum()) for g, t in zip(moved, v, strict=True))

    slope = (product(1e-5) - product(-1e-5)) / 2e-5
    expected = float((to_images * dx).sum() + (to_targets * dy).sum())
    assert slope == pytest.approx(expected, rel=1e-6, abs=1e-7)
