"""Restarts of all clients: starting, watching, replacing, choosing.

Taught in: notebooks/02_dlg_four_steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gradinv_helpers.attacks.adam import Adam
from gradinv_helpers.attacks.levenberg_marquardt import LevenbergMarquardt
from gradinv_helpers.attacks.optimise import (
    NO_LOWER_POINT,
    Minimiser,
    TrialState,
)
from gradinv_helpers.attacks.problem import MatchingProblem
from gradinv_helpers.attacks.reconstruction import Reconstruction, Step, TrialReport
from gradinv_helpers.attacks.saved_state import Run, SavedState, Slot
from gradinv_helpers.compute import cpu_threads
from gradinv_helpers.errors import InputError

# A gradient within this share of the shared one is a match. Single images of LeNet are
# then beyond 45 dB, and the rounding of float32 stops most searches before 1e-5.
_MATCHED = 10**-4.5
# What Levenberg-Marquardt reaches: all the digits of the shared gradient.
_ALL_DIGITS = {torch.float32: 3e-7, torch.float64: 1e-12}
# Standing further away than this share counts as stuck: the trial is replaced.
_STUCK = 0.1
# A trial that gains less than this share of its loss in _PATIENCE iterations stands.
_STANDSTILL = 0.02
_PATIENCE = 10
# MAP under noise: neighbouring pixels differ by a Laplace law of this mean.
_PIXEL_STEP = 0.1
_STANDSTILL_OF_MAP = 1e-3
_SECONDS_BETWEEN_SAVES = 20.0


class Search:
    """One search: all restarts of the clients of one problem, as one batch.

    Args:
        problem: The matching loss.
        clients: Numbers of the clients in the caller's list.
        iterations: Outer steps per restart.
        restarts: Independent starts per client.
        seed: Seed of the starts; client k uses ``seed + k``.
        init_scale: Standard deviation of the noise around grey at the start.
        log_every: Iterations between two snapshots.
        on_step: Called after every iteration of every restart.
        guesses: Images (N, C, H, W) by row of the problem, from which its first
            restart begins where they are a better match than grey.
        denoise: Whether the residual of the best restart is noise, so that the MAP
            estimate under a smoothness prior follows.
        checkpoint: File that keeps the state, from which the same call goes on.

    Attributes:
        interrupted: Whether Ctrl-C ended the search.
    """

    def __init__(
        self,
        problem: MatchingProblem,
        *,
        clients: Sequence[int],
        iterations: int,
        restarts: int,
        seed: int,
        init_scale: float,
        log_every: int,
        on_step: Callable[[Step], None] | None,
        guesses: Mapping[int, Tensor] | None = None,
        denoise: bool = False,
        checkpoint: Path | None = None,
    ):
        self.problem, self.iterations = problem, iterations
        self.numbers, self.seed = tuple(clients), seed
        self.interrupted = False
        self.init_scale = init_scale
        self.log_every, self.on_step = log_every, on_step
        self.guesses, self.denoise = dict(guesses or {}), denoise
        rows = range(len(problem.updates))
        self.slots = [Slot(c, r) for c in rows for r in range(restarts)]
        self.all_slots = self.slots
        self.starts_drawn = [0 for _ in rows]
        self.solved = [False for _ in rows]
        self.final: dict[int, Slot] = {}  # the restart that the MAP estimate took up
        self.standstill = _STANDSTILL
        # Noise of a known size leaves a residual of its own: no need to go below it.
        share = _MATCHED
        if problem.plan.optimiser == "levenberg-marquardt":
            share = _ALL_DIGITS.get(problem.like.dtype, _MATCHED)
            self.problem = problem = problem.double()
        matched = problem.level(share)
        noise = problem.level(0.0, noise=problem.noise)
        self.noisy = [n > m for n, m in zip(noise, matched, strict=True)]
        self.tolerance = [max(m, n) for m, n in zip(matched, noise, strict=True)]
        self.stuck = problem.level(_STUCK)
        self.state = SavedState(checkpoint, self) if checkpoint else None

    def run(self) -> list[Reconstruction]:
        """Search until every restart has a reason to stop, and report the best."""
        begun = time.perf_counter()
        if self.state is not None:
            self.state.load()
        with cpu_threads(self.problem.work * len(self.slots)):
            waiting = [slot for slot in self.all_slots if not slot.finished]
            finished = self._minimise(waiting)
            blurred = [slot for slot in self.all_slots if self._needs_precision(slot)]
            if finished and blurred:
                self.problem = self.problem.double()
                finished = self._minimise([self._reopen(slot) for slot in blurred])
            if finished and self.denoise:
                self._denoise()
        seconds = time.perf_counter() - begun
        found = []
        for client in range(len(self.problem.updates)):
            if self.interrupted and not self._finite_runs(client):
                break
            found.append(self._reconstruction(client, seconds))
        if self.state is not None and not self.interrupted:
            self.state.remove()
        return found

    def _minimise(self, slots: list[Slot]) -> bool:
        """Run slots, new or taken up again; say whether they were left to finish."""
        self.slots = slots
        if not slots:
            return True
        clients = [slot.client for slot in slots]
        self.clients = torch.tensor(clients, device=self.problem.like.device)
        starts = torch.stack([self._start(slot) for slot in slots])
        optimiser = self.problem.plan.optimiser
        self.minimiser: Minimiser | Adam | LevenbergMarquardt
        if optimiser == "levenberg-marquardt":
            self.minimiser = LevenbergMarquardt(
                self._evaluate,
                starts,
                curvature=lambda x, trials: self.problem.curvature(
                    x, self.clients[trials]
                ),
                inspect=self._inspect,
                replace=self._replace,
            )
        elif self.problem.first_order:
            self.minimiser = Adam(
                self._evaluate,
                starts,
                iterations=self.iterations,
                project=self.problem.project,
                inspect=self._inspect,
                replace=self._replace,
                signed=optimiser == "signed-adam",
                begun=[slot.begun for slot in slots],
            )
        else:
            self.minimiser = Minimiser(
                self._evaluate, starts, inspect=self._inspect, replace=self._replace
            )
        try:
            self.minimiser.run()
        except KeyboardInterrupt:
            for slot, state in self.running():
                state.stopped = "interrupted"
                self._record(slot, state, replaced=False)
            self.interrupted = True
            if self.state is not None:
                self.state.save()
            return False
        return True

    def running(self) -> list[tuple[Slot, TrialState]]:
        """The restarts that have not stopped, with their latest states."""
        pairs = zip(self.slots, self.minimiser.states, strict=True)
        return [(slot, state) for slot, state in pairs if not state.stopped]

    def _denoise(self) -> None:
        """Go on from the best restart of every noisy client to its MAP estimate."""
        problem = self.problem.double()
        chosen: list[Slot] = []
        for client in range(len(problem.updates)):
            finite = [s for s in self._slots(client) if s.runs and s.loss < math.inf]
            if not finite:
                continue
            best = min(finite, key=lambda slot: slot.loss)
            noise = problem.squared_misfit(best.runs[-1].point, client)
            known = self.noisy[client]
            if not known and problem.num_entries > problem.num_pixels:
                # The fit has taken up as much noise as it has unknowns.
                noise /= 1 - problem.num_pixels / problem.num_entries
            if not known and noise <= _MATCHED**2:
                continue
            unknowns = 2 * problem.num_pixels / problem.num_entries
            problem.tv_weights[client] = max(
                float(problem.tv_weights[client]), unknowns * noise / _PIXEL_STEP
            )
            self.final[client] = best
            chosen.append(self._reopen(best))
            self.solved[client], self.tolerance[client] = False, -math.inf
        self.problem, self.standstill = problem, _STANDSTILL_OF_MAP
        self._minimise(chosen)

    def _needs_precision(self, slot: Slot) -> bool:
        """Whether rounding ended a run that was on its way to a match."""
        last = slot.runs[-1].report
        if self.problem.plan.optimiser != "l-bfgs":
            return False
        single = self.problem.like.dtype == torch.float32
        can = self.problem.like.device.type != "mps"  # it has no double precision
        left = self.iterations - slot.spent - last.iterations
        rounded = (
            last.stopped == NO_LOWER_POINT and last.loss <= self.stuck[slot.client]
        )
        return single and can and rounded and left > 0 and not self.solved[slot.client]

    def _reopen(self, slot: Slot) -> Slot:
        """Make the last run of a slot the beginning of its next one."""
        slot.earlier, slot.finished = slot.runs.pop(), False
        return slot

    def _start(self, slot: Slot) -> Tensor:
        """Where a slot goes on, in the precision of the problem."""
        if slot.earlier is not None:
            return slot.earlier.point.to(self.problem.like)
        return self._new_start(slot)

    def _new_start(self, slot: Slot) -> Tensor:
        """The next random start of this client; start s is the same in every call."""
        number = self.starts_drawn[slot.client]
        self.starts_drawn[slot.client] += 1
        slot.seed, slot.snapshots, slot.earlier = number, {}, None
        generator = torch.Generator().manual_seed(
            1_000_003 * number + self.seed + self.numbers[slot.client]
        )
        grey = self.problem.start(generator, self.init_scale)
        if number == 0 and slot.client in self.guesses:
            guess = grey.clone()
            guess[: self.problem.num_pixels] = (
                self.guesses[slot.client].clamp(0, 1).reshape(-1)
            )
            points = torch.stack([grey, guess])
            client = torch.full((2,), slot.client, device=grey.device)
            losses = self.problem.evaluate(points, client)[0]
            return points[int(losses[1] < losses[0])]
        return grey

    def _evaluate(self, points: Tensor, trials: Tensor) -> tuple[Tensor, Tensor]:
        return self.problem.evaluate(points, self.clients[trials])

    def _inspect(self, trial: int, state: TrialState) -> str:
        """A reason to stop a restart after an iteration, or nothing."""
        slot = self.slots[trial]
        iteration = slot.begun + len(state.trace) - 1
        if iteration % self.log_every == 0:
            images = self.problem.images(state.point).clamp(0, 1)
            slot.snapshots[iteration] = images.float().cpu().clone()
        spent = slot.spent + iteration
        reason = self._reason(slot, state, spent)
        if self.on_step is not None:
            self.on_step(
                Step(
                    client=self.numbers[slot.client],
                    restart=slot.restart,
                    iteration=spent,
                    loss=state.loss,
                    iterations=self.iterations,
                    finished=self.solved[slot.client],
                )
            )
        if self.state is not None:
            self.state.save(every=_SECONDS_BETWEEN_SAVES)
        return reason

    def _reason(self, slot: Slot, state: TrialState, spent: int) -> str:
        if self.solved[slot.client]:
            return "another restart has matched the update"
        misfit = self.problem.misfit(state, slot.client)
        if misfit <= self.tolerance[slot.client]:
            self.solved[slot.client] = True
            known = self.noisy[slot.client]
            return "matched down to the noise" if known else "matched"
        if spent >= self.iterations:
            return "all iterations used"
        trace = state.trace
        if len(trace) > _PATIENCE and not self.problem.first_order:
            if trace[-1] > (1 - self.standstill) * trace[-1 - _PATIENCE]:
                far = misfit > self.stuck[slot.client]
                return "stuck" if far else "standstill"
        return ""

    def _replace(self, trial: int, state: TrialState) -> Tensor | None:
        """Record a restart that stopped; give a new start if it failed."""
        slot = self.slots[trial]
        misfit = self.problem.misfit(state, slot.client)
        failed = (
            not misfit <= self.stuck[slot.client]
            and state.stopped != "all iterations used"
        )
        used = slot.begun + state.iterations
        left = self.iterations - slot.spent - used
        again = failed and left > 0 and not self.solved[slot.client]
        again = again and slot.client not in self.final
        self._record(slot, state, replaced=again)
        if not again:
            return None
        slot.spent += max(1, used)  # a start that fails at once costs one
        return self._new_start(slot)

    def _record(self, slot: Slot, state: TrialState, *, replaced: bool) -> None:
        slot.finished = not replaced and state.stopped != "interrupted"
        slot.runs.append(self.run_so_far(slot, state, replaced=replaced))

    def run_so_far(
        self, slot: Slot, state: TrialState, *, replaced: bool = False
    ) -> Run:
        """The current run of a slot as a record."""
        if slot.earlier is not None and not math.isfinite(state.loss):
            report = replace(slot.earlier.report, stopped=state.stopped)
            return replace(slot.earlier, report=report)
        losses = tuple(state.trace)
        if not losses or losses[-1] != state.loss:
            losses += (state.loss,)
        evaluations = state.evaluations
        if slot.earlier is not None:
            losses = slot.earlier.losses[:-1] + losses
            evaluations += slot.earlier.report.evaluations
        report = TrialReport(
            seed=slot.seed,
            loss=state.loss,
            iterations=slot.begun + state.iterations,
            evaluations=evaluations,
            stopped=state.stopped,
            replaced=replaced,
        )
        return Run(state.point.clone(), report, losses, dict(slot.snapshots))

    def _slots(self, client: int) -> list[Slot]:
        return [slot for slot in self.all_slots if slot.client == client]

    def _runs(self, client: int) -> list[Run]:
        return [run for slot in self._slots(client) for run in slot.runs]

    def _finite_runs(self, client: int) -> list[Run]:
        return [run for run in self._runs(client) if math.isfinite(run.report.loss)]

    def _reconstruction(self, client: int, seconds: float) -> Reconstruction:
        """The run of this client with the lowest matching loss."""
        runs, finite = self._runs(client), self._finite_runs(client)
        if not finite:
            raise InputError(
                "update",
                "a finite matching loss from at least one start",
                f"none in {len(runs)} starts",
                "lower init_scale, or check the model for overflow",
            )
        best = min(finite, key=lambda run: run.report.loss)
        if client in self.final and self.final[client].runs:
            best = self.final[client].runs[-1]
        plan = self.problem.plan
        images = self.problem.images(best.point).clamp(0, 1).float().cpu()
        last = len(best.losses) - 1
        snapshots = {i: x for i, x in best.snapshots.items() if i < last}
        snapshots[last] = images
        return Reconstruction(
            images=images,
            labels=self.problem.labels(best.point, client),
            losses=best.losses,
            iterations=tuple(range(len(best.losses))),
            snapshots=torch.stack(list(snapshots.values())),
            snapshot_iterations=tuple(snapshots),
            trials=tuple(run.report for run in runs),
            stopped=best.report.stopped,
            seconds=seconds,
            attack=plan.attack,
            reason=plan.reason,
            label_source=plan.label_source,
            seed=self.seed + self.numbers[client],
        )
