"""Restarts of a search as records, in memory and in a file.

A search that takes hours can be cut off. With a checkpoint it writes all its restarts
from time to time, and the same call goes on from there.
Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradinv_helpers.attacks.reconstruction import TrialReport
from gradinv_helpers.errors import InputError
from gradinv_helpers.files import write_bytes

if TYPE_CHECKING:
    from gradinv_helpers.attacks.search import Search


@dataclass(frozen=True)
class Run:
    """A finished start: what a reconstruction shows of it."""

    point: Tensor
    report: TrialReport
    losses: tuple[float, ...]
    snapshots: dict[int, Tensor]


@dataclass
class Slot:
    """One restart of one client: its current start and the runs behind it."""

    client: int
    restart: int
    seed: int = -1
    spent: int = 0  # iterations of runs that were replaced
    runs: list[Run] = field(default_factory=list)
    snapshots: dict[int, Tensor] = field(default_factory=dict)
    earlier: Run | None = None  # the part of the current run before it was reopened
    finished: bool = False

    @property
    def loss(self) -> float:
        """Loss of the last run."""
        return self.runs[-1].report.loss if self.runs else math.inf

    @property
    def begun(self) -> int:
        """Iterations that the current run had behind it when it was taken up again."""
        return self.earlier.report.iterations if self.earlier else 0


class SavedState:
    """The file behind a search.

    What goes on is every point that was reached, not the curvature that L-BFGS had
    gathered: a search that was interrupted ends close to, but not exactly, where it
    would have ended without.

    Args:
        path: A ``.safetensors`` file, which need not exist.
        search: The search whose restarts are kept.
    """

    def __init__(self, path: Path, search: Search):
        self.path, self.search = path, search
        self.saved_at = time.monotonic()

    def load(self) -> None:
        """Take up the restarts of the file, if there is one.

        Raises:
            InputError: The file is damaged, or belongs to another attack.
        """
        if not self.path.exists():
            return
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                state = json.loads((file.metadata() or {})["state"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(
                "checkpoint",
                "a file that an attack has written",
                f"{self.path}: {str(error).splitlines()[0]}",
                "remove it to begin anew",
            ) from error
        if state["fingerprint"] != self._fingerprint():
            raise InputError(
                "checkpoint",
                "the same updates, attack, labels, restarts and seed as in the file",
                f"others than in {self.path}",
                "remove it to begin anew, or name another",
            )
        self.search.starts_drawn = state["starts_drawn"]
        self.search.solved = state["solved"]
        pairs = zip(self.search.all_slots, state["slots"], strict=True)
        for number, (slot, record) in enumerate(pairs):
            slot.seed, slot.spent = record["seed"], record["spent"]
            slot.finished = record["finished"]
            slot.runs = [
                _read_run(f"{number}.{i}", run, tensors)
                for i, run in enumerate(record["runs"])
            ]
            if record["open"]:
                slot.earlier = slot.runs.pop()
                slot.snapshots = dict(slot.earlier.snapshots)

    def save(self, *, every: float = 0.0) -> None:
        """Write the restarts, if the last time is ``every`` seconds ago."""
        if time.monotonic() - self.saved_at < every:
            return
        from safetensors.torch import save

        running = {id(slot): state for slot, state in self.search.running()}
        tensors: dict[str, Tensor] = {}
        slots = []
        for number, slot in enumerate(self.search.all_slots):
            runs, state = list(slot.runs), running.get(id(slot))
            halted = bool(runs) and runs[-1].report.stopped == "interrupted"
            if state is not None and math.isfinite(state.loss):
                runs.append(self.search.run_so_far(slot, state))
            elif slot.earlier is not None and not slot.finished and not halted:
                runs.append(slot.earlier)
            is_open = halted or len(runs) > len(slot.runs)
            records = []
            for i, run in enumerate(runs):
                records.append(_write_run(f"{number}.{i}", run, tensors))
            slots.append(
                {
                    "seed": slot.seed,
                    "spent": slot.spent,
                    "finished": slot.finished,
                    "open": is_open,
                    "runs": records,
                }
            )
        state_text = json.dumps(
            {
                "fingerprint": self._fingerprint(),
                "starts_drawn": self.search.starts_drawn,
                "solved": self.search.solved,
                "slots": slots,
            }
        )
        write_bytes(self.path, save(tensors, {"state": state_text}))
        self.saved_at = time.monotonic()

    def remove(self) -> None:
        """Forget the file: the search is done."""
        self.path.unlink(missing_ok=True)

    def _fingerprint(self) -> str:
        """A hash of everything that the result depends on but the iterations."""
        problem = self.search.problem
        plan = problem.plan
        labels = None if plan.labels is None else [e.tolist() for e in plan.labels]
        distance = getattr(plan.distance, "__qualname__", repr(type(plan.distance)))
        facts = [
            plan.attack,
            plan.optimiser,
            distance,
            labels,
            float(plan.tv_weight),
            len(self.search.all_slots),
            self.search.seed,
            list(self.search.numbers),
            self.search.init_scale,
            self.search.denoise,
            problem.num_samples,
            list(problem.shape),
        ]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for tensor in problem.targets:
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()


def _write_run(name: str, run: Run, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Store the tensors of a run; return the rest of it for JSON."""
    tensors[f"{name}.point"] = run.point.detach().cpu().contiguous()
    for iteration, images in run.snapshots.items():
        tensors[f"{name}.snapshot.{iteration}"] = images.contiguous()
    report = asdict(run.report)
    return {
        "report": {**report, "loss": _number(report["loss"])},
        "losses": [_number(loss) for loss in run.losses],
        "snapshots": list(run.snapshots),
    }


def _read_run(name: str, record: dict[str, Any], tensors: dict[str, Tensor]) -> Run:
    report = {**record["report"], "loss": float(record["report"]["loss"])}
    return Run(
        point=tensors[f"{name}.point"],
        report=TrialReport(**report),
        losses=tuple(float(loss) for loss in record["losses"]),
        snapshots={
            iteration: tensors[f"{name}.snapshot.{iteration}"]
            for iteration in record["snapshots"]
        },
    )


def _number(value: float) -> float | str:
    """A number for JSON, which knows neither infinity nor NaN."""
    return value if math.isfinite(value) else str(value)
