"""Ranks by counting, spectra by sampling, rounding by rounding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradinv_helpers as gi
from gradinv_helpers.attacks.jacobian import gradient_jacobian, linearise_gradient
from gradinv_helpers.attacks.spectrum import (
    FORMATS,
    DenseOperator,
    bits,
    cholesky_rank,
    count_equations,
    determined,
    estimate_spectrum,
    exact_spectrum,
    gradient_operator,
    rounding_std,
)
from gradinv_helpers.errors import InputError

F64 = torch.float64


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.stem(x))
        return self.head((a + torch.sigmoid(self.norm(a))).mean((2, 3)))


def chain(
    *,
    kernel: int = 3,
    width: int = 4,
    strides: tuple[int, ...] = (2, 1),
    activation: type[nn.Module] = nn.Sigmoid,
    bias: bool = True,
    hidden: tuple[int, ...] = (),
    side: int = 8,
    classes: int = 5,
    pool: nn.Module | None = None,
    seed: int = 0,
) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 2
    for stride in strides:
        conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=bias)
        layers += [conv, activation()]
        channels, side = width, -(-side // stride)
    if pool is not None:
        layers.append(pool)
        side //= 2
    layers.append(nn.Flatten())
    features = channels * side * side
    for units in hidden:
        layers += [nn.Linear(features, units, bias=bias), activation()]
        features = units
    layers.append(nn.Linear(features, classes, bias=bias))
    model = nn.Sequential(*layers).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def batch(size: int, *, side: int = 8, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    images = torch.rand(size, 2, side, side, generator=generator, dtype=F64)
    labels = torch.randint(classes, (size,), generator=generator)
    return images, nn.functional.one_hot(labels, classes).double()


def measured_rank(model: nn.Module, images: Tensor, targets: Tensor) -> int:
    _, dense = gradient_jacobian(model, images, targets)
    values = torch.linalg.svdvals(dense)
    return int((values > 1e-9 * values[0]).sum())


# --- counted ----------------------------------------------------------------------


@pytest.mark.parametrize(("size", "rank"), [(1, 3072), (2, 5904), (3, 6672), (4, 7440)])
def test_the_wall_of_lenet_is_counted(size: int, rank: int) -> None:
    model = gi.build_model("lenet", in_channels=3, image_size=32, num_classes=10)
    found = count_equations(model, torch.rand(size, 3, 32, 32))
    assert found.rank == rank
    assert found.unknowns == 3072 * size
    assert found.missing == 3072 * size - rank
    names = [layer.layer for layer in found.layers]
    assert names[0] == "Linear 768 to 10"
    assert names[-1] == "Conv2d 3 to 12"
    assert found.layers[-1].known == rank


SMOOTH: list[dict] = [
    {},
    {"kernel": 5, "width": 3},
    {"strides": (2, 2, 1)},
    {"strides": (2, 3, 1), "width": 5},
    {"strides": (1, 2), "width": 3},
    {"activation": nn.Tanh},
    {"activation": nn.Softplus},
    {"bias": False},
    {"strides": (2,), "width": 6},
    {"strides": (2,), "hidden": (10,)},
    {"strides": (), "hidden": (20,)},
    {"strides": (), "hidden": (30, 12)},
]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("settings_", SMOOTH, ids=str)
def test_behind_smooth_layers_counting_is_exact(settings_: dict, size: int) -> None:
    model = chain(**settings_)
    images, targets = batch(size)
    assert count_equations(model, images).rank == measured_rank(model, images, targets)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(2), nn.AvgPool2d(2)], ids=str)
def test_behind_relu_counting_is_close(
    width: int, pool: nn.Module | None, size: int
) -> None:
    model = chain(width=width, activation=nn.ReLU, strides=(1, 2), pool=pool)
    images, targets = batch(size)
    counted, true = (
        count_equations(model, images).rank,
        measured_rank(model, images, targets),
    )
    assert -0.01 <= (counted - true) / images.numel() <= 0.18


@settings(max_examples=15, deadline=None)
@given(
    width=st.integers(1, 6),
    kernel=st.sampled_from([1, 3, 5]),
    strides=st.lists(st.sampled_from([1, 2]), max_size=3).map(tuple),
    activation=st.sampled_from([nn.Sigmoid, nn.ReLU]),
    size=st.integers(1, 4),
)
def test_counts_add_up(width, kernel, strides, activation, size) -> None:
    model = chain(width=width, kernel=kernel, strides=strides, activation=activation)
    images, _ = batch(size)
    found = count_equations(model, images)
    assert 0 <= found.rank <= images.numel()
    assert found.rank <= sum(layer.equations for layer in found.layers)
    assert all(0 <= layer.known <= layer.inputs for layer in found.layers)


def test_a_model_that_is_no_chain_is_bounded_by_its_parameters() -> None:
    torch.manual_seed(0)
    model = Residual().double().eval()
    images, targets = batch(2, classes=3)
    found = count_equations(model, images)
    assert found.layers == ()
    # 76 of the stem, 8 of the norm, 2 * (4 + 3) of 12 in the head, and its 3 biases.
    assert found.rank == 76 + 8 + 12 + 3
    assert measured_rank(model, images, targets) <= found.rank


def test_counting_needs_images() -> None:
    with pytest.raises(InputError, match="shape"):
        count_equations(chain(), torch.rand(2, 8, 8))


# --- measured ---------------------------------------------------------------------


def test_the_exact_spectrum_is_that_of_the_dense_jacobian() -> None:
    model, (images, targets) = chain(width=2), batch(3)
    _, dense = gradient_jacobian(model, images, targets)
    found = exact_spectrum(linearise_gradient(model, images, targets))
    expected = torch.linalg.svdvals(dense)
    assert found.exact
    assert found.values.shape == (1, min(dense.shape))
    assert (found.values[0] - expected).abs().max() < 1e-9 * expected[0]
    level = float(expected[20:22].mean())
    assert found.count_above(level) == (21, 0)


def known_matrix(rows: int, columns: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(rows, rank, generator=generator, dtype=F64)
    right = torch.randn(columns, rank, generator=generator, dtype=F64)
    values = torch.logspace(2, -3, rank, dtype=F64)
    left, right = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
    return left * values @ right.T, values


@pytest.mark.parametrize("shape", [(300, 200), (150, 400)])
def test_a_sampled_spectrum_is_near_the_true_one(shape: tuple[int, int]) -> None:
    matrix, values = known_matrix(*shape, rank=120)
    found = estimate_spectrum(DenseOperator(matrix), steps=60, probes=16)
    assert not found.exact
    assert (found.equations, found.unknowns) == shape
    assert found.largest == pytest.approx(100, rel=1e-6)
    assert found.weights.sum(1) == pytest.approx([min(shape)] * 16)
    total, error = found.sum_of(torch.square)
    assert abs(total - float(values.square().sum())) < 4 * error
    for level in (10, 1, 0.1):
        count, error = found.count_above(level)
        assert abs(count - int((values > level).sum())) < 4 * error + 2
    expected = bits(values, noise_std=0.1)
    assert found.limited_to(120).bits(0.1) == pytest.approx(expected, rel=0.15)
    again = estimate_spectrum(DenseOperator(matrix), steps=60, probes=16)
    assert torch.equal(found.values, again.values)


def test_a_recursion_that_ends_early_is_exact() -> None:
    matrix = torch.diag(torch.tensor([3.0] * 20 + [1.0] * 10 + [0.0] * 5, dtype=F64))
    found = estimate_spectrum(DenseOperator(matrix), steps=20, probes=400)
    count, error = found.count_above(2)
    assert abs(count - 20) < 4 * error
    in_pairs = found.values[found.weights > 1e-9]
    near = (in_pairs[:, None] - torch.tensor([0.0, 1, 3])).abs().amin(1)
    assert near.max() < 1e-6


def test_a_known_rank_takes_weight_from_the_smallest_nodes() -> None:
    matrix, _ = known_matrix(60, 50, rank=30)
    found = estimate_spectrum(DenseOperator(matrix), steps=10, probes=3)
    limited = found.limited_to(30)
    assert limited.weights.sum(1) == pytest.approx([30] * 3)
    assert bool((limited.weights >= 0).all())
    assert limited.count_above(1.0)[0] == pytest.approx(found.count_above(1.0)[0])


@pytest.mark.parametrize("kind", ["chain", "residual"])
def test_both_products_are_of_one_matrix(kind: str) -> None:
    torch.manual_seed(0)
    model = chain() if kind == "chain" else Residual().eval()
    images, targets = batch(2, classes=5 if kind == "chain" else 3)
    operator = gradient_operator(model, images.float(), targets.float())
    _, dense = gradient_jacobian(model, images.float(), targets.float())
    assert (operator.equations, operator.unknowns) == dense.shape
    v = torch.randn(3, operator.unknowns, dtype=F64)
    w = torch.randn(3, operator.equations, dtype=F64)
    scale = float(dense.abs().max())
    assert (operator.along(v) - v @ dense.T).abs().max() < 1e-12 * scale * v.numel()
    assert (operator.back(w) - w @ dense).abs().max() < 1e-12 * scale * w.numel()


def test_cholesky_finds_the_rank_and_a_factor() -> None:
    matrix, _ = known_matrix(80, 50, rank=20)
    normal = matrix.T @ matrix
    rank, factor = cholesky_rank(normal)
    assert (rank, factor.shape) == (20, (20, 50))
    assert (factor.T @ factor - normal).abs().max() < 1e-9 * normal.abs().max()
    assert cholesky_rank(torch.zeros(3, 3))[0] == 0
    assert cholesky_rank(torch.eye(4))[0] == 4
    with pytest.raises(InputError, match="shape"):
        cholesky_rank(torch.zeros(3, 4))


def test_counts_are_checked() -> None:
    operator = DenseOperator(torch.eye(3, dtype=F64))
    for name in ("steps", "probes"):
        with pytest.raises(InputError, match=name):
            estimate_spectrum(operator, **{name: 0})


# --- rounded ----------------------------------------------------------------------


def test_bits_are_the_mutual_information() -> None:
    values = torch.tensor([3.0, 1.0, 0.0])
    # 1/2 log2 (1 + 9) + 1/2 log2 (1 + 1)
    assert bits(values, noise_std=2, prior_std=2) == pytest.approx(
        0.5 * math.log2(10) + 0.5
    )
    matrix, values = known_matrix(40, 30, rank=25)
    inside = torch.eye(30, dtype=F64) + matrix.T @ matrix * (0.25 / 0.01) ** 2
    expected = float(torch.logdet(inside)) / math.log(4)
    assert bits(values, noise_std=0.01) == pytest.approx(expected)


def test_directions_stand_out_of_the_noise() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 0.5])
    assert determined(values, noise_std=0.3, prior_std=0.25) == 2
    for name in ("noise_std", "prior_std"):
        usual = {"noise_std": 1.0, "prior_std": 1.0}
        with pytest.raises(InputError, match=name):
            determined(values, **usual | {name: 0.0})
        with pytest.raises(InputError, match=name):
            bits(values, **usual | {name: 0.0})


def as_sent(values: Tensor, number_format: str) -> Tensor:
    if number_format == "int8":
        step = values.abs().max() / 127
        return (values / step).round().clamp(-127, 127) * step
    return values.to(getattr(torch, number_format)).double()


@pytest.mark.parametrize("scale", [1.0, 1e-5])
@pytest.mark.parametrize("number_format", FORMATS[1:])
def test_rounding_errs_as_much_as_is_said(number_format: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    # 1e-5 is below the smallest normal number of float16
    values = scale * torch.randn(50_000, generator=generator, dtype=F64)
    error = as_sent(values, number_format) - values
    standard = error / rounding_std(values, number_format)
    assert float(standard.square().mean()) == pytest.approx(1, abs=0.02)
    assert (
        float(standard.abs().max()) <= math.sqrt(3) * 1.001
    )  # torch halves by way of float32


def test_double_precision_is_finer_by_29_bits() -> None:
    values = torch.tensor([0.0, 1.0, 1.99, -2.0, 1e-3])
    single, double = (rounding_std(values, name) for name in ("float32", "float64"))
    assert (single[1:] / double[1:]).tolist() == [2.0**29] * 4
    assert float(single[1]) == 2.0**-23 / math.sqrt(12)
    with pytest.raises(InputError, match="number_format"):
        rounding_std(values, "float8")
