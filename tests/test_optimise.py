"""Many minimisations in one batch are exactly as many alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradinv_helpers.attacks.optimise import (
    UPDATES_PER_ITERATION,
    History,
    LineSearch,
    Minimiser,
    TrialState,
)

F64 = torch.float64
ARMIJO, CURVATURE = 1e-4, 0.9


def run(
    objective: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    starts: Tensor,
    *,
    iterations: int = 50,
    tolerance: float = 0.0,
    replace=lambda trial, state: None,
) -> list[TrialState]:
    def inspect(trial: int, state: TrialState) -> str:
        if state.loss <= tolerance:
            return "small enough"
        return "budget" if len(state.trace) > iterations else ""

    return Minimiser(objective, starts, inspect=inspect, replace=replace).run()


def quadratics(trials: int, size: int, condition: float, seed: int = 0):
    """f_t(x) = (x - m_t)^T A_t (x - m_t) / 2 with random axes; the minimisers m_t."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(trials, size, size, generator=generator).to(F64))
    scales = torch.logspace(0, -math.log10(condition), size, dtype=F64)
    a = axes.Q @ torch.diag(scales) @ axes.Q.mT
    m = torch.randn(trials, size, generator=generator).to(F64)

    def objective(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        d = x - m[which]
        slope = (a[which] @ d[:, :, None])[:, :, 0]
        return (d * slope).sum(1) / 2, slope

    return objective, m


def rosenbrock(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        free = x.detach().requires_grad_()
        valley = 100 * (free[:, 1:] - free[:, :-1] ** 2) ** 2
        loss = (valley + (1 - free[:, :-1]) ** 2).sum(1)
        (gradient,) = torch.autograd.grad(loss.sum(), free)
    return loss.detach(), gradient


# --- convergence ------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1.0, 100.0, 1e4])
def test_quadratics_reach_the_closed_form(condition: float) -> None:
    objective, minimisers = quadratics(4, 30, condition)
    states = run(objective, torch.zeros(4, 30, dtype=F64), tolerance=1e-20)
    for state, minimiser in zip(states, minimisers, strict=True):
        assert state.stopped
        assert torch.allclose(state.point, minimiser, atol=1e-7)
        assert state.updates <= 200


def test_rosenbrock_in_several_dimensions() -> None:
    torch.manual_seed(0)
    starts = torch.stack([torch.full((6,), -0.5), torch.zeros(6), torch.rand(6)])
    states = run(rosenbrock, starts.to(F64), tolerance=1e-18)
    for state in states:
        assert torch.allclose(state.point, torch.ones(6, dtype=F64), atol=1e-7)


def test_as_quick_as_scipy() -> None:
    from scipy.optimize import minimize

    start = np.array([-1.2, 1.0])
    theirs = minimize(
        lambda x: [
            v[0].item() if v.dim() == 1 else v[0].numpy()
            for v in rosenbrock(torch.tensor(x)[None], torch.zeros(1))
        ],
        start,
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 0, "gtol": 1e-9, "maxcor": 40},
    )
    (state,) = run(rosenbrock, torch.tensor(start)[None], tolerance=1e-18)
    assert np.allclose(theirs.x, 1, atol=1e-6)
    assert np.allclose(state.point, 1, atol=1e-6)
    assert state.evaluations <= theirs.nfev + UPDATES_PER_ITERATION + 5


def test_trace_falls_and_counters_agree() -> None:
    objective, _ = quadratics(3, 20, 1e4)
    states = run(objective, torch.zeros(3, 20, dtype=F64), iterations=3)
    for trial, state in enumerate(states):
        assert len(state.trace) == 4
        assert all(b < a for a, b in zip(state.trace, state.trace[1:], strict=False))
        assert state.updates == 3 * UPDATES_PER_ITERATION
        assert state.iterations == 3
        assert state.evaluations >= state.updates + 1
        loss, _ = objective(state.point[None], torch.tensor([trial]))
        assert float(loss) == pytest.approx(state.loss, rel=1e-12)


# --- independence -----------------------------------------------------------------


def mixed_objective(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Trial 0: easy bowl; 1: hard valley; 2: NaN far away; 3: quartic; 4: NaN."""
    easy = (x - 1).square().sum(1), 2 * (x - 1)
    valley = rosenbrock(x, which)
    wall = -torch.log(2 - x).sum(1) - x.sum(1) * 0.1, 1 / (2 - x) - 0.1
    quartic = (x**4).sum(1) - x.sum(1), 4 * x**3 - 1
    broken = torch.full_like(easy[0], math.nan), torch.full_like(x, math.nan)
    losses = torch.stack([easy[0], valley[0], wall[0], quartic[0], broken[0]])
    slopes = torch.stack([easy[1], valley[1], wall[1], quartic[1], broken[1]])
    rows = torch.arange(len(x))
    return losses[which, rows], slopes[which, rows]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_results_alone_and_in_a_batch_agree(dtype: torch.dtype) -> None:
    """Trials that are easy, hard, broken or at the edge do not touch each other."""
    torch.manual_seed(1)
    starts = (0.5 * torch.randn(5, 4)).to(dtype)
    together = run(mixed_objective, starts.clone(), iterations=5, tolerance=-1e9)
    for trial in range(5):

        def own(x: Tensor, which: Tensor, trial: int = trial):
            return mixed_objective(x, torch.full_like(which, trial))

        (alone,) = run(own, starts[trial : trial + 1], iterations=5, tolerance=-1e9)
        state = together[trial]
        assert state.stopped == alone.stopped
        tolerance = 1e-9 if dtype == torch.float64 else 1e-3
        assert torch.allclose(state.point, alone.point, atol=tolerance)
        if dtype == torch.float64 and trial != 4:
            assert state.updates == alone.updates
            assert state.evaluations == alone.evaluations
            assert state.trace == pytest.approx(alone.trace, rel=1e-9, abs=1e-15)
    assert together[4].stopped == "the loss or its gradient is not finite at the start"
    assert together[4].evaluations == 1


@given(seed=st.integers(0, 10_000), trials=st.integers(2, 5))
@settings(max_examples=15, deadline=None)
def test_order_of_the_trials_does_not_matter(seed: int, trials: int) -> None:
    objective, _ = quadratics(trials, 6, 50.0, seed)
    order = torch.randperm(trials, generator=torch.Generator().manual_seed(seed))
    starts = torch.zeros(trials, 6, dtype=F64)
    plain = run(objective, starts, tolerance=1e-16)
    mixed = run(lambda x, t: objective(x, order[t]), starts, tolerance=1e-16)
    for place, trial in enumerate(order.tolist()):
        assert mixed[place].evaluations == plain[trial].evaluations
        assert torch.allclose(mixed[place].point, plain[trial].point, atol=1e-10)


def test_the_objective_is_told_the_trials_still_running() -> None:
    objective, _ = quadratics(3, 5, 10.0)
    seen = []

    def watched(x: Tensor, which: Tensor):
        assert len(x) == len(which)
        seen.append(which.tolist())
        return objective(x, which)

    def inspect(trial: int, state: TrialState) -> str:
        return "done" if len(state.trace) > (1, 3, 2)[trial] else ""

    starts = torch.zeros(3, 5, dtype=F64)
    Minimiser(watched, starts, inspect=inspect, replace=lambda t, s: None).run()
    assert seen[0] == [0, 1, 2]
    assert [1, 2] in seen
    assert seen[-1] == [1]
    assert seen.count([0]) == seen.count([2]) == 0


# --- the line search --------------------------------------------------------------


def search_one(phi, derivative, step: float) -> tuple[float, bool, LineSearch]:
    """Run one line search; the step it ends with, and whether it succeeded."""
    search = LineSearch(1)
    f0, d0 = np.array([phi(0.0)]), np.array([derivative(0.0)])
    search.begin(np.array([0]), f0, d0, np.array([step]))
    while True:
        at = float(search.step[0])
        done, failed = search.advance(np.array([phi(at)]), np.array([derivative(at)]))
        if done[0] or failed[0]:
            return at, bool(done[0]), search


def assert_strong_wolfe(phi, derivative, step: float) -> None:
    assert phi(step) <= phi(0.0) + ARMIJO * step * derivative(0.0)
    assert abs(derivative(step)) <= CURVATURE * abs(derivative(0.0))


positive = st.floats(0.05, 20.0)


@given(
    slope=positive,
    curvature=positive,
    wave=st.floats(0.0, 5.0),
    frequency=st.floats(0.1, 6.0),
    phase=st.floats(0.0, 6.28),
    step=st.floats(1e-6, 1e4),
)
@settings(max_examples=300, deadline=None)
def test_accepted_steps_meet_the_strong_wolfe_conditions(
    slope, curvature, wave, frequency, phase, step
) -> None:
    """Bowls with waves on them, that fall at zero and rise in the end."""

    def phi(t: float) -> float:
        waves = wave * (math.sin(frequency * t + phase) - math.sin(phase))
        tilt = -(slope + abs(wave * frequency)) * t
        return tilt + curvature * t * t / 2 + waves

    def derivative(t: float) -> float:
        waves = wave * frequency * math.cos(frequency * t + phase)
        return -(slope + abs(wave * frequency)) + curvature * t + waves

    assert derivative(0.0) < 0
    at, done, search = search_one(phi, derivative, step)
    assert search.evaluations[0] <= 20
    # Among many waves, twenty values may be too few: then it says that it gave up.
    assert done or wave * frequency > 0.3 * slope
    if done:
        assert_strong_wolfe(phi, derivative, at)


# The six functions of Moré and Thuente (1994), Section 5, tables 1 to 6.
def yanai(beta1: float, beta2: float):
    def gamma(beta: float) -> float:
        return math.sqrt(1 + beta**2) - beta

    g1, g2 = gamma(beta1), gamma(beta2)

    def phi(t: float) -> float:
        return g1 * math.hypot(1 - t, beta2) + g2 * math.hypot(t, beta1)

    def derivative(t: float) -> float:
        return -g1 * (1 - t) / math.hypot(1 - t, beta2) + g2 * t / math.hypot(t, beta1)

    return phi, derivative


def more_thuente_3():
    beta, waves = 0.01, 39

    def phi0(t: float) -> float:
        if t <= 1 - beta:
            return 1 - t
        if t >= 1 + beta:
            return t - 1
        return (t - 1) ** 2 / (2 * beta) + beta / 2

    def derivative0(t: float) -> float:
        if t <= 1 - beta:
            return -1.0
        return 1.0 if t >= 1 + beta else (t - 1) / beta

    k = waves * math.pi / 2
    return (
        lambda t: phi0(t) + (1 - beta) / k * math.sin(k * t),
        lambda t: derivative0(t) + (1 - beta) * math.cos(k * t),
    )


FAMOUS = [
    (lambda t: -t / (t * t + 2), lambda t: (t * t - 2) / (t * t + 2) ** 2),
    (
        lambda t: (t + 0.004) ** 5 - 2 * (t + 0.004) ** 4,
        lambda t: 5 * (t + 0.004) ** 4 - 8 * (t + 0.004) ** 3,
    ),
    more_thuente_3(),
    yanai(0.001, 0.001),
    yanai(0.01, 0.001),
    yanai(0.001, 0.01),
]


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("step", [1e-3, 1e-1, 1e1, 1e3])
def test_famous_functions(number: int, step: float) -> None:
    phi, derivative = FAMOUS[number]
    at, done, search = search_one(phi, derivative, step)
    assert done
    assert_strong_wolfe(phi, derivative, at)
    assert search.evaluations[0] <= 15


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("step", [1e-3, 1e-1, 1e1, 1e3])
def test_same_steps_as_minpack(number: int, step: float) -> None:
    """SciPy holds a translation of the authors' own program."""
    from scipy.optimize._dcsrch import DCSRCH

    phi, derivative = FAMOUS[number]
    theirs = DCSRCH(phi, derivative, ARMIJO, CURVATURE, 1e-14, 0.0, 1e6)
    expected, *_ = theirs(step, phi(0.0), derivative(0.0), maxiter=30)
    at, _, _ = search_one(phi, derivative, step)
    assert at == pytest.approx(expected, rel=1e-9)


def test_searches_in_a_batch_are_independent() -> None:
    steps = np.array([1e-3, 1e1, 1e-1, 1e3, 1.0, 1e-2])
    search = LineSearch(6)
    search.begin(
        np.arange(6),
        np.array([phi(0.0) for phi, _ in FAMOUS]),
        np.array([derivative(0.0) for _, derivative in FAMOUS]),
        steps,
    )
    accepted: dict[int, float] = {}
    for _ in range(20):
        at = search.step.copy()
        done, _ = search.advance(
            np.array([phi(t) for (phi, _), t in zip(FAMOUS, at, strict=True)]),
            np.array([dphi(t) for (_, dphi), t in zip(FAMOUS, at, strict=True)]),
        )
        for row in np.flatnonzero(done):
            accepted.setdefault(int(row), float(at[row]))
    for row, (phi, derivative) in enumerate(FAMOUS):
        alone, _, _ = search_one(phi, derivative, float(steps[row]))
        assert accepted[row] == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("edge", [0.3, 1e-3, 1e-6])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_region_without_values_is_left(edge: float, bad: float) -> None:
    def phi(t: float) -> float:
        return bad if t > edge else -t + t * t / (2 * edge)

    def derivative(t: float) -> float:
        return bad if t > edge else -1 + t / edge

    at, done, _ = search_one(phi, derivative, 1.0)
    assert done
    assert at <= edge
    assert_strong_wolfe(phi, derivative, at)


def test_a_function_without_minimum_is_given_up() -> None:
    _, done, search = search_one(lambda t: -t, lambda t: -1.0, 1.0)
    assert not done
    assert search.evaluations[0] <= 20
    assert search.step[0] <= 1e6


def test_a_wrong_slope_is_given_up() -> None:
    """Rounding can make every step look worse than the start."""
    _, done, search = search_one(lambda t: t, lambda t: -1.0, 1.0)
    assert not done
    assert search.evaluations[0] <= 20


# --- the direction ----------------------------------------------------------------


def two_loops(pairs: list[tuple[Tensor, Tensor]], gradient: Tensor) -> Tensor:
    """The textbook recursion (Nocedal and Wright, Algorithm 7.4) for one trial."""
    q, alphas = gradient.clone(), []
    for s, y in reversed(pairs):
        alpha = (s @ q) / (s @ y)
        alphas.append(alpha)
        q = q - alpha * y
    if pairs:
        s, y = pairs[-1]
        q = q * (s @ y) / (y @ y)
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        q = q + s * (alpha - (y @ q) / (s @ y))
    return -q


def curved_pairs(trials: int, count: int, size: int, seed: int):
    """Steps and gradient changes of random positive-definite matrices."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(trials, size, size, generator=generator).to(F64)
    a = root @ root.mT + 0.5 * torch.eye(size, dtype=F64)
    s = torch.randn(count, trials, size, generator=generator).to(F64)
    return s, torch.einsum("tij,ktj->kti", a, s)


@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 20])
def test_direction_is_that_of_two_loops(length: int, count: int) -> None:
    trials, size = 3, 12
    s, y = curved_pairs(trials, max(count, 1), size, seed=count)
    history = History(trials, size, torch.zeros(1, dtype=F64), length=length)
    kept: list[list] = [[] for _ in range(trials)]
    gradient = torch.randn(trials, size, dtype=F64)
    history.direction(gradient)
    for k in range(count):
        # Trial 0 takes every pair, trial 1 every second one, trial 2 few.
        rows = [t for t in range(trials) if k % (1, 2, 5)[t] == 0]
        gradient[rows] += y[k, rows]
        history.add(torch.tensor(rows), s[k, rows], gradient[rows])
        for t in rows:
            kept[t].append((s[k, t], y[k, t]))
        found = history.direction(gradient)
        for t in range(trials):
            expected = two_loops(kept[t][-length:], gradient[t])
            assert torch.allclose(found[t], expected, rtol=1e-8, atol=1e-9)
            assert float(found[t] @ gradient[t]) < 0
    if count == 0:
        gradient = torch.randn(trials, size, dtype=F64)
        assert torch.equal(history.direction(gradient), -gradient)


def test_forgetting_and_dropping_trials() -> None:
    trials, size = 4, 6
    s, y = curved_pairs(trials, 5, size, seed=0)
    history = History(trials, size, torch.zeros(1, dtype=F64), length=3)
    gradient = torch.randn(trials, size, dtype=F64)
    history.direction(gradient)
    for k in range(5):
        gradient += y[k]
        history.add(torch.arange(trials), s[k], gradient)
        history.direction(gradient)
    history.forget(torch.tensor([1]))
    found = history.direction(gradient)
    pairs = [[(s[k, t], y[k, t]) for k in (2, 3, 4)] for t in range(trials)]
    for t in (0, 2, 3):
        assert torch.allclose(found[t], two_loops(pairs[t], gradient[t]), rtol=1e-8)
    assert torch.equal(found[1], -gradient[1])
    history.keep(torch.tensor([0, 3]))
    again = history.direction(gradient[[0, 3]])
    assert torch.allclose(again, found[[0, 3]], rtol=1e-10)
    gradient[3] += y[0, 3]
    history.add(torch.tensor([1]), s[:1, 3], gradient[3:])
    pairs[3] = [*pairs[3][1:], (s[0, 3], y[0, 3])]
    assert torch.allclose(
        history.direction(gradient[[0, 3]])[1],
        two_loops(pairs[3], gradient[3]),
        rtol=1e-8,
    )


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan])
def test_pairs_without_curvature_are_left_out(bad: float) -> None:
    history = History(2, 3, torch.zeros(1, dtype=F64))
    s, y = torch.ones(2, 3, dtype=F64), torch.ones(2, 3, dtype=F64)
    y[0] *= bad
    history.direction(torch.zeros(2, 3, dtype=F64))
    history.add(torch.arange(2), s, y)
    assert history.used.tolist() == [0, 1]
    gradient = torch.ones(2, 3, dtype=F64)
    assert torch.equal(history.direction(gradient)[0], -gradient[0])


# --- stopping, replacing, interrupting --------------------------------------------


def test_replaced_trials_start_afresh() -> None:
    objective, minimisers = quadratics(3, 5, 10.0)
    first = []

    def broken(x: Tensor, which: Tensor):
        loss, slope = objective(x, which)
        bad = (which == 1) & (x.abs().amax(1) > 50)
        return torch.where(bad, math.nan, loss), torch.where(
            bad[:, None], math.nan, slope
        )

    def replace(trial: int, state: TrialState) -> Tensor | None:
        first.append((trial, state.stopped, state.evaluations))
        return torch.zeros(5, dtype=F64) if len(first) == 1 else None

    starts = torch.zeros(3, 5, dtype=F64)
    starts[1] = 100.0
    states = run(broken, starts, tolerance=1e-18, replace=replace)
    assert first[0] == (1, "the loss or its gradient is not finite at the start", 1)
    alone = run(objective, torch.zeros(3, 5, dtype=F64), tolerance=1e-18)
    for state, reference, minimiser in zip(states, alone, minimisers, strict=True):
        assert torch.allclose(state.point, minimiser, atol=1e-7)
        assert state.evaluations == reference.evaluations
        assert state.updates == reference.updates
        assert state.trace == pytest.approx(reference.trace, rel=1e-9, abs=1e-18)


def test_a_replacement_may_fail_as_well() -> None:
    def broken(x: Tensor, which: Tensor):
        loss = x.square().sum(1)
        return torch.where(which == 0, math.inf, loss), 2 * x

    tries = []

    def replace(trial: int, state: TrialState) -> Tensor | None:
        if trial == 0:
            tries.append(state.stopped)
            return torch.ones(2, dtype=F64) if len(tries) < 4 else None
        return None

    states = run(broken, torch.ones(2, 2, dtype=F64), tolerance=1e-12, replace=replace)
    assert len(tries) == 4
    assert states[0].stopped.startswith("the loss or its gradient is not finite")
    assert states[1].stopped == "small enough"


def test_a_gradient_that_is_not_finite_at_the_start() -> None:
    def objective(x: Tensor, which: Tensor):
        slope = 2 * x
        slope[which == 0] = math.nan
        return x.square().sum(1), slope

    states = run(objective, torch.ones(2, 2, dtype=F64), tolerance=1e-12)
    assert states[0].stopped == "the loss or its gradient is not finite at the start"
    assert states[0].evaluations == 1
    assert states[1].stopped == "small enough"


def test_a_pointed_function_ends_at_its_point() -> None:
    def objective(x: Tensor, which: Tensor):
        return x.abs().sum(1), torch.where(x < 0, -1.0, 1.0).to(F64)

    (state,) = run(objective, torch.ones(1, 1, dtype=F64), tolerance=-1.0)
    assert state.stopped == "the line search finds no lower point"
    assert state.loss < 1e-10
    assert state.evaluations < 300


def test_a_flat_function_stands_still() -> None:
    def objective(x: Tensor, which: Tensor):
        return torch.ones(len(x), dtype=F64), torch.zeros_like(x)

    starts = torch.ones(1, 3, dtype=F64)
    (state,) = run(objective, starts, iterations=2)
    assert state.stopped == "budget"
    assert torch.equal(state.point, starts[0])
    assert state.trace == [1.0, 1.0, 1.0]


def test_a_wall_of_nan_is_avoided() -> None:
    """-log(2 - x) - x / 10 has its wall at 2 and falls to the left."""

    def objective(x: Tensor, which: Tensor):
        return (x - 1).square().sum(1) - torch.log(1.1 - x).sum(1), 2 * (x - 1) + 1 / (
            1.1 - x
        )

    states = run(objective, torch.full((1, 2), -5.0, dtype=F64), iterations=3)
    loss, slope = objective(states[0].point[None], torch.tensor([0]))
    assert math.isfinite(float(loss))
    assert float(slope.abs().max()) < 1e-6


def test_stop_at_the_start() -> None:
    objective, minimisers = quadratics(2, 4, 2.0)
    states = run(objective, minimisers.clone(), tolerance=1e-12)
    for state in states:
        assert (state.stopped, state.updates, state.evaluations) == (
            "small enough",
            0,
            1,
        )
        assert len(state.trace) == 1


class Stop(Exception):
    """Something that ends the run from inside."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
@pytest.mark.parametrize("when", [0, 1, 4])
def test_an_interruption_leaves_the_latest_points(error, when: int) -> None:
    """Every state's loss is the loss at its point, also in mid-iteration."""
    objective, _ = quadratics(4, 8, 1e3)

    def inspect(trial: int, state: TrialState) -> str:
        if trial == 0:
            return "early" if len(state.trace) > 1 else ""
        if trial == 2 and len(state.trace) > when:
            raise error
        return ""

    starts = torch.zeros(4, 8, dtype=F64)
    # Trials of different difficulty are at different places at the same time.
    starts[1] = 30.0
    starts[3] = -500.0
    minimiser = Minimiser(objective, starts, inspect=inspect, replace=lambda *_: None)
    with pytest.raises(error):
        minimiser.run()
    for trial, state in enumerate(minimiser.states):
        loss, _ = objective(state.point[None], torch.tensor([trial]))
        assert state.loss == pytest.approx(float(loss), rel=1e-12)
        assert state.stopped == ("early" if trial == 0 and when > 1 else "")


def test_an_interruption_in_the_objective_leaves_the_latest_points() -> None:
    objective, _ = quadratics(3, 8, 1e3)
    for limit in range(1, 60, 7):
        calls = 0

        def watched(x: Tensor, which: Tensor, limit: int = limit):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise KeyboardInterrupt
            return objective(x, which)

        def inspect(trial: int, state: TrialState) -> str:
            return "early" if trial == 0 and len(state.trace) > 1 else ""

        starts = torch.zeros(3, 8, dtype=F64)
        minimiser = Minimiser(watched, starts, inspect=inspect, replace=lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            minimiser.run()
        for trial, state in enumerate(minimiser.states):
            loss, _ = objective(state.point[None], torch.tensor([trial]))
            assert state.loss == pytest.approx(float(loss), rel=1e-12)


def test_starts_are_not_changed() -> None:
    objective, _ = quadratics(2, 4, 2.0)
    starts = torch.zeros(2, 4, dtype=F64)
    run(objective, starts, tolerance=1e-12)
    assert float(starts.abs().max()) == 0
