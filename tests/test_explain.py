"""What ``explain_update`` says, against ranks and methods computed elsewhere."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import gradinv_helpers as gi
from gradinv_helpers.attacks.jacobian import jacobian_rank
from gradinv_helpers.errors import InputError
from gradinv_helpers.explain import (
    Explanation,
    explain_update,
    reference_images,
)
from gradinv_helpers.updates import LocalTraining


def images(size: int, side: int = 8) -> gi.Images:
    return gi.load_images("digits", split="test", image_size=side)[:size]


def lenet(side: int = 8, seed: int = 0) -> nn.Module:
    return gi.build_model(
        "lenet", in_channels=1, image_size=side, num_classes=10, seed=seed
    )


def narrow() -> nn.Module:
    """Two images behind it are more than its gradient holds."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(3, 2, 3, stride=2, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def outlook(told: Explanation) -> dict[str, bool]:
    return {entry.attack: entry.works for entry in told.attacks}


def text_of(told: Explanation, row: str) -> str:
    """A row of the text, whose further lines are indented."""
    lines = str(told).splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith(row))
    more = itertools.takewhile(lambda line: line.startswith(" "), lines[first + 1 :])
    return " ".join(line.strip() for line in (lines[first], *more))


def test_one_image_behind_a_chain_is_given_away() -> None:
    update = gi.local_update(lenet(), images(1))
    told = explain_update(update)
    assert (told.rank, told.unknowns, told.missing) == (64, 64, 0)
    assert told.rank_source == "measured"
    assert told.condition is not None and told.condition > 1
    assert outlook(told) == {"exact": True, "dlg": True, "gaussian-map": True}
    assert "layer by layer" in text_of(told, "exact")
    assert "gives the image away" in told.verdict
    found = gi.invert(update, attack="exact")  # and so it is
    assert found.certificate is not None and found.certificate.exact


def test_what_a_narrow_network_keeps_is_missing() -> None:
    update = gi.local_update(narrow(), images(2))
    told = explain_update(update)
    at = reference_images((2, 1, 8, 8), seed=5)
    targets = torch.eye(10)[gi.infer_labels(update)]
    elsewhere = jacobian_rank(update.model, at, targets)
    assert told.rank == elsewhere.rank == told.count.rank < 128
    assert told.missing == elsewhere.missing
    assert told.condition is None
    assert outlook(told) == {"exact": False, "dlg": False, "gaussian-map": True}
    assert f"{told.missing} directions" in told.verdict
    assert f"{told.missing} missing" in text_of(told, "rank")
    assert told.spectrum is not None
    assert told.spectrum.count_above(0.0)[0] == pytest.approx(told.rank)


def test_numbers_of_the_update() -> None:
    update = gi.local_update(lenet(), images(3))
    told = explain_update(update, measure="counted")
    entries = sum(p.numel() for p in update.model.parameters())
    assert (told.kind, told.num_samples, told.group_sizes) == ("gradient", 3, (3,))
    assert (told.numbers, told.num_bytes) == (entries, 4 * entries)
    assert (told.dtype, told.steps, told.optimiser) == ("float32", 1, "sgd")
    assert told.rank_source == "counted"
    assert told.rank == told.count.rank
    assert told.spectrum is told.bits is told.determined is told.condition is None
    assert "(counted)" in str(told)
    assert "measured" not in str(told)
    for row in ("sent", "labels", "unknowns", "verdict", "time"):
        text_of(told, row)


def test_coarser_formats_say_less() -> None:
    told = explain_update(gi.local_update(lenet(), images(2)))
    counts = told.formats
    assert counts["float64"] >= counts["float32"] >= counts["float16"]
    assert counts["float16"] >= counts["bfloat16"]
    assert told.determined == counts["float32"]
    assert told.bits is not None


def test_noise_hides_directions() -> None:
    update = gi.local_update(lenet(), images(1))
    noisy = update.replace_tensors(update.tensors, noise_std=0.1)
    clear, blurred = explain_update(update), explain_update(noisy)
    assert blurred.rank == clear.rank
    assert blurred.determined is not None and clear.determined is not None
    assert blurred.determined < clear.determined
    assert blurred.bits is not None and clear.bits is not None
    assert blurred.bits < clear.bits / 2
    assert not outlook(blurred)["exact"]
    assert "noise of 0.1" in text_of(blurred, "made by")


def test_several_steps_are_called_a_stand_in() -> None:
    training = LocalTraining(sends="delta", epochs=2, batch_size=1)
    told = explain_update(gi.local_update(lenet(), images(2), training))
    assert (told.kind, told.steps) == ("delta", 4)
    assert "stand-in for 4 steps" in text_of(told, "caution")
    assert outlook(told) == {"exact": False, "dlg": False, "gaussian-map": True}
    # The weights of a change are rounded too, and the rate is divided out.
    one = LocalTraining(sends="delta", lr=0.01)
    change = explain_update(gi.local_update(lenet(), images(2), one))
    gradient = explain_update(gi.local_update(lenet(), images(2)))
    assert change.precision_std > 20 * gradient.precision_std
    assert "stand-in" not in str(change)


def test_an_aggregate_names_its_clients() -> None:
    pair = [gi.local_update(lenet(), images(4)[s]) for s in (slice(2), slice(2, 4))]
    told = explain_update(gi.aggregate(pair), measure="counted")
    assert told.group_sizes == (2, 2)
    assert "2 clients" in text_of(told, "sent")
    assert told.unknowns == 256


def test_a_deep_model_is_counted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    )
    model.append(nn.Linear(144, 10))
    model.train()
    update = gi.local_update(model, images(2))
    before = {k: v.clone() for k, v in update.model.state_dict().items()}
    told = explain_update(update)
    after = update.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert set(outlook(told)) == {"exact", "inverting-gradients", "gaussian-map"}
    assert not outlook(told)["exact"]


def test_the_same_call_says_the_same() -> None:
    update = gi.local_update(narrow(), images(2))
    state = torch.random.get_rng_state()
    first, second = (str(explain_update(update, seed=3)) for _ in range(2))
    assert first.splitlines()[:-1] == second.splitlines()[:-1]  # the last is the time
    assert torch.equal(state, torch.random.get_rng_state())


def test_reference_images_are_smooth_and_their_own() -> None:
    found = reference_images((3, 3, 16, 16), seed=1)
    assert found.shape == (3, 3, 16, 16)
    assert 0 <= float(found.min()) < float(found.max()) <= 1
    steps = (found[..., 1:] - found[..., :-1]).std()
    assert steps < 0.5 * found.std()
    assert (found[0] - found[1]).abs().max() > 0.1
    assert torch.equal(found, reference_images((3, 3, 16, 16), seed=1))
    assert not torch.equal(found, reference_images((3, 3, 16, 16), seed=2))


def test_bad_input() -> None:
    update = gi.local_update(lenet(), images(1))
    with pytest.raises(InputError, match="did you mean 'counted'"):
        explain_update(update, measure="count")
    with pytest.raises(InputError, match="seed"):
        explain_update(update, seed=-1)
    large = gi.local_update(lenet(32), images(8, 32))
    with pytest.raises(InputError, match="at most 6,500 pixels"):
        explain_update(large, measure="measured")
