"""Run a suite, keep every measurement as soon as it is there, write the results.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradinv_helpers.bench import SUITES
from gradinv_helpers.bench.results import read_result, write_result
from gradinv_helpers.bench.suite import Record, Setting, Suite, Task, rounded
from gradinv_helpers.compute import resolve_device
from gradinv_helpers.data import DATASETS
from gradinv_helpers.errors import InputError, check_choice, check_count, check_seed
from gradinv_helpers.experiment import versions
from gradinv_helpers.files import prepare_folder, write_bytes, write_json, write_text
from gradinv_helpers.plots import to_png

_WIDTH = 1000  # pixels of a plot
NUMBERS = ("images", "recipe_images", "noise_images", "repeats", "iterations")


@dataclass(frozen=True)
class BenchOptions:
    """Everything that ``gradinv bench`` can be told; see its ``--help``.

    Raises:
        InputError: A value is unknown or out of range, or is none of the suite's.
    """

    suite: str
    dataset: str
    data_root: str | None
    device: str
    seed: int
    output_dir: str
    quick: bool = False
    images: int | None = None
    recipe_images: int | None = None
    noise_images: int | None = None
    repeats: int | None = None
    iterations: int | None = None

    def __post_init__(self) -> None:
        suite = _suite(check_choice("suite", self.suite, SUITES))
        check_choice("dataset", self.dataset, DATASETS)
        check_seed("seed", self.seed)
        resolve_device(self.device)
        for name in NUMBERS:
            value = getattr(self, name)
            if value is not None:
                check_count(name, value)
                if name not in suite.numbers:
                    known = " and ".join(suite.numbers)
                    expected = f"an option of suite {self.suite!r}, which takes {known}"
                    raise InputError(name, expected, value)

    @property
    def numbers(self) -> dict[str, int]:
        """The suite's own options, with its defaults."""
        suite = _suite(self.suite)
        usual = suite.quick if self.quick else suite.numbers
        given = {name: getattr(self, name) for name in suite.numbers}
        return {k: usual[k] if v is None else v for k, v in given.items()}

    @property
    def name(self) -> str:
        """Name of the result files, without a suffix."""
        return f"{self.suite}_{self.dataset}" + ("_quick" if self.quick else "")

    @property
    def command(self) -> str:
        """The command that repeats the run; folders are left to its reader."""
        words = ["gradinv bench --suite", self.suite, "--dataset", self.dataset]
        if self.dataset == "folder":
            words += ["--data-root", "FOLDER"]
        for name in NUMBERS:
            if getattr(self, name) is not None:
                words += ["--" + name.replace("_", "-"), str(getattr(self, name))]
        words += ["--device", resolve_device(self.device).type]
        words += ["--seed", str(self.seed), *["--quick"] * self.quick]
        return " ".join(words)


@dataclass(frozen=True)
class BenchResult:
    """The table of a finished suite, and the files written."""

    table: str
    files: tuple[Path, ...]


def run_bench(
    options: BenchOptions,
    *,
    on_stage: Callable[[str], None] = lambda text: None,
    on_task: Callable[[int, int], None] = lambda done, total: None,
) -> BenchResult:
    """Take all measurements of a suite and write table, plot and JSON.

    What is measured is kept in ``<name>.partial.json`` at once. After an interruption
    the same call goes on from there; the file is gone when the suite is complete.

    Args:
        options: The suite and its options.
        on_stage: Told in words what begins.
        on_task: Told how many measurements are done, of how many.

    Returns:
        The table and the files.

    Raises:
        InputError: An option does not fit the data set, the folder cannot be written
            to, or it holds an unfinished run with other options.

    Taught in: notebooks/03_stronger_matching.
    """
    suite = _suite(options.suite)
    folder = prepare_folder(options.output_dir)
    setting = Setting(
        dataset=options.dataset,
        data_root=options.data_root,
        numbers=options.numbers,
        seed=options.seed,
        device=resolve_device(options.device),
        folder=folder,
        quick=options.quick,
        say=on_stage,
    )
    partial = folder / f"{options.name}.partial.json"
    with _one_thread():
        about = _about(options, setting)
        _check_partial(partial, about)
        on_stage(f"preparing suite {options.suite}")
        tasks = suite.tasks(setting)
        head = about | {"notes": rounded(setting.notes)}
        records = _measured(tasks, partial, head, on_stage, on_task)
    report = suite.report(records, setting)
    files = (
        write_result(
            folder / f"{options.name}.json",
            {
                **head,
                "complete": True,
                "summary": rounded(report.summary),
                "records": records,
            },
        ),
        write_text(folder / f"{options.name}.md", _page(options, head, report.table)),
        write_bytes(
            folder / f"{options.name}.png", to_png(report.figure, max_width=_WIDTH)
        ),
    )
    partial.unlink(missing_ok=True)
    return BenchResult(report.table, files)


def _suite(name: str) -> Suite:
    """Load the module of a suite."""
    module = "gradinv_helpers.bench." + name.replace("-", "_")
    found: Suite = importlib.import_module(module).SUITE
    return found


def _about(options: BenchOptions, setting: Setting) -> dict[str, Any]:
    """What must be equal for a run to be gone on with."""
    return {
        "suite": options.suite,
        "command": options.command,
        "options": {
            "dataset": options.dataset,
            "seed": options.seed,
            "quick": options.quick,
            **setting.numbers,
        },
        "machine": machine(setting.device),
        "versions": versions(),
    }


def _check_partial(partial: Path, about: dict[str, Any]) -> None:
    """Refuse to overwrite an unfinished run that is not this one."""
    kept = _read(partial)
    differing = [name for name in about if kept and kept.get(name) != about[name]]
    if differing:
        raise InputError(
            "output_dir",
            "no unfinished run of another kind",
            f"{str(partial)!r}, which differs in {' and '.join(differing)}",
            "repeat its command to finish it, or delete the file",
        )


def _read(partial: Path) -> dict[str, Any]:
    if not partial.is_file():
        return {}
    try:
        return read_result(partial)
    except InputError as error:
        expected, hint = "a readable unfinished run", "delete the file"
        raise InputError("output_dir", expected, str(partial), hint) from error


def _measured(
    tasks: Any,
    partial: Path,
    head: dict[str, Any],
    on_stage: Callable[[str], None],
    on_task: Callable[[int, int], None],
) -> list[Record]:
    """Records of all tasks in order; those of an earlier run are not taken again."""
    kept = _read(partial)
    if kept and kept.get("notes") != head["notes"]:
        raise InputError(
            "output_dir",
            "no unfinished run on other images or models",
            str(partial),
            "delete the file to begin again",
        )
    earlier = {record["key"]: record for record in kept.get("records", [])}
    records: list[Record] = []
    if earlier:
        on_stage(f"going on after {len(earlier)} of {len(tasks)} measurements")
    for number, task in enumerate(tasks):
        on_task(number, len(tasks))
        if task.key in earlier:
            records.append(earlier[task.key])
            continue
        records.append(_record(task))
        ahead = [earlier[t.key] for t in tasks[number + 1 :] if t.key in earlier]
        done = {**head, "complete": False, "records": records + ahead}
        write_json(partial, done)
    on_task(len(tasks), len(tasks))
    return records


def _record(task: Task) -> Record:
    return {"key": task.key, **rounded(task.run())}


def _page(options: BenchOptions, head: dict[str, Any], table: str) -> str:
    facts, computer = head["versions"], head["machine"]
    lines = [
        f"# Suite `{options.suite}` on `{options.dataset}`",
        "",
        f"`{options.command}`",
        "",
        table,
        "",
        f"Measured on {computer['device']}, {computer['threads']} thread of "
        f"{computer['cores']} cores, {computer['memory_gib']} GiB; "
        f"torch {facts['torch']}, Python {facts['python']}.",
        "",
    ]
    return "\n".join(lines)


def machine(device: torch.device) -> dict[str, Any]:
    """Facts of the machine that times depend on."""
    cpu = _cpu_name()
    on_cuda = device.type == "cuda"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "device": torch.cuda.get_device_name(device) if on_cuda else cpu,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        names = [line.split(":", 1)[1] for line in lines if line.startswith("model n")]
        return names[0].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, OSError, ValueError):
        return None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Measure on one thread, as small problems run best and comparably."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
