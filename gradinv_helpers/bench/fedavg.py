"""Suite ``fedavg``: what a weight change shows after several local steps.

Clients with a random LeNet train for some epochs, in one batch or in several that they
shuffle, and send the change of their weights. ``gaussian-map`` replays the training.
The recipe is known. Either labels and the images of every step are given, which is an
upper bound, or labels are inferred and the order is sought.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradinv_helpers.attacks.map_search import map_estimate
from gradinv_helpers.attacks.replay import local_batches
from gradinv_helpers.bench.figures import panels
from gradinv_helpers.bench.suite import (
    Record,
    Report,
    Setting,
    Suite,
    Task,
    chosen,
    distinct,
    markdown,
    mean_difference,
    mean_with_interval,
    spread_of,
    stop_if_interrupted,
    timed,
    with_interval,
    with_quartiles,
)
from gradinv_helpers.data import Images
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import LocalTraining, Optimiser, local_update

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES: dict[Optimiser, float] = {"sgd": 0.01, "momentum": 0.01, "adam": 0.001}
KNOWN, UNKNOWN = "known", "unknown"
# The likelihood of a change is that of many steps: more is lost to rounding than of one
# gradient, and what lies below this share of it takes time and shows nothing.
_LAST_LEVEL = 1e-4
_LABEL_SETS = 4  # inferred labels, and those with one changed, that are tried


@dataclass(frozen=True)
class Case:
    """One recipe of local training.

    Args:
        optimiser: Of the client.
        epochs: Passes over its images.
        images: Its images.
        batch_size: Images per local step.
        order: Whether the labels and the images of every step are known.
    """

    optimiser: Optimiser
    epochs: int
    images: int
    batch_size: int
    order: str

    @property
    def batches(self) -> int:
        """Local batches of one epoch."""
        return -(-self.images // self.batch_size)

    @property
    def training(self) -> LocalTraining:
        """The recipe as the server states it."""
        return LocalTraining(
            sends="delta",
            lr=RATES[self.optimiser],
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimiser=self.optimiser,
        )

    @property
    def facts(self) -> Record:
        """What its records hold."""
        return {
            "optimiser": self.optimiser,
            "epochs": self.epochs,
            "images": self.images,
            "local_batches": self.batches,
            "order": self.order,
        }

    def __str__(self) -> str:
        steps = f"{self.epochs} epochs of {self.batches} batches"
        return f"{self.optimiser}, {steps}, order {self.order}"


# Optimiser, epochs, and (images, batch size).
_GRID: tuple[tuple[Optimiser, Sequence[int], Sequence[tuple[int, int]]], ...] = (
    ("sgd", (1, 2, 5), ((4, 4), (4, 2))),
    ("sgd", (1,), ((5, 1),)),
    ("momentum", (1, 2), ((4, 4), (4, 2))),
    ("adam", (1, 2), ((4, 4), (4, 2))),
)
CASES: tuple[Case, ...] = tuple(
    Case(optimiser, count, *client, order)
    for optimiser, epochs, clients in _GRID
    for count, client, order in itertools.product(epochs, clients, (KNOWN, UNKNOWN))
)
QUICK_CASES = (Case("sgd", 2, 2, 2, KNOWN), Case("momentum", 1, 2, 1, UNKNOWN))


@dataclass(frozen=True)
class _Bench:
    """Images of the suite; client k has the model of seed k."""

    setting: Setting
    pool: Images

    def measure(self, case: Case, number: int) -> Record:
        """Attack one client."""
        seed = self.setting.seed + number
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.pool), generator=generator)
        truth = self.pool[order[: case.images]]
        channels, side, _ = self.pool.shape
        model = build_model(
            "lenet",
            in_channels=channels,
            image_size=side,
            num_classes=max(2, self.pool.num_classes),
            seed=seed,
        ).to(self.setting.device)
        update = local_update(model, truth, case.training, seed=seed)
        known: dict[str, Any] = {}
        if case.order == KNOWN:
            steps = local_batches(case.images, case.training, seed=seed)
            known = {"labels": truth.labels, "order": steps}
        attack = functools.partial(
            map_estimate,
            update,
            iterations=self.setting.numbers["iterations"],
            restarts=1 if self.setting.quick else _LABEL_SETS,
            seed=seed,
            last_level=_LAST_LEVEL,
            **known,
        )
        estimate, seconds = timed(attack, self.setting.device)
        found = estimate.reconstruction
        stop_if_interrupted(found)
        result = score(found, truth, others=self.pool)
        labels = result.label_correct
        return {
            **case.facts,
            "number": number,
            "psnr": list(result.psnr),
            "floors": {name: list(f.psnr) for name, f in result.floors.items()},
            "labels_right": None if labels is None else sum(labels),
            "misfit": estimate.stages[-1].misfit,
            "noise": estimate.noise,
            "stopped": found.stopped,
            "seconds": seconds,
        }


def _tasks(setting: Setting) -> list[Task]:
    bench = _Bench(setting, setting.images())
    return [
        Task(f"{case}, client {k}", functools.partial(bench.measure, case, k))
        for k in range(setting.numbers["repeats"])
        for case in (QUICK_CASES if setting.quick else CASES)
    ]


# --- what comes of it -------------------------------------------------------------

_HEAD = [
    "client",
    "order",
    "clients",
    "mean PSNR in dB (95 %)",
    "above the floor, dB (95 %)",
    "worst image",
    "labels right",
    "misfit (quartiles)",
    "seconds (quartiles)",
]


def _report(records: Sequence[Record], setting: Setting) -> Report:
    rows, cases = [], []
    for case in QUICK_CASES if setting.quick else CASES:
        row, numbers = _case(chosen(records, **case.facts))
        steps = f"{case.epochs} × {case.batches} of {case.batch_size}"
        rows.append([f"{case.optimiser}, {steps}", case.order, *row])
        cases.append({**case.facts, **numbers})
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in RATES.items())
    note = (
        "Client: optimiser, epochs × local batches of so many images. Order known: the "
        "labels and the images of every step are given, which is an upper bound. "
        "Unknown: the client shuffled its images before every epoch, labels are "
        "inferred and the order is sought. Means over images with their bootstrap "
        "intervals; the floor of an image is the best of a constant image, another "
        "image, and the mean of the client's. Misfit: distance of the replayed change "
        f"to the one sent, as a share of it. Learning rates: {rates}; at most "
        f"{setting.numbers['iterations']} iterations."
    )
    table = f"{markdown(_HEAD, rows)}\n\n{note}"
    return Report({"cases": cases}, table, _figure(cases))


def _case(found: Sequence[Record]) -> tuple[list[str], Record]:
    """One line of the table, and the same as numbers."""
    psnr = [value for record in found for value in record["psnr"]]
    floors = [
        max(values)
        for record in found
        for values in zip(*record["floors"].values(), strict=True)
    ]
    right = sum(record["labels_right"] or 0 for record in found)
    misfits = [record["misfit"] for record in found]
    seconds = [record["seconds"] for record in found]
    low, middle, high = (
        spread_of(misfits)[k] for k in ("quartile_1", "median", "quartile_3")
    )
    case = {
        "clients": len(found),
        "psnr": mean_with_interval(psnr),
        "floor": mean_with_interval(floors),
        "gain": mean_difference(psnr, floors),
        "worst": min(psnr),
        "labels_right": right,
        "labels": len(psnr),
        "misfit": spread_of(misfits),
        "noise_found": sum(record["noise"] > 0 for record in found),
        "seconds": spread_of(seconds),
    }
    row = [
        f"{len(found)}",
        with_interval(case["psnr"]),
        with_interval(case["gain"]),
        f"{min(psnr):.1f}",
        f"{right} of {len(psnr)}",
        f"{middle:.1e} ({low:.1e} to {high:.1e})",
        with_quartiles(seconds, 0),
    ]
    return row, case


def _figure(cases: Sequence[Record]) -> Figure:
    """PSNR over epochs: one chart per optimiser and order."""
    charts: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for optimiser in distinct(cases, "optimiser"):
        for order in (KNOWN, UNKNOWN):
            group = chosen(cases, optimiser=optimiser, order=order)
            lines = {}
            for count in distinct(group, "local_batches"):
                line = chosen(group, local_batches=count)
                name = f"{count} local batch" + ("es" if count > 1 else "")
                lines[name] = _line(line, "psnr")
            if group:
                lines["floor"] = _floor(group)
                charts[f"{optimiser}, order {order}"] = lines
    return panels(
        charts,
        xlabel="local epochs",
        ylabels=["mean PSNR (dB)"],
        columns=2,
        floor="floor",
    )


def _line(cases: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    return [c["epochs"] for c in cases], [c[name]["value"] for c in cases]


def _floor(cases: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Mean floor of all clients, for every number of epochs."""
    epochs = distinct(cases, "epochs")
    means = [
        statistics.fmean(c["floor"]["value"] for c in chosen(cases, epochs=count))
        for count in epochs
    ]
    return epochs, means


SUITE = Suite(
    numbers={"repeats": 3, "iterations": 40},
    quick={"repeats": 1, "iterations": 1},
    tasks=_tasks,
    report=_report,
)
