"""L-BFGS for many independent problems at once. Taught in: notebooks/02_dlg_four_steps.

Every problem (trial) keeps its own history, its own strong-Wolfe line search and its
own reasons to stop; only the evaluations of the function are shared in one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# (x (A, n), which of the T trials they belong to (A,)) -> loss (A,), gradient (A, n)
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

UPDATES_PER_ITERATION = 20
NO_LOWER_POINT = "the line search finds no lower point"
_MOST_PAIRS, _FEWEST_PAIRS = 100, 20
_HISTORY_BYTES = 64 * 2**20  # beyond this, reading the history costs too much
_ARMIJO, _CURVATURE = 1e-4, 0.9  # the usual constants of strong Wolfe for quasi-Newton
_MAX_STEP = 1e6
_LINE_SEARCH_EVALUATIONS = 20


class LineSearch:
    """Moré-Thuente line searches, one per trial, advanced one evaluation at a time.

    All arrays have one entry per trial and live in NumPy: they are tiny, and one
    transfer per evaluation is all that a GPU has to wait for.

    Source: Moré and Thuente (1994), Algorithm 3.1 and Section 4.
    """

    def __init__(self, trials: int):
        zeros = np.zeros(trials)
        # value and slope at 0, at the best point x, and at the other end y
        self.f0, self.d0 = zeros.copy(), zeros.copy()
        self.x, self.fx, self.dx = zeros.copy(), zeros.copy(), zeros.copy()
        self.y, self.fy, self.dy = zeros.copy(), zeros.copy(), zeros.copy()
        self.step = zeros.copy()
        self.width, self.width_before = zeros.copy(), zeros.copy()
        self.bracketed = np.zeros(trials, dtype=bool)
        self.first_stage = np.ones(trials, dtype=bool)
        self.evaluations = np.zeros(trials, dtype=int)

    def begin(
        self, who: np.ndarray, f: np.ndarray, d: np.ndarray, step: np.ndarray
    ) -> None:
        """Start new searches for the trials ``who`` from value f and slope d < 0."""
        self.f0[who], self.d0[who] = f, d
        self.x[who], self.fx[who], self.dx[who] = 0.0, f, d
        self.y[who], self.fy[who], self.dy[who] = 0.0, f, d
        self.step[who] = step
        self.width[who], self.width_before[who] = _MAX_STEP, 2 * _MAX_STEP
        self.bracketed[who], self.first_stage[who] = False, True
        self.evaluations[who] = 0

    def keep(self, rows: np.ndarray) -> None:
        """Drop all trials but ``rows``."""
        for name, value in vars(self).items():
            setattr(self, name, value[rows])

    def advance(self, f: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take in value f and slope d at ``step`` and choose the next steps.

        Returns:
            Which searches have met the strong Wolfe conditions, and which have
            given up. The others have a new ``step``.
        """
        self.evaluations += 1
        finite = np.isfinite(f) & np.isfinite(d)
        with np.errstate(invalid="ignore"):  # a trial that is about to be replaced
            allowed = self.f0 + _ARMIJO * self.step * self.d0
        done = finite & (f <= allowed) & (np.abs(d) <= -_CURVATURE * self.d0)
        failed = ~done & (self.evaluations >= _LINE_SEARCH_EVALUATIONS)
        going = np.flatnonzero(~done & ~failed)
        if len(going) == 0:
            return done, failed
        bad = going[~finite[going]]
        self.step[bad] = self.x[bad] + 0.1 * (self.step[bad] - self.x[bad])
        good = going[finite[going]]
        if len(good):
            self._refine(good, f[good], d[good], allowed[good])
        # Narrower than this, values differ by rounding only.
        span = np.abs(self.y - self.x)
        failed |= ~done & self.bracketed & (span <= 1e-7 * np.abs(self.y))
        return done, failed

    def _refine(
        self, who: np.ndarray, f: np.ndarray, d: np.ndarray, allowed: np.ndarray
    ) -> None:
        slope = _ARMIJO * self.d0[who]
        t = self.step[who]
        self.first_stage[who] &= ~((f <= allowed) & (d >= 0))
        # In the first stage the function minus its Armijo line is searched instead.
        shift = np.where(
            self.first_stage[who] & (f <= self.fx[who]) & (f > allowed), slope, 0.0
        )
        ends = {
            "x": self.x[who],
            "fx": self.fx[who] - shift * self.x[who],
            "dx": self.dx[who] - shift,
            "y": self.y[who],
            "fy": self.fy[who] - shift * self.y[who],
            "dy": self.dy[who] - shift,
        }
        low, high = self._limits(who, t)
        new, bracketed, ends = _next_step(
            ends, t, f - shift * t, d - shift, self.bracketed[who], low, high
        )
        self.x[who], self.y[who] = ends["x"], ends["y"]
        self.fx[who] = ends["fx"] + shift * ends["x"]
        self.fy[who] = ends["fy"] + shift * ends["y"]
        self.dx[who], self.dy[who] = ends["dx"] + shift, ends["dy"] + shift
        self.bracketed[who] = bracketed
        span = np.abs(ends["y"] - ends["x"])
        slow = bracketed & (span >= 0.66 * self.width_before[who])
        new = np.where(slow, ends["x"] + 0.5 * (ends["y"] - ends["x"]), new)
        self.width_before[who] = np.where(
            bracketed, self.width[who], self.width_before[who]
        )
        self.width[who] = np.where(bracketed, span, self.width[who])
        self.step[who] = np.clip(new, 1e-20, _MAX_STEP)

    def _limits(self, who: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest step that the next one may take."""
        x, y = self.x[who], self.y[who]
        free_low = t + 1.1 * (t - x)
        free_high = t + 4.0 * (t - x)
        inside = self.bracketed[who]
        low = np.where(inside, np.minimum(x, y), free_low)
        return low, np.where(inside, np.maximum(x, y), free_high)


def _next_step(
    ends: dict[str, np.ndarray],
    t: np.ndarray,
    f: np.ndarray,
    d: np.ndarray,
    bracketed: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The safeguarded cubic or quadratic step of Moré and Thuente (1994), Section 4.

    All four cases are computed for every trial and selected afterwards.
    """
    x, fx, dx = ends["x"], ends["fx"], ends["dx"]
    y, fy, dy = ends["y"], ends["fy"], ends["dy"]
    with np.errstate(all="ignore"):
        turned = d * np.sign(dx) < 0

        theta = 3 * (fx - f) / (t - x) + dx + d
        size = np.maximum(np.maximum(np.abs(theta), np.abs(dx)), np.abs(d))
        root = size * np.sqrt(
            np.maximum(0.0, (theta / size) ** 2 - (dx / size) * (d / size))
        )
        # 1: higher value: the minimum lies between x and t
        gamma = np.where(t < x, -root, root)
        r = ((gamma - dx) + theta) / (((gamma - dx) + gamma) + d)
        cubic = x + r * (t - x)
        quadratic = x + (dx / ((fx - f) / (t - x) + dx)) / 2 * (t - x)
        near = np.abs(cubic - x) < np.abs(quadratic - x)
        step1 = np.where(near, cubic, cubic + (quadratic - cubic) / 2)
        # 2: lower value, slope changed sign
        gamma = np.where(t > x, -root, root)
        r = ((gamma - d) + theta) / (((gamma - d) + gamma) + dx)
        cubic = t + r * (x - t)
        secant = t + d / (d - dx) * (x - t)
        step2 = np.where(np.abs(cubic - t) > np.abs(secant - t), cubic, secant)
        # 3: lower value, same sign, flatter
        r = ((gamma - d) + theta) / ((gamma + (dx - d)) + gamma)
        edge = np.where(t > x, high, low)
        cubic = np.where((r < 0) & (gamma != 0), t + r * (x - t), edge)
        closer = np.abs(cubic - t) < np.abs(secant - t)
        inner = np.where(closer, cubic, secant)
        guard = t + 0.66 * (y - t)
        inner = np.where(t > x, np.minimum(guard, inner), np.maximum(guard, inner))
        outer = np.clip(np.where(closer, secant, cubic), low, high)
        step3 = np.where(bracketed, inner, outer)
        # 4: lower value, same sign, not flatter
        theta = 3 * (f - fy) / (y - t) + dy + d
        size = np.maximum(np.maximum(np.abs(theta), np.abs(dy)), np.abs(d))
        root = size * np.sqrt(
            np.maximum(0.0, (theta / size) ** 2 - (dy / size) * (d / size))
        )
        gamma = np.where(t > y, -root, root)
        r = ((gamma - d) + theta) / (((gamma - d) + gamma) + dy)
        step4 = np.where(bracketed, t + r * (y - t), edge)

    higher = f > fx
    flatter = np.abs(d) < np.abs(dx)
    new = np.select([higher, turned, flatter], [step1, step2, step3], step4)
    bracketed = bracketed | higher | turned

    # The interval that holds the minimum: x is always its best end.
    flip = ~higher & turned
    ends = {
        "y": np.where(higher, t, np.where(flip, x, y)),
        "fy": np.where(higher, f, np.where(flip, fx, fy)),
        "dy": np.where(higher, d, np.where(flip, dx, dy)),
        "x": np.where(higher, x, t),
        "fx": np.where(higher, fx, f),
        "dx": np.where(higher, dx, d),
    }
    middle = (ends["x"] + ends["y"]) / 2
    fallback = np.where(bracketed, middle, high)
    return np.where(np.isfinite(new), new, fallback), bracketed, ends


class History:
    """Curvature pairs of every trial, and the L-BFGS direction in compact form.

    Positions are a ring buffer per trial. A new y is a difference of two gradients, so
    its products with all pairs are a difference of products that the directions have
    formed anyway: a direction costs two passes over the memory and a pair none.

    Source: Byrd, Nocedal and Schnabel (1994), Theorem 2.4, for the compact inverse.
    """

    def __init__(self, trials: int, size: int, like: Tensor, length: int | None = None):
        if length is None:  # long histories where they are cheap
            pair = 2 * trials * size * like.element_size()
            length = min(_MOST_PAIRS, max(_FEWEST_PAIRS, _HISTORY_BYTES // pair))
        self.length = length
        self.pairs = like.new_zeros(trials, 2 * length, size)  # s rows, then y rows
        products = like.new_zeros(trials, length, length, dtype=torch.float64)
        self.sy = products  # s_i . y_j, for s_i not younger than y_j
        self.yy = products.clone()  # y_i . y_j
        self.used = torch.zeros(trials, dtype=torch.long, device=like.device)
        # The gradient of the last direction, and its products with all pairs.
        self.gradient = like.new_zeros(trials, size)
        self.along = like.new_zeros(trials, 2 * length, dtype=torch.float64)
        self.added = torch.zeros(trials, dtype=torch.bool, device=like.device)

    def keep(self, rows: Tensor) -> None:
        """Drop all trials but ``rows``."""
        for name in ("pairs", "sy", "yy", "used", "gradient", "along", "added"):
            setattr(self, name, getattr(self, name)[rows])

    def forget(self, rows: Tensor) -> None:
        """Start afresh for the trials ``rows``."""
        self.pairs[rows], self.sy[rows], self.yy[rows] = 0, 0, 0
        self.along[rows], self.used[rows], self.added[rows] = 0, 0, False

    def add(self, rows: Tensor, s: Tensor, gradient: Tensor) -> None:
        """Store the step to ``gradient`` from where the last direction was taken.

        Pairs without curvature are left out. Rows of other trials are as they were.
        """
        y = gradient - self.gradient[rows]
        curvature = (s * y).sum(1, dtype=torch.float64)
        enough = curvature > 1e-10 * (y * y).sum(1, dtype=torch.float64)
        rows, s, y = rows[enough], s[enough], y[enough]
        if len(rows) == 0:
            return
        slot = self.used[rows] % self.length
        self.pairs[rows, slot] = s
        self.pairs[rows, self.length + slot] = y
        self.used[rows] += 1
        self.added[rows] = True

    def direction(self, gradient: Tensor) -> Tensor:
        """Minus the approximate inverse Hessian times ``gradient`` (T, n)."""
        m, device = self.length, gradient.device
        along = (gradient[:, None, :] @ self.pairs.mT)[:, 0].double()
        self._take_in(along)
        self.gradient, self.along = gradient.clone(), along
        # Oldest pair first, unused places last, as the triangle R below needs it.
        first = torch.where(self.used > m, self.used % m, 0)
        order = (first[:, None] + torch.arange(m, device=device)) % m
        valid = torch.arange(m, device=device) < self.used[:, None]
        # Only the triangle above the diagonal is ever read.
        places = m * order[:, :, None] + order[:, None, :]
        r = self.sy.flatten(1).gather(1, places.flatten(1)).unflatten(1, (m, m))
        curvatures = r.diagonal(dim1=1, dim2=2).masked_fill(~valid, 1.0)
        r.diagonal(dim1=1, dim2=2).copy_(curvatures)
        last = (self.used - 1).clamp_min(0)
        newest = self.yy.diagonal(dim1=1, dim2=2).gather(1, last[:, None] % m)[:, 0]
        youngest = curvatures.gather(1, last.clamp_max(m - 1)[:, None])[:, 0]
        scale = torch.where(
            self.used == 0, 1.0, youngest / torch.where(newest > 0, newest, 1.0)
        )[:, None]

        sg = along[:, :m].gather(1, order)
        rsg = torch.linalg.solve_triangular(r, sg[:, :, None], upper=True)[:, :, 0]
        placed = torch.zeros_like(rsg).scatter_(1, order, rsg)
        bent = (self.yy @ placed[:, :, None])[:, :, 0] - along[:, m:]
        inner = curvatures * rsg + scale * bent.gather(1, order)
        along_s = torch.linalg.solve_triangular(r.mT, inner[:, :, None], upper=False)
        along_s = torch.zeros_like(rsg).scatter_(1, order, along_s[:, :, 0])
        weights = torch.cat([along_s, -scale * placed], dim=1).to(gradient.dtype)
        combined = (weights[:, None, :] @ self.pairs)[:, 0]
        return -(scale.to(gradient.dtype) * gradient + combined)

    def _take_in(self, along: Tensor) -> None:
        """Form the products of the pairs that are new since the last direction."""
        rows = self.added.nonzero()[:, 0]
        if len(rows) == 0:
            return
        m, slot = self.length, (self.used[rows] - 1) % self.length
        s, y = self.pairs[rows, slot], self.pairs[rows, m + slot]
        products = along[rows] - self.along[rows]  # of y
        every = torch.arange(len(rows), device=rows.device)
        # The old products at the new places are those of pairs that are gone.
        products[every, slot] = (s * y).sum(1, dtype=torch.float64)
        products[every, m + slot] = (y * y).sum(1, dtype=torch.float64)
        self.sy[rows, slot, :] = 0
        self.sy[rows, :, slot] = products[:, :m]
        self.yy[rows, :, slot] = products[:, m:]
        self.yy[rows, slot, :] = products[:, m:]
        self.added[rows] = False


@dataclass
class TrialState:
    """One trial as its owner sees it: the latest accepted point and how it got there.

    ``loss`` is the value at ``point``; ``stopped`` is empty while the trial runs.
    """

    point: Tensor
    loss: float = float("nan")
    updates: int = 0
    evaluations: int = 0
    stopped: str = ""
    trace: list[float] = field(default_factory=list)  # loss after every iteration

    @property
    def iterations(self) -> int:
        """Outer steps begun, of up to 20 updates each."""
        return -(-self.updates // UPDATES_PER_ITERATION)


# Asked after every full iteration of a trial: a reason to stop it, or "".
Inspector = Callable[[int, TrialState], str]
# Asked when a trial has stopped: a point to start again from, or None.
Replacer = Callable[[int, TrialState], "Tensor | None"]


class Minimiser:
    """L-BFGS on many points at once, until each of them has a reason to stop.

    Args:
        objective: Losses and gradients of a batch of points; it is told to which
            trials they belong.
        starts: Shape (T, n), one start per trial.
        inspect: Called at the start and after every iteration (20 updates) of a
            trial with its number and state; a non-empty answer stops it.
        replace: Called with a trial that has stopped; another start makes it run
            again, with counters at zero.

    Attributes:
        states: The latest state of every trial, also after an interruption.

    Source: Liu and Nocedal (1989), Moré and Thuente (1994).
    Taught in: notebooks/02_dlg_four_steps.
    """

    def __init__(
        self,
        objective: Objective,
        starts: Tensor,
        *,
        inspect: Inspector,
        replace: Replacer,
    ):
        self.objective, self.inspect, self.replace = objective, inspect, replace
        trials, size = starts.shape
        self.states = [TrialState(point=start.clone()) for start in starts]
        # Rows of all arrays are the trials still running.
        self.trials = np.arange(trials)
        self.x = starts.clone()
        self.g = torch.zeros_like(self.x)
        self.direction = torch.zeros_like(self.x)
        self.f = np.full(trials, np.nan)
        self.fresh = np.ones(trials, dtype=bool)  # no gradient known yet
        self.steepest = np.ones(trials, dtype=bool)
        self.search = LineSearch(trials)
        self.history = History(trials, size, starts)

    def run(self) -> list[TrialState]:
        """Advance until no trial is running; return the last state of each."""
        while len(self.trials):
            self._advance()
        return self.states

    def _advance(self) -> None:
        """One evaluation for every running trial, and what follows from it."""
        step = torch.as_tensor(self.search.step, dtype=self.x.dtype).to(self.x.device)
        candidate = torch.addcmul(self.x, step[:, None], self.direction)
        trials = torch.as_tensor(self.trials, device=self.x.device)
        loss, gradient = self.objective(candidate, trials)
        slope = (gradient * self.direction).sum(1, dtype=torch.float64)
        numbers = torch.stack([loss.double(), slope]).cpu().numpy()
        f, d = numbers[0], numbers[1]
        for trial in self.trials:
            self.states[trial].evaluations += 1

        begun = self.fresh.copy()
        done, failed = self.search.advance(f, d)
        done, failed = done & ~begun, failed & ~begun
        # A search that gave up still keeps a lower point, if it stands on one.
        finite = np.isfinite(f) & np.isfinite(d)  # the slope shows a bad gradient
        lower = failed & finite & (f < self.f)
        accepted = done | lower | begun
        reasons: dict[int, str] = {}
        for row in np.flatnonzero(begun & ~finite).tolist():
            reasons[row] = "the loss or its gradient is not finite at the start"
        hopeless = failed & ~lower & self.steepest
        for row in np.flatnonzero(hopeless).tolist():
            reasons[row] = NO_LOWER_POINT
        # A failed search along a quasi-Newton direction: forget the curvature.
        forget = np.flatnonzero(failed)
        if len(forget):
            self.history.forget(torch.as_tensor(forget, device=self.x.device))

        self._accept(np.flatnonzero(accepted & ~begun), candidate, gradient, f, failed)
        rows = np.flatnonzero(begun)
        if len(rows):
            index = torch.as_tensor(rows, device=self.x.device)
            self.g[index] = gradient[index]
            self.f[rows] = f[rows]
            self.fresh[rows] = False
        self._report(np.flatnonzero(accepted), begun, reasons)
        self._new_directions(np.flatnonzero(accepted | failed))
        self._retire(reasons)

    def _accept(
        self,
        rows: np.ndarray,
        candidate: Tensor,
        gradient: Tensor,
        f: np.ndarray,
        failed: np.ndarray,
    ) -> None:
        if len(rows) == 0:
            return
        index = torch.as_tensor(rows, device=self.x.device)
        new_x, new_g = candidate[index], gradient[index]
        keeps = torch.as_tensor(~failed[rows], device=self.x.device)
        s = new_x - self.x[index]
        self.history.add(index[keeps], s[keeps], new_g[keeps])
        self.x[index], self.g[index] = new_x, new_g
        self.f[rows] = f[rows]
        for row in rows:
            self.states[self.trials[row]].updates += 1

    def _report(
        self, rows: np.ndarray, begun: np.ndarray, reasons: dict[int, str]
    ) -> None:
        # First all states, so that they agree if one inspection ends the run.
        for row in rows.tolist():
            state = self.states[self.trials[row]]
            state.loss, state.point = float(self.f[row]), self.x[row]
        for row in rows.tolist():
            state = self.states[self.trials[row]]
            if not begun[row] and state.updates % UPDATES_PER_ITERATION:
                continue
            state.trace.append(state.loss)
            if row not in reasons:
                reason = self.inspect(int(self.trials[row]), state)
                if reason:
                    reasons[row] = reason

    def _new_directions(self, rows: np.ndarray) -> None:
        if len(rows) == 0:
            return
        index = torch.as_tensor(rows, device=self.x.device)
        everyone = len(rows) == len(self.trials)
        directions = self.history.direction(self.g)
        slopes = (self.g * directions).sum(1, dtype=torch.float64)
        uphill = ~(slopes < 0) | ~torch.isfinite(directions).all(1)
        if bool(uphill[index].any()):  # rounding spoilt the history
            chosen = index[uphill[index]]
            self.history.forget(chosen)
            directions[chosen] = -self.g[chosen]
            slopes[chosen] = -self.g[chosen].double().square().sum(1)
        if everyone:
            self.direction = directions
        else:
            self.direction[index] = directions[index]
        first = (self.history.used == 0)[index]
        norm = self.g[index].double().abs().sum(1).clamp_min(1e-300)
        step = torch.where(first, (1.0 / norm).clamp_max(1.0), 1.0).cpu().numpy()
        self.steepest[rows] = first.cpu().numpy()
        self.search.begin(rows, self.f[rows], slopes[index].cpu().numpy(), step)

    def _retire(self, reasons: dict[int, str]) -> None:
        """Replace stopped trials by new starts, or drop them from the batch."""
        leaving = []
        for row in sorted(reasons):
            trial = int(self.trials[row])
            state = self.states[trial]
            state.point = self.x[row].clone()
            state.stopped = reasons[row]
            start = self.replace(trial, state)
            if start is None:
                leaving.append(row)
                continue
            self.states[trial] = TrialState(point=start.clone())
            index = torch.as_tensor([row], device=self.x.device)
            self.x[row], self.direction[row] = start, 0
            self.history.forget(index)
            self.search.step[row] = 0.0
            self.fresh[row] = True
        if leaving:
            self._drop(np.array(leaving))

    def _drop(self, leaving: np.ndarray) -> None:
        rows = np.setdiff1d(np.arange(len(self.trials)), leaving)
        index = torch.as_tensor(rows, device=self.x.device)
        self.x, self.g = self.x[index], self.g[index]
        self.direction = self.direction[index]
        self.trials, self.f = self.trials[rows], self.f[rows]
        self.fresh, self.steepest = self.fresh[rows], self.steepest[rows]
        self.search.keep(rows)
        self.history.keep(index)
