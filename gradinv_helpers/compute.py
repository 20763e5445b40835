"""Where and with how many threads a computation runs."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gradinv_helpers.errors import InputError, check_choice

DEVICES: tuple[str, ...] = ("auto", "cpu", "cuda", "mps")

# Above this many multiplications in one forward pass, threads begin to pay.
_SMALL_WORK = 200_000_000


def resolve_device(name: str = "auto") -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``mps`` into a device that is there.

    Raises:
        InputError: Unknown name, or a device that this machine does not have.
    """
    check_choice("device", name, DEVICES)
    has = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(device for device, there in has.items() if there))
    if not has[name]:
        raise InputError(
            "device", "a device of this machine", repr(name), "use 'auto' or 'cpu'"
        )
    return torch.device(name)


@contextmanager
def cpu_threads(work: int) -> Iterator[int]:
    """Run the block with a number of CPU threads that suits the size of its work.

    Convolutions of small images spend their time on waking threads: on shared
    machines two threads were measured to be up to hundreds of times slower than
    one. Small work therefore runs on one thread.

    Args:
        work: Multiplications of one forward pass over the whole batch, roughly.

    Yields:
        The number of threads in use; the former number is restored afterwards.
    """
    before = torch.get_num_threads()
    wanted = 1 if work < _SMALL_WORK else min(before, os.cpu_count() or 1)
    torch.set_num_threads(wanted)
    try:
        yield wanted
    finally:
        torch.set_num_threads(before)


def forward_work(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Count the multiplications of a forward pass of one image, at least roughly.

    Args:
        model: Any module that takes (N, C, H, W); it is not changed.
        image_shape: Shape (C, H, W).
    """
    from torch.utils.flop_counter import FlopCounterMode

    like = next(model.parameters())
    probe = copy.deepcopy(model).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        probe(like.new_zeros(1, *image_shape))
    return counter.get_total_flops() // 2


@contextmanager
def private_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside the block and restore its random state afterwards."""
    cuda = device.type == "cuda"
    devices = [torch.cuda.current_device()] if cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
