"""Several searches side by side: one thread of the CPU each.

A search over small images keeps one thread busy and gains nothing from a second one
(``gradinv_helpers.compute.cpu_threads``). Groups of clients are independent, so they
share the cores instead. What is found does not depend on how many run at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from gradinv_helpers.attacks.reconstruction import Reconstruction, Step
from gradinv_helpers.attacks.search import Search
from gradinv_helpers.compute import cpu_threads

OnStep = Callable[[Step], None]
# A search of one group, made when its turn comes.
Maker = Callable[[OnStep], Search]


def run_groups(
    makers: Sequence[Maker], *, workers: int, on_step: OnStep | None
) -> list[list[Reconstruction]]:
    """Run the searches of all groups, up to ``workers`` at a time.

    Args:
        makers: Called with what the search is to call after every iteration.
        workers: Searches at a time.
        on_step: Called after every iteration of every restart, never by two searches
            at once.

    Returns:
        What the groups found, in order. After Ctrl-C, groups whose turn had not come
        are missing at the end.

    Raises:
        InputError: As the searches do; the others are then given up.
    """
    if workers == 1 or len(makers) == 1:
        found = []
        for make in makers:
            search = make(on_step or _nothing)
            found.append(search.run())
            if search.interrupted:
                break
        return found
    # Every thread asks for one thread of its own and restores what it found: one.
    with cpu_threads(0):
        return _SideBySide(on_step or _nothing).run(makers, workers)


def side_by_side(work: int, like: torch.Tensor) -> int:
    """Searches that may run at a time, if one takes ``work`` multiplications."""
    threads = torch.get_num_threads()
    if like.device.type != "cpu":
        return 1
    with cpu_threads(work) as taken:
        return threads if taken == 1 else 1


class _SideBySide:
    """Searches in threads, which end together."""

    def __init__(self, on_step: OnStep):
        self.on_step, self.lock, self.ended = on_step, threading.Lock(), False

    def run(self, makers: Sequence[Maker], workers: int) -> list[list[Reconstruction]]:
        with ThreadPoolExecutor(workers) as pool:
            runs = [pool.submit(self._run, make) for make in makers]
            try:
                wait(runs)
            except KeyboardInterrupt:
                self.ended = True  # told to every search at its next iteration
        found = []
        for run in runs:
            result = run.result()
            if result is None:  # its turn had not come
                break
            found.append(result)
        return found

    def _run(self, make: Maker) -> list[Reconstruction] | None:
        if self.ended:
            return None
        try:
            search = make(self._tell)
            found = search.run()
        except BaseException:
            self.ended = True
            raise
        self.ended = self.ended or search.interrupted
        return found

    def _tell(self, step: Step) -> None:
        with self.lock:
            if self.ended:
                raise KeyboardInterrupt
            self.on_step(step)


def _nothing(step: Step) -> None:
    """Nobody wants to know."""
