"""What an attack returns, and what it tells while it runs.

Taught in: notebooks/02_dlg_four_steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradinv_helpers.attacks.certificate import Certificate


@dataclass(frozen=True)
class TrialReport:
    """How one restart of the attack ended.

    Args:
        seed: Number of the random start: the same number gives the same start.
        loss: Loss of its best point, total variation and penalty included.
        iterations: Outer steps taken, of up to 20 L-BFGS updates each.
        evaluations: Evaluations of the matching loss.
        stopped: Why it stopped.
        replaced: Whether a new random start took its place.
    """

    seed: int
    loss: float
    iterations: int
    evaluations: int
    stopped: str
    replaced: bool


@dataclass(frozen=True)
class Reconstruction:
    """What the attacker makes of one update; it holds no ground truth.

    Args:
        images: Shape (N, C, H, W) in [0, 1], float32, on the CPU.
        labels: Shape (N,).
        losses: Loss of the chosen restart after each of ``iterations``: the matching
            loss, plus the weighted total variation and the cost of values outside
            [0, 1].
        iterations: Outer steps at which ``losses`` were taken.
        snapshots: Images (S, N, C, H, W) of the chosen restart on the way.
        snapshot_iterations: Outer steps at which ``snapshots`` were taken.
        trials: One report per restart, replaced ones included.
        stopped: Why the chosen restart stopped.
        seconds: Wall time of the whole attack; clients inverted together share it.
        attack: Name of the attack that ran.
        reason: Why this attack was picked.
        label_source: Where the labels come from.
        seed: Seed of the attack.
        certificate: What an exact attack can prove of its answer; ``None`` for
            attacks that search.
    """

    images: Tensor
    labels: Tensor
    losses: tuple[float, ...]
    iterations: tuple[int, ...]
    snapshots: Tensor
    snapshot_iterations: tuple[int, ...]
    trials: tuple[TrialReport, ...]
    stopped: str
    seconds: float
    attack: str
    reason: str
    label_source: str
    seed: int
    certificate: Certificate | None = None

    @property
    def loss(self) -> float:
        """Loss of the result; without total variation, its matching loss."""
        return self.losses[-1]


@dataclass(frozen=True)
class Step:
    """What a running attack tells its caller after an iteration of one restart.

    Args:
        client: Index of the update in the list under attack.
        restart: Index of the restart.
        iteration: Outer steps taken by this restart.
        loss: Its matching loss.
        iterations: Most steps it may take.
        finished: Whether this client needs no more work.
    """

    client: int
    restart: int
    iteration: int
    loss: float
    iterations: int
    finished: bool
