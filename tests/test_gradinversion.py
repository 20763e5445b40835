"""GradInversion: what BatchNorm tells of a batch, and restarts that agree."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

import gradinv_helpers as gi
from gradinv_helpers.attacks.gradinversion import (
    GradInversionProblem,
    GradInversionWeights,
    MomentReader,
    known_moments,
)
from gradinv_helpers.attacks.plan import make_plan
from gradinv_helpers.attacks.search import Search
from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.updates import LocalTraining, SharedUpdate

SIDE, CLASSES = 8, 6


def network(seed: int = 0, *, momentum: float | None = 0.1) -> nn.Sequential:
    """Two convolutions with BatchNorm, in train mode, with statistics of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12, momentum=momentum),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12, momentum=momentum),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * SIDE**2, CLASSES),
        )
        for layer in (model[1], model[4]):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            layer.running_mean.normal_(std=0.3)
            layer.running_var.uniform_(0.5, 2)
            layer.num_batches_tracked.fill_(7)
    return model.train()


def photographs(labels: list[int], seed: int = 0) -> Images:
    """Smooth colour images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(len(labels), 3, 4, 4, generator=generator)
    pixels = nn.functional.interpolate(coarse, SIDE, mode="bilinear")
    names = tuple(f"class {k}" for k in range(CLASSES))
    return Images(pixels.clamp(0, 1), torch.tensor(labels), names)


def inputs_of_the_layers(model: nn.Sequential, images: Tensor) -> list[Tensor]:
    """What goes into the two BatchNorm layers, written out: (channels, values)."""
    first = nn.functional.conv2d(images, model[0].weight, padding=1)
    flat = first.transpose(0, 1).flatten(1)
    norm = model[1]
    mean, variance = norm.running_mean, norm.running_var
    if model.training:
        mean, variance = flat.mean(1), flat.var(1, correction=0)
    shape = (1, -1, 1, 1)
    standard = (first - mean.view(shape)) / (variance.view(shape) + norm.eps).sqrt()
    hidden = (standard * norm.weight.view(shape) + norm.bias.view(shape)).relu()
    second = nn.functional.conv2d(hidden, model[3].weight, padding=1)
    return [flat, second.transpose(0, 1).flatten(1)]


def problem(
    *updates: SharedUpdate, labels: list[list[int]], **weights: float
) -> GradInversionProblem:
    plan = make_plan(list(updates), "gradinversion", labels=labels)
    return GradInversionProblem(list(updates), plan, GradInversionWeights(**weights))


def point(images: Tensor) -> Tensor:
    return images.flatten()[None]


ONE = torch.tensor([0])


# --- what is known ----------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_sent_buffers_give_the_moments_of_the_batch(momentum: float | None) -> None:
    model, batch = network(momentum=momentum).double(), photographs([0, 1, 2])
    found = known_moments(gi.local_update(model, batch))
    assert [m.layer for m in found] == ["1", "4"]
    expected = inputs_of_the_layers(model, batch.pixels.double())
    for moments, values in zip(found, expected, strict=True):
        assert moments.exact
        torch.testing.assert_close(moments.mean, values.mean(1))
        torch.testing.assert_close(moments.variance, values.var(1))


def test_without_buffers_the_running_statistics_are_left() -> None:
    model, batch = network(), photographs([0, 1])
    kept = dataclasses.replace(gi.local_update(model, batch), buffers=None)
    evaluated = gi.local_update(copy.deepcopy(model).eval(), batch)
    for update in (kept, evaluated):
        found = known_moments(update)
        assert [m.exact for m in found] == [False, False]
        assert torch.equal(found[1].mean, model[4].running_mean)
        assert torch.equal(found[1].variance, model[4].running_var)


def test_nothing_is_known_of_new_or_missing_layers() -> None:
    model, batch = network(), photographs([0, 1])
    model[1].reset_running_stats()
    found = known_moments(gi.local_update(model.eval(), batch))
    assert [m.layer for m in found] == ["4"]
    lenet = gi.build_model("lenet", in_channels=3, image_size=SIDE, num_classes=CLASSES)
    assert known_moments(gi.local_update(lenet, batch)) == []
    bare = nn.BatchNorm2d(3, track_running_stats=False)
    model = nn.Sequential(bare, nn.Flatten(), nn.Linear(3 * SIDE**2, CLASSES))
    assert known_moments(gi.local_update(model.train(), batch)) == []


@pytest.mark.parametrize("training", [True, False])
def test_moments_of_several_batches_are_those_of_each(training: bool) -> None:
    model = network().double().train(training)
    before = copy.deepcopy(model.state_dict())
    batches = torch.stack(
        [photographs([0, 0, 0], seed).pixels.double() for seed in (1, 2)]
    )
    found = MomentReader(model, ["1", "4"])(batches)
    for t, batch in enumerate(batches):
        expected = inputs_of_the_layers(model, batch)
        for moments, values in zip(found, expected, strict=True):
            torch.testing.assert_close(moments[0, t], values.mean(1))
            torch.testing.assert_close(moments[1, t], values.var(1))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_single_value_has_no_variance() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)).eval()
    (moments,) = MomentReader(model, ["1"])(torch.rand(2, 1, 3, SIDE, SIDE))
    assert torch.equal(moments[1], torch.zeros(2, 3))


# --- the term ---------------------------------------------------------------------


def test_no_gap_at_the_batch_whose_moments_were_sent() -> None:
    batch = photographs([0, 1, 2])
    update = gi.local_update(network().double(), batch)
    asked = problem(update, labels=[[0, 1, 2]])
    true = batch.pixels.double()[None]
    gap, slope = asked.moment_gap(true, ONE)
    assert float(gap) < 1e-20
    assert float(slope.abs().max()) < 1e-10
    other = photographs([0, 1, 2], seed=5).pixels.double()[None]
    assert float(asked.moment_gap(other, ONE)[0]) > 1e-2


def test_no_gap_where_the_running_statistics_are_those_of_the_batch() -> None:
    model, batch = network().double().eval(), photographs([0, 1, 2])
    for place, layer in enumerate((model[1], model[4])):  # the second sees the first
        with torch.no_grad():
            values = inputs_of_the_layers(model, batch.pixels.double())[place]
        layer.running_mean.copy_(values.mean(1))
        layer.running_var.copy_(values.var(1))
    asked = problem(gi.local_update(model, batch), labels=[[0, 1, 2]])
    assert float(asked.moment_gap(batch.pixels.double()[None], ONE)[0]) < 1e-20
    moved = (batch.pixels.double() * 0.5)[None]
    assert float(asked.moment_gap(moved, ONE)[0]) > 1e-5


@pytest.mark.parametrize("mode", ["sent", "kept", "eval"])
def test_the_gap_is_the_formula_and_its_slope_its_derivative(mode: str) -> None:
    model = network().double().train(mode != "eval")
    batch = photographs([0, 1])
    update = gi.local_update(model, batch)
    if mode == "kept":
        update = dataclasses.replace(update, buffers=None)
    asked = problem(update, labels=[[0, 1]], sent=3.0, running=0.5)
    weight = 3.0 if mode == "sent" else 0.5 * 2

    @torch.no_grad()
    def written_out(images: Tensor) -> Tensor:
        total = images.new_zeros(())
        known = known_moments(update)
        for values, moments in zip(
            inputs_of_the_layers(model, images), known, strict=True
        ):
            mean = (values.mean(1) - moments.mean).square()
            spread = (values.var(1) + 1e-5).sqrt() - (moments.variance + 1e-5).sqrt()
            total += ((mean + spread.square()) / (moments.variance + 1e-5)).mean() / 2
        return weight * total

    images = torch.stack([photographs([0, 1], s).pixels.double() for s in (3, 4)])
    gap, slope = asked.moment_gap(images, torch.tensor([0, 0]))
    for t in range(2):
        assert float(gap[t]) == pytest.approx(float(written_out(images[t])), rel=1e-9)
    direction = torch.randn(
        2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)
    )
    step = 1e-5 * direction.double()
    change = written_out(images[1] + step) - written_out(images[1] - step)
    along = float((slope[1] * direction).sum())
    assert along == pytest.approx(float(change) / 2e-5, rel=1e-5)


def test_loss_and_gradient_belong_together() -> None:
    labels = [0, 1, 1]
    smooth = network().double()
    smooth[2], smooth[5] = nn.Softplus(), nn.Softplus()  # no jumps between two points
    update = gi.local_update(smooth, photographs(labels))
    asked = problem(update, labels=[labels])
    points = torch.cat([point(photographs(labels, s).pixels.double()) for s in (1, 2)])
    both = torch.tensor([0, 0])
    direction = torch.randn(points.shape, generator=torch.Generator().manual_seed(1))
    loss, gradient = asked.evaluate(points, both)
    ends = [
        asked.evaluate(points + sign * 1e-5 * direction.double(), both)[0].sum()
        for sign in (1, -1)
    ]
    slope = float(ends[0] - ends[1]) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4)
    assert loss.shape == (2,)


def test_clients_of_an_aggregate_normalise_by_themselves() -> None:
    model = network().double()
    batches = [photographs([0, 1], 1), photographs([2], 2)]
    updates = [gi.local_update(model, batch) for batch in batches]
    asked = problem(gi.aggregate(updates), labels=[[0, 1, 2]])
    true = torch.cat([batch.pixels for batch in batches]).double()[None]
    assert float(asked.moment_gap(true, ONE)[0]) < 1e-20
    gradients, _ = asked.map(true, asked._targets(point(true), ONE))
    for found, sent in zip(gradients, asked.targets, strict=True):
        torch.testing.assert_close(found, sent)


def test_some_clients_without_buffers_count_by_no_moments() -> None:
    model = network()
    sends = gi.local_update(model, photographs([0, 1], 1))
    keeps = dataclasses.replace(
        gi.local_update(model, photographs([2, 3], 2)), buffers=None
    )
    asked = problem(sends, keeps, labels=[[0, 1], [2, 3]])
    clients = torch.tensor([0, 1])
    grey = torch.full((2, 2, 3, SIDE, SIDE), 0.5)
    exact, running = asked.moment_gap(grey, clients)[0].tolist()
    alone = problem(keeps, labels=[[2, 3]]).moment_gap(grey[1:], ONE)[0]
    assert running == pytest.approx(float(alone), rel=1e-5)
    assert exact > 0


# --- the group --------------------------------------------------------------------


def test_images_of_a_class_may_change_places() -> None:
    labels = [4, 1, 4]
    update = gi.local_update(network().double(), photographs(labels))
    asked = problem(update, labels=[labels])
    images = photographs(labels, 1).pixels.double()
    both = torch.tensor([0, 0])
    swapped = torch.cat([point(images), point(images[[2, 1, 0]])])
    assert float(asked.gaps(swapped, both).abs().max()) < 1e-12
    crossed = torch.cat([point(images), point(images[[1, 0, 2]])])
    assert float(asked.gaps(crossed, both).abs().max()) > 0.1


def test_gaps_are_to_the_mean_of_the_restarts_of_one_client() -> None:
    batches = [photographs([0, 1], s) for s in (1, 2)]
    updates = [gi.local_update(network().double(), batch) for batch in batches]
    asked = problem(*updates, labels=[[0, 1], [0, 1]])
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(4, 2 * 3 * SIDE**2, generator=generator).double()
    gaps = asked.gaps(points, torch.tensor([0, 1, 0, 0]))
    mean = points[[0, 2, 3]].mean(0)
    torch.testing.assert_close(gaps[[0, 2, 3]], points[[0, 2, 3]] - mean)
    assert not gaps[1].any()  # alone


def test_the_group_term_pulls_restarts_together() -> None:
    labels = [0, 1, 2, 3]
    update = gi.local_update(network(), photographs(labels))
    spreads = []
    for group in (0.0, 3.0):
        asked = problem(update, labels=[labels], group=group, sent=0.0)
        search = Search(
            asked,
            clients=[0],
            iterations=3,
            restarts=3,
            seed=0,
            init_scale=0.05,
            log_every=5,
            on_step=None,
        )
        (found,) = search.run()
        last = torch.stack([slot.runs[-1].point for slot in search.all_slots])
        spreads.append(float(last.std(0).mean()))
        assert math.isfinite(found.loss)
    assert spreads[1] < 0.5 * spreads[0]


# --- the attack -------------------------------------------------------------------


def psnr(found: gi.Reconstruction, truth: Images) -> float:
    result = gi.score(found, truth)
    return sum(result.psnr) / len(truth)


def test_moments_that_were_sent_win_over_the_same_search_without_them() -> None:
    labels = [0, 1, 2, 2]
    truth, model = photographs(labels, 9), network()
    before = copy.deepcopy(model.state_dict())
    update = gi.local_update(model, truth)
    settings = {"iterations": 8, "restarts": 1, "labels": labels}
    ours = gi.invert(update, attack="gradinversion", **settings)
    plain = gi.invert(update, attack="inverting-gradients", **settings)
    floors = gi.score(ours, truth, others=photographs(labels, 10)).floors
    floor = max(sum(f.psnr) / len(truth) for f in floors.values())
    assert psnr(ours, truth) > psnr(plain, truth) + 1
    assert psnr(ours, truth) > floor + 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_labels_are_inferred_and_the_call_repeats() -> None:
    truth = photographs([0, 3, 3])
    update = gi.local_update(network(), truth)
    settings = {"attack": "gradinversion", "iterations": 1, "restarts": 2, "seed": 3}
    found, again = (gi.invert(update, **settings) for _ in range(2))
    assert found.attack == "gradinversion"
    assert found.label_source == "inferred (counts)"
    assert found.labels.sort().values.tolist() == [0, 3, 3]
    assert torch.equal(found.images, again.images)
    assert found.images.shape == (3, 3, SIDE, SIDE)


def test_labels_that_cannot_be_inferred_are_fitted() -> None:
    model = nn.Sequential(nn.Conv2d(3, CLASSES, SIDE), nn.Flatten())
    update = gi.local_update(model, photographs([0, 1]))
    found = gi.invert(update, attack="gradinversion", iterations=1, restarts=2)
    assert found.label_source == "fitted with the images"
    assert found.labels.shape == (2,)


def test_levenberg_marquardt_has_no_place_for_further_terms() -> None:
    update = gi.local_update(network().eval(), photographs([0, 1]))
    with pytest.raises(InputError, match="levenberg-marquardt"):
        gi.invert(update, attack="gradinversion", optimiser="levenberg-marquardt")


def test_weight_changes_of_one_step_carry_the_moments_too() -> None:
    training = LocalTraining(sends="delta", lr=0.05)
    batch = photographs([0, 1])
    update = gi.local_update(network().double(), batch, training)
    asked = problem(update, labels=[[0, 1]])
    assert float(asked.moment_gap(batch.pixels.double()[None], ONE)[0]) < 1e-20


@pytest.mark.parametrize("name", ["sent", "running", "group", "energy"])
def test_weights_are_checked(name: str) -> None:
    with pytest.raises(InputError, match=name):
        GradInversionWeights(**{name: -1.0})
