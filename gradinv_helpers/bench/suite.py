"""What a suite is made of, and the numbers that all suites report.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.intervals import bootstrap_interval
from gradinv_helpers.metrics import ImagesLike, score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]

DIGITS = 6  # significant digits of the numbers in a result file
QUICK_SIZE = 16  # pixels
_RESAMPLES = 2000


@dataclass(frozen=True)
class Task:
    """One measurement.

    Args:
        key: Its name, unique in the suite and the same in every run.
        run: Measures; returns plain values for JSON.
    """

    key: str
    run: Callable[[], Record]


@dataclass(frozen=True)
class Report:
    """What is made of all records of a suite.

    Args:
        summary: Plain values for JSON.
        table: Markdown.
        figure: The plot.
    """

    summary: Mapping[str, Any]
    table: str
    figure: Figure


@dataclass(frozen=True)
class Setting:
    """What the tasks of a suite run on.

    Args:
        dataset: Name of the data set.
        data_root: Where it lies, if that is known.
        numbers: The suite's own options, such as ``images``.
        seed: First seed of everything random.
        device: Where models and attacks run.
        folder: Where files may be kept.
        quick: Whether the suite runs on its smallest cases only.
        say: Told in words what begins.
        notes: What the suite wants to have written beside its summary.
    """

    dataset: str
    data_root: str | None
    numbers: Mapping[str, int]
    seed: int
    device: torch.device
    folder: Path
    quick: bool
    say: Callable[[str], None] = lambda text: None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def image_size(self) -> int | None:
        """Side of the images in pixels; their own where ``None``."""
        return QUICK_SIZE if self.quick else None

    def images(self, split: str = "test") -> Images:
        """One split of the data set, with a fingerprint of it among the notes."""
        found = load_images(
            self.dataset,
            data_root=self.data_root,
            split="train" if split == "train" else "test",
            image_size=self.image_size,
        )
        self.notes.setdefault("images_sha256", {})[split] = fingerprint(found)
        return found


@dataclass(frozen=True)
class Suite:
    """A measurement with its options.

    Args:
        numbers: The suite's own options with their defaults.
        quick: The same for ``--quick``.
        tasks: All measurements in the order in which they are taken.
        report: Summary, table and plot of their records.
    """

    numbers: Mapping[str, int]
    quick: Mapping[str, int]
    tasks: Callable[[Setting], Sequence[Task]]
    report: Callable[[Sequence[Record], Setting], Report]


# --- measuring --------------------------------------------------------------------


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Return what ``call`` returns, and its seconds, all kernels included."""
    _finish(device)
    begun = time.perf_counter()
    result = call()
    _finish(device)
    return result, time.perf_counter() - begun


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def victim_numbers(dataset: str, available: int, wanted: int) -> list[int]:
    """Indices of the images under attack: the first ones, or a spread over a folder.

    A folder is sorted by class, so its first images would all be of one.

    Raises:
        InputError: There are not so many images.
    """
    if wanted > available:
        expected = f"at most {available} images ({dataset}, test split)"
        raise InputError("images", expected, wanted)
    return spread(available, wanted) if dataset == "folder" else list(range(wanted))


def spread(available: int, wanted: int) -> list[int]:
    """Return ``wanted`` indices at equal distances, the first one included."""
    return [i * available // wanted for i in range(wanted)]


def image_scores(found: ImagesLike, truth: Images, others: Images) -> Record:
    """PSNR in dB, the label, and the floors of one reconstructed image."""
    result = score(found, truth, others=others)
    label = result.label_correct
    return {
        "psnr": result.psnr[0],
        "label_right": None if label is None else bool(label[0]),
        "floors": {name: floor.psnr[0] for name, floor in result.floors.items()},
    }


def stop_if_interrupted(found: Any) -> None:
    """Pass Ctrl-C on, which an attack answers by returning its best so far."""
    if found.stopped == "interrupted":
        raise KeyboardInterrupt


def fingerprint(images: Images) -> str:
    """Short digest of pixels and labels."""
    digest = hashlib.sha256(images.pixels.numpy().tobytes())
    digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()[:16]


def last_weight_gradient(model: nn.Module, gradient: Mapping[str, Tensor]) -> Tensor:
    """Gradient of the weight of the last linear layer, (classes, features)."""
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return gradient[f"{linear[-1]}.weight"]


# --- numbers ----------------------------------------------------------------------


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
    return {
        "median": middle,
        "quartile_1": low,
        "quartile_3": high,
        "min": min(values),
        "max": max(values),
    }


def ratio_of_medians(
    values: Sequence[float], others: Sequence[float], seed: int = 0
) -> dict[str, float]:
    """Compare medians of pairs: their ratio with a 95 percent bootstrap interval."""
    pairs = np.array([values, others], dtype=float)
    ratio = float(np.divide(*np.median(pairs, axis=1)))
    low = high = math.nan  # a single pair tells nothing about the spread
    if len(values) > 1:
        draws = np.random.default_rng(seed)
        drawn = draws.integers(len(values), size=(_RESAMPLES, len(values)))
        ratios = np.divide(*np.median(pairs[:, drawn], axis=2))
        low, high = np.percentile(ratios, [2.5, 97.5]).tolist()
    return {"value": ratio, "low": low, "high": high, "pairs": len(values)}


def mean_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean of values with a 95 percent bootstrap interval."""
    low, high = bootstrap_interval(values)
    return {"value": statistics.fmean(values), "low": low, "high": high}


def mean_difference(
    values: Sequence[float], others: Sequence[float]
) -> dict[str, float]:
    """Mean of the differences of pairs, with a 95 percent bootstrap interval."""
    differences = [a - b for a, b in zip(values, others, strict=True)]
    return {**mean_with_interval(differences), "pairs": len(differences)}


def rounded(value: Any) -> Any:
    """Keep six significant digits of every number; JSON has no NaN, so it is None."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def chosen(records: Sequence[Record], **wanted: object) -> list[Record]:
    """Records that hold all wanted values."""
    return [r for r in records if all(r.get(k) == v for k, v in wanted.items())]


def distinct(records: Sequence[Record], name: str) -> list[Any]:
    """Values of one field in the order in which they first come."""
    return list(dict.fromkeys(record[name] for record in records))


# --- text -------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    lines = [head, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_quartiles(values: Sequence[float], digits: int = 1) -> str:
    """Write ``median (first quartile to third)``; a dash for no values."""
    if not values:
        return "–"
    found = spread_of(values)
    low, high = found["quartile_1"], found["quartile_3"]
    return f"{found['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def with_deviation(values: Sequence[float], digits: int = 1) -> str:
    """Write ``mean ± standard deviation``; a dash for no values."""
    if not values:
        return "–"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def with_interval(found: Mapping[str, float], digits: int = 1) -> str:
    """Write ``value (low to high)``; the value alone where there is no interval."""
    low, high = found["low"], found["high"]
    if math.isnan(low):
        return f"{found['value']:.{digits}f}"
    return f"{found['value']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
