"""A federated run that is attacked while it goes on: ``gradinv simulate``.

Taught in: notebooks/07_iid_noniid.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import nn

from gradinv_helpers import plots
from gradinv_helpers.attacks.class_proportions import infer_class_proportions
from gradinv_helpers.attacks.invert import invert
from gradinv_helpers.compute import resolve_device
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.defences import (
    Defence,
    GaussianNoise,
    Sign,
    StochasticQuantisation,
    TopK,
)
from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
    check_seed,
)
from gradinv_helpers.experiment import versions
from gradinv_helpers.federated.aggregation import aggregate
from gradinv_helpers.federated.heterogeneity import label_histograms, total_variation
from gradinv_helpers.federated.rounds import RoundReport, train_federated
from gradinv_helpers.federated.secure_aggregation import secure_aggregate
from gradinv_helpers.files import prepare_folder, write_bytes, write_json
from gradinv_helpers.metrics import LeakageScore, score
from gradinv_helpers.models import MODELS, build_model
from gradinv_helpers.partition import Client, Scheme, partition
from gradinv_helpers.privacy import PrivateNoise, epsilon_spent
from gradinv_helpers.updates import LocalTraining, Optimiser, SharedUpdate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENGINES: tuple[str, ...] = ("inprocess",)
ALGORITHMS: tuple[str, ...] = ("fedavg", "fedsgd")
# Attacks that have seen no images: the clients hold the train split, on which the
# learned priors that ship were trained.
ATTACKS: tuple[str, ...] = (
    "auto",
    "gaussian-map",
    "inverting-gradients",
    "dlg",
    "idlg",
    "exact",
)
DEFENCES: dict[str, str] = {
    "noise": "noise:0.01 (Gaussian, share of the update's norm)",
    "top-k": "top-k:0.1 (share of the entries that is sent)",
    "sign": "sign",
    "quantise": "quantise:4 (bits per entry)",
    "dp": "dp:1.0:0.5 (noise multiplier, clipping norm; fedsgd)",
}
_EXAMPLES = 200  # labelled images that the server infers class shares by
DELTA = 1e-5  # of the (epsilon, delta) that is reported for dp


@dataclass(frozen=True)
class SimulationOptions:
    """Everything that ``gradinv simulate`` can be told; see its ``--help``.

    Raises:
        InputError: A value is unknown or out of range, or two of them do not fit.
    """

    dataset: str
    data_root: str | None
    device: str
    seed: int
    output_dir: str
    rounds: int = 10
    clients: int = 10
    clients_per_round: int | None = None
    samples_per_client: int | None = None
    partition: Scheme = "iid"
    alpha: float | None = None
    algorithm: str = "fedavg"
    model: str = "mlp"
    lr: float = 0.1
    local_epochs: int = 1
    batch_size: int = 16
    optimiser: Optimiser = "sgd"
    dropout: float = 0.0
    defence: tuple[str, ...] = ()
    secure_aggregation: bool = False
    threshold: int | None = None
    engine: str = "inprocess"
    attack: str = "auto"
    attack_every: int = 5
    attack_images: int = 8
    iterations: int = 20
    restarts: int = 1

    def __post_init__(self) -> None:
        counts = ("rounds", "clients", "local_epochs", "batch_size")
        for name in (*counts, "iterations", "restarts"):
            check_count(name, getattr(self, name))
        for name in ("attack_every", "attack_images"):
            check_count(name, getattr(self, name), minimum=0)
        if self.clients_per_round is not None:
            check_count(
                "clients_per_round", self.clients_per_round, maximum=self.clients
            )
        if self.samples_per_client is not None:
            check_count("samples_per_client", self.samples_per_client)
        check_seed("seed", self.seed)
        check_choice("partition", self.partition, get_args(Scheme))
        check_choice("algorithm", self.algorithm, ALGORITHMS)
        check_choice("model", self.model, MODELS)
        check_choice("engine", self.engine, ENGINES)
        check_choice("attack", self.attack, ATTACKS)
        if check_number("dropout", self.dropout) >= 1:
            raise InputError("dropout", "a probability below 1", self.dropout)
        if self.partition == "dirichlet" and self.alpha is None:
            object.__setattr__(self, "alpha", 0.5)
        if self.threshold is not None:
            if not self.secure_aggregation:
                hint = "add --secure-aggregation"
                raise InputError("threshold", "None without it", self.threshold, hint)
            check_count("threshold", self.threshold, maximum=self.drawn)
        resolve_device(self.device)
        if self.defences.clip_norm is not None and self.algorithm != "fedsgd":
            hint = "clipping per sample needs --algorithm fedsgd"
            raise InputError("defence", "no dp with fedavg", list(self.defence), hint)
        self.training()

    @functools.cached_property
    def defences(self) -> ParsedDefences:
        """What ``defence`` means."""
        return parse_defences(self.defence)

    @property
    def drawn(self) -> int:
        """Clients that are asked in each round."""
        return self.clients_per_round or self.clients

    @property
    def needed(self) -> int:
        """Clients that secure aggregation needs to the end of a round."""
        return self.threshold or max(1, self.drawn // 2 + 1)

    def training(self) -> LocalTraining:
        """The recipe of every client."""
        if self.algorithm == "fedsgd":
            return LocalTraining(lr=self.lr, clip_norm=self.defences.clip_norm)
        return LocalTraining(
            sends="delta",
            lr=self.lr,
            epochs=self.local_epochs,
            batch_size=self.batch_size,
            optimiser=self.optimiser,
        )


@dataclass(frozen=True)
class ParsedDefences:
    """What ``--defence`` means.

    Args:
        applied: Applied by every client to its update, in order.
        clip_norm: Clipping norm per sample of ``dp``, or ``None``.
        noise_multiplier: Noise multiplier of ``dp``, or ``None``.
    """

    applied: tuple[Defence, ...] = ()
    clip_norm: float | None = None
    noise_multiplier: float | None = None


def parse_defences(texts: Sequence[str]) -> ParsedDefences:
    """Read defences such as ``top-k:0.1`` or ``dp:1.0:0.5``.

    Raises:
        InputError: An unknown name, or numbers that do not fit it.
    """
    applied: list[Defence] = []
    clip_norm = multiplier = None
    for text in texts:
        name, *parts = text.split(":")
        check_choice("defence", name, DEFENCES)
        wanted = DEFENCES[name].split(" (")[0]
        try:
            numbers = [float(part) for part in parts]
        except ValueError as error:
            raise InputError("defence", f"such as {wanted}", repr(text)) from error
        if len(numbers) != wanted.count(":"):
            raise InputError("defence", f"such as {wanted}", repr(text))
        if name == "noise":
            applied.append(GaussianNoise(numbers[0], relative=True))
        elif name == "top-k":
            applied.append(TopK(numbers[0]))
        elif name == "sign":
            applied.append(Sign())
        elif name == "quantise":
            if not numbers[0].is_integer():
                raise InputError("defence", "a whole number of bits", repr(text))
            applied.append(StochasticQuantisation(int(numbers[0])))
        else:
            multiplier = numbers[0]
            clip_norm = check_number("defence", numbers[1], exclusive=True)
            applied.append(PrivateNoise(multiplier))
    return ParsedDefences(tuple(applied), clip_norm, multiplier)


@dataclass(frozen=True, eq=False)
class RoundLeakage:
    """What one message of a round gave away.

    Attributes:
        round: Number of the round, from 1.
        sender: The client's number, or ``None`` for the sum of all.
        num_samples: Images behind the message.
        proportions: Inferred shares of the classes (K,).
        proportion_error: Their total variation distance from the true shares, 0 to 1.
        proportion_floor: The same of a guess that every client holds the global mix.
        score: Image leakage against the true images, or ``None``.
        note: Why there is no score; empty where there is one.
    """

    round: int
    sender: int | None
    num_samples: int
    proportions: tuple[float, ...] | None
    proportion_error: float | None
    proportion_floor: float
    score: LeakageScore | None
    note: str = ""

    @property
    def psnr(self) -> float | None:
        """Mean PSNR of the images in dB."""
        return None if self.score is None else self.score.means()["psnr"]

    @property
    def floor(self) -> float | None:
        """The best of the floors of the score, in dB."""
        if self.score is None:
            return None
        return max(f.means()["psnr"] for f in self.score.floors.values())

    @property
    def sender_name(self) -> str:
        """Words for the sender."""
        return "the sum" if self.sender is None else f"client {self.sender}"

    def to_dict(self) -> dict[str, Any]:
        """Numbers for JSON."""
        return {
            "round": self.round,
            "sender": self.sender,
            "num_samples": self.num_samples,
            "proportions": self.proportions,
            "proportion_error": self.proportion_error,
            "proportion_floor": self.proportion_floor,
            "psnr": self.psnr,
            "floor": self.floor,
            "note": self.note,
            "score": self.score and self.score.to_dict(),
        }


@dataclass(frozen=True)
class SimulationResult:
    """What ``run_simulation`` measured and wrote.

    Args:
        rounds: One report per round.
        arrived: Clients whose message arrived, of each round; none in a round that was
            lost because too few stayed.
        leakage: What the messages that were attacked gave away.
        epsilon: Privacy spent by every sample at ``DELTA``, for ``dp``.
        files: Files written, in order.
        interrupted: Whether Ctrl-C ended the run early; what was done is written.
    """

    rounds: tuple[RoundReport, ...]
    arrived: tuple[tuple[int, ...], ...]
    leakage: tuple[RoundLeakage, ...]
    epsilon: float | None
    files: tuple[Path, ...]
    interrupted: bool

    def table(self) -> str:
        """A line per round, for the terminal."""
        lines = ["round  clients  accuracy   kB up  kB down  seconds  leakage"]
        for report, arrived in zip(self.rounds, self.arrived, strict=True):
            found = [seen for seen in self.leakage if seen.round == report.round]
            told = "; ".join(map(_told, found)) if arrived else "lost: too few stayed"
            clients = f"{len(arrived)}/{len(report.participants)}"
            accuracy = "" if report.accuracy is None else f"{report.accuracy:.3f}"
            lines.append(
                f"{report.round:5}  {clients:>7}  {accuracy:>8}"
                f"  {report.bytes_up / 1e3:6.0f}  {report.bytes_down / 1e3:7.0f}"
                f"  {report.seconds:7.2f}  {told}".rstrip()
            )
        if self.epsilon is not None:
            lines.append(f"epsilon {self.epsilon:.2f} at delta {DELTA:g} (add/remove)")
        return "\n".join(lines)


def run_simulation(
    options: SimulationOptions,
    *,
    on_stage: Callable[[str], None] = lambda text: None,
    on_round: Callable[[RoundReport], None] = lambda report: None,
) -> SimulationResult:
    """Train a federation, attack some of its messages, and write what came out.

    The clients divide the train split among themselves; accuracy is measured on the
    test split, which the server has as its own. In every ``attack_every``-th round,
    from the first, it takes the message of the participant with the fewest images,
    infers the class shares behind it by examples from the test split, and inverts the
    images where there are at most ``attack_images``. With secure aggregation the server
    has the sum alone, and attacks that.

    Args:
        options: The experiment.
        on_stage: Told in words what begins.
        on_round: Told of every finished round.

    Raises:
        InputError: An option does not fit the data set, or the output folder cannot
            be written to.
    """
    begun = time.perf_counter()
    train, test = (
        load_images(options.dataset, data_root=options.data_root, split=split)
        for split in ("train", "test")
    )
    clients = _clients(options, train)
    folder = prepare_folder(options.output_dir)
    record = _Record(options, folder, clients, train, _examples(test, options.seed))
    interrupted = False
    on_stage(
        f"training {options.model} on {len(clients)} clients with "
        f"{min(len(c.images) for c in clients)} to "
        f"{max(len(c.images) for c in clients)} images"
    )

    def watch(report: RoundReport, updates: tuple[SharedUpdate, ...]) -> None:
        record.add(report, updates, on_stage)
        on_round(record.rounds[-1])

    try:
        train_federated(
            clients,
            _model(options, train),
            rounds=options.rounds,
            clients_per_round=options.clients_per_round,
            evaluate=test,
            defences=options.defences.applied,
            combine=record.combine,
            seed=options.seed,
            on_round=watch,
        )
    except KeyboardInterrupt:
        if not record.rounds:
            raise
        interrupted = True
    record.finish(interrupted, time.perf_counter() - begun)
    return SimulationResult(
        tuple(record.rounds),
        tuple(record.arrived),
        tuple(record.leakage),
        record.epsilon(),
        tuple(record.files),
        interrupted,
    )


def _clients(options: SimulationOptions, train: Images) -> list[Client]:
    """The clients; each keeps its first images where a number is asked for."""
    clients = partition(
        train,
        clients=options.clients,
        scheme=options.partition,
        alpha=options.alpha,
        seed=options.seed,
        training=options.training(),
    )
    most = options.samples_per_client
    if most is None:
        return clients
    return [replace(client, images=client.images[:most]) for client in clients]


def _examples(test: Images, seed: int) -> Images:
    """Labelled images of the server's own."""
    generator = torch.Generator().manual_seed(seed)
    return test[torch.randperm(len(test), generator=generator)[:_EXAMPLES]]


def _model(options: SimulationOptions, train: Images) -> nn.Module:
    channels, size, _ = train.shape
    model = build_model(
        options.model,
        in_channels=channels,
        image_size=size,
        num_classes=max(2, train.num_classes),
        seed=options.seed,
    )
    return model.to(resolve_device(options.device))


class _Record:
    """Collects rounds and leakage, and writes them as the run goes on."""

    def __init__(
        self,
        options: SimulationOptions,
        folder: Path,
        clients: Sequence[Client],
        train: Images,
        examples: Images,
    ):
        self.options, self.folder, self.clients = options, folder, clients
        self.train, self.examples = train, examples
        self.mix = train.labels.cpu().bincount(minlength=train.num_classes)
        self.held = label_histograms(clients)
        self.rounds: list[RoundReport] = []
        self.arrived: list[tuple[int, ...]] = []
        self.leakage: list[RoundLeakage] = []
        self.files: list[Path] = []
        self.shown: list[tuple[str, Figure]] = []
        self.survivors: tuple[int, ...] = ()
        self.sum: SharedUpdate | None = None

    def combine(self, updates: Sequence[SharedUpdate]) -> SharedUpdate:
        """Let clients drop out, and combine what arrives."""
        options, number = self.options, len(self.rounds) + 1
        rng = np.random.default_rng([options.seed, number, 1])
        gone = np.flatnonzero(rng.random(len(updates)) < options.dropout).tolist()
        self.survivors = tuple(k for k in range(len(updates)) if k not in gone)
        enough = options.needed if options.secure_aggregation else 1
        if len(self.survivors) < enough:  # the round is lost, the model stays
            self.survivors, self.sum = (), None
            first = updates[0]
            zeros = {n: torch.zeros_like(t) for n, t in first.tensors.items()}
            return replace(first, tensors=zeros, buffers=None, encoding=None)
        if options.secure_aggregation:
            self.sum = secure_aggregate(
                updates, threshold=enough, dropouts=gone, seed=options.seed + number
            )
        else:
            self.sum = aggregate([updates[k] for k in self.survivors])
        return self.sum

    def add(
        self,
        report: RoundReport,
        updates: tuple[SharedUpdate, ...],
        on_stage: Callable[[str], None],
    ) -> None:
        """Take down a round, and attack it if it is its turn."""
        arrived = [updates[k] for k in self.survivors]
        report = replace(report, bytes_up=sum(u.num_bytes for u in arrived))
        self.rounds.append(report)
        self.arrived.append(tuple(report.participants[k] for k in self.survivors))
        every = self.options.attack_every
        if every and arrived and (report.round - 1) % every == 0:
            on_stage(f"attacking round {report.round}")
            self.leakage.append(self._attacked(report, updates))
        self._write()

    def epsilon(self) -> float | None:
        """Privacy spent by every sample so far, for ``dp``."""
        multiplier = self.options.defences.noise_multiplier
        if not multiplier or not self.rounds:
            return None
        return epsilon_spent(
            noise_multiplier=multiplier,
            sample_rate=1.0,  # of a client's images, which it knows were used
            steps=max(self._times_asked()),
            delta=DELTA,
        )

    def finish(self, interrupted: bool, seconds: float) -> None:
        """Write the plot, the pictures and the record of the run."""
        for name, figure in self.shown:
            self._keep(name, plots.to_png(figure))
        self._keep("simulation.png", plots.to_png(_plot(self.rounds, self.leakage)))
        self._write(interrupted, seconds)
        self.files.append(self.folder / "simulation.json")

    def _times_asked(self) -> list[int]:
        return [
            sum(k in report.participants for report in self.rounds)
            for k in range(len(self.clients))
        ]

    def _attacked(
        self, report: RoundReport, updates: Sequence[SharedUpdate]
    ) -> RoundLeakage:
        """What the server makes of one message of a round."""
        senders = [report.participants[k] for k in self.survivors]
        if self.options.secure_aggregation:
            assert self.sum is not None
            update, sender = self.sum, None
        else:
            place = min(self.survivors, key=lambda k: updates[k].num_samples)
            update, sender = updates[place], report.participants[place]
            senders = [sender]
        held = [self.clients[k].images for k in senders]
        truth = Images(
            torch.cat([images.pixels for images in held]),
            torch.cat([images.labels for images in held]),
            self.train.class_names,
        )
        right = self.held[senders].sum(0)
        found, error, note = None, None, ""
        try:
            found = infer_class_proportions(
                update,
                examples=self.examples.pixels,
                example_labels=self.examples.labels,
                seed=self.options.seed,
            )
            error = float(total_variation(found, right))
        except InputError as obstacle:
            note = str(obstacle)
        result, why = self._inverted(update, truth, report.round, sender)
        return RoundLeakage(
            round=report.round,
            sender=sender,
            num_samples=update.num_samples,
            proportions=None if found is None else tuple(found.tolist()),
            proportion_error=error,
            proportion_floor=float(total_variation(self.mix, right)),
            score=result,
            note="; ".join(text for text in (note, why) if text),
        )

    def _inverted(
        self, update: SharedUpdate, truth: Images, number: int, sender: int | None
    ) -> tuple[LeakageScore | None, str]:
        """Image leakage of one message, or why there is none."""
        options = self.options
        if update.num_samples > options.attack_images:
            return None, (
                f"{update.num_samples} images in one message, more than "
                f"{options.attack_images}"
            )
        try:
            found = invert(
                update,
                attack=options.attack,
                iterations=options.iterations,
                restarts=options.restarts,
                seed=options.seed,
            )
        except InputError as error:
            return None, str(error)
        if found.stopped == "interrupted":
            raise KeyboardInterrupt
        name = "sum" if sender is None else f"client_{sender}"
        result = score(found, truth, seed=options.seed)
        picture = plots.pairs(truth, found)
        self.shown.append((f"round_{number}_{name}.png", picture))
        return result, ""

    def _write(self, interrupted: bool = True, seconds: float | None = None) -> None:
        write_json(
            self.folder / "simulation.json",
            {
                "command": "gradinv simulate",
                "options": asdict(self.options),
                "clients": self.held.tolist(),
                "rounds": [
                    {**asdict(report), "arrived": arrived}
                    for report, arrived in zip(self.rounds, self.arrived, strict=True)
                ],
                "leakage": [seen.to_dict() for seen in self.leakage],
                "epsilon": self.epsilon(),
                "interrupted": interrupted,
                "files": [path.name for path in self.files],
                "seconds": seconds,
                "versions": versions(),
            },
        )

    def _keep(self, name: str, content: bytes) -> None:
        self.files.append(write_bytes(self.folder / name, content))


def _told(seen: RoundLeakage) -> str:
    parts = []
    if seen.proportion_error is not None:
        parts.append(
            f"classes off by {seen.proportion_error:.2f} "
            f"(global mix {seen.proportion_floor:.2f})"
        )
    if seen.psnr is not None:
        parts.append(f"images {seen.psnr:.1f} dB (floor {seen.floor:.1f})")
    elif seen.note:
        parts.append(seen.note)
    return f"{seen.sender_name}: {', '.join(parts)}"


def _plot(rounds: Sequence[RoundReport], leakage: Sequence[RoundLeakage]) -> Figure:
    """Accuracy, bytes and leakage against the round."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3), layout="constrained")
    numbers = [report.round for report in rounds]
    blue, orange, *_ = plots.PALETTE
    measured = [(r.round, r.accuracy) for r in rounds if r.accuracy is not None]
    axes[0].plot(*zip(*measured, strict=True), "o-", color=blue, markersize=3)
    axes[0].set(xlabel="round", ylabel="accuracy, test split", ylim=(0, 1))
    for name, colour in (("bytes_up", blue), ("bytes_down", orange)):
        values = np.cumsum([getattr(report, name) for report in rounds]) / 1e6
        axes[1].plot(numbers, values, color=colour, label=name.replace("bytes_", ""))
    axes[1].set(xlabel="round", ylabel="MB so far", ylim=(0, None))
    images = [seen for seen in leakage if seen.score is not None]
    shares = [seen for seen in leakage if seen.proportion_error is not None]
    if images:
        places = [seen.round for seen in images]
        axes[2].plot(places, [s.psnr for s in images], "o-", color=blue, label="attack")
        floors = [seen.floor for seen in images]
        axes[2].plot(places, floors, "--", color="0.4", label="floor")
        axes[2].set(xlabel="round", ylabel="PSNR (dB)")
    elif shares:
        places = [seen.round for seen in shares]
        errors = [seen.proportion_error for seen in shares]
        axes[2].plot(places, errors, "o-", color=blue, label="inferred")
        mixes = [seen.proportion_floor for seen in shares]
        axes[2].plot(places, mixes, "--", color="0.4", label="global mix")
        axes[2].set(xlabel="round", ylabel="error of class shares", ylim=(0, 1))
    else:
        axes[2].set_axis_off()
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        if one.get_legend_handles_labels()[0]:
            one.legend(fontsize=8, frameon=False)
    return figure
