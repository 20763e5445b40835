r"""The steps at which a diffusion client's gradient was taken, in closed form.

A denoiser is told the step t by an embedding h(t), and the first layer behind it is
linear. Its gradient is a sum of products of what comes back to the layer and h(t), so
that its rows lie in the span of the embedded steps.

Taught in: notebooks/06_diffusion_prior.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.denoising import DenoisingUpdate
from gradinv_helpers.errors import InputError

# Distance of an embedded step to the span of those in a gradient: by rounding alone
# it stays far below the first, and far below that of all other steps. A singular
# value below the last is no direction.
_IN_SPAN, _GAP, _ROUNDING, _RANK = 1e-2, 10.0, 1e-7, 1e-5
_MOST_ASSIGNMENTS, _MOST_TRIED = 64, 10_000


@dataclass(frozen=True)
class TimestepEstimate:
    """Which steps a gradient was taken at.

    Args:
        steps: The different steps found, in rising order; a step that several images
            share counts once.
        distances: For each of the T steps the distance, from 0 to 1, of its embedding
            to the span of those in the gradient; 0 for the true ones.
        layer: Name of the linear layer that was read.
        rank: Independent embeddings in its gradient.

    Taught in: notebooks/06_diffusion_prior.
    """

    steps: tuple[int, ...]
    distances: Tensor
    layer: str
    rank: int


def infer_timestep(update: DenoisingUpdate) -> TimestepEstimate:
    r"""Read the steps from the gradient of the time embedding, in closed form.

    For the first linear layer behind the embedding h(t) of the step,
    :math:`(g_W\;\; g_b) = \sum_i \delta_i\,(h(t_i)\;\; 1)`. Of one image every row is
    therefore a multiple of :math:`(h(t)\;\; 1)`; of n images the rows span the n
    embeddings, and a step is tested by its distance to that span. This works for
    fewer different steps than the embedding has entries.

    Args:
        update: What the client sent.

    Returns:
        The steps, with the distances of all steps. The order of the images is not
        determined, nor how often a step occurs.

    Raises:
        InputError: No linear layer takes a function of the step alone; its gradient
            is zero or noisy; or there are too many different steps to tell them apart.

    Taught in: notebooks/06_diffusion_prior.
    """
    name, embedded = _time_layer(update)
    parameter = f"{name}.weight"
    rows = update.tensors[parameter].double().cpu()
    bias = update.tensors.get(f"{name}.bias")
    if bias is not None:
        rows = torch.cat([rows, bias.double().cpu()[:, None]], 1)
        embedded = torch.cat([embedded, torch.ones(len(embedded), 1).double()], 1)
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    if not float(values[0]) > 0:
        raise InputError("update", f"a non-zero gradient of {parameter}", "all zeros")
    rank = min(update.num_samples, int((values > _RANK * values[0]).sum()))
    unit = embedded / embedded.norm(dim=1, keepdim=True)
    inside = (unit @ vectors[:rank].T).square().sum(1)
    distances = (1 - inside).clamp_min(0).sqrt()
    order = distances.argsort(stable=True)
    nearest, others = order[:rank], order[rank:]
    last = float(distances[nearest[-1]])
    if last > _IN_SPAN:
        raise InputError(
            "update",
            "embedded steps in the gradient of the time embedding",
            f"distance {last:.2g} of the nearest",
            "noise was added; give timesteps",
        )
    if len(others) and float(distances[others[0]]) < _GAP * max(last, _ROUNDING):
        raise InputError(
            "update",
            "fewer different steps, so that their embeddings tell them apart",
            f"{update.num_samples} images and an embedding of {embedded.shape[1]}",
            "give timesteps",
        )
    steps = tuple(sorted(nearest.tolist()))
    return TimestepEstimate(steps, distances.float(), name, rank)


def _time_layer(update: DenoisingUpdate) -> tuple[str, Tensor]:
    """The first linear layer that takes only the step, and its inputs (T, n)."""
    model = copy.deepcopy(update.model).eval()
    inputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, taken: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, []).append(taken[0].detach())

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and f"{name}.weight" in update.tensors:
                handle = module.register_forward_pre_hook(keep(name))
                stack.callback(handle.remove)
        like = next(model.parameters())
        drawing = torch.Generator().manual_seed(0)
        shape = (2, *update.image_shape)
        probes = torch.randn(shape, generator=drawing).to(like)
        with torch.no_grad():
            for step in range(update.num_steps):
                steps = torch.full((2,), step, device=like.device)
                model(probes, steps)
    for name, found in inputs.items():
        of_steps = len(found) == update.num_steps and found[0].dim() == 2
        # Two different images, one step: the same input, which changes with the step.
        if not of_steps or len(found[0]) != 2:
            continue
        stacked = torch.stack(found)
        same = torch.equal(stacked[:, 0], stacked[:, 1])
        if same and not torch.equal(stacked[0], stacked[-1]):
            return name, stacked[:, 0].double().cpu()
    raise InputError(
        "update.model", "a linear layer fed by the step alone", "none", "give timesteps"
    )


def assignments(
    different: tuple[int, ...], count: int, ordered: bool
) -> list[tuple[int, ...]]:
    """All ways in which ``count`` images can have exactly these different steps.

    The order counts only if the noise is known, and with it which image is which.
    """
    missing = count - len(different)
    repeats = itertools.combinations_with_replacement(different, missing)
    sets = (tuple(sorted(different + more)) for more in repeats)
    ways: Iterable[tuple[int, ...]] = sets
    if ordered:
        ways = (way for one in sets for way in itertools.permutations(one))
    found: dict[tuple[int, ...], None] = {}
    for tried, way in enumerate(ways):
        found[way] = None
        if tried >= _MOST_TRIED or len(found) > _MOST_ASSIGNMENTS:
            raise InputError(
                "timesteps",
                f"at most {_MOST_ASSIGNMENTS} ways to assign the steps {different}",
                f"{count} images",
                "give timesteps",
            )
    return list(found)
