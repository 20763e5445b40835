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
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradinv_helpers.attacks.gradients as gradients_module
from gradinv_helpers.attacks.gradients import (
    _AutogradMap,
    _ChainMap,
    gradient_map,
    trials_at_once,
)
from gradinv_helpers.errors import InputError
from gradinv_helpers.models import Normalize, build_model

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


@sdpa_kernel(SDPBackend.MATH)  # the only attention that torch differentiates twice
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


def normalised() -> nn.Module:
    return nn.Sequential(
        Normalize([0.4], [0.3]),
        nn.Conv2d(1, 3, 3, stride=2),
        nn.Sigmoid(),
        nn.Identity(),
        Normalize([0.1, 0.5, 0.2], [2.0, 0.5, 0.1]),
        nn.Flatten(),
        nn.Linear(12, NUM_CLASSES),
    )


def averaged() -> nn.Module:
    return nn.Sequential(
        nn.AvgPool2d(2, stride=1),
        nn.Conv2d(1, 3, 2, stride=(2, 1)),
        nn.Tanh(),
        nn.AvgPool2d(2, 1, padding=1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d((1, 2), divisor_override=3),
        nn.Conv2d(3, 5, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, NUM_CLASSES),
    )


def smooth_kinks() -> nn.Module:
    """Every other activation, with constants of its own."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(36, 9),
        nn.LeakyReLU(0.2),
        nn.Linear(9, 8),
        nn.ELU(0.7),
        nn.Linear(8, 8),
        nn.Softplus(3.0, threshold=0.5),
        nn.Linear(8, 8),
        nn.GELU(),
        nn.Linear(8, 8),
        nn.SiLU(),
        nn.Linear(8, NUM_CLASSES),
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


def other_activation() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 5), nn.GELU("tanh"), nn.Linear(5, NUM_CLASSES)
    )


def coarse_average() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.AdaptiveAvgPool2d((2, 1)),
        nn.Flatten(),
        nn.Linear(4, NUM_CLASSES),
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


class OtherNorms(nn.Module):
    """Normalisation with fixed statistics, or with none, and without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.bare = nn.BatchNorm2d(3, affine=False, eps=0.1)
        self.head = nn.Linear(48, NUM_CLASSES)
        self.flat = nn.BatchNorm1d(NUM_CLASSES)
        for norm in (self.bare, self.flat):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(self.flat.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.instance_norm(torch.tanh(self.bare(self.conv(x))))
        return self.flat(self.head(x.flatten(1)))


class InputStatistics(nn.Module):
    """Normalisation by statistics of the input, also in evaluation mode."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), norm
        self.head = nn.Linear(64, NUM_CLASSES)
        nn.init.normal_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


INPUT_NORMS = [
    lambda: nn.InstanceNorm2d(4, affine=True),
    lambda: nn.BatchNorm2d(4, track_running_stats=False),
    lambda: nn.GroupNorm(2, 4),
    lambda: nn.LayerNorm([4, 4, 4]),
    lambda: nn.LayerNorm(4, bias=False),
]


class OddConvolutions(nn.Module):
    """Strides that leave rows over, dilation, groups, no bias, and a bare image."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 4, 3, stride=2, bias=False)
        self.two = nn.Conv2d(4, 4, (1, 2), stride=(2, 1), padding=(0, 1), groups=2)
        self.three = nn.Conv2d(4, 2, 2, dilation=(1, 2), padding=1)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.one(x))
        x = torch.tanh(
            F.conv2d(x, self.two.weight, self.two.bias, (2, 1), (0, 1), 1, 2)
        )
        kernel = self.three.weight
        x = F.conv2d(
            x, bias=self.three.bias, weight=kernel, padding=[1], dilation=(1, 2)
        )
        alone = F.conv2d(x[0, :1], self.one.weight, padding="same")
        return self.head(x.flatten(2).mean(2).repeat(1, 2)) + alone.mean()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(36, 8), nn.Linear(8, NUM_CLASSES)
        self.act, self.hard = nn.ReLU(inplace=True), nn.Hardswish(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.hard(self.act(self.one(x.flatten(1))) - 0.1))


class Attention(nn.Module):
    """Multi-head attention of rows, causal at that, before plain attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 5, 0.0, batch_first=True)
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x.squeeze(1))
        x = F.scaled_dot_product_attention(x, x, x.tanh(), is_causal=True)
        return self.head(x.mean(1))


CHAINS: list[Callable[[], nn.Module]] = [
    chain_of_everything,
    overlapping_pool,
    no_biases,
    one_linear,
    shared_activation,
    normalised,
    averaged,
    smooth_kinks,
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
    other_activation,
    coarse_average,
    lambda: OtherNorms().eval(),
    OddConvolutions,
    InPlace,
    lambda: Attention().eval(),
    Attention,
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


@pytest.mark.parametrize("norm", INPUT_NORMS)
@pytest.mark.parametrize("trials", [1, 3])
def test_normalisation_by_the_input(norm, trials: int) -> None:
    """vmap has wrong second derivatives for some of them."""
    model = double(lambda: InputStatistics(norm())).eval()
    assert_right(gradient_map(model), model, *batch(trials, 2))


@pytest.mark.parametrize("make", [*CHAINS, lambda: built("lenet")])
@pytest.mark.parametrize(("trials", "images"), [(1, 1), (3, 2)])
def test_chains_without_columns(make, trials: int, images: int, monkeypatch) -> None:
    """The way of larger batches, which takes convolutions as they are."""
    monkeypatch.setattr(gradients_module, "_FEW_COLUMNS", 0)
    model = double(make)
    assert_right(gradient_map(model), model, *batch(trials, images))


@pytest.mark.parametrize("make", [Residual, OddConvolutions, grouped, norm_in_training])
@pytest.mark.parametrize(("trials", "images"), [(1, 2), (3, 2)])
def test_large_convolutions(make, trials: int, images: int, monkeypatch) -> None:
    """The way of larger networks, whose convolutions are differentiated in halves."""
    monkeypatch.setattr(gradients_module, "_LARGE_CONVOLUTION", 0)
    model = double(make)
    assert_right(_AutogradMap(model), model, *batch(trials, images))


class Clamped(nn.Module):
    """The definition of nn.Hardsigmoid in operations that have two derivatives."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 3).clamp(0, 6) / 6


@pytest.mark.parametrize("trials", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_hard_sigmoid(trials: int, training: bool) -> None:
    """torch itself has no second derivative of it."""

    def with_activation(activation: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 20), activation, nn.Linear(20, 4)
        )
        nn.init.normal_(model[1].weight, std=0.6)
        return model.double().train(training)

    model = with_activation(nn.Hardsigmoid(inplace=training))
    x, y = batch(trials, 2)
    inside = model[:2](x[0]).abs() < 3
    assert inside.any() and not inside.all()
    gradients, pullback = gradient_map(model)(x, y)
    v = cotangents(gradients)
    expected, to_images, _ = reference(with_activation(Clamped()), x, y, v)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(ours, theirs, **TOLERANCE)
    assert torch.allclose(pullback(v)[0], to_images, **TOLERANCE)


class HardSigmoidOfItsOwn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.hardsigmoid(x)


@pytest.mark.parametrize("trials", [1, 2])
def test_a_layer_without_second_derivative_is_named(trials: int) -> None:
    layer = HardSigmoidOfItsOwn()
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), layer, nn.Linear(5, 4))
    x, y = batch(trials, 2)
    message = "model: expected layers that torch can differentiate twice, .*hardsigmoid"
    with pytest.raises(InputError, match=message) as error:
        gradients, pullback = gradient_map(model.double())(x, y)
        pullback(cotangents(gradients))
    assert "\n" not in str(error.value)


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
@pytest.mark.parametrize("name", ["resnet18", "resnet20", "vit"])
def test_larger_models(name: str, training: bool) -> None:
    model = built(name).double().train(training)
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


@given(factor=st.floats(-1e3, 1e3), seed=st.integers(0, 1000), chain=st.booleans())
@settings(max_examples=15, deadline=None)
def test_pullback_is_linear(factor, seed, chain) -> None:
    mapped = gradient_map(LENET if chain else RESIDUAL)
    x, y = batch(2, 2, seed=seed)

    def pulled(first: float, second: float) -> Tensor:
        gradients, pullback = mapped(x, y)
        pairs = zip(cotangents(gradients, 1), cotangents(gradients, 2), strict=True)
        return pullback([first * v + second * w for v, w in pairs])[0]

    expected = factor * pulled(1, 0) + pulled(0, 1)
    scale = float(expected.abs().max())
    assert torch.allclose(pulled(factor, 1), expected, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", [lambda: built("lenet"), Residual, normalised, Norm])
def test_devices_agree(make) -> None:
    model = double(make).eval()
    x, y = batch(3, 2)
    gradients, pullback = gradient_map(model)(x, y)
    v = cotangents(gradients)
    there, there_pullback = gradient_map(copy.deepcopy(model).cuda())(
        x.cuda(), y.cuda()
    )
    for here, other in zip(gradients, there, strict=True):
        assert torch.allclose(here, other.cpu(), rtol=1e-8, atol=1e-10)
    back = there_pullback([t.cuda() for t in v])[0].cpu()
    assert torch.allclose(back, pullback(v)[0], rtol=1e-8, atol=1e-10)


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


# --- memory -----------------------------------------------------------------------


def test_trials_of_a_model_that_is_mostly_weights() -> None:
    """By hand: gradients, targets, derivatives, differences; little else."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20_000), nn.Linear(20_000, 10))
    weights = sum(p.nbytes for p in model.parameters())
    assert trials_at_once(model, (1, 1, 8, 8), budget_bytes=50 * weights) in (
        10,
        11,
        12,
    )
    assert trials_at_once(model, (1, 1, 8, 8), budget_bytes=1) == 1


@pytest.mark.parametrize("name", ["convnet", "resnet20", "vit"])
def test_trials_of_models_that_are_mostly_activations(name: str) -> None:
    """The outputs of a forward pass are needed twice or more, a dozen times at most."""
    model = build_model(name, in_channels=3, image_size=16, num_classes=10)
    outputs = []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, i, o: outputs.append(o))
    model(torch.zeros(16, 3, 16, 16))
    forward = sum(t.nbytes for t in outputs if isinstance(t, Tensor))
    for module in model.modules():
        module._forward_hooks.clear()
    state = copy.deepcopy(model.state_dict())
    budget = 1000 * forward
    trials = trials_at_once(model, (16, 3, 16, 16), budget_bytes=budget)
    assert 1000 / 12 < trials < 1000 / 2
    half = trials_at_once(model, (8, 3, 16, 16), budget_bytes=budget)
    assert 1.3 * trials < half < 2.1 * trials
    wide = copy.deepcopy(model).double()
    assert trials_at_once(
        wide, (16, 3, 16, 16), budget_bytes=2 * budget
    ) == pytest.approx(trials, rel=0.05)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_bad_budget() -> None:
    with pytest.raises(
        InputError, match="budget_bytes: expected an integer of at least 1"
    ):
        trials_at_once(one_linear(), (1, 1, 6, 6), budget_bytes=0)
