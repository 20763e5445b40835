"""Suite ``diffusion``: what the options of ``gradinv diffusion-dlg`` are worth.

Digits of 16x16 pixels behind one clean gradient of a LeNet. Around the defaults of
each attack one option changes at a time, on the same batches: restarts, where the
labels come from, the weight of the prior, and what the prior has learned. Beside them
stand the prior alone, the mean image of each class, and the data-free Gaussian.

Taught in: notebooks/06_diffusion_prior.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.diffusion_latent import diffusion_latent
from gradinv_helpers.attacks.diffusion_posterior import diffusion_posterior
from gradinv_helpers.attacks.gradinvdiff import gradinvdiff
from gradinv_helpers.attacks.labels import infer_labels
from gradinv_helpers.attacks.map_search import map_estimate
from gradinv_helpers.bench.priors import common
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
    mean_with_interval,
    stop_if_interrupted,
    with_interval,
)
from gradinv_helpers.bench.trained import model_at
from gradinv_helpers.classifier import Classifier, train_classifier
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.diffusion_experiment import (
    ATTACKS,
    DiffusionOptions,
    prior_draws,
    prior_floor,
)
from gradinv_helpers.errors import InputError
from gradinv_helpers.metrics import LeakageScore, score
from gradinv_helpers.models import build_model
from gradinv_helpers.plots import PALETTE
from gradinv_helpers.priors.diffusion import DiffusionPrior, train_diffusion
from gradinv_helpers.updates import SharedUpdate, local_update

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 16  # pixels
BATCHES = (1, 4, 8)
LATENT, POSTERIOR, OPTIMISED = ATTACKS
CLASS_MEAN, ALONE, MISLED = "class mean", "prior alone", "prior alone, wrong labels"
MAP = "gaussian-map, data-free"
GUESSES = (CLASS_MEAN, ALONE)  # without a gradient; their best is the floor
SHIPPED, SAME, OTHER, PHOTOS = (
    "diffusion-digits",
    "classes 5 to 9",
    "classes 0 to 4",
    "grey photos",
)
INFERRED, GIVEN, WRONG = "inferred", "given", "wrong"
RESTARTS, LABELS, WEIGHT, PRIOR = "restarts", "labels", "lambda_prior", "prior"

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    LATENT: diffusion_latent,
    POSTERIOR: diffusion_posterior,
    OPTIMISED: gradinvdiff,
}
_STEPS, _DECODING_STEPS = 50, 5  # of the reverse diffusion; of a latent's decoder
_PRIOR_DRAWS = 4
_TRAINING_STEPS, _TRAINING_IMAGES = 800, 600  # of the priors that the suite trains
_EPOCHS, _LR = 10, 1e-2  # of the LeNet that has learned
_QUICK_IMAGES = 64  # to train on


@dataclass(frozen=True)
class Choice:
    """An attack with its options; what is ``None`` is the command's default.

    Args:
        method: One of ``ATTACKS``, or what stands beside them.
        restarts: ``--restarts``.
        lambda_prior: ``--lambda-prior``, of ``diffusion-latent``.
        labels: ``inferred``; ``given``, as with ``--fix-labels``; or ``wrong``, of
            classes that no victim has.
        prior: What ``--prior`` has learned.
    """

    method: str
    restarts: int | None = None
    lambda_prior: float | None = None
    labels: str = INFERRED
    prior: str = SHIPPED

    @property
    def setting(self) -> str:
        """What was changed, in the words of the command."""
        words = [f"--restarts {self.restarts}"] * (self.restarts is not None)
        if self.lambda_prior is not None:
            words.append(f"--lambda-prior {self.lambda_prior:g}")
        if self.labels == GIVEN:
            words.append("--fix-labels")
        elif self.labels == WRONG:
            words.append("wrong labels")
        if self.prior != SHIPPED:
            words.append(f"prior of {self.prior}")
        return ", ".join(words) or "default"

    def options(self, steps: int) -> DiffusionOptions:
        """What the command makes of the choice."""
        return DiffusionOptions(
            dataset="digits",
            data_root=None,
            device="cpu",
            seed=0,
            output_dir="",
            attack=self.method,
            steps=steps,
            restarts=self.restarts,
            lambda_prior=self.lambda_prior,
            fix_labels=self.labels == GIVEN,
        )


@dataclass(frozen=True)
class Part:
    """A question, with the batches that it is asked of.

    Args:
        name: The question.
        choices: Attacks; the first one of each method is what the others are
            compared with.
        sizes: Images of a batch.
        epochs: Of the LeNet, before the round.
        first_class: Victims are of this class and those after it.
        beside: What stands beside the attacks.
    """

    name: str
    choices: tuple[Choice, ...]
    sizes: tuple[int, ...] = BATCHES
    epochs: int = 0
    first_class: int = 0
    beside: tuple[Choice, ...] = field(
        default=(Choice(CLASS_MEAN), Choice(ALONE), Choice(MAP))
    )

    @property
    def all(self) -> tuple[Choice, ...]:
        """All that is measured, guesses first."""
        return (*self.beside, *self.choices)


OPTIONS = Part(
    "options",
    tuple(
        choice
        for attack in ATTACKS
        for choice in (
            Choice(attack),
            *(
                Choice(attack, restarts=count)
                for count in ((1, 2) if attack == POSTERIOR else (2, 4))
            ),
            Choice(attack, labels=GIVEN),
            Choice(attack, labels=WRONG),
            *(
                Choice(attack, lambda_prior=weight)
                for weight in ((0.0, 0.5, 8.0) if attack == LATENT else ())
            ),
        )
    ),
    beside=(
        Choice(CLASS_MEAN),
        Choice(ALONE),
        Choice(MISLED, labels=WRONG),
        Choice(MAP),
    ),
)
LEARNED = Part(
    "labels behind a LeNet that has learned",
    tuple(Choice(a, labels=labels) for a in ATTACKS for labels in (INFERRED, GIVEN)),
    sizes=(8,),  # of four digits it still gives all labels away
    epochs=_EPOCHS,
)
PRIORS = Part(
    "priors, and digits from 5 to 9",
    tuple(Choice(a, prior=prior) for a in ATTACKS for prior in (SAME, OTHER, PHOTOS)),
    first_class=5,
    beside=(
        Choice(CLASS_MEAN),
        *(Choice(ALONE, prior=prior) for prior in (SAME, OTHER, PHOTOS)),
        Choice(MAP),
    ),
)
PARTS = (OPTIONS, LEARNED, PRIORS)
QUICK_PARTS = (
    Part(
        OPTIONS.name,
        (
            Choice(LATENT),
            Choice(LATENT, lambda_prior=8.0),
            Choice(POSTERIOR),
            Choice(POSTERIOR, restarts=1),
            Choice(POSTERIOR, labels=WRONG),
            Choice(OPTIMISED),
            Choice(OPTIMISED, labels=GIVEN),
        ),
        sizes=(2,),
        beside=OPTIONS.beside,
    ),
    Part(
        PRIORS.name,
        (Choice(POSTERIOR, prior=SAME), Choice(POSTERIOR, prior=OTHER)),
        sizes=(1,),
        first_class=5,
        beside=PRIORS.beside[:3],
    ),
)


# --- measuring ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scene:
    """One update under attack.

    Args:
        truth: The victims.
        update: What the server saw.
        labels: Labels by where they come from.
        seed: Seed of everything random.
    """

    truth: Images
    update: SharedUpdate
    labels: dict[str, Tensor]
    seed: int


@dataclass(frozen=True, eq=False)
class _Bench:
    """Victims, priors and the judge; batch k is behind the model of seed k."""

    setting: Setting
    train: Images
    test: Images
    judge: Classifier

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the suite
    def model(self, epochs: int, seed: int) -> nn.Module:
        """A LeNet, trained on the train split where the part asks for it."""
        channels, side, _ = self.train.shape
        model = build_model(
            "lenet",
            in_channels=channels,
            image_size=side,
            num_classes=self.train.num_classes,
            seed=seed,
        )
        if epochs:
            self.setting.say(f"training lenet, epochs: {epochs}")
            model = train_classifier(
                self.train, model=model, epochs=epochs, lr=_LR, seed=seed
            ).model
        return model.to(self.setting.device)

    @functools.cached_property
    def class_means(self) -> Tensor:
        """Mean training image of every class (K, C, H, W)."""
        pixels, labels = self.train.pixels, self.train.labels
        means = [pixels[labels == k].mean(0) for k in range(self.train.num_classes)]
        return torch.stack(means)

    @functools.cache  # noqa: B019 - lives as long as the suite
    def prior(self, name: str) -> DiffusionPrior:
        """The prior that ships, or one that the suite trains and keeps."""
        if name == SHIPPED:
            return DiffusionPrior.load(SHIPPED)
        images = self.public(name)
        steps = 2 if self.setting.quick else _TRAINING_STEPS
        parts = ["diffusion", name.replace(" ", ""), f"{steps}steps"]
        parts += [f"seed{self.setting.seed}", fingerprint(images)]
        folder = self.setting.folder / "models" / "_".join(parts)
        if not folder.is_dir():
            self.setting.say(f"training a diffusion model of {name}")
            made = train_diffusion(
                images, steps=steps, seed=self.setting.seed, class_conditional=False
            )
            if made.about["steps"] < steps:
                raise KeyboardInterrupt
            made.save(folder)
        return DiffusionPrior.load(folder)

    def public(self, name: str) -> Images:
        """What a prior learns from; as many images of each kind."""
        if name == PHOTOS:
            photos = load_images("photos", split="train", image_size=SIZE)
            grey = photos.pixels.mean(1, keepdim=True)
            images = Images(grey, photos.labels, photos.class_names)
        else:
            first = 0 if name == OTHER else 5
            images = self.train[of_classes(self.train, first, first + 5)]
        generator = torch.Generator().manual_seed(self.setting.seed)
        most = _QUICK_IMAGES if self.setting.quick else _TRAINING_IMAGES
        return images[torch.randperm(len(images), generator=generator)[:most]]

    @functools.lru_cache(maxsize=1)  # noqa: B019 - lives as long as the suite
    def scene(self, epochs: int, first_class: int, count: int, number: int) -> Scene:
        """One batch, and what the attacker has of it."""
        seed = self.setting.seed + number
        rows = of_classes(self.test, first_class, self.test.num_classes)
        generator = torch.Generator().manual_seed(seed)
        drawn = self.test[rows[torch.randperm(len(rows), generator=generator)[:count]]]
        # In the order of inferred labels: the same start then meets the same class.
        truth = drawn[drawn.labels.argsort(stable=True)]
        update = local_update(self.model(epochs, seed), truth)
        labels = {
            INFERRED: infer_labels(update).cpu(),
            GIVEN: truth.labels,
            WRONG: other_labels(truth.labels, self.test.num_classes, generator),
        }
        return Scene(truth, update, labels, seed)

    def measure(self, part: Part, count: int, choice: Choice, number: int) -> Record:
        """What one attack, or what stands beside it, makes of one batch."""
        scene = self.scene(part.epochs, part.first_class, count, number)
        begun = time.process_time()
        found = self.make(scene, choice)
        spent = time.process_time() - begun
        return {
            "part": part.name,
            "epochs": part.epochs,
            "first_class": part.first_class,
            "images": count,
            **vars(choice),
            "setting": choice.setting,
            "number": number,
            "labels_right": common(scene.labels[choice.labels], scene.truth.labels),
            **found,
            "cpu_seconds": spent,
        }

    def make(self, scene: Scene, choice: Choice) -> Record:
        """Images of an attack or a guess, scored."""
        labels = scene.labels[choice.labels]
        if choice.method in (ALONE, MISLED):
            return self.draws(scene, labels, self.prior(choice.prior))
        facts: Record = {}
        if choice.method == CLASS_MEAN:
            images = self.class_means[labels]
        elif choice.method == MAP:
            iterations = self.setting.numbers["iterations"]
            estimate = map_estimate(
                scene.update, labels=labels, iterations=iterations, seed=scene.seed
            )
            stop_if_interrupted(estimate.reconstruction)
            images = estimate.reconstruction.images
            facts["misfit"] = estimate.stages[-1].misfit
        else:
            prior = replace(self.prior(choice.prior), steps=_DECODING_STEPS)
            known = choice.options(self.steps).attack_settings
            found = _FUNCTIONS[choice.method](
                scene.update,
                prior,
                labels=None if choice.labels == INFERRED else labels,
                **known,
                seed=scene.seed,
            )
            stop_if_interrupted(found)
            images, facts["misfit"] = found.images, min(found.misfits)
        made = Images(images.cpu(), labels, scene.truth.class_names)
        result = score(made, scene.truth, others=self.test, judge=self.judge)
        return _numbers(result) | facts

    def draws(self, scene: Scene, labels: Tensor, prior: DiffusionPrior) -> Record:
        """What a prior says of these labels, the mean of the scores of some draws."""
        count = 1 if self.setting.quick else _PRIOR_DRAWS
        made = prior_draws(prior, labels, count, scene.seed + 2**31)
        known: Any = {"others": self.test, "judge": self.judge}
        found = prior_floor(made, labels, scene.truth, **known)
        assert found.identified and found.class_correct and found.feature_similarity
        return {
            "psnr": list(found.psnr),
            "mse": list(found.mse),
            "feature_similarity": list(found.feature_similarity),
            "identified": sum(found.identified),
            "candidates": len(self.test),
            "class_right": sum(found.class_correct),
        }

    @property
    def steps(self) -> int:
        """Steps of every attack."""
        return min(_STEPS, 2 * self.setting.numbers["iterations"])


def _numbers(result: LeakageScore) -> Record:
    """Scores of the images of one batch."""
    assert result.identification and result.class_correct
    assert result.feature_similarity is not None
    floors = [floor.psnr for floor in result.floors.values()]
    return {
        "psnr": list(result.psnr),
        "mse": list(result.mse),
        "floor": [max(values) for values in zip(*floors, strict=True)],
        "feature_similarity": list(result.feature_similarity),
        "identified": sum(rank == 1 for rank in result.identification.ranks),
        "candidates": result.identification.pool_size,
        "class_right": sum(result.class_correct),
    }


def of_classes(images: Images, first: int, end: int) -> Tensor:
    """Rows of the images of classes from ``first`` to before ``end``."""
    return ((images.labels >= first) & (images.labels < end)).nonzero()[:, 0]


def other_labels(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """As many labels, drawn from the classes that are not among them."""
    absent = [k for k in range(classes) if k not in labels.tolist()]
    drawn = torch.randint(len(absent), labels.shape, generator=generator)
    return torch.tensor(absent)[drawn]


def _tasks(setting: Setting) -> list[Task]:
    if setting.dataset != "digits":
        expected = "'digits', which the diffusion model that ships is of"
        raise InputError("dataset", expected, repr(setting.dataset))
    bench = _bench(setting)
    parts = QUICK_PARTS if setting.quick else PARTS
    for choice in (choice for part in parts for choice in part.all):
        bench.prior(choice.prior)  # so that no attack is charged for it
    return [
        Task(
            f"{part.name}, {count} images, batch {number}, "
            f"{choice.method}, {choice.setting}",
            functools.partial(bench.measure, part, count, choice, number),
        )
        for number in range(setting.numbers["repeats"])
        for part in parts
        for count in part.sizes
        for choice in part.all
    ]


def _bench(setting: Setting) -> _Bench:
    train, test = (
        load_images(setting.dataset, split=split, image_size=SIZE)
        for split in ("train", "test")
    )
    digests = setting.notes.setdefault("images_sha256", {})
    digests |= {"train": fingerprint(train), "test": fingerprint(test)}
    judge = Classifier(model_at(setting, "convnet", "trained", train, test).cpu())
    return _Bench(setting, train, test, judge)


# --- what comes of it ---------------------------------------------------------------

_HEAD = [
    "attack",
    "setting",
    "images",
    "PSNR, dB (95 %)",
    "minus the first setting, dB (95 %)",
    "above the floor, dB (95 %)",
    "MSE",
    "feature cosine",
    "class seen",
    "identified",
    "labels right",
    "misfit",
    "CPU seconds",
]
_TITLES: dict[str, Callable[[Record], bool]] = {
    "Beside the attacks": lambda r: r["method"] not in ATTACKS,
    "Restarts": lambda r: r["restarts"] is not None,
    "Labels": lambda r: r["labels"] != INFERRED,
    "Weight of the prior": lambda r: r["lambda_prior"] is not None,
}


def _report(records: Sequence[Record], setting: Setting) -> Report:
    summaries, tables = [], []
    for part in distinct(records, "part"):
        own = [
            _summary(found, method, setting_)
            for count in distinct(chosen(records, part=part), "images")
            for found in (chosen(records, part=part, images=count),)
            for method, setting_ in _measured(found)
        ]
        summaries += own
        for title, rows in _by_title(part, own):
            table = markdown(_HEAD, [_row(summary) for summary in rows])
            tables.append(f"### {title}\n\n{table}")
    tables.append(_note(setting))
    return Report({"cases": summaries}, "\n\n".join(tables), _figure(summaries))


def _measured(found: Sequence[Record]) -> list[tuple[str, str]]:
    """Methods with their settings, in the order in which they first come."""
    return list(dict.fromkeys((r["method"], r["setting"]) for r in found))


def _by_title(
    part: str, summaries: Sequence[Record]
) -> Iterator[tuple[str, list[Record]]]:
    """Rows of each table; the first setting of an attack is in every one of them."""
    methods = distinct(summaries, "method")

    def place(summary: Record) -> tuple[int, bool, str, int]:
        is_other = summary["difference"] is not None
        setting, images = summary["setting"], summary["images"]
        return methods.index(summary["method"]), is_other, setting, images

    ordered = sorted(summaries, key=place)
    if part != OPTIONS.name:
        yield part[0].upper() + part[1:], ordered
        return
    for title, belongs in _TITLES.items():
        varied = {s["method"] for s in ordered if belongs(s)} & set(ATTACKS)
        rows = [
            s
            for s in ordered
            if belongs(s) or (s["method"] in varied and s["difference"] is None)
        ]
        if rows:
            yield title, rows


_FACTS = (
    "part",
    "images",
    "method",
    "setting",
    "restarts",
    "lambda_prior",
    "labels",
    "prior",
)


def _summary(found: Sequence[Record], method: str, setting: str) -> Record:
    """One attack with one setting on all batches of one size."""
    own = chosen(found, method=method, setting=setting)
    first = chosen(
        found, method=method, setting=chosen(found, method=method)[0]["setting"]
    )
    numbers = {record["number"] for record in own}
    psnr = [statistics.fmean(record["psnr"]) for record in own]
    before = {r["number"]: statistics.fmean(r["psnr"]) for r in first}
    pairs = [
        (value, before[record["number"]])
        for value, record in zip(psnr, own, strict=True)
        if record["number"] in before
    ]
    floors = [
        statistics.fmean(floor_of(chosen(found, number=record["number"])))
        for record in own
    ]
    of_images = sum(len(record["psnr"]) for record in own)
    is_first = own[0]["setting"] == first[0]["setting"]
    misfits = [record["misfit"] for record in own if "misfit" in record]
    return {
        **{name: own[0][name] for name in _FACTS},
        "batches": len(numbers),
        "psnr": mean_with_interval(psnr),
        "difference": None if is_first else mean_difference(*zip(*pairs, strict=True)),
        "floor": statistics.fmean(floors),
        "gain": mean_difference(psnr, floors),
        "mse": statistics.fmean(e for record in own for e in record["mse"]),
        "feature_similarity": statistics.fmean(
            cosine for record in own for cosine in record["feature_similarity"]
        ),
        "class_right": sum(r["class_right"] for r in own) / of_images,
        "identified": sum(r["identified"] for r in own) / of_images,
        "identified_by_chance": statistics.fmean(1 / r["candidates"] for r in own),
        "labels_right": sum(r["labels_right"] for r in own) / of_images,
        "misfit": statistics.median(misfits) if misfits else None,
        "cpu_seconds": statistics.fmean(r["cpu_seconds"] for r in own),
    }


def floor_of(batch: Sequence[Record]) -> list[float]:
    """Best PSNR in dB that a guess has for every image of one batch.

    Args:
        batch: Records of all that met it; those of guesses count.
    """
    rows = [r["floor"] for r in batch if "floor" in r][:1]
    rows += [r["psnr"] for r in batch if r["method"] in GUESSES]
    return [max(column) for column in zip(*rows, strict=True)]


def _row(summary: Record) -> list[str]:
    difference, misfit = summary["difference"], summary["misfit"]
    return [
        summary["method"],
        "–" if summary["setting"] == "default" else summary["setting"],
        f"{summary['images']}",
        with_interval(summary["psnr"]),
        "–" if difference is None else with_interval(difference),
        with_interval(summary["gain"]),
        f"{summary['mse']:.4f}",
        f"{summary['feature_similarity']:.2f}",
        f"{summary['class_right']:.0%}",
        f"{summary['identified']:.0%}",
        f"{summary['labels_right']:.0%}",
        "–" if misfit is None else f"{misfit:.0e}",
        f"{summary['cpu_seconds']:.1f}",
    ]


def _note(setting: Setting) -> str:
    steps = min(_STEPS, 2 * setting.numbers["iterations"])
    return (
        f"Means over {setting.numbers['repeats']} batches, with bootstrap intervals "
        "over batches; batch k is behind the LeNet of seed k, at its initialisation "
        "where nothing else is said. Differences are of the same batches. The first "
        "row of an attack has the defaults of `gradinv diffusion-dlg`: one start, but "
        f"four draws of `diffusion-posterior`; λ = 2; inferred labels; {steps} steps. "
        f"`diffusion-latent` decodes in {_DECODING_STEPS} steps here, while the "
        "command takes 150 steps and decodes in 10. Wrong labels: drawn "
        "from the classes that no victim has. The floor of an image is the best of: "
        "its own mean colour, another image, the mean of the batch, the mean training "
        f"image of its inferred class, and {_PRIOR_DRAWS} draws of the prior for the "
        "inferred labels (a mean of their scores). Class seen: an independent "
        "classifier sees the true class; feature cosine: that of its last features. "
        "Identified: the true image is nearer than all other test images; chance is "
        "1 of 360. Misfit: relative squared distance to the update, a median. The "
        f"priors of the last table were trained for {_TRAINING_STEPS} steps on "
        f"{_TRAINING_IMAGES} images each, and know no classes."
    )


def _figure(summaries: Sequence[Record]) -> Figure:
    """Differences to the first setting of every attack, with their intervals."""
    from matplotlib.figure import Figure

    drawn = [s for s in summaries if s["difference"] is not None]
    attacks = [a for a in ATTACKS if chosen(drawn, method=a)]
    parts = distinct(drawn, "part")
    names = sorted(
        {(s["part"], s["setting"]) for s in drawn},
        key=lambda name: (parts.index(name[0]), name[1]),
    )
    height = 1.2 + 0.34 * len(names)
    figure = Figure(figsize=(9.6, height), facecolor="white", layout="constrained")
    grid = figure.subplots(
        1, max(1, len(attacks)), squeeze=False, sharex=True, sharey=True
    )[0]
    sizes = sorted({s["images"] for s in drawn})
    for axes, attack in zip(grid, attacks, strict=False):
        for shift, (size, colour) in enumerate(zip(sizes, PALETTE, strict=False)):
            own = chosen(drawn, method=attack, images=size)
            for at, summary in enumerate(own):
                found = summary["difference"]
                row = names.index((summary["part"], summary["setting"]))
                place = row + 0.2 * (shift - (len(sizes) - 1) / 2)
                axes.plot([found["low"], found["high"]], [place] * 2, color=colour)
                plural = "image" if size == 1 else "images"
                label = f"{size} {plural}" if at == 0 else None
                axes.plot(found["value"], place, "o", ms=4, color=colour, label=label)
        axes.axvline(0, color="#666666", lw=0.8)
        axes.set(title=attack, xlabel="difference in PSNR (dB)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#E3E3E3")
    grid[0].set_yticks(range(len(names)), [_short(*name) for name in names])
    grid[0].invert_yaxis()
    handles = {
        label: handle
        for axes in grid
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=max(1, len(handles)),
        frameon=False,
    )
    return figure


def _short(part: str, setting: str) -> str:
    return f"{setting}, trained" if part == LEARNED.name else setting


SUITE = Suite(
    numbers={"repeats": 5, "iterations": 40},
    quick={"repeats": 1, "iterations": 1},
    tasks=_tasks,
    report=_report,
)
