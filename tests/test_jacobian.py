"""Jacobians of gradients against torch's own, and ranks against dense SVDs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import gradinv_helpers as gi
from gradinv_helpers.attacks import jacobian
from gradinv_helpers.attacks.jacobian import (
    Linearisation,
    gradient_jacobian,
    gram,
    jacobian_rank,
    linearise_gradient,
    singular_values,
)

F64 = torch.float64
SIDE = 7


class Residual(nn.Module):
    """A module that is no chain: a skip connection around a normalised branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.branch = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.stem(x))
        a = a + torch.sigmoid(self.branch(self.norm(a)))
        return self.head(a.mean((2, 3)))


def chain(kind: str) -> nn.Module:
    conv, linear = nn.Conv2d, nn.Linear
    layers: dict[str, list[nn.Module]] = {
        "sigmoid": [
            *(conv(2, 4, 5, stride=2, padding=2), nn.Sigmoid()),
            *(conv(4, 4, 3, stride=2, padding=1), nn.Tanh()),
            *(conv(4, 5, 3, padding=1), nn.Sigmoid(), nn.Flatten(), linear(20, 6)),
        ],
        "pools": [
            *(conv(2, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(3, 2, 1)),
            conv(4, 6, (2, 3), stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
            *(nn.ReLU(), nn.Flatten(), linear(24, 3)),
        ],
        "no bias": [
            *(conv(2, 3, 3, bias=False), nn.Sigmoid(), nn.Flatten()),
            *(linear(75, 8, bias=False), nn.Tanh(), linear(8, 4, bias=False)),
        ],
        "mlp": [nn.Flatten(), linear(98, 10), nn.Sigmoid(), linear(10, 4)],
        "begins without weights": [
            *(nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()),
            *(linear(18, 10), nn.Sigmoid(), linear(10, 4)),
        ],
    }
    return nn.Sequential(*layers[kind])


def build(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return (Residual() if kind.startswith("residual") else chain(kind)).train(
        kind == "residual, training"
    )


CHAINS = ["sigmoid", "pools", "no bias", "mlp", "begins without weights"]
MODELS = [*CHAINS, "residual", "residual, training"]


def batch(model: nn.Module, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and soft labels in double precision."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 2, SIDE, SIDE, generator=generator, dtype=F64)
    classes = list(model.parameters())[-1].shape[0]
    logits = torch.randn(size, classes, generator=generator, dtype=F64)
    return images, torch.softmax(logits, -1)


def reference(model: nn.Module, images: Tensor, targets: Tensor):
    """The gradient and its dense Jacobian by torch alone."""
    import copy

    model = copy.deepcopy(model).double()

    def gradient(x: Tensor) -> Tensor:
        loss = -(targets * F.log_softmax(model(x), -1)).sum(-1).mean()
        found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return torch.cat([g.flatten() for g in found])

    dense = torch.autograd.functional.jacobian(gradient, images)
    return gradient(images).detach(), dense.flatten(1)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(
        expected.abs().max()
    )


# --- the Jacobian -----------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_the_jacobian_is_torchs(kind: str, size: int) -> None:
    model = build(kind)
    images, targets = batch(model, size)
    expected_gradient, expected = reference(model, images, targets)
    gradient, dense = gradient_jacobian(model, images, targets)
    assert close(gradient, expected_gradient)
    assert close(dense, expected)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_products_and_normal_matrices(kind: str, size: int) -> None:
    model = build(kind)
    images, targets = batch(model, size)
    _, expected = reference(model, images, targets)
    linear = linearise_gradient(model, images, targets)
    directions = torch.randn(5, expected.shape[1], dtype=F64)
    moved = directions @ expected.T
    assert close(linear.along(directions), moved)
    assert close(linear.gram_along(directions), moved @ moved.T)
    assert close(linear.normal(), expected.T @ expected)
    assert linear.unknowns == expected.shape[1]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("way", ["tangents", "weights", "outputs"])
def test_all_ways_to_the_normal_matrix_agree(
    monkeypatch: pytest.MonkeyPatch, kind: str, size: int, way: str
) -> None:
    model = build(kind, seed=1)
    images, targets = batch(model, size, seed=1)
    _, expected = reference(model, images, targets)
    linear = linearise_gradient(model, images, targets)
    monkeypatch.setattr(jacobian, "_DEARER", 0 if way == "tangents" else math.inf)
    if way != "tangents":
        # What a layer's own weights add, from the weights or from the outputs.
        count = 0 if way == "weights" else 10**12
        monkeypatch.setattr(jacobian._Pairing, "weights", property(lambda _: count))
    assert close(linear.normal(), expected.T @ expected)


def test_layers_between_may_have_no_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.SiLU(),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Conv2d(5, 6, 3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    images, targets = batch(model, 2)
    _, expected = reference(model, images, targets)
    linear = linearise_gradient(model, images, targets)
    assert close(linear.dense(), expected)
    assert close(linear.normal(), expected.T @ expected)


def test_many_directions_are_carried_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("sigmoid")
    images, targets = batch(model, 2)
    linear = linearise_gradient(model, images, targets)
    whole = linear.dense()
    monkeypatch.setattr(jacobian, "_CHUNK_BYTES", 7 * linear._tangent_bytes)
    assert close(linear.dense(), whole)
    directions = torch.randn(9, linear.unknowns, dtype=F64)
    assert close(linear.along(directions), directions @ whole.T)


@pytest.mark.parametrize("kind", ["residual", "sigmoid"])
def test_the_batched_reverse_pass_of_a_gpu(kind: str) -> None:
    model = build(kind)
    images, targets = batch(model, 2)
    model.double()
    linear = jacobian._AutogradLinearisation(model, images, targets)
    directions = torch.randn(4, linear.unknowns, dtype=F64)
    found = linear._back(directions.view(-1, *images.shape), batched=True)
    moved = torch.cat([g.flatten(1) for g in found], 1)
    assert close(moved, linear.along(directions))


def test_an_image_moves_the_gradient_by_its_own_share() -> None:
    """Columns follow their images when these are permuted or join a larger batch."""
    model = build("sigmoid")
    images, targets = batch(model, 3)
    order = torch.tensor([2, 0, 1])
    plain = gradient_jacobian(model, images, targets)[1].unflatten(1, (3, -1))
    mixed = gradient_jacobian(model, images[order], targets[order])[1]
    assert close(mixed.unflatten(1, (3, -1)), plain[:, order])
    alone = gradient_jacobian(model, images[1:2], targets[1:2])[1]
    assert close(plain[:, 1], alone / 3)


def test_small_movements_are_followed() -> None:
    model = build("residual")
    images, targets = batch(model, 2)
    gradient, dense = gradient_jacobian(model, images, targets)
    step = 1e-5 * torch.randn_like(images)
    after, _ = gradient_jacobian(model, images + step, targets)
    before, _ = gradient_jacobian(model, images - step, targets)
    assert close(dense @ step.flatten(), (after - before) / 2, 1e-7)
    assert not torch.equal(after, gradient)


def test_single_precision_is_raised_and_models_are_left_alone() -> None:
    model = build("sigmoid")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = batch(model, 2)[0].float()
    targets = F.one_hot(torch.tensor([4, 1]), 6).float()
    gradient, dense = gradient_jacobian(model, images, targets)
    _, expected = reference(model, images.double(), targets.double())
    assert gradient.dtype == dense.dtype == F64
    assert close(dense, expected)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


# --- rank -------------------------------------------------------------------------


def lenet(channels: int, size: int, seed: int = 0) -> nn.Module:
    """The network of DLG with fewer channels, so that small images meet its wall."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(channels, channels, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(channels, channels, 5, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(channels * ((size + 3) // 4) ** 2, 10),
    )
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def photos(size: int, count: int) -> tuple[Tensor, Tensor]:
    images = gi.load_images("photos", split="test", image_size=size)[list(range(count))]
    return images.pixels.double(), F.one_hot(images.labels, 10).double()


@pytest.mark.parametrize(
    ("channels", "size", "count", "rank"),
    [(3, 8, 1, 192), (3, 8, 2, 312), (3, 8, 3, 360), (4, 16, 1, 540), (6, 16, 1, 768)],
)
def test_the_wall(channels: int, size: int, count: int, rank: int) -> None:
    """Ranks at real images against an SVD of torch's own Jacobian."""
    model, (images, targets) = lenet(channels, size), photos(size, count)
    found = jacobian_rank(model, images, targets)
    if images.numel() < 500:  # the reference is slow
        _, dense = reference(model, images, targets)
        values = torch.linalg.svdvals(dense)
        assert int((values > 1e-7 * values[0]).sum()) == rank
        own = found.singular_values[: len(values)]
        assert float((own - values).abs().max()) < 1e-10 * float(values[0])
    assert (found.rank, found.unknowns) == (rank, images.numel())
    assert found.missing == images.numel() - rank
    full = rank == images.numel()
    assert (found.condition < 1e5) if full else math.isinf(found.condition)


def test_what_is_missing_leaves_the_gradient_where_it_is() -> None:
    model, (images, targets) = lenet(3, 8), photos(8, 2)
    linear = linearise_gradient(model, images, targets)
    rank = jacobian_rank(model, images, targets)
    # Not just to first order: the gradient does not see a small finite step either.
    _, vectors = torch.linalg.eigh(linear.normal())
    lost, seen = vectors[:, rank.missing - 1], vectors[:, -1]
    moved = [
        (gradient_jacobian(model, images + 1e-4 * v.view_as(images), targets)[0])
        for v in (lost, seen)
    ]
    unseen, visible = ((g - linear.gradient).norm() for g in moved)
    assert float(unseen) < 1e-3 * float(visible)


def test_the_condition_is_that_of_the_jacobian() -> None:
    model, (images, targets) = lenet(4, 8), photos(8, 2)
    _, dense = reference(model, images, targets)
    found = jacobian_rank(model, images, targets)
    assert found.rank == found.unknowns == 384
    assert found.condition == pytest.approx(float(torch.linalg.cond(dense)), rel=1e-6)


def test_the_threshold_counts() -> None:
    model, (images, targets) = lenet(4, 8), photos(8, 2)
    values = jacobian_rank(model, images, targets).singular_values
    for place in (10, 200, 380):
        threshold = float((values[place - 1] * values[place]).sqrt() / values[0])
        found = jacobian_rank(model, images, targets, threshold=threshold)
        assert found.rank == place
        assert math.isinf(found.condition)


def test_a_gradient_that_does_not_see_its_images_has_rank_zero() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(98, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.fill_(-1.0)  # no unit is ever on
    images, targets = batch(model, 1)
    found = jacobian_rank(model, images, targets)
    assert found.rank == 0
    assert math.isinf(found.condition)


class Matrix(Linearisation):
    """A gradient that is a known matrix times the pixels."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix
        self.images = matrix.new_zeros(1, 1, 1, matrix.shape[1])
        self.gradient = matrix.new_zeros(len(matrix))

    @property
    def _tangent_bytes(self) -> int:
        return 8 * len(self.matrix)

    def _along(self, directions: Tensor, compressed: bool) -> Tensor:
        return directions @ self.matrix.T


@given(
    exponents=st.lists(st.floats(-14.0, 0.0), min_size=2, max_size=12),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_small_singular_values_survive_the_squaring(exponents, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = len(exponents)
    values = torch.tensor([0.0, *sorted(exponents)[::-1][1:]], dtype=F64)
    values = 10**values
    draw = torch.randn(2, 15, 15, generator=generator, dtype=F64)
    left, right = torch.linalg.qr(draw).Q
    matrix = left[:, :count] @ torch.diag(values) @ right[:count, :count].contiguous()
    expected = torch.linalg.svdvals(matrix)
    found = singular_values(Matrix(matrix))
    assert float((found - expected).abs().max()) < 1e-10 * float(expected[0])


def test_squaring_alone_would_not_do() -> None:
    """The case that needs the second look: rank 3 at 1e-7, but 4 by eigenvalues."""
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(2, 40, 40, dtype=F64)).Q
    values = torch.tensor([1.0, 1e-3, 1e-6, 1e-9], dtype=F64)
    matrix = left[:, :4] @ torch.diag(values) @ right[:4]
    found = singular_values(Matrix(matrix))
    assert torch.allclose(found[:3], values[:3], rtol=1e-3, atol=0)
    assert float(found[4:].max()) < 1e-10
    squares = torch.linalg.eigvalsh(matrix.T @ matrix).abs().sqrt()
    assert float(squares[:36].max()) > 1e-9


@pytest.mark.parametrize("shape", [(3, 1), (40, 5), (10, 300), (20, 1700)])
def test_gram(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = gram(matrix)
    assert close(found, matrix.T @ matrix)
    assert torch.equal(found, found.T)


# --- bad input --------------------------------------------------------------------


class Once(nn.Module):
    """A network with a function that torch differentiates once only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(98, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.ops.aten.hardsigmoid(self.stem(x.flatten(1))))


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("sigmoid")
    images, targets = batch(model, 2)
    with pytest.raises(gi.InputError, match="images: expected shape"):
        gradient_jacobian(model, images[0], targets)
    with pytest.raises(gi.InputError, match="targets: expected shape"):
        gradient_jacobian(model, images, targets[:1])
    with pytest.raises(gi.InputError, match="threshold"):
        jacobian_rank(model, images, targets, threshold=1e-12)
    with pytest.raises(gi.InputError, match="differentiate twice"):
        gradient_jacobian(Once(), images, torch.full((2, 3), 1 / 3))
    monkeypatch.setattr(jacobian, "_MOST_BYTES", 10_000)
    with pytest.raises(gi.InputError, match="GiB"):
        gradient_jacobian(model, images, targets)
