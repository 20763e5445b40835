"""Suite ``trials``: what it costs to attack many images at once.

Each trial is one image behind its own gradient of LeNet, with its label known. Ours
runs all of them as one batch; the other side is the ordinary loop over trials with
double backward and ``torch.optim.LBFGS`` with strong-Wolfe line searches. Both get
the same number of evaluations, so neither quality nor early stopping plays a part.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.invert import invert_clients
from gradinv_helpers.attacks.plan import make_plan
from gradinv_helpers.attacks.problem import MatchingProblem
from gradinv_helpers.bench import recipes
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
    ratio_of_medians,
    spread,
    spread_of,
    stop_if_interrupted,
    timed,
    with_interval,
    with_quartiles,
)
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import SharedUpdate, local_update

OURS, LOOP = "one batch", "loop over trials"
CORES = "batches side by side"  # of up to 24 trials, one per core
COUNTS = (1, 4, 16, 64)
_QUICK_COUNTS = (1, 4)
_ITERATIONS = 10  # of up to 20 updates: too few for any trial to finish early
_QUICK_ITERATIONS = 1
_INIT_SCALE = 0.05


@dataclass(frozen=True)
class _Bench:
    """Updates of as many clients as there are trials at most, one image each."""

    model: nn.Module
    updates: list[SharedUpdate]
    labels: list[Tensor]
    seed: int
    device: torch.device
    iterations: int

    def starts(self, count: int) -> Tensor:
        """Grey images plus a little noise, (T, 1, C, H, W)."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (count, 1, *self.updates[0].image_shape)
        noise = torch.randn(shape, generator=generator)
        return (0.5 + _INIT_SCALE * noise).to(self.device)

    def gradients(self, count: int) -> list[list[Tensor]]:
        """Shared gradient of every trial."""
        return [list(update.tensors.values()) for update in self.updates[:count]]

    def evaluation(self, count: int, method: str) -> Record:
        """Seconds of one loss with its image gradient, for all trials."""
        starts = self.starts(count)
        call: Callable[[], Any]
        if method == OURS:
            known = self.labels[:count]
            plan = make_plan(self.updates[:count], "dlg", labels=known)
            problem = MatchingProblem(self.updates[:count], plan)
            clients = torch.arange(count, device=self.device)
            call = functools.partial(problem.evaluate, starts.flatten(1), clients)
        else:
            call = functools.partial(self._loop_once, starts, self.gradients(count))
        call()
        repeats = max(1, 32 // count)
        seconds = timed(lambda: [call() for _ in range(repeats)], self.device)[1]
        return {"seconds": seconds / repeats}

    def _loop_once(self, starts: Tensor, gradients: list[list[Tensor]]) -> None:
        for start, gradient, label in zip(starts, gradients, self.labels, strict=False):
            x = start.clone().requires_grad_()
            known = label.to(self.device)
            loss = recipes.squared_loss(self.model, gradient, x, labels=known)
            torch.autograd.grad(loss, x)

    def attack(self, count: int) -> Record:
        """Seconds of whole attacks: our batch, then the loop with as many steps."""
        updates, labels = self.updates[:count], self.labels[:count]
        batch = functools.partial(
            invert_clients,
            updates,
            attack="dlg",
            labels=labels,
            restarts=1,
            iterations=self.iterations,
            seed=self.seed,
            init_scale=_INIT_SCALE,
        )
        ours, seconds = timed(batch, self.device)
        for found in ours:
            stop_if_interrupted(found)
        spent = [sum(t.evaluations for t in found.trials) for found in ours]
        before = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)
        try:
            side_by_side, cores_seconds = timed(batch, self.device)
        finally:
            torch.set_num_threads(before)
        for found in side_by_side:
            stop_if_interrupted(found)
        (_, used), loop_seconds = timed(
            functools.partial(
                recipes.trials_in_a_loop,
                self.model,
                self.gradients(count),
                list(self.starts(count)),
                labels=[label.to(self.device) for label in labels],
                max_evaluations=spent,
            ),
            self.device,
        )
        return {
            OURS: {"seconds": seconds, "evaluations": sum(spent)},
            CORES: {"seconds": cores_seconds, "evaluations": sum(spent)},
            LOOP: {"seconds": loop_seconds, "evaluations": sum(used)},
        }

    def short_attack(self, count: int, method: str) -> None:
        """An attack that is long enough to fill all memory that it will ever take."""
        if method == OURS:
            invert_clients(
                self.updates[:count],
                attack="dlg",
                labels=self.labels[:count],
                restarts=1,
                iterations=self.iterations,
            )
            return
        recipes.trials_in_a_loop(
            self.model,
            self.gradients(count),
            list(self.starts(count)),
            labels=[label.to(self.device) for label in self.labels[:count]],
            max_evaluations=[20 * self.iterations] * min(count, 2)
            + [2] * max(0, count - 2),
        )


def _bench(
    pool: Images, count: int, seed: int, device: torch.device, iterations: int
) -> _Bench:
    channels, size, _ = pool.shape
    model = build_model(
        "lenet",
        in_channels=channels,
        image_size=size,
        num_classes=max(2, pool.num_classes),
        seed=seed,
    ).to(device)
    # Images come again where there are too few: the arithmetic stays the same.
    victims = [pool[[i % len(pool)]] for i in spread(max(count, len(pool)), count)]
    updates = [local_update(model, victim) for victim in victims]
    labels = [victim.labels for victim in victims]
    return _Bench(model, updates, labels, seed, device, iterations)


def _tasks(setting: Setting) -> list[Task]:
    pool = setting.images()
    counts = _QUICK_COUNTS if setting.quick else COUNTS
    iterations = _QUICK_ITERATIONS if setting.quick else _ITERATIONS
    setting.notes["updates_per_trial"] = 20 * iterations
    setting.notes["memory"] = (
        "peak of torch's allocator"
        if setting.device.type == "cuda"
        else "peak resident set of a process of its own, less its peak before"
    )
    bench = _bench(pool, max(counts), setting.seed, setting.device, iterations)
    bench.attack(1)  # loads what is loaded late
    tasks = []
    for repeat in range(setting.numbers["repeats"]):
        for count in counts:
            for method in (LOOP, OURS):
                run = functools.partial(_one_evaluation, bench, count, method)
                key = f"evaluation, {count} trials, {method}, repeat {repeat}"
                tasks.append(Task(key, run))
            run = functools.partial(_one_attack, bench, count)
            tasks.append(Task(f"attack, {count} trials, repeat {repeat}", run))
    for count in counts[-1:] if setting.quick else counts:  # a process takes seconds
        for method in (LOOP, OURS):
            run = functools.partial(_peak, setting, count, method, iterations)
            tasks.append(Task(f"memory, {count} trials, {method}", run))
    return tasks


def _one_evaluation(bench: _Bench, count: int, method: str) -> Record:
    found = bench.evaluation(count, method)
    return {"what": "evaluation", "trials": count, "method": method, **found}


def _one_attack(bench: _Bench, count: int) -> Record:
    return {"what": "attack", "trials": count, **bench.attack(count)}


# --- memory -----------------------------------------------------------------------


def _peak(setting: Setting, count: int, method: str, iterations: int) -> Record:
    """Run an attack in a process of its own and take its peak."""
    job = {
        "dataset": setting.dataset,
        "data_root": setting.data_root,
        "seed": setting.seed,
        "device": setting.device.type,
        "image_size": setting.image_size,
        "trials": count,
        "method": method,
        "iterations": iterations,
    }
    code = (
        f"import json, sys; from {__name__} import peak_of_job; "
        "sys.stdout.write(json.dumps(peak_of_job(json.load(sys.stdin))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process that measures memory failed: {last}")
    found = json.loads(done.stdout)
    return {"what": "memory", "trials": count, "method": method, **found}


def peak_of_job(job: Mapping[str, Any]) -> dict[str, float | None]:
    """Run an attack in this process and take its memory.

    Args:
        job: What ``_peak`` puts together.

    Returns:
        The peak in MiB, and how much of it the attack has added.
    """
    torch.set_num_threads(1)
    device = torch.device(job["device"])
    pool = load_images(
        job["dataset"],
        data_root=job["data_root"],
        split="test",
        image_size=job["image_size"],
    )
    count, most = job["trials"], job["iterations"]
    bench = _bench(pool, count, job["seed"], device, most)
    _bench(pool, 1, job["seed"], device, 1).short_attack(1, job["method"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = _peak_mib(device)
    bench.short_attack(count, job["method"])
    after = _peak_mib(device)
    grown = None if before is None or after is None else after - before
    return {"peak_mib": after, "grown_mib": grown}


def _peak_mib(device: torch.device) -> float | None:
    """Peak memory so far; ``None`` where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        (peak,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 1024
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    units = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


# --- what comes of it -------------------------------------------------------------


def _report(records: Sequence[Record], setting: Setting) -> Report:
    attacks = chosen(records, what="attack")
    counts = distinct(attacks, "trials")
    cases, rows = [], []
    for count in counts:
        case, row = _case(records, count)
        cases.append(case)
        rows.append(row)
    charts = {
        "one evaluation": {
            name: (counts, [1e3 * c["evaluation"][name]["median"] for c in cases])
            for name in (LOOP, OURS)
        },
        "whole attack": {
            name: (counts, [c["attack"][name]["median"] for c in cases])
            for name in (LOOP, OURS, CORES)
        },
        "memory": {name: _memory_line(cases, name) for name in (LOOP, OURS)},
    }
    figure = panels(
        charts,
        xlabel="trials",
        ylabels=["milliseconds", "seconds", "growth of the peak (MiB)"],
        columns=3,
        logarithmic="xy",
    )
    return Report({"cases": cases}, _table(rows, setting), figure)


def _case(records: Sequence[Record], count: int) -> tuple[Record, list[str]]:
    """Numbers and line of one number of trials."""
    attacks = chosen(records, what="attack", trials=count)
    once = {
        name: [
            r["seconds"]
            for r in chosen(records, what="evaluation", trials=count, method=name)
        ]
        for name in (LOOP, OURS)
    }
    whole = {n: [r[n]["seconds"] for r in attacks] for n in (LOOP, OURS, CORES)}
    each = {
        n: [r[n]["seconds"] / r[n]["evaluations"] for r in attacks]
        for n in (LOOP, OURS)
    }
    memory = {name: _grown(records, count, name) for name in (LOOP, OURS)}
    case: Record = {
        "trials": count,
        "evaluation": {name: spread_of(once[name]) for name in once},
        "evaluation_ratio": ratio_of_medians(once[LOOP], once[OURS]),
        "attack": {name: spread_of(whole[name]) for name in whole},
        "attack_ratio": ratio_of_medians(whole[LOOP], whole[OURS]),
        "attack_ratio_all_cores": ratio_of_medians(whole[LOOP], whole[CORES]),
        "attack_ratio_per_evaluation": ratio_of_medians(each[LOOP], each[OURS]),
        "evaluations_per_trial": {
            n: statistics.fmean(r[n]["evaluations"] for r in attacks) / count
            for n in (LOOP, OURS)
        },
        "memory_grown_mib": memory,
    }
    row = [
        f"{count}",
        with_quartiles([1e3 * s for s in once[LOOP]]),
        with_quartiles([1e3 * s for s in once[OURS]]),
        with_interval(case["evaluation_ratio"]),
        with_quartiles(whole[LOOP], 2),
        with_quartiles(whole[OURS], 2),
        with_interval(case["attack_ratio"]),
        with_quartiles(whole[CORES], 2),
        with_interval(case["attack_ratio_all_cores"]),
        *(_mib(memory[name]) for name in (LOOP, OURS)),
    ]
    return case, row


def _memory_line(
    cases: Sequence[Record], method: str
) -> tuple[list[float], list[float]]:
    """Trials and MiB; less than a page of growth is drawn as 0.1 MiB."""
    grown = {case["trials"]: case["memory_grown_mib"][method] for case in cases}
    known = {t: max(0.1, mib) for t, mib in grown.items() if mib is not None}
    return list(known), list(known.values())


def _grown(records: Sequence[Record], count: int, method: str) -> float | None:
    """Growth of the peak in MiB, where it was measured."""
    found = chosen(records, what="memory", trials=count, method=method)
    return found[0]["grown_mib"] if found else None


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _table(rows: Sequence[Sequence[str]], setting: Setting) -> str:
    head = [
        "trials",
        "evaluation, loop, ms",
        "evaluation, batch, ms",
        "ratio (95 %)",
        "attack, loop, s",
        "attack, batch, s",
        "ratio (95 %)",
        "attack, all cores, s",
        "ratio (95 %)",
        "memory, loop, MiB",
        "memory, batch, MiB",
    ]
    note = (
        "Medians with quartiles over the repeats; an attack is "
        f"{setting.notes['updates_per_trial']} L-BFGS updates of every trial, and the "
        "loop gets as many evaluations as the batch has used. One thread, but for "
        "'all cores', where more than 24 trials run as several batches side by side; "
        "the loop has no use for a second thread. Memory, on one thread: "
        f"{setting.notes['memory']}."
    )
    return f"{markdown(head, rows)}\n\n{note}"


SUITE = Suite(
    numbers={"repeats": 3},
    quick={"repeats": 1},
    tasks=_tasks,
    report=_report,
)
