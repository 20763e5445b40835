"""Local steps and unknown labels in suite ``wall``."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.jacobian import gram, linearise_gradient
from gradinv_helpers.attacks.replay import replay_map
from gradinv_helpers.attacks.spectrum import cholesky_rank
from gradinv_helpers.bench.wall_steps import (
    _gradient,
    _linearised,
    _weights,
    count_labels,
    count_steps,
    table,
)
from gradinv_helpers.updates import LocalTraining


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(18, 3)
        )


def batch(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    return images, F.one_hot(torch.arange(count) % 3, 3).double()


def test_one_step_has_the_rank_of_its_gradient() -> None:
    model, (images, targets) = network(), batch(2)
    recipe = LocalTraining(sends="delta", lr=0.3)
    found = count_steps(model, images, targets, recipe)
    linear = linearise_gradient(model, images, targets)
    assert found["rank"] == cholesky_rank(linear.normal())[0]
    assert found["rank"] < found["unknowns"] == 72


def test_training_is_that_of_the_replay() -> None:
    """The trace of the rounding-free Jacobian against finite differences."""
    model, (images, targets) = network().double(), batch(2)
    recipe = LocalTraining(sends="delta", lr=0.5, epochs=2, batch_size=1)
    replay = replay_map(model, recipe, 2)

    def change(flat: Tensor) -> Tensor:
        sent, _ = replay(flat.view(1, *images.shape), targets[None])
        return torch.cat([part.flatten() for part in sent])

    flat, step = images.flatten(), 1e-5
    moves = torch.eye(len(flat), dtype=flat.dtype) * step
    columns = [(change(flat + m) - change(flat - m)) / (2 * step) for m in moves]
    rank = cholesky_rank(gram(torch.stack(columns, 1)))[0]
    found = count_steps(model, images, targets, recipe)
    assert rank >= found["rank"]  # differences add their own noise
    single = count_steps(model, images, targets, LocalTraining(sends="delta"))
    assert found["rank"] > single["rank"]  # the second epoch sees other weights


def test_jacobian_is_that_of_autograd() -> None:
    model, (images, targets) = network(), batch(2)
    weights = _weights(model)

    def sent(flat: Tensor) -> Tensor:
        slopes = _gradient(model, weights, flat.view_as(images), targets)
        return torch.cat([slope.flatten() for slope in slopes.values()])

    value, linear = _linearised(sent, images.flatten())
    wanted = torch.autograd.functional.jacobian(sent, images.flatten())
    torch.testing.assert_close(linear, wanted)
    torch.testing.assert_close(value, sent(images.flatten()))


@pytest.mark.parametrize("known", [True, False])
def test_unknown_labels_are_unknowns(known: bool) -> None:
    images, targets = batch(1)
    found = count_labels(network(), images, targets, known=known)
    assert found["unknowns"] == 36 + (0 if known else 2)
    # The bias of the last layer shows the label: both are determined or neither.
    assert found["rank"] <= found["unknowns"]
    more = count_labels(network(), images, targets, known=False)["rank"]
    assert more == count_labels(network(), images, targets, known=True)["rank"] + 2


def test_table() -> None:
    model, (images, targets) = network(), batch(4)
    recipe = LocalTraining(sends="delta", batch_size=2)
    records = [
        count_steps(model, images, targets, recipe),
        count_labels(model, images, targets, known=False),
    ]
    lines = table(records).splitlines()
    assert lines[2].startswith("| 2 | 1 | 2 | 144 |")
    assert any(line.startswith("| 4 | unknown | 152 |") for line in lines)
