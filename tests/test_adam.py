"""Signed Adam and the attack that uses it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gradinv_helpers as gi
from gradinv_helpers.attacks.adam import Adam
from gradinv_helpers.attacks.matching import cosine_distance
from gradinv_helpers.attacks.optimise import TrialState


def reference(start: Tensor, target: Tensor, updates: int) -> Tensor:
    """The recipe written plainly with torch.optim.Adam, one trial."""
    x = start.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=0.025)
    marks = [int(-(-share * updates // 1)) for share in (3 / 8, 5 / 8, 7 / 8)]
    falling = torch.optim.lr_scheduler.MultiStepLR(adam, marks, gamma=0.1)
    for _ in range(updates):
        x.grad = torch.sign(2 * (x.detach() - target))
        adam.step()
        falling.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    return x.detach()


def solve(
    starts: Tensor, targets: Tensor, iterations: int, *, bad: int | None = None
) -> list[TrialState]:
    calls = {"bad": bad}

    def objective(x: Tensor, trials: Tensor) -> tuple[Tensor, Tensor]:
        error = x - targets[trials]
        loss, slope = error.square().sum(1), 2 * error
        for row, trial in enumerate(trials.tolist()):
            if trial == calls["bad"]:
                loss[row] = float("nan")
        return loss, slope

    def inspect(trial: int, state: TrialState) -> str:
        return "enough" if state.updates >= 20 * iterations else ""

    def replace(trial: int, state: TrialState) -> Tensor | None:
        if trial == calls["bad"]:
            calls["bad"] = None
            return torch.full_like(state.point, 0.25)
        return None

    return Adam(
        objective,
        starts,
        iterations=iterations,
        project=lambda x: x.clamp(0, 1),
        inspect=inspect,
        replace=replace,
    ).run()


def test_equals_plain_adam_on_signs_for_every_trial() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    targets = 1.4 * torch.rand(3, 5, generator=generator, dtype=torch.float64) - 0.2
    for k, state in enumerate(solve(starts, targets, 4)):
        expected = reference(starts[k], targets[k], 80)
        torch.testing.assert_close(state.point, expected, rtol=0, atol=1e-12)
        assert state.updates == 80
        assert len(state.trace) == 5
        error = (state.point - targets[k]).square().sum()
        assert state.loss == pytest.approx(float(error))


def test_a_trial_that_is_not_finite_is_replaced_and_leaves_the_others_alone() -> None:
    starts = torch.full((2, 4), 0.5, dtype=torch.float64)
    targets = torch.tensor([[0.1] * 4, [0.9] * 4], dtype=torch.float64)
    plain = solve(starts, targets, 3)
    mended = solve(starts, targets, 3, bad=0)
    torch.testing.assert_close(mended[1].point, plain[1].point)
    again = solve(torch.full((1, 4), 0.25, dtype=torch.float64), targets[:1], 3)
    torch.testing.assert_close(mended[0].point, again[0].point)


def test_cosine_distance_against_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4), (2, 5)]
    dummy, target = (
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        for _ in range(2)
    )
    for part in dummy:
        part.requires_grad_()
    long = [torch.cat([p.flatten(1) for p in side], 1) for side in (dummy, target)]
    expected = 1 - torch.cosine_similarity(long[0], long[1], dim=1)
    slopes = torch.autograd.grad(expected.sum(), dummy)
    value, derivatives = cosine_distance([p.detach() for p in dummy], target)
    torch.testing.assert_close(value, expected.detach())
    for mine, theirs in zip(derivatives, slopes, strict=True):
        torch.testing.assert_close(mine, theirs)
    scaled, _ = cosine_distance([7 * p.detach() for p in dummy], target)
    torch.testing.assert_close(scaled, value)


def test_it_beats_squared_distance_behind_relu() -> None:
    victim = gi.load_images("photos", split="test", image_size=16)[[1]]
    model = gi.build_model("convnet", in_channels=3, image_size=16, num_classes=10)
    update = gi.local_update(model, victim)
    settings = {"restarts": 1, "iterations": 30}
    cosine = gi.invert(update, attack="inverting-gradients", tv_weight=1e-3, **settings)
    squared = gi.invert(update, attack="idlg", **settings)
    score = gi.score(cosine, victim)
    assert cosine.attack == "inverting-gradients"
    assert cosine.labels.tolist() == victim.labels.tolist()
    assert score.psnr[0] > score.floors["constant"].psnr[0] + 4
    assert score.psnr[0] > gi.score(squared, victim).psnr[0] + 2
    assert all(trial.iterations == 30 for trial in cosine.trials)
    assert float(cosine.images.min()) >= 0
    assert float(cosine.images.max()) <= 1


def test_it_takes_batches_and_given_labels() -> None:
    batch = gi.load_images("digits", split="test")[[0, 1]]
    model = gi.build_model("mlp", in_channels=1, image_size=8, num_classes=10)
    update = gi.local_update(model, batch)
    settings = {"restarts": 1, "iterations": 2}
    fitted = gi.invert(update, attack="inverting-gradients", **settings)
    assert fitted.images.shape == (2, 1, 8, 8)
    assert fitted.label_source == "fitted with the images"
    given = gi.invert(
        update, attack="inverting-gradients", labels=batch.labels, **settings
    )
    assert given.label_source == "given (upper bound)"
