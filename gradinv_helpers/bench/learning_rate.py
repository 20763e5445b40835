"""Suite ``learning-rate``: what an update says of a rate that the server does not know.

Clients train for some epochs at rates from 0.01 to 1 and send the change of their
weights without the rate. It is read off the last layer for all of them, and refined
together with images for some. The images that come back where the rate is fitted along
stand beside those at the true rate, and at a rate that is off by two.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from gradinv_helpers.attacks.learning_rate import infer_learning_rate
from gradinv_helpers.attacks.map_search import map_estimate
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
    stop_if_interrupted,
)
from gradinv_helpers.data import Images
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import (
    LocalTraining,
    Optimiser,
    SharedUpdate,
    local_update,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENET, LENET_DEFAULT, MLP = "LeNet", "LeNet, PyTorch's weights", "MLP"
NETWORKS = (LENET, LENET_DEFAULT, MLP)
RATES = (0.01, 0.1, 0.5, 1.0)
RATES_OF_ADAM = (0.001, 0.01)
COUNTS = (1, 2, 4)
SCHEDULES = ((1, 1), (2, 1), (1, 2), (5, 1), (2, 2))  # epochs, batches of an epoch
FAST, REFINED, SEEN = "last layer", "images as well", "what comes back"
TRUE, FOUND, TWICE = "true", "inferred", "twice"
# Network, rate: cases in which images are fitted.
_REFINED = ((LENET, 0.01), (LENET_DEFAULT, 0.1), (MLP, 0.1))
_REFINED_SCHEDULES = ((1, 5, 1), (2, 2, 2))  # images, epochs, batches
_REFINED_CLIENTS = 2
_ITERATIONS, _LAST_LEVEL = 12, 1e-3


@dataclass(frozen=True)
class Case:
    """A client's network and recipe."""

    network: str
    optimiser: Optimiser
    images: int
    epochs: int
    batches: int
    rate: float

    @property
    def training(self) -> LocalTraining:
        """The client's recipe."""
        return LocalTraining(
            sends="delta",
            lr=self.rate,
            epochs=self.epochs,
            batch_size=self.images // self.batches,
            optimiser=self.optimiser,
        )

    def __str__(self) -> str:
        steps = f"{self.images} images, {self.epochs} × {self.batches}"
        return f"{self.network}, {self.optimiser} {self.rate:g}, {steps}"


_RATES_OF: dict[Optimiser, tuple[float, ...]] = {
    "sgd": RATES,
    "momentum": RATES[:2],
    "adam": RATES_OF_ADAM,
}
CASES: tuple[Case, ...] = tuple(
    Case(network, optimiser, count, epochs, batches, rate)
    for optimiser, rates in _RATES_OF.items()
    for network, count, (epochs, batches), rate in itertools.product(
        NETWORKS, COUNTS, SCHEDULES, rates
    )
    if batches <= count
)
REFINED_CASES: tuple[Case, ...] = tuple(
    Case(network, "sgd", count, epochs, batches, rate)
    for network, rate in _REFINED
    for count, epochs, batches in _REFINED_SCHEDULES
)
QUICK_CASES = (Case(MLP, "sgd", 1, 2, 1, 0.1), Case(LENET, "sgd", 1, 1, 1, 0.1))


@dataclass(frozen=True)
class _Bench:
    """Images of the suite; client k has the networks of seed k."""

    setting: Setting
    pool: Images

    def client(self, case: Case, number: int) -> tuple[Images, SharedUpdate, bool]:
        """Images, their update without the rate, and whether training lowers loss."""
        seed = self.setting.seed + number
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(self.pool), generator=generator)
        truth = self.pool[drawn[: case.images]]
        model = _network(case.network, self.pool, seed).to(self.setting.device)
        update = local_update(model, truth, case.training, seed=seed)
        after = _network(case.network, self.pool, seed)
        with torch.no_grad():
            for name, weight in after.named_parameters():
                weight.add_(update.tensors[name].cpu())
        stable = _loss(after, truth) <= _loss(model.cpu(), truth)
        return truth, _with_rate(update, None), stable

    def infer(self, case: Case, what: str, number: int) -> Record:
        """Infer the rate of one client."""
        truth, update, stable = self.client(case, number)
        begun = time.process_time()
        found = infer_learning_rate(update, refine=what != FAST, seed=number)
        seconds = time.process_time() - begun
        counts, true = found.labels.sort().values, truth.labels.sort().values
        return {
            **_facts(case, what, number),
            "stable": stable,
            "found": found.lr,
            "first": found.first,
            "misfit": found.misfit,
            "error": abs(found.lr / case.rate - 1),
            "labels_right": bool(counts.equal(true)),
            "cpu_seconds": seconds,
        }

    def attack(self, case: Case, number: int) -> Record:
        """Images at the true rate, at an unknown one, and at twice the true one."""
        truth, update, stable = self.client(case, number)
        record = {**_facts(case, SEEN, number), "stable": stable}
        record |= {"psnr": {}, "cpu_seconds": {}}
        rates = {TRUE: case.rate, FOUND: None, TWICE: 2 * case.rate}
        for name, rate in rates.items():
            begun = time.process_time()
            estimate = map_estimate(
                _with_rate(update, rate),
                labels=truth.labels,
                iterations=self.setting.numbers["iterations"],
                restarts=1,
                seed=number,
                last_level=_LAST_LEVEL,
            )
            stop_if_interrupted(estimate.reconstruction)
            record["cpu_seconds"][name] = time.process_time() - begun
            if estimate.learning_rate is not None:
                record["error"] = abs(estimate.learning_rate / case.rate - 1)
            result = score(estimate.reconstruction, truth)
            record["psnr"][name] = statistics.fmean(result.psnr)
        return record


def _network(name: str, pool: Images, seed: int) -> nn.Module:
    channels, side, _ = pool.shape
    model = build_model(
        "mlp" if name == MLP else "lenet",
        in_channels=channels,
        image_size=side,
        num_classes=max(2, pool.num_classes),
        seed=seed,
    )
    if name == LENET_DEFAULT:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    layer.reset_parameters()
    return model


def _loss(model: nn.Module, images: Images) -> float:
    with torch.no_grad():
        logits = model(images.pixels)
        return float(nn.functional.cross_entropy(logits, images.labels))


def _with_rate(update: SharedUpdate, rate: float | None) -> SharedUpdate:
    training = dataclasses.replace(update.training, lr=rate)
    return update.replace_tensors(update.tensors, training=training)


def _facts(case: Case, what: str, number: int) -> Record:
    return {**dataclasses.asdict(case), "what": what, "number": number}


def _tasks(setting: Setting) -> list[Task]:
    bench = _Bench(setting, setting.images())
    clients = range(setting.numbers["repeats"])
    cases, refined = CASES, REFINED_CASES
    if setting.quick:
        cases = refined = QUICK_CASES
    few = clients[:_REFINED_CLIENTS]
    tasks = [
        Task(
            f"{FAST}: {case}, client {k}", functools.partial(bench.infer, case, FAST, k)
        )
        for k, case in itertools.product(clients, cases)
    ]
    for k, case in itertools.product(few, refined):
        refine = functools.partial(bench.infer, case, REFINED, k)
        tasks.append(Task(f"{REFINED}: {case}, client {k}", refine))
    for k, case in itertools.product(few, refined):
        attack = functools.partial(bench.attack, case, k)
        if case.network != MLP:  # behind ReLU the search does not see lengths
            tasks.append(Task(f"{SEEN}: {case}, client {k}", attack))
    return tasks


# --- what comes of it -------------------------------------------------------------


def _report(records: Sequence[Record], setting: Setting) -> Report:
    fast, refined = chosen(records, what=FAST), chosen(records, what=REFINED)
    cases = []
    names = ("network", "optimiser", "epochs", "batches", "rate")
    keys = dict.fromkeys(tuple(record[name] for name in names) for record in fast)
    for key in keys:
        facts = dict(zip(names, key, strict=True))
        found = chosen(fast, **facts)
        stable = [record for record in found if record["stable"]]
        numbers = {**facts, "clients": len(found), **_numbers(stable)}
        cases.append(numbers)
    note = (
        "Relative error of the rate in percent, by the last layer alone (by the "
        "largest entry for Adam): median (worst) over clients of 1, 2 and 4 images, "
        "labels inferred along. After the slash: clients whose training lowered their "
        "loss, which alone count, of all."
    )
    parts = [_fast_table(chosen(cases, optimiser=name)) for name in _RATES_OF]
    parts = [part for part in parts if part] + [note, _refined_table(refined)]
    seen = chosen(records, what=SEEN)
    if seen:
        parts.append(_seen_table(seen))
    seconds = [record["cpu_seconds"] for record in fast]
    parts.append(f"The last layer takes {statistics.median(seconds):.2f} CPU seconds.")
    summary = {"cases": cases, "refined": refined, "seen": seen}
    return Report(summary, "\n\n".join(parts), _figure(cases))


def _numbers(found: Sequence[Record]) -> Record:
    if not found:
        return {"stable": 0, "median": math.nan, "worst": math.nan, "labels": 0}
    errors = [record["error"] for record in found]
    return {
        "stable": len(found),
        "median": statistics.median(errors),
        "worst": max(errors),
        "labels": sum(record["labels_right"] for record in found),
    }


def _cell(case: Record) -> str:
    counted = f"{case['stable']} of {case['clients']}"
    if not case["stable"]:
        return f"– / {counted}"
    return f"{_percent(case['median'])} ({_percent(case['worst'])}) / {counted}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if share < 1 else f"{100 * share:.0f}"


def _fast_table(cases: Sequence[Record]) -> str:
    """Networks and schedules of one optimiser, a column for every rate."""
    rates = sorted(distinct(cases, "rate")) if cases else []
    rows = []
    for network, epochs, batches in dict.fromkeys(
        (case["network"], case["epochs"], case["batches"]) for case in cases
    ):
        facts = {"network": network, "epochs": epochs, "batches": batches}
        found = {case["rate"]: _cell(case) for case in chosen(cases, **facts)}
        cells = [found.get(rate, "–") for rate in rates]
        rows.append([f"{network}, {epochs} × {batches}", *cells])
    if not rows:
        return ""
    head = [f"{cases[0]['optimiser']}, epochs × batches"]
    return markdown(head + [f"rate {rate:g}" for rate in rates], rows)


def _client(record: Record) -> str:
    images = "1 image" if record["images"] == 1 else f"{record['images']} images"
    return f"{record['network']}, {images}, {record['epochs']} × {record['batches']}"


def _refined_table(refined: Sequence[Record]) -> str:
    rows = []
    for record in refined:
        rows.append(
            [
                _client(record),
                f"{record['rate']:g}",
                _percent(abs(record["first"] / record["rate"] - 1)),
                f"{100 * record['error']:.2f}",
                f"{record['misfit']:.1e}",
                f"{record['cpu_seconds']:.0f}",
            ]
        )
    head = ["client", "rate", "last layer", "images as well", "misfit", "CPU seconds"]
    return f"{markdown(head, rows)}\n\nError of the rate in percent, by client."


def _seen_table(seen: Sequence[Record]) -> str:
    rows = []
    for record in seen:
        rows.append(
            [
                _client(record),
                f"{100 * record['error']:.3f}",
                *(f"{record['psnr'][name]:.1f}" for name in (TRUE, FOUND, TWICE)),
                *(f"{record['cpu_seconds'][name]:.0f}" for name in (TRUE, FOUND)),
            ]
        )
    head = ["client", "error in %", "true rate", "rate unknown", "twice the rate"]
    head += ["CPU s, true rate", "CPU s, rate unknown"]
    note = (
        "Mean PSNR in dB of `gaussian-map`, labels given; the rate that it was not "
        "told is fitted along with the images, with this error at the end."
    )
    return f"{markdown(head, rows)}\n\n{note}"


def _figure(cases: Sequence[Record]) -> Figure:
    """Median error over the rate: one chart per network, a line per schedule."""
    charts: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for network in distinct(cases, "network"):
        group = chosen(cases, network=network, optimiser="sgd")
        lines = {}
        for epochs, batches in dict.fromkeys(
            (case["epochs"], case["batches"]) for case in group
        ):
            line = [
                case
                for case in chosen(group, epochs=epochs, batches=batches)
                if case["stable"]
            ]
            lines[f"{epochs} × {batches}"] = (
                [case["rate"] for case in line],
                [100 * case["median"] for case in line],
            )
        charts[network] = lines
    return panels(
        charts,
        xlabel="learning rate",
        ylabels=["median error (%)"],
        columns=3,
        base=10,
    )


SUITE = Suite(
    numbers={"repeats": 5, "iterations": _ITERATIONS},
    quick={"repeats": 1, "iterations": 1},
    tasks=_tasks,
    report=_report,
)
