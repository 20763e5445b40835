"""Levenberg-Marquardt against closed forms, scipy and what it must not promise."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import gradinv_helpers as gi
from gradinv_helpers.attacks import levenberg_marquardt
from gradinv_helpers.attacks.exact import invert_layer_by_layer
from gradinv_helpers.attacks.levenberg_marquardt import (
    AT_MINIMUM,
    LevenbergMarquardt,
    MatchingSquares,
    solve_dense,
)
from gradinv_helpers.attacks.optimise import NO_LOWER_POINT, TrialState
from gradinv_helpers.federated.aggregation import normalize
from gradinv_helpers.priors.smoothness import total_variation

F64 = torch.float64


def least_squares(residuals):
    """Loss, gradient and Gauss-Newton Hessian of residuals (x (n,), trial) -> (m,)."""

    def evaluate(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        free = x.detach().requires_grad_()
        pairs = zip(free, which.tolist(), strict=True)
        loss = torch.stack([residuals(p, t).square().sum() for p, t in pairs])
        (gradient,) = torch.autograd.grad(loss.sum(), free)
        return loss.detach(), gradient

    def curvature(x: Tensor, which: Tensor) -> Tensor:
        found = []
        for point, trial in zip(x, which.tolist(), strict=True):
            j = torch.autograd.functional.jacobian(
                lambda p, t=trial: residuals(p, t), point
            )
            found.append(2 * j.T @ j)
        return torch.stack(found)

    return evaluate, curvature


def run(
    residuals,
    starts: Tensor,
    *,
    iterations: int = 60,
    tolerance: float = 1e-28,
    replace=lambda trial, state: None,
) -> list[TrialState]:
    evaluate, curvature = least_squares(residuals)

    def inspect(trial: int, state: TrialState) -> str:
        if state.loss <= tolerance:
            return "small enough"
        return "budget" if state.iterations >= iterations else ""

    return LevenbergMarquardt(
        evaluate, starts, curvature=curvature, inspect=inspect, replace=replace
    ).run()


def rosenbrock(x: Tensor, trial: int) -> Tensor:
    return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


def powell(x: Tensor, trial: int) -> Tensor:
    """Powell's singular function: the Jacobian has rank 2 of 4 at the solution."""
    return torch.stack(
        [
            x[0] + 10 * x[1],
            math.sqrt(5) * (x[2] - x[3]),
            (x[1] - 2 * x[2]) ** 2,
            math.sqrt(10) * (x[0] - x[3]) ** 2,
        ]
    )


# --- convergence ------------------------------------------------------------------


@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 12),
    rows=st.integers(1, 20),
    rank=st.integers(1, 12),
)
@settings(max_examples=40, deadline=None)
def test_linear_equations_end_at_the_least_squares_answer(
    seed: int, size: int, rows: int, rank: int
) -> None:
    """Also where they contradict each other, and where they are too few."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=F64)
    a = left @ torch.randn(rank, size, generator=generator, dtype=F64)
    b = torch.randn(rows, generator=generator, dtype=F64)
    start = torch.randn(1, size, generator=generator, dtype=F64)
    (state,) = run(lambda x, t: a @ x - b, start, tolerance=1e-24)
    best = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
    lowest = float((a @ best - b).square().sum())
    assert state.loss == pytest.approx(lowest, rel=1e-6, abs=1e-20)
    # What the equations say nothing about stays where it was.
    moved = state.point - start[0]
    inside = torch.linalg.pinv(a, rtol=1e-9) @ (a @ moved)
    assert float((moved - inside).abs().max()) < 1e-5 * (1 + float(moved.abs().max()))


def test_rosenbrock_ends_where_minpack_ends() -> None:
    from scipy.optimize import least_squares as scipy_least_squares

    start = np.array([-1.2, 1.0])

    def theirs(x: np.ndarray) -> np.ndarray:
        return rosenbrock(torch.tensor(x), 0).numpy()

    found = scipy_least_squares(theirs, start, method="lm", xtol=1e-12, ftol=1e-12)
    (state,) = run(rosenbrock, torch.tensor(start)[None], tolerance=1e-26)
    assert np.allclose(found.x, 1, atol=1e-8)
    assert np.allclose(state.point, 1, atol=1e-10)
    assert state.evaluations <= 2 * found.nfev


def test_convergence_is_quadratic_where_a_solution_exists() -> None:
    (state,) = run(rosenbrock, torch.full((1, 3), 0.5, dtype=F64))
    assert state.stopped == "small enough"
    errors = [math.sqrt(loss) for loss in state.trace if 1e-14 < loss < 1e-2]
    assert len(errors) >= 2
    for before, after in itertools.pairwise(errors):
        assert after < 100 * before**2


def test_a_singular_solution_is_still_reached() -> None:
    start = torch.tensor([[3.0, -1.0, 0.0, 1.0]], dtype=F64)
    (state,) = run(powell, start, tolerance=1e-18)
    assert state.stopped == "small enough"
    assert float(state.point.abs().max()) < 1e-2


def test_residuals_that_cannot_vanish_end_at_a_minimum() -> None:
    def bent(x: Tensor, trial: int) -> Tensor:
        return torch.cat([x - 1, 0.1 * x.square() + 1])

    (state,) = run(bent, torch.full((1, 2), 3.0, dtype=F64))
    assert state.stopped == AT_MINIMUM
    evaluate, _ = least_squares(bent)
    _, gradient = evaluate(state.point[None], torch.tensor([0]))
    assert float(gradient.abs().max()) < 1e-3


def test_a_loss_that_its_derivatives_do_not_describe_ends_without_harm() -> None:
    def objective(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        return 1 + x.abs().sum(1), -torch.sign(x)  # uphill

    starts = torch.ones(1, 2, dtype=F64)
    (state,) = LevenbergMarquardt(
        objective,
        starts,
        curvature=lambda x, t: torch.eye(2, dtype=F64).expand(len(x), 2, 2),
        inspect=lambda trial, state: "",
        replace=lambda trial, state: None,
    ).run()
    assert state.stopped == NO_LOWER_POINT
    assert state.updates == 0
    assert torch.equal(state.point, starts[0])


def test_a_wall_of_nan_is_avoided() -> None:
    def walled(x: Tensor, trial: int) -> Tensor:
        return torch.log(x) - math.log(1e-3)  # NaN for x < 0, where a full step ends

    (state,) = run(walled, torch.full((1, 2), 5.0, dtype=F64), tolerance=1e-20)
    assert state.stopped == "small enough"
    assert torch.allclose(state.point, torch.full((2,), 1e-3, dtype=F64))
    assert all(b < a for a, b in itertools.pairwise(state.trace))


def test_a_curvature_that_is_not_positive_is_damped() -> None:
    """Cholesky fails until the damping is above the most negative curvature."""

    def objective(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        return (x - 2).square().sum(1), 2 * (x - 2)

    (state,) = LevenbergMarquardt(
        objective,
        torch.zeros(1, 2, dtype=F64),
        curvature=lambda x, t: torch.diag(torch.tensor([1.0, -0.5], dtype=F64))[None],
        inspect=lambda trial, state: "done" if state.loss < 1e-12 else "",
        replace=lambda trial, state: None,
    ).run()
    assert state.stopped == "done"
    assert torch.allclose(state.point, torch.full((2,), 2.0, dtype=F64), atol=1e-5)


# --- trials -----------------------------------------------------------------------


def mixed(x: Tensor, trial: int) -> Tensor:
    """Trial 0: linear; 1: a valley; 2: no solution; 3: NaN at once; 4: singular."""
    if trial == 0:
        return x - 3
    if trial == 1:
        return rosenbrock(x, trial)
    if trial == 2:
        return torch.cat([x - 1, x.square() + 1])
    return x * math.nan if trial == 3 else powell(x, trial)


def mixed_starts() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 4, generator=generator, dtype=F64)


@pytest.mark.parametrize("together", [1, 2, 5])
def test_results_alone_and_in_a_batch_agree(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """However many Hessians fit at once."""
    monkeypatch.setattr(levenberg_marquardt, "_MATRIX_BYTES", together * 4 * 4 * 8)
    starts = mixed_starts()
    states = run(mixed, starts.clone(), tolerance=1e-20)
    for trial, state in enumerate(states):
        (alone,) = run(
            lambda x, t, trial=trial: mixed(x, trial),
            starts[trial : trial + 1],
            tolerance=1e-20,
        )
        assert state.stopped == alone.stopped
        assert state.updates == alone.updates == state.iterations
        assert state.evaluations == alone.evaluations
        assert state.trace == pytest.approx(alone.trace, rel=1e-9, abs=1e-22)
    assert states[3].stopped == "the loss or its gradient is not finite at the start"
    assert states[3].trace == []
    assert torch.equal(starts, mixed_starts())


def test_trace_and_counters() -> None:
    evaluate, _ = least_squares(rosenbrock)
    states = run(rosenbrock, mixed_starts()[:3], iterations=4, tolerance=0.0)
    for trial, state in enumerate(states):
        assert state.stopped == "budget"
        assert len(state.trace) == 5
        assert all(b < a for a, b in itertools.pairwise(state.trace))
        assert state.evaluations >= 5
        loss, _ = evaluate(state.point[None], torch.tensor([trial]))
        assert float(loss) == pytest.approx(state.loss, rel=1e-12)


def test_a_stopped_trial_gets_another_start() -> None:
    seen = []

    def replace(trial: int, state: TrialState) -> Tensor | None:
        seen.append((trial, state.stopped, state.iterations))
        return torch.full((4,), 0.9, dtype=F64) if len(seen) == 1 else None

    def broken(x: Tensor, trial: int) -> Tensor:
        far = bool((x.detach().abs() > 50).any())
        return rosenbrock(x, trial) * (math.nan if far else 1.0)

    starts = mixed_starts()[:3]
    starts[1] = 100.0
    states = run(broken, starts, replace=replace, tolerance=1e-24)
    assert seen[0] == (1, "the loss or its gradient is not finite at the start", 0)
    assert sorted(trial for trial, *_ in seen) == [0, 1, 1, 2]
    (alone,) = run(broken, torch.full((1, 4), 0.9, dtype=F64), tolerance=1e-24)
    assert states[1].trace == pytest.approx(alone.trace, rel=1e-9, abs=1e-26)
    assert [state.stopped for state in states] == ["small enough"] * 3


def test_an_interruption_leaves_the_latest_points() -> None:
    evaluate, curvature = least_squares(rosenbrock)

    def inspect(trial: int, state: TrialState) -> str:
        if trial == 1 and state.iterations == 2:
            raise KeyboardInterrupt
        return ""

    search = LevenbergMarquardt(
        evaluate,
        mixed_starts()[:3],
        curvature=curvature,
        inspect=inspect,
        replace=lambda trial, state: None,
    )
    with pytest.raises(KeyboardInterrupt):
        search.run()
    for trial, state in enumerate(search.states):
        loss, _ = evaluate(state.point[None], torch.tensor([trial]))
        assert state.loss == pytest.approx(float(loss), rel=1e-12)
        assert state.iterations == 2
        assert state.stopped == ""


def test_single_precision_is_raised() -> None:
    starts = mixed_starts()[:1]
    (state,) = run(rosenbrock, starts.float(), tolerance=1e-26)
    (double,) = run(rosenbrock, starts.float().double(), tolerance=1e-26)
    assert state.point.dtype == F64
    assert state.trace == double.trace


def test_too_many_unknowns_are_refused() -> None:
    with pytest.raises(gi.InputError, match="at most 8,192 unknown pixels"):
        run(rosenbrock, torch.zeros(1, 8193))


# --- the matching loss ------------------------------------------------------------


def lenet(channels: int = 6, size: int = 8, seed: int = 0, activation=nn.Sigmoid):
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, stride in enumerate((2, 2, 1)):
        inputs = channels if i else 3
        layers.append(nn.Conv2d(inputs, channels, 5, stride=stride, padding=2))
        layers.append(activation())
    outputs = channels * ((size + 3) // 4) ** 2
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(outputs, 10))
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model.eval()


def photos(size: int, count: int, first: int = 0) -> gi.Images:
    images = gi.load_images("photos", split="test", image_size=size)
    return images[list(range(first, first + count))]


def squares_of(
    model: nn.Module, batches: list[gi.Images], **options
) -> tuple[MatchingSquares, Tensor]:
    """The matching loss of a batch per trial, and the true points."""
    updates = [gi.local_update(model, batch).gradient() for batch in batches]
    shared = [torch.stack([u[name] for u in updates]) for name in updates[0]]
    targets = torch.stack([F.one_hot(b.labels, 10).double() for b in batches])
    squares = MatchingSquares(model, shared, targets, batches[0].shape, **options)
    return squares, torch.stack([b.pixels.double().flatten() for b in batches])


def stated_loss(
    model: nn.Module, batch: gi.Images, point: Tensor, *, tv_weight: float
) -> tuple[Tensor, Tensor]:
    """The loss as its documentation has it, and its residuals' Jacobian, by torch."""
    model = copy.deepcopy(model).double()
    shared = [
        g.double() for g in gi.local_update(model.float(), batch).tensors.values()
    ]
    model.double()
    size = torch.cat([g.flatten() for g in shared]).norm()

    def residuals(x: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x.view_as(batch.pixels)), batch.labels)
        found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        pairs = zip(found, shared, strict=True)
        matching = torch.cat([(g - t).flatten() for g, t in pairs]) / size
        outside = (x - x.clamp(0, 1)) / math.sqrt(x.numel())
        return torch.cat([matching, outside])

    point.requires_grad_()
    roughness = total_variation(point.view_as(batch.pixels), smoothing=1e-3)
    loss = residuals(point).square().sum() + tv_weight * roughness
    return loss, torch.autograd.functional.jacobian(residuals, point.detach())


@pytest.mark.parametrize("tv_weight", [0.0, 0.1])
def test_the_loss_is_the_stated_one(tv_weight: float) -> None:
    model = lenet(2)
    batches = [photos(8, 2), photos(8, 2, 3)]
    squares, _ = squares_of(model, batches, tv_weight=tv_weight)
    generator = torch.Generator().manual_seed(0)
    points = 0.5 + 0.4 * torch.randn(2, squares.unknowns, generator=generator).double()
    loss, gradient = squares.evaluate(points, torch.tensor([0, 1]))
    hessians = squares.curvature(points, torch.tensor([0, 1]))
    for trial, batch in enumerate(batches):
        point = points[trial].clone()
        expected, jacobian = stated_loss(model, batch, point, tv_weight=tv_weight)
        (slope,) = torch.autograd.grad(expected, point)
        assert float(loss[trial]) == pytest.approx(expected.item(), rel=1e-9)
        assert torch.allclose(gradient[trial], slope, rtol=1e-7, atol=1e-12)
        if not tv_weight:
            normal = 2 * jacobian.T @ jacobian
            assert torch.allclose(hessians[trial], normal, rtol=1e-7, atol=1e-12)


def test_trials_are_told_apart() -> None:
    batches = [photos(8, 1), photos(8, 1, 5)]
    squares, truth = squares_of(lenet(), batches, tv_weight=torch.tensor([0.0, 1.0]))
    swapped = torch.tensor([1, 0])
    loss, _ = squares.evaluate(truth, torch.tensor([0, 1]))
    crossed, _ = squares.evaluate(truth, swapped)
    assert float(loss[0]) < 1e-12
    assert float(loss[1]) > 1e-3  # its own total variation
    assert float(crossed.min()) > 1e-4
    both = squares.curvature(truth, swapped)
    assert torch.equal(both[1:], squares.curvature(truth[1:], swapped[1:]))


@given(seed=st.integers(0, 1000), scale=st.floats(1e-4, 2.0))
@settings(max_examples=30, deadline=None)
def test_the_parabola_lies_above_the_total_variation(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, 4, 5, generator=generator, dtype=F64)
    step = scale * torch.randn(2, 3, 4, 5, generator=generator, dtype=F64)
    hessian = torch.zeros(120, 120, dtype=F64)
    levenberg_marquardt._add_tv_curvature(hessian, images, 0.7)
    free = images.clone().requires_grad_()
    here = 0.7 * total_variation(free, smoothing=1e-3)
    (slope,) = torch.autograd.grad(here, free)
    h = step.flatten()
    model = here.item() + float(slope.flatten() @ h) + float(h @ hessian @ h) / 2
    there = float(0.7 * total_variation(images + step, smoothing=1e-3))
    assert there <= model + 1e-9
    assert torch.allclose(hessian, hessian.T)
    assert float(hessian.sum().abs()) < 1e-9  # a constant costs nothing


# --- the attack -------------------------------------------------------------------


def worst(images: Tensor, truth: gi.Images) -> float:
    return float((images - truth.pixels.to(images)).abs().max())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh])
def test_images_are_solved_to_all_digits(count: int, activation) -> None:
    truth = photos(8, count)
    update = gi.local_update(lenet(activation=activation).double(), truth)
    images, certificate, trace = solve_dense(update, truth.labels)
    assert worst(images, truth) < 1e-9
    assert certificate.exact
    assert certificate.method == "levenberg-marquardt"
    assert certificate.residual < 1e-24
    assert certificate.rank == certificate.unknowns == count * 192
    assert certificate.condition < 1e5
    assert trace[0] > 1e-3
    assert trace[-1] < 1e-24


def test_rounded_gradients_and_weight_changes() -> None:
    truth = photos(8, 1)
    for training in (None, gi.LocalTraining(sends="delta", lr=0.5)):
        update = gi.local_update(lenet(), truth, training)
        images, certificate, _ = solve_dense(update, truth.labels)
        assert worst(images, truth) < 1e-4
        assert certificate.exact
        assert certificate.residual < 1e-12


def test_a_module_that_is_no_chain() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.branch = nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8 * 64, 10)

        def forward(self, x: Tensor) -> Tensor:
            a = torch.tanh(self.stem(x))
            return self.head((a + torch.sigmoid(self.branch(a))).flatten(1))

    torch.manual_seed(0)
    truth = photos(8, 1)
    images, certificate, _ = solve_dense(
        gi.local_update(Skip().double(), truth), truth.labels
    )
    assert certificate.exact
    assert worst(images, truth) < 1e-8


def test_an_exact_solution_need_not_be_the_solution() -> None:
    """Past the wall the residual vanishes at other images; the rank says so."""
    truth = photos(8, 2)
    update = gi.local_update(lenet(3, 8).double(), truth)
    images, certificate, _ = solve_dense(update, truth.labels)
    assert certificate.residual < 1e-20
    assert worst(images, truth) > 0.05
    assert certificate.rank == 312
    assert certificate.unknowns == 384
    assert math.isinf(certificate.condition)
    assert not certificate.exact
    assert "72 directions are not in the update" in str(certificate)


def test_jagged_losses_fail_honestly() -> None:
    truth = photos(8, 1)
    update = gi.local_update(lenet(activation=nn.ReLU), truth)
    images, certificate, trace = solve_dense(
        update, truth.labels, iterations=8, restarts=1
    )
    assert worst(images, truth) > 0.1
    assert certificate.residual > 1e-3
    assert not certificate.exact
    assert all(b <= a for a, b in itertools.pairwise(trace))


def test_wrong_labels_do_not_pass() -> None:
    truth = photos(8, 1)
    update = gi.local_update(lenet(), truth)
    _, certificate, _ = solve_dense(
        update, (truth.labels + 1) % 10, iterations=8, restarts=1
    )
    assert certificate.residual > 1e-3
    assert not certificate.exact


def noisy_update(share: float) -> tuple[gi.SharedUpdate, gi.Images]:
    truth = photos(16, 1, 4)
    generator = torch.Generator().manual_seed(0)
    noise = gi.GaussianNoise(share, relative=True)
    update = gi.local_update(lenet(12, 16), truth)
    return gi.defend(update, noise, generator=generator), truth


def test_noise_is_answered_by_the_maximum_of_the_likelihood() -> None:
    """Layer by layer amplifies noise; all equations together are the best estimate."""
    update, truth = noisy_update(1e-3)
    begin, _, before = invert_layer_by_layer(update)
    images, certificate, _ = solve_dense(update, truth.labels, start=begin)
    error = float((images - truth.pixels).square().mean())
    assert error < 0.5 * float((begin - truth.pixels).square().mean())
    assert certificate.residual < before.residual
    # As good as theory allows: the trace of the inverse Fisher information.
    squares, points = squares_of(lenet(12, 16), [truth])
    fisher = squares.curvature(points, torch.tensor([0]))[0] / 2
    entries = sum(t.numel() for t in update.tensors.values())
    bound = float((1e-6 / entries / torch.linalg.eigvalsh(fisher)).mean())
    assert 0.5 * bound < error < 1.5 * bound


def test_smoothness_helps_where_there_is_noise() -> None:
    update, truth = noisy_update(1e-2)
    entries = sum(t.numel() for t in update.tensors.values())
    errors = []
    for tv_weight in (0.0, 2 * 1e-4 * 768 / entries / 0.1):
        images, _, _ = solve_dense(
            update, truth.labels, tv_weight=tv_weight, restarts=1, iterations=8
        )
        errors.append(float((images - truth.pixels).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_the_same_call_gives_the_same_answer() -> None:
    truth = photos(8, 1)
    update = gi.local_update(lenet(), truth)
    first = solve_dense(update, truth.labels, seed=3)
    again = solve_dense(update, truth.labels, seed=3)
    other = solve_dense(update, truth.labels, seed=4)
    assert torch.equal(first[0], again[0])
    assert first[2] == again[2]
    assert first[2][0] != other[2][0]


def test_further_starts_follow_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of all starts is returned, and no more are taken than asked for."""
    truth = photos(8, 1)
    update = gi.local_update(lenet(activation=nn.ReLU), truth)
    losses = []
    kept = LevenbergMarquardt._retire

    def watch(self, reasons):
        losses.extend(self._state(row).loss for row in reasons)
        kept(self, reasons)

    monkeypatch.setattr(LevenbergMarquardt, "_retire", watch)
    _, _, trace = solve_dense(update, truth.labels, restarts=3, iterations=3)
    assert len(losses) == 3
    assert len(set(losses)) == 3
    assert trace[-1] == min(losses)
    losses.clear()
    solve_dense(gi.local_update(lenet(), truth), truth.labels, restarts=3)
    assert len(losses) == 1


def test_bad_input_is_named() -> None:
    truth = photos(8, 2)
    update = gi.local_update(lenet(), truth)
    with pytest.raises(gi.InputError, match="labels: expected 2 class indices"):
        solve_dense(update, truth.labels[:1])
    with pytest.raises(gi.InputError, match="labels: expected indices from 0 to 9"):
        solve_dense(update, truth.labels + 20)
    with pytest.raises(gi.InputError, match="start: expected shape"):
        solve_dense(update, truth.labels, start=truth.pixels[:1])
    with pytest.raises(gi.InputError, match="iterations"):
        solve_dense(update, truth.labels, iterations=0)
    with pytest.raises(gi.InputError, match="tv_weight"):
        solve_dense(update, truth.labels, tv_weight=-1.0)
    zeros = {name: torch.zeros_like(t) for name, t in update.tensors.items()}
    with pytest.raises(gi.InputError, match="non-zero"):
        solve_dense(update.replace_tensors(zeros), truth.labels)
    with pytest.raises(gi.InputError, match="normalised"):
        solve_dense(normalize(update), truth.labels)


def test_large_batches_are_refused() -> None:
    truth = photos(32, 3)
    model = gi.build_model("lenet", in_channels=3, image_size=32, num_classes=10)
    with pytest.raises(gi.InputError, match="at most 8,192 unknown pixels"):
        solve_dense(gi.local_update(model, truth), truth.labels)
