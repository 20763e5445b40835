"""Adam and signed Adam for many independent problems at once.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradinv_helpers.attacks.optimise import (
    UPDATES_PER_ITERATION,
    Inspector,
    Objective,
    Replacer,
    TrialState,
)

_STEP = 0.025  # 0.1 in units of a typical standard deviation of pixels
_DECAY_AT = (3 / 8, 5 / 8, 7 / 8)
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class Adam:
    """Adam, on the gradient or on its signs, with a step that falls three times.

    The sign makes every pixel move at the same speed, however small its gradient,
    which helps where the loss is flat or jagged, as behind ReLU. The step is divided
    by 10 at 3/8, 5/8 and 7/8 of the budget, and every point is projected.

    Args:
        objective: Losses and gradients of a batch of points; it is told to which
            trials they belong.
        starts: Shape (T, n), one start per trial.
        iterations: Budget of every trial, in iterations of 20 updates.
        project: Maps points (A, n) to the nearest allowed ones.
        inspect: As for ``Minimiser``.
        replace: As for ``Minimiser``; a replaced trial gets the whole schedule.
        signed: Whether only the signs of the gradient count, as in Inverting Gradients.
        begun: Iterations that every trial has behind it, for one that is taken up
            again: its step has fallen accordingly.

    Attributes:
        states: The latest state of every trial, also after an interruption.

    Source: Geiping et al. (2020), Section 5 and Appendix A.
    Taught in: notebooks/03_stronger_matching.
    """

    def __init__(
        self,
        objective: Objective,
        starts: Tensor,
        *,
        iterations: int,
        project: Callable[[Tensor], Tensor],
        inspect: Inspector,
        replace: Replacer,
        signed: bool = True,
        begun: Sequence[int] | None = None,
    ):
        self.objective, self.project = objective, project
        self.inspect, self.replace, self.signed = inspect, replace, signed
        self.before = [b * UPDATES_PER_ITERATION for b in begun or [0] * len(starts)]
        self.budget = iterations * UPDATES_PER_ITERATION
        self.states = [TrialState(point=start.clone()) for start in starts]
        self.trials = list(range(len(starts)))
        self.x = starts.clone()
        self.best = [(math.inf, start) for start in starts]  # lowest loss, its point
        self.mean = torch.zeros_like(starts)
        self.square = torch.zeros_like(starts)

    def run(self) -> list[TrialState]:
        """Advance until no trial is running; return the last state of each."""
        while self.trials:
            self._advance()
        return self.states

    def _advance(self) -> None:
        """Look at every running trial, then move it by one update."""
        trials = torch.tensor(self.trials, device=self.x.device)
        loss, gradient = self.objective(self.x, trials)
        losses = loss.double().tolist()
        sound = torch.isfinite(gradient).all(1).tolist()
        reasons: dict[int, str] = {}
        for row, trial in enumerate(self.trials):
            state = self.states[trial]
            state.evaluations += 1
            state.loss = losses[row]
            state.point = self.x[row]
            if sound[row] and losses[row] < self.best[trial][0]:
                self.best[trial] = losses[row], self.x[row]
            if not sound[row] or losses[row] != losses[row]:
                state.loss = float("inf")
                reasons[row] = "the loss is not finite"
            elif state.updates % UPDATES_PER_ITERATION == 0:
                state.trace.append(state.loss)
                reason = self.inspect(trial, state)
                if reason:
                    reasons[row] = reason
        self._move([r for r in range(len(self.trials)) if r not in reasons], gradient)
        self._retire(reasons)

    def _move(self, rows: list[int], gradient: Tensor) -> None:
        """One step of Adam for the trials in ``rows``; their measured points stay."""
        states = [self.states[self.trials[row]] for row in rows]
        slope = torch.sign(gradient[rows]) if self.signed else gradient[rows]
        count = torch.tensor([state.updates for state in states]).to(self.x)[:, None]
        before = [self.before[self.trials[row]] for row in rows]
        spent = count + torch.tensor(before).to(self.x)[:, None]
        passed = sum((spent >= share * self.budget).to(self.x) for share in _DECAY_AT)
        self.mean[rows] = _BETA1 * self.mean[rows] + (1 - _BETA1) * slope
        self.square[rows] = _BETA2 * self.square[rows] + (1 - _BETA2) * slope.square()
        mean = self.mean[rows] / (1 - _BETA1 ** (count + 1))
        square = self.square[rows] / (1 - _BETA2 ** (count + 1))
        step = _STEP * 0.1**passed * mean / (square.sqrt() + _EPSILON)
        self.x = self.x.clone()
        self.x[rows] = self.project(self.x[rows] - step)
        for state in states:
            state.updates += 1

    def _retire(self, reasons: dict[int, str]) -> None:
        """Replace stopped trials by new starts, or drop them from the batch."""
        leaving = []
        for row, reason in sorted(reasons.items()):
            trial = self.trials[row]
            state = self.states[trial]
            if self.best[trial][0] < state.loss:  # the steps go up and down
                state.loss, state.point = self.best[trial]
            state.point, state.stopped = state.point.clone(), reason
            start = self.replace(trial, state)
            if start is None:
                leaving.append(row)
                continue
            self.states[trial], self.before[trial] = TrialState(start.clone()), 0
            self.best[trial] = math.inf, start
            self.x[row], self.mean[row], self.square[row] = start, 0, 0
        rows = [row for row in range(len(self.trials)) if row not in leaving]
        if leaving:
            self.x, self.mean = self.x[rows], self.mean[rows]
            self.square = self.square[rows]
            self.trials = [self.trials[row] for row in rows]
