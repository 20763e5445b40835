"""Suite ``wall``: how many directions of a batch its gradient determines.

For every architecture, batch size, initialisation and stage of training the rank of
the Jacobian is measured at photographs in double precision, and set against the rule
that counts equations layer by layer. On some of them the attack follows, on the same
batches in float32, with labels inferred. What the rounding of the numbers that travel
leaves of the rank is measured on one network, and so is what local steps and unknown
labels do to it.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.invert import invert
from gradinv_helpers.attacks.jacobian import gram, linearise_gradient
from gradinv_helpers.attacks.spectrum import (
    FORMATS,
    PRIOR_STD,
    bits,
    cholesky_rank,
    count_equations,
    determined,
    rounding_std,
)
from gradinv_helpers.bench import wall_steps
from gradinv_helpers.bench.figures import panels
from gradinv_helpers.bench.suite import (
    Record,
    Report,
    Setting,
    Suite,
    Task,
    chosen,
    distinct,
    fingerprint,
    markdown,
    mean_difference,
    stop_if_interrupted,
    timed,
)
from gradinv_helpers.classifier import accuracy, train_classifier
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.metrics import score
from gradinv_helpers.models import _resnet20, build_model
from gradinv_helpers.updates import LocalTraining, local_update

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INITIALISATIONS: tuple[str, ...] = ("uniform", "pytorch")
STAGES: dict[str, int] = {"untrained": 0, "1 epoch": 1, "10 epochs": 10}
BATCH_SIZES: tuple[int, ...] = (1, 2, 4, 8)
SIZE, LARGE = 16, 32  # pixels
RANK, WALL, ROUNDING, ATTACK = "rank", "large images", "rounding", "attack"
ATTACKED = (
    "lenet",
    "kernel 3",
    "width 24",
    "tanh",
    "relu",
    "mlp, sigmoid",
    "convnet",
    "resnet20, width 4",
)
_MOST_OF_STAGE = {"1 epoch": 4, "10 epochs": 4}  # larger batches only of untrained ones
_LR, _LR_OF_KINKS = 1e-2, 3e-3  # sigmoids learn slowly
_QUICK_ARCHITECTURES = ("lenet", "kernel 3, relu")
_QUICK_IMAGES = 100  # to train on
_PRECISE = "uniform"  # initialisation of the network whose numbers are rounded

Builder = Callable[[int, int, int], nn.Module]


@dataclass(frozen=True)
class Architecture:
    """A network of the map, for images of any size.

    Args:
        build: Makes it from channels, image side and number of classes.
        smooth: Whether its slope never jumps.
        most: Largest batch whose Jacobian is affordable.
    """

    build: Builder
    smooth: bool = True
    most: int = 8


def convolutions(
    *,
    kernel: int = 5,
    width: int = 12,
    strides: Sequence[int] = (2, 2, 1),
    activation: Callable[[], nn.Module] = nn.Sigmoid,
) -> Builder:
    """LeNet of DLG by default, with one thing changed at a time."""

    def build(channels: int, side: int, classes: int) -> nn.Module:
        layers: list[nn.Module] = []
        for stride in strides:
            conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2)
            layers += [conv, activation()]
            channels, side = width, -(-side // stride)
        head = nn.Linear(width * side * side, classes)
        return nn.Sequential(*layers, nn.Flatten(), head)

    return build


def _built(name: str) -> Builder:
    def build(channels: int, side: int, classes: int) -> nn.Module:
        return build_model(
            name, in_channels=channels, image_size=side, num_classes=classes
        )

    return build


def _small_resnet(channels: int, side: int, classes: int) -> nn.Module:
    return _resnet20(channels, side, classes, width=4)


def _mlp(channels: int, side: int, classes: int) -> nn.Module:
    hidden = nn.Linear(channels * side * side, 64)
    return nn.Sequential(nn.Flatten(), hidden, nn.Sigmoid(), nn.Linear(64, classes))


ARCHITECTURES: dict[str, Architecture] = {
    "lenet": Architecture(convolutions()),
    "kernel 3": Architecture(convolutions(kernel=3)),
    "width 6": Architecture(convolutions(width=6)),
    "width 24": Architecture(convolutions(width=24)),
    "strides 1-2-2": Architecture(convolutions(strides=(1, 2, 2))),
    "2 convolutions": Architecture(convolutions(strides=(2, 2))),
    "4 convolutions": Architecture(convolutions(strides=(2, 2, 1, 1))),
    "tanh": Architecture(convolutions(activation=nn.Tanh)),
    "relu": Architecture(convolutions(activation=nn.ReLU), smooth=False),
    "kernel 3, relu": Architecture(
        convolutions(kernel=3, activation=nn.ReLU), smooth=False
    ),
    "mlp, sigmoid": Architecture(_mlp),
    "mlp": Architecture(_built("mlp"), smooth=False),
    "convnet": Architecture(_built("convnet"), smooth=False, most=2),
    "resnet20, width 4": Architecture(_small_resnet, smooth=False, most=1),
}


# --- measuring --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Bench:
    """Photographs of one size, and networks at all stages."""

    setting: Setting
    test: Images
    train: Images

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the suite
    def network(
        self, name: str, initialisation: str, stage: str
    ) -> tuple[nn.Module, float]:
        """A network, and its accuracy on what it was trained on."""
        architecture = ARCHITECTURES[name]
        channels, side, _ = self.test.shape
        classes = max(2, self.train.num_classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.setting.seed)
            model = architecture.build(channels, side, classes).eval()
            if initialisation == "uniform":
                for parameter in model.parameters():
                    nn.init.uniform_(parameter, -0.5, 0.5)
        if STAGES[stage]:
            self.setting.say(f"training {name}, {initialisation}, {stage}")
            model = train_classifier(
                self.train,
                model=model,
                epochs=STAGES[stage],
                lr=_LR if architecture.smooth else _LR_OF_KINKS,
                seed=self.setting.seed,
            ).model
        right = accuracy(model, self.train)
        return model.to(self.setting.device), right

    def drawn(self, size: int, number: int) -> Images:
        """The photographs of one batch."""
        generator = torch.Generator().manual_seed(self.setting.seed + number)
        order = torch.randperm(len(self.test), generator=generator)
        return self.test[order[:size]]

    def batch(self, size: int, number: int) -> tuple[Tensor, Tensor]:
        """Images and one-hot labels of one batch."""
        drawn = self.drawn(size, number)
        targets = F.one_hot(drawn.labels, max(2, self.train.num_classes))
        device = self.setting.device
        return drawn.pixels.double().to(device), targets.double().to(device)

    def measure(
        self, what: str, name: str, initialisation: str, stage: str, size: int, k: int
    ) -> Record:
        """Rank of one batch, and what the rule says."""
        model, right = self.network(name, initialisation, stage)
        images, targets = self.batch(size, k)
        (rank, _), seconds = timed(
            lambda: cholesky_rank(linearise_gradient(model, images, targets).normal()),
            self.setting.device,
        )
        return {
            "what": what,
            "architecture": name,
            "initialisation": initialisation,
            "stage": stage,
            "batch_size": size,
            "number": k,
            "unknowns": images.numel(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "rank": rank,
            "counted": count_equations(model, images).rank,
            "train_accuracy": right,
            "seconds": seconds,
        }

    def attack(
        self, name: str, initialisation: str, stage: str, size: int, k: int
    ) -> Record:
        """What the default attack makes of one batch."""
        model, _ = self.network(name, initialisation, stage)
        truth = self.drawn(size, k)
        update = local_update(model, truth)
        about = {
            "what": ATTACK,
            "architecture": name,
            "initialisation": initialisation,
            "stage": stage,
            "batch_size": size,
            "number": k,
        }
        if not any(float(tensor.square().sum()) for tensor in update.tensors.values()):
            return {**about, "psnr": None}  # there is nothing to invert
        attack = functools.partial(
            invert,
            update,
            iterations=self.setting.numbers["iterations"],
            restarts=1,
            seed=self.setting.seed + k,
        )
        try:
            found, seconds = timed(attack, self.setting.device)
        except InputError as error:  # a gradient that overflows in every start
            return {**about, "psnr": None, "why": str(error)}
        stop_if_interrupted(found)
        result = score(found, truth, others=self.test)
        return {
            **about,
            "psnr": list(result.psnr),
            "floors": {name: list(f.psnr) for name, f in result.floors.items()},
            "labels_right": result.label_correct and sum(result.label_correct),
            "ran": found.attack,
            "seconds": seconds,
        }

    def round(self, size: int, number_format: str, k: int) -> Record:
        """What the rounding of every entry leaves of the LeNet's gradient."""
        model, _ = self.network("lenet", _PRECISE, "untrained")
        images, targets = self.batch(size, k)
        linear = linearise_gradient(model, images, targets)
        weights = [p for p in model.parameters() if p.requires_grad]
        parts = linear.gradient.split([p.numel() for p in weights])
        std = torch.cat([rounding_std(part, number_format) for part in parts])
        squares = torch.linalg.eigvalsh(gram(linear.dense() / std[:, None]))
        values = squares.clamp_min(0).sqrt()
        rank = cholesky_rank(linear.normal())[0]
        values = values[len(values) - rank :]
        return {
            "what": ROUNDING,
            "format": number_format,
            "batch_size": size,
            "number": k,
            "unknowns": images.numel(),
            "rank": rank,
            "determined": determined(values, noise_std=1.0),
            "bits": bits(values, noise_std=1.0),
        }

    def steps(self, batch_size: int, epochs: int, k: int) -> Record:
        """What a weight change of several local steps determines."""
        model, _ = self.network(wall_steps.NETWORK, _PRECISE, "untrained")
        recipe = LocalTraining(
            sends="delta", lr=wall_steps.LR, epochs=epochs, batch_size=batch_size
        )
        batch = self.batch(wall_steps.IMAGES, k)
        return {**wall_steps.count_steps(model, *batch, recipe), "number": k}

    def labels(self, known: bool, size: int, k: int) -> Record:
        """What one gradient determines of images, or of images and labels."""
        model, _ = self.network(wall_steps.NETWORK, _PRECISE, "untrained")
        batch = self.batch(size, k)
        return {**wall_steps.count_labels(model, *batch, known=known), "number": k}


def _tasks(setting: Setting) -> list[Task]:
    small = _bench(setting, SIZE)
    most, repeats = setting.numbers["images"], setting.numbers["repeats"]
    names = _QUICK_ARCHITECTURES if setting.quick else tuple(ARCHITECTURES)
    stages = list(STAGES)[:2] if setting.quick else list(STAGES)
    cases = [
        (RANK, name, initialisation, stage, size, k)
        for stage in stages
        for name in names
        for initialisation in INITIALISATIONS
        for size in BATCH_SIZES
        if size <= min(most, ARCHITECTURES[name].most, _MOST_OF_STAGE.get(stage, most))
        for k in range(repeats)
    ]
    tasks = [_task(small.measure, *case) for case in cases]
    tasks += [
        Task(
            f"{ATTACK}, {', '.join(map(str, case))}",
            functools.partial(small.attack, *case),
        )
        for case in _attacked(setting)
    ]
    formats = FORMATS[1:3] if setting.quick else FORMATS
    for size in (1,) if setting.quick else (1, 2):
        tasks += [
            _task(small.round, size, form, k)
            for form in formats
            for k in range(repeats)
        ]
    recipes = wall_steps.RECIPES[1:2] if setting.quick else wall_steps.RECIPES
    tasks += [
        Task(
            f"{wall_steps.STEPS}, {size}, {epochs} epochs, {k}",
            functools.partial(small.steps, size, epochs, k),
        )
        for size, epochs in recipes
        for k in range(repeats)
    ]
    tasks += [
        Task(
            f"{wall_steps.LABELS}, {'given' if known else 'unknown'}, {size}, {k}",
            functools.partial(small.labels, known, size, k),
        )
        for size in ((1,) if setting.quick else (1, 2))
        for known in (True, False)
        for k in range(repeats)
    ]
    if not setting.quick:
        large = _bench(setting, LARGE)
        tasks += [
            _task(large.measure, WALL, "lenet", initialisation, "untrained", size, 0)
            for initialisation in INITIALISATIONS
            for size in range(1, 1 + min(most, 4))
        ]
    return tasks


def _attacked(setting: Setting) -> list[tuple[str, str, str, int, int]]:
    """Cases that are attacked, not only counted: larger batches of small networks."""
    most, repeats = setting.numbers["images"], setting.numbers["repeats"]
    names = _QUICK_ARCHITECTURES[:1] if setting.quick else ATTACKED
    return [
        (name, initialisation, stage, size, k)
        for stage in (list(STAGES)[:1] if setting.quick else STAGES)
        for name in names
        for initialisation in INITIALISATIONS
        for size in BATCH_SIZES
        if size <= _MOST_OF_STAGE.get(stage, most)
        for k in range(repeats)
    ]


def _task(measure: Callable[..., Record], *case: object) -> Task:
    key = ", ".join(map(str, case))
    key = key if isinstance(case[0], str) else f"{ROUNDING}, {key}"
    return Task(key, functools.partial(measure, *case))


def _bench(setting: Setting, size: int) -> _Bench:
    test, train = (
        load_images(
            setting.dataset,
            data_root=setting.data_root,
            split="train" if split == "train" else "test",
            image_size=size,
        )
        for split in ("test", "train")
    )
    digests = setting.notes.setdefault("images_sha256", {})
    digests[f"test, {size} pixels"] = fingerprint(test)
    digests[f"train, {size} pixels"] = fingerprint(train)
    if setting.quick:
        train = train[:_QUICK_IMAGES]
    return _Bench(setting, test, train)


# --- what comes of it -------------------------------------------------------------


def _report(records: Sequence[Record], setting: Setting) -> Report:
    ranks = chosen(records, what=RANK)
    cases = [_case(found) for found in _groups(ranks)]
    large = [_case(found) for found in _groups(chosen(records, what=WALL))]
    rounded_cases = [
        _rounding_case(chosen(records, what=ROUNDING, batch_size=size, format=form))
        for size in distinct(chosen(records, what=ROUNDING), "batch_size")
        for form in distinct(chosen(records, what=ROUNDING), "format")
    ]
    attacked = [r for r in chosen(records, what=ATTACK) if r["psnr"] is not None]
    attacks = [_attack_case(found) for found in _groups(attacked)]
    errors = _rule_errors([*ranks, *chosen(records, what=WALL)])
    summary = {
        "cases": cases,
        "large_images": large,
        "rounding": rounded_cases,
        "rule": errors,
        "attacks": attacks,
    }
    iterations = setting.numbers["iterations"]
    parts = [_rank_table(cases), _NOTE, _attack_table(attacks, iterations)]
    if large:
        parts.append(_large_table(large))
    parts += [_rule_table(errors), wall_steps.table(records)]
    parts.append(_rounding_table(rounded_cases))
    return Report(summary, "\n\n".join(parts), _figure(cases, attacks))


def _groups(records: Sequence[Record]) -> list[list[Record]]:
    """Records that differ in their batch only."""
    names = ("architecture", "initialisation", "stage", "batch_size")
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[n] for n in names), []).append(record)
    return list(found.values())


def _case(found: Sequence[Record]) -> Record:
    names = ("architecture", "initialisation", "stage", "batch_size", "unknowns")
    ranks, counts = ([r[key] for r in found] for key in ("rank", "counted"))
    return {
        **{name: found[0][name] for name in names},
        "batches": len(found),
        "rank": statistics.fmean(ranks),
        "rank_min": min(ranks),
        "rank_max": max(ranks),
        "counted": statistics.fmean(counts),
        "rank_per_unknown": statistics.fmean(ranks) / found[0]["unknowns"],
        "train_accuracy": found[0]["train_accuracy"],
    }


def _attack_case(found: Sequence[Record]) -> Record:
    names = ("architecture", "initialisation", "stage", "batch_size")
    psnr = [value for record in found for value in record["psnr"]]
    floors = [
        max(values)
        for record in found
        for values in zip(*record["floors"].values(), strict=True)
    ]
    right = [record["labels_right"] for record in found]
    return {
        **{name: found[0][name] for name in names},
        "images": len(psnr),
        "psnr": statistics.fmean(psnr),
        "worst": min(psnr),
        "floor": statistics.fmean(floors),
        "gain": mean_difference(psnr, floors),
        "labels_right": None if None in right else sum(right),
        "ran": sorted({record["ran"] for record in found}),
        "seconds": statistics.fmean(record["seconds"] for record in found),
    }


def _rule_errors(records: Sequence[Record]) -> list[Record]:
    """How far the rule is off, in percent of the unknowns, by kind of network."""
    found = []
    for kind, smooth in (("smooth", True), ("ReLU", False)):
        for stage in STAGES:
            off = [
                100 * (r["counted"] - r["rank"]) / r["unknowns"]
                for r in records
                if ARCHITECTURES[r["architecture"]].smooth == smooth
                and r["stage"] == stage
            ]
            if off:
                sizes = [abs(value) for value in off]
                found.append(
                    {
                        "kind": kind,
                        "stage": stage,
                        "cases": len(off),
                        "exact": sum(value == 0 for value in off),
                        "mean": statistics.fmean(off),
                        "mean_size": statistics.fmean(sizes),
                        "largest": max(sizes),
                    }
                )
    return found


def _rounding_case(found: Sequence[Record]) -> Record:
    unknowns = found[0]["unknowns"]
    given = statistics.fmean(r["bits"] for r in found)
    shown = statistics.fmean(r["determined"] for r in found)
    return {
        "batch_size": found[0]["batch_size"],
        "format": found[0]["format"],
        "unknowns": unknowns,
        "rank": statistics.fmean(r["rank"] for r in found),
        "determined": shown,
        "images": found[0]["batch_size"] * shown / unknowns,
        "bits": given,
        "bits_per_pixel": given / unknowns,
    }


_NOTE = (
    f"Images of {SIZE}x{SIZE} pixels. Each cell: rank / unknowns in percent, measured "
    "at photographs by a pivoted Cholesky factorisation (pivots above 1e-12 of the "
    "largest), and in brackets what the rule counts. Initialisation: uniform from -0.5 "
    "to 0.5, as DLG has it, or PyTorch's own. Labels are known and change nothing: "
    "they are no continuous unknowns."
)


def _rank_table(cases: Sequence[Record]) -> str:
    sizes = sorted({case["batch_size"] for case in cases})
    rows = []
    for name in distinct(cases, "architecture"):
        for initialisation in INITIALISATIONS:
            for stage in STAGES:
                line = chosen(
                    cases,
                    architecture=name,
                    initialisation=initialisation,
                    stage=stage,
                )
                if line:
                    found = {case["batch_size"]: case for case in line}
                    cells = [_cell(found[s]) if s in found else "–" for s in sizes]
                    right = f"{100 * line[0]['train_accuracy']:.0f}"
                    title = f"{name}, {initialisation}, {stage}"
                    rows.append([title, *cells, right])
    head = ["network", *(f"B = {s}" for s in sizes), "right on its training images, %"]
    return markdown(head, rows)


def _attack_table(cases: Sequence[Record], iterations: int) -> str:
    sizes = sorted({case["batch_size"] for case in cases})
    rows = []
    names = ("architecture", "initialisation", "stage")
    for title in dict.fromkeys(tuple(case[name] for name in names) for case in cases):
        line = chosen(cases, **dict(zip(names, title, strict=True)))
        found = {case["batch_size"]: case for case in line}
        cells = [_attack_cell(found[s]) if s in found else "–" for s in sizes]
        rows.append([", ".join(title), *cells])
    head = ["the attack's mean PSNR, dB", *(f"B = {s}" for s in sizes)]
    note = (
        "Mean PSNR, and in brackets the mean floor: the best of a constant image, "
        "another image, and the mean of the batch. The attack is `auto`, labels are "
        f"inferred, the gradient is in float32; at most {iterations} iterations. A "
        "dash is a case that was not run, or a gradient that is zero or overflows."
    )
    return f"{markdown(head, rows)}\n\n{note}"


def _attack_cell(case: Record) -> str:
    return f"{case['psnr']:.1f} ({case['floor']:.1f})"


def _cell(case: Record) -> str:
    counted = 100 * case["counted"] / case["unknowns"]
    return f"{100 * case['rank_per_unknown']:.1f} ({counted:.1f})"


def _large_table(cases: Sequence[Record]) -> str:
    rows = [
        [
            f"LeNet, {case['initialisation']}, B = {case['batch_size']}",
            f"{case['unknowns']:,}",
            f"{case['rank']:,.0f}",
            f"{case['counted']:,.0f}",
            f"{case['unknowns'] - case['rank']:,.0f}",
        ]
        for case in cases
    ]
    head = [f"{LARGE}x{LARGE} pixels", "unknowns", "rank", "counted", "missing"]
    return markdown(head, rows)


def _rule_table(errors: Sequence[Record]) -> str:
    rows = [
        [
            f"{error['kind']}, {error['stage']}",
            f"{error['cases']}",
            f"{error['exact']}",
            f"{error['mean']:+.1f}",
            f"{error['mean_size']:.1f}",
            f"{error['largest']:.1f}",
        ]
        for error in errors
    ]
    head = [
        "the rule's error, % of the unknowns",
        "cases",
        "exact",
        "mean",
        "mean size",
        "largest",
    ]
    return markdown(head, rows)


def _rounding_table(cases: Sequence[Record]) -> str:
    rows = [
        [
            f"{case['format']}, B = {case['batch_size']}",
            f"{case['unknowns']:,}",
            f"{case['rank']:,.0f}",
            f"{case['determined']:,.0f}",
            f"{case['images']:.2f}",
            f"{case['bits_per_pixel']:.1f}",
        ]
        for case in cases
    ]
    head = [
        "LeNet, the numbers sent as",
        "unknowns",
        "rank",
        "above rounding",
        "in images",
        "bits per pixel",
    ]
    note = (
        "Above rounding: directions in which the rounded gradient tells more than a "
        f"standard deviation of {PRIOR_STD:g} per pixel does beforehand. Every entry "
        "is weighed by its own rounding; int8 has one step per tensor."
    )
    return f"{markdown(head, rows)}\n\n{note}"


def _figure(cases: Sequence[Record], attacks: Sequence[Record]) -> Figure:
    charts = {
        f"{what}, untrained, {initialisation}": _lines(found, key, initialisation)
        for what, found, key in (("rank", cases, "share"), ("PSNR", attacks, "gain"))
        for initialisation in INITIALISATIONS
    }
    ranks, gains = ["rank / unknowns (%)"] * 2, ["mean PSNR above the floor (dB)"] * 2
    return panels(charts, xlabel="batch size", ylabels=[*ranks, *gains], columns=2)


def _lines(
    cases: Sequence[Record], key: str, initialisation: str
) -> dict[str, tuple[list[float], list[float]]]:
    """One line per architecture over the batch size."""
    lines = {}
    for name in distinct(cases, "architecture"):
        line = chosen(
            cases, architecture=name, initialisation=initialisation, stage="untrained"
        )
        line.sort(key=lambda case: case["batch_size"])
        heights = [
            100 * case["rank_per_unknown"] if key == "share" else case["gain"]["value"]
            for case in line
        ]
        lines[name] = ([case["batch_size"] for case in line], heights)
    return lines


SUITE = Suite(
    numbers={"images": 8, "repeats": 1, "iterations": 60},
    quick={"images": 2, "repeats": 1, "iterations": 1},
    tasks=_tasks,
    report=_report,
)
