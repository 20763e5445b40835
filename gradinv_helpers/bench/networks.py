"""Suite ``networks``: batches behind deeper networks, with BatchNorm in every mode.

A random ConvNet without BatchNorm, a ConvNet with BatchNorm after one epoch of
training, and a random ResNet-18. A BatchNorm layer normalises by its running
statistics (eval mode) or by those of the batch (train mode), and in train mode the
client sends its new buffers along or keeps them back. All attacks on a batch have the
same budget of updates and the same inferred labels; beside them stands what the labels
alone give.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.invert import invert
from gradinv_helpers.attacks.labels import infer_labels
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
from gradinv_helpers.classifier import accuracy, train_classifier
from gradinv_helpers.data import Images
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import SharedUpdate, local_update

CONVNET, WITH_BATCH_NORM, RESNET = "convnet", "convnet-bn", "resnet18"
NO_LAYERS, EVAL = "no BatchNorm", "eval"
SENT, KEPT = "train, buffers sent", "train, buffers kept back"
COSINE, MOMENTS, MAP = "inverting-gradients", "gradinversion", "gaussian-map"
BATCH_SIZES: tuple[int, ...] = (1, 4, 8, 16)
_UPDATES_PER_ITERATION = 20
# Updates behind a ResNet-18, beside those of the others: about as long for each batch.
_SHARES = {1: 0.5, 4: 0.25, 8: 0.15, 16: 0.1}
_MOST_BY_MAP = 4  # images behind a ResNet-18; larger batches take it too long


@dataclass(frozen=True)
class Case:
    """One cell of the design.

    Args:
        model: The network.
        mode: How BatchNorm is used.
        attack: Name of the attack.
        batch_size: Images behind the update.
        number: Number of the batch.
    """

    model: str
    mode: str
    attack: str
    batch_size: int
    number: int

    @property
    def cost(self) -> int:
        """How late it is measured."""
        return self.batch_size + (max(BATCH_SIZES) if self.model == RESNET else 0)

    @property
    def key(self) -> str:
        """Its name."""
        what = f"{self.model}, {self.mode}, {self.attack}"
        return f"{what}, {self.batch_size} images, batch {self.number}"


def cases(repeats: int = 1, *, quick: bool = False) -> list[Case]:
    """List all cells, cheap ones first.

    Attacks that would only repeat another cell are left out: without BatchNorm, or
    with running statistics that nothing has moved, ``gradinversion`` with one start is
    the cosine's search, and the cosine does not read buffers.
    """
    design = [
        (CONVNET, NO_LAYERS, (COSINE, MAP)),
        (WITH_BATCH_NORM, SENT, (MOMENTS, MAP)),
        (WITH_BATCH_NORM, KEPT, (COSINE, MOMENTS, MAP)),
        (WITH_BATCH_NORM, EVAL, (COSINE, MOMENTS, MAP)),
        (RESNET, SENT, (MOMENTS,)),
        (RESNET, KEPT, (COSINE,)),
        (RESNET, EVAL, (COSINE, MAP)),
    ]
    if quick:
        design = [(WITH_BATCH_NORM, SENT, (MOMENTS, MAP))]
    found = [
        Case(model, mode, attack, size, number)
        for model, mode, attacks in design
        for attack in attacks
        for size in ((1, 2) if quick else BATCH_SIZES)
        for number in range(repeats)
        if (model, attack) != (RESNET, MAP) or size <= _MOST_BY_MAP
    ]
    return sorted(found, key=lambda case: case.cost)


@dataclass(frozen=True, eq=False)
class _Bench:
    """Images and networks of the suite."""

    setting: Setting
    pool: Images
    train: Images

    @functools.cached_property
    def class_means(self) -> Tensor:
        """Mean training image of every class (K, C, H, W)."""
        pixels, labels = self.train.pixels, self.train.labels
        means = [pixels[labels == k].mean(0) for k in range(self.train.num_classes)]
        return torch.stack(means)

    @functools.cached_property
    def with_batch_norm(self) -> nn.Module:
        """A ConvNet whose running statistics are those of one epoch."""
        self.setting.say("training the ConvNet with BatchNorm, epochs: 1")
        channels, size, _ = self.train.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.setting.seed)
            fresh = convnet_with_batch_norm(channels, size, self.train.num_classes)
        return train_classifier(
            self.train,
            model=fresh,
            epochs=1,
            seed=self.setting.seed,
            device=self.setting.device,
        ).model

    def model(self, case: Case) -> nn.Module:
        """The network of one case in its mode."""
        if case.model == WITH_BATCH_NORM:
            model = self.with_batch_norm
        else:
            channels, size, _ = self.pool.shape
            model = build_model(
                case.model,
                in_channels=channels,
                image_size=size,
                num_classes=max(2, self.pool.num_classes),
                seed=self.setting.seed + case.number,
            )
        model = model.to(self.setting.device)
        return model.train(case.mode in (SENT, KEPT))

    def measure(self, case: Case) -> Record:
        """Attack one batch behind one network."""
        seed = self.setting.seed + case.number
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.pool), generator=generator)
        truth = self.pool[order[: case.batch_size]]
        update = _shared(self.model(case), truth, case.mode)
        labels = infer_labels(update, seed=seed).cpu()
        share = _SHARES[case.batch_size] if case.model == RESNET else 1
        rounds = share * self.setting.numbers["iterations"] / _UPDATES_PER_ITERATION
        iterations = max(1, round(rounds))
        attack = functools.partial(
            invert,
            update,
            attack=case.attack,
            labels=labels,
            iterations=iterations,
            restarts=1,
            seed=seed,
        )
        found, seconds = timed(attack, self.setting.device)
        stop_if_interrupted(found)
        result = score(found, truth, others=self.pool)
        told = Images(self.class_means[labels], labels, truth.class_names)
        return {
            **dataclasses.asdict(case),
            "updates": iterations * _UPDATES_PER_ITERATION,
            "psnr": list(result.psnr),
            "labels_right": sum(result.label_correct or ()),
            "floors": {name: list(f.psnr) for name, f in result.floors.items()},
            "labels_alone": list(score(told, truth).psnr),
            "stopped": found.stopped,
            "seconds": seconds,
        }


def _shared(model: nn.Module, truth: Images, mode: str) -> SharedUpdate:
    update = local_update(model, truth)
    return dataclasses.replace(update, buffers=None) if mode == KEPT else update


def convnet_with_batch_norm(
    in_channels: int, image_size: int, num_classes: int
) -> nn.Module:
    """The ConvNet of ``build_model`` with BatchNorm between convolution and ReLU."""
    layers: list[nn.Module] = []
    before = in_channels
    for place, width in enumerate((32, 64, 64, 64)):
        convolution = nn.Conv2d(before, width, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * (place % 2)
        before = width
    side = image_size // 2 // 2
    layers += [nn.Flatten(), nn.Linear(before * side * side, num_classes)]
    return nn.Sequential(*layers)


def _tasks(setting: Setting) -> list[Task]:
    bench = _Bench(setting, setting.images(), setting.images("train"))
    setting.notes["models"] = {
        f"{WITH_BATCH_NORM}, 1 epoch": {
            "test_accuracy": accuracy(bench.with_batch_norm, bench.pool)
        }
    }
    return [
        Task(case.key, functools.partial(bench.measure, case))
        for case in cases(setting.numbers["repeats"], quick=setting.quick)
    ]


# --- what comes of it -------------------------------------------------------------

_HEAD = [
    "network",
    "BatchNorm",
    "attack",
    "batch size",
    "updates",
    "batches",
    "PSNR, dB (95 %)",
    "labels alone, dB",
    "floor, dB (95 %)",
    "above the floor, dB (95 %)",
    "images above their floor",
    "labels right",
    "seconds (quartiles)",
]
_WHAT = ("model", "mode", "attack", "batch_size", "updates")


def _report(records: Sequence[Record], setting: Setting) -> Report:
    groups: dict[tuple, list[Record]] = {}
    order = list(dict.fromkeys((c.model, c.mode, c.attack) for c in cases()))
    for record in sorted(records, key=lambda r: order.index(_place(r))):
        groups.setdefault(tuple(record[name] for name in _WHAT), []).append(record)
    rows, found = [], []
    for what, some in groups.items():
        row, case = _case(some)
        rows.append([f"{part}" for part in what] + row)
        found.append({**dict(zip(_WHAT, what, strict=True)), **case})
    figure = panels(
        dict(_charts(found)),
        xlabel="images in the batch",
        ylabels=["mean PSNR (dB)"],
        columns=3,
        floor="floor",
    )
    note = (
        "Means over images with bootstrap intervals. The floor of an image is the best "
        "of: a constant image, another image, the mean of the batch. Labels alone: the "
        "mean training image of every inferred class. Labels are inferred and given to "
        f"all attacks alike, which have one start. {CONVNET} and {RESNET} are "
        f"untrained (batch k behind the network of seed k), {WITH_BATCH_NORM} has seen "
        f"one epoch of the train split. {COSINE} reads no buffers: its result is the "
        f"same whether they are sent or not. {MOMENTS} with one start is {COSINE} "
        f"where nothing is known of the moments, as behind a random {RESNET} that "
        "sends no buffers."
    )
    return Report({"cases": found}, f"{markdown(_HEAD, rows)}\n\n{note}", figure)


def _place(record: Record) -> tuple[str, str, str]:
    return record["model"], record["mode"], record["attack"]


def _charts(found: Sequence[Record]) -> Iterator[tuple[str, dict]]:
    """PSNR against batch size of every attack, for each network and mode."""
    for model in distinct(found, "model"):
        for mode in distinct(chosen(found, model=model), "mode"):
            own = chosen(found, model=model, mode=mode)
            lines, floor = {}, {}
            for attack in distinct(own, "attack"):
                points = chosen(own, attack=attack)
                sizes = [float(case["batch_size"]) for case in points]
                lines[attack] = (sizes, [case["psnr"]["value"] for case in points])
            for case in own:
                floor[float(case["batch_size"])] = case["floor"]["value"]
            lines["floor"] = (list(floor), list(floor.values()))
            yield f"{model}\n{mode}", lines


def _case(found: Sequence[Record]) -> tuple[list[str], Record]:
    """One line of the table, and the same as numbers."""
    psnr = [value for record in found for value in record["psnr"]]
    alone = [value for record in found for value in record["labels_alone"]]
    lowest = [
        max(values)
        for record in found
        for values in zip(*record["floors"].values(), strict=True)
    ]
    right = sum(record["labels_right"] for record in found)
    seconds = [record["seconds"] for record in found]
    above = sum(a > b for a, b in zip(psnr, lowest, strict=True))
    case = {
        "batches": len(found),
        "psnr": mean_with_interval(psnr),
        "labels_alone": mean_with_interval(alone),
        "floor": mean_with_interval(lowest),
        "gain": mean_difference(psnr, lowest),
        "above_floor": above,
        "labels_right": right,
        "seconds": spread_of(seconds),
    }
    row = [
        f"{len(found)}",
        with_interval(case["psnr"]),
        f"{case['labels_alone']['value']:.1f}",
        with_interval(case["floor"]),
        with_interval(case["gain"]),
        f"{above} of {len(psnr)}",
        f"{right} of {len(psnr)}",
        with_quartiles(seconds, 0),
    ]
    return row, case


SUITE = Suite(
    numbers={"repeats": 1, "iterations": 400},
    quick={"repeats": 1, "iterations": 20},
    tasks=_tasks,
    report=_report,
)
