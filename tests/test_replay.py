"""Replayed local training against the client's own, and its derivatives."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import gradinv_helpers as gi
import gradinv_helpers.attacks.gradients as gradients_module
from gradinv_helpers.attacks.gradients import gradient_map
from gradinv_helpers.attacks.replay import (
    fit_learning_rate,
    local_batches,
    replay_map,
    shared_statistics,
)
from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

NUM_CLASSES = 4
SAME = {"rtol": 1e-10, "atol": 1e-14}
OPTIMISERS = ("sgd", "momentum", "adam")


def recipe(**changes) -> LocalTraining:
    return dataclasses.replace(LocalTraining(sends="delta", lr=0.05), **changes)


def chain(seed: int = 0) -> nn.Module:
    """A chain of layers, for which single steps have a shorter way."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(27, NUM_CLASSES),
    ).double()


def with_norm(training: bool = True, momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.BatchNorm2d(3, momentum=momentum),
        nn.Softplus(),
        nn.Conv2d(3, 5, 3, bias=False),  # its gradient would be a rounding error
        nn.BatchNorm2d(5, momentum=momentum),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(20, NUM_CLASSES),
    ).double()
    with torch.no_grad():  # statistics that are not those of the first batch
        model[1].running_mean.uniform_(-0.3, 0.3)
        model[1].running_var.uniform_(0.5, 1.5)
    return model.train(training)


class Gated(nn.Module):
    """No chain: a product, frozen weights and weights that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Linear(36, 8)
        self.gate = nn.Linear(36, 8)
        self.gate.weight.requires_grad_(False)
        self.head = nn.Linear(8, NUM_CLASSES)
        self.unused = nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(torch.sin(self.body(x)) * torch.sigmoid(self.gate(x)))


def private(count: int, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    return Images(pixels, labels, tuple("abcd"))


def one_hot(images: Images) -> tuple[Tensor, Tensor]:
    """One trial that holds the truth."""
    targets = F.one_hot(images.labels, NUM_CLASSES).double()
    return images.pixels[None].double(), targets[None]


def dummies(trials: int, count: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (trials, count, 1, 6, 6)
    images = torch.rand(shape, generator=generator, dtype=torch.float64)
    logits = torch.randn(
        trials, count, NUM_CLASSES, generator=generator, dtype=torch.float64
    )
    return images, logits.softmax(-1)


def assert_sent(
    found: list[Tensor], update: SharedUpdate, *more: Tensor, atol: float = 1e-14
) -> None:
    expected = [*update.tensors.values(), *more]
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got[0], wanted, rtol=1e-10, atol=atol)


def assert_derivative(mapped, images: Tensor, targets: Tensor) -> None:
    """The pull-back against central differences along random directions."""
    step = 1e-5
    torch.manual_seed(4)
    found, pullback = mapped(images, targets)
    cotangents = [torch.randn_like(g) for g in found]
    to_images, to_targets = pullback(cotangents)
    assert to_images.shape == images.shape and to_targets.shape == targets.shape

    def product(x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(mapped(x, y)[0], cotangents, strict=True)
        return sum((g * v).flatten(1).sum(1) for g, v in pairs)

    for _ in range(2):
        along, turn = torch.randn_like(images), torch.randn_like(targets)
        turn = turn - turn.mean(-1, keepdim=True)  # targets go on adding up to 1
        for dx, dy in ((along, 0 * turn), (0 * along, turn)):
            ahead = product(images + step * dx, targets + step * dy)
            behind = product(images - step * dx, targets - step * dy)
            expected = (ahead - behind) / (2 * step)
            slope = (to_images * dx).flatten(1).sum(1)
            slope = slope + (to_targets * dy).flatten(1).sum(1)
            torch.testing.assert_close(slope, expected, rtol=2e-5, atol=1e-7)


# --- the values -------------------------------------------------------------------


@pytest.mark.parametrize("model", [chain(), Gated()], ids=["chain", "gated"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_replay_sends_what_the_client_sends(model, optimiser, decay):
    images = private(5)
    for epochs, batch_size in itertools.product((1, 2, 3), (None, 1, 2, 7)):
        training = recipe(
            optimiser=optimiser,
            epochs=epochs,
            batch_size=batch_size,
            weight_decay=decay,
        )
        update = local_update(model, images, training)
        found, _ = replay_map(model, training, 5)(*one_hot(images))
        assert_sent(found, update)


@given(
    optimiser=st.sampled_from(OPTIMISERS),
    epochs=st.integers(1, 3),
    batch_size=st.integers(1, 6),
    count=st.integers(1, 6),
    lr=st.floats(1e-4, 1.0),
    decay=st.floats(0, 0.5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_replay_follows_a_known_shuffle(
    optimiser, epochs, batch_size, count, lr, decay, seed
):
    training = recipe(
        optimiser=optimiser,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=decay,
    )
    model, images = chain(), private(count)
    update = local_update(model, images, training, seed=seed)
    order = local_batches(count, training, seed=seed)
    found, _ = replay_map(model, training, count, order=order)(*one_hot(images))
    for got, wanted in zip(found, update.tensors.values(), strict=True):
        torch.testing.assert_close(got[0], wanted, rtol=1e-9, atol=1e-12)


def test_one_shuffled_epoch_is_only_a_numbering():
    training, images = recipe(batch_size=2), private(5)
    model, order = chain(), torch.cat(local_batches(5, training, seed=7))
    assert order.tolist() != [0, 1, 2, 3, 4]
    update = local_update(model, images, training, seed=7)
    x, y = one_hot(images)
    assert_sent(replay_map(model, training, 5)(x[:, order], y[:, order])[0], update)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_gradient_map(training):
    model, (x, y) = with_norm(training), dummies(2, 4)
    mapped = replay_map(model, LocalTraining(), 4)
    for got, wanted in zip(mapped(x, y)[0], gradient_map(model)(x, y)[0], strict=True):
        torch.testing.assert_close(got, wanted, **SAME)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_trials_do_not_touch_each_other(optimiser, batch_size):
    training = recipe(optimiser=optimiser, batch_size=batch_size)
    mapped = replay_map(chain(), training, 3)
    x, y = dummies(3, 3)
    found, pullback = mapped(x, y)
    back = pullback(found)
    for trial in range(3):
        some, pull = mapped(x[trial : trial + 1], y[trial : trial + 1])
        for got, wanted in zip(found, some, strict=True):
            torch.testing.assert_close(got[trial], wanted[0], **SAME)
        for got, wanted in zip(back, pull(some), strict=True):
            torch.testing.assert_close(got[trial], wanted[0], **SAME)


def test_float32_stays_float32():
    model, training = chain().float(), recipe(batch_size=2, optimiser="adam")
    x, y = (part.float() for part in dummies(1, 4))
    found, pullback = replay_map(model, training, 4)(x, y)
    exact, _ = replay_map(chain(), training, 4)(x.double(), y.double())
    assert all(g.dtype == torch.float32 for g in (*found, *pullback(found)))
    for got, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-6)


# --- derivatives ------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("order", ["sequential", "averaged"])
@pytest.mark.parametrize(("epochs", "batch_size"), [(1, None), (2, None), (2, 2)])
def test_pullback_is_the_derivative(optimiser, order, epochs, batch_size):
    training = recipe(
        optimiser=optimiser,
        epochs=epochs,
        batch_size=batch_size,
        weight_decay=0.1,
        lr=0.2,
    )
    for model in (chain(), Gated()):
        mapped = replay_map(model, training, 3, order=order)
        if optimiser == "adam":  # too sharp for differences where g changes its sign
            assert_as_published(mapped, model, training, order)
        else:
            assert_derivative(mapped, *dummies(2, 3))


def assert_as_published(mapped, model, training, order):
    """The pull-back against one long graph through formulas of Kingma and Ba."""
    x, y = dummies(1, 3)
    found, pullback = mapped(x, y)
    torch.manual_seed(5)
    cotangents = [torch.randn_like(g) for g in found]
    to_images, to_targets = pullback(cotangents)
    free, soft = x[0].clone().requires_grad_(), y[0].clone().requires_grad_()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    names = [n for n in trained if n != "unused"]
    assert all(
        not g.any() for n, g in zip(trained, found, strict=True) if n == "unused"
    )
    found, cotangents = (
        [g for n, g in zip(trained, row, strict=True) if n != "unused"]
        for row in (found, cotangents)
    )
    start = [trained[n] for n in names]
    weights = [w.clone().requires_grad_() for w in start]
    m = v = [torch.zeros_like(w) for w in start]
    for t, chosen in enumerate(local_batches(3, training), start=1):
        if order == "averaged":
            chosen = torch.arange(3)
        state = dict(zip(names, weights, strict=True))
        logits = torch.func.functional_call(model, state, (free[chosen],))
        loss = F.cross_entropy(logits, soft[chosen])
        g = torch.autograd.grad(loss, weights, create_graph=True)
        g = [a + training.weight_decay * w for a, w in zip(g, weights, strict=True)]
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
        v = [0.999 * a + 0.001 * b * b for a, b in zip(v, g, strict=True)]
        rate = training.lr * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        epsilon = 1e-8 * (1 - 0.999**t) ** 0.5
        weights = [
            w - rate * a / (b.sqrt() + epsilon)
            for w, a, b in zip(weights, m, v, strict=True)
        ]
    changes = [w - s for w, s in zip(weights, start, strict=True)]
    for got, wanted in zip(found, changes, strict=True):
        torch.testing.assert_close(got[0], wanted.detach(), rtol=1e-9, atol=1e-13)
    product = sum((c * u[0]).sum() for c, u in zip(changes, cotangents, strict=True))
    back = torch.autograd.grad(product, [free, soft])
    for got, wanted in zip((to_images, to_targets), back, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got[0], wanted, rtol=1e-6, atol=1e-7 * scale)


@pytest.mark.parametrize("training", [True, False])
def test_pullback_through_batch_norm(training):
    model = with_norm(training)
    recipe_ = recipe(epochs=2, batch_size=2, optimiser="momentum")
    mapped = replay_map(model, recipe_, 4, statistics=training)
    assert_derivative(mapped, *dummies(2, 4))


def test_pullback_of_large_convolutions(monkeypatch):
    monkeypatch.setattr(gradients_module, "_LARGE_CONVOLUTION", 0)
    mapped = replay_map(chain(), recipe(batch_size=1, lr=0.3), 3)
    assert_derivative(mapped, *dummies(1, 3))


@pytest.mark.parametrize("epochs", [1, 2])
def test_adam_at_gradients_of_zero(epochs):
    """Dead ReLUs have gradients of exactly 0, where a square root has no slope."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, NUM_CLASSES)
    ).double()
    with torch.no_grad():
        model[1].bias[:3] = -100.0
    training = recipe(optimiser="adam", epochs=epochs)
    images = private(3)
    found, pullback = replay_map(model, training, 3)(*one_hot(images))
    assert_sent(found, local_update(model, images, training))
    assert bool((found[0][0, :3] == 0).all())
    back = pullback([torch.ones_like(g) for g in found])
    assert all(bool(b.isfinite().all()) for b in back)
    assert float(back[0].abs().max()) > 0


# --- BatchNorm --------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_batch_norm_in_train_mode(optimiser, batch_size, momentum):
    model, images = with_norm(momentum=momentum), private(6)
    before = copy.deepcopy(model.state_dict())
    training = recipe(optimiser=optimiser, epochs=2, batch_size=batch_size)
    update = local_update(model, images, training)
    mapped = replay_map(model, training, 6, statistics=True)
    found, pullback = mapped(*one_hot(images))
    changes = shared_statistics(update)
    assert len(changes) == 4 and all(bool(c.any()) for c in changes)
    assert_sent(found, update, *changes, atol=1e-11)
    pullback(found)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    plain, _ = replay_map(model, training, 6)(*one_hot(images))
    assert_sent(plain, update, atol=1e-11)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_batch_norm_in_eval_mode():
    model, images = with_norm(training=False), private(4)
    training = recipe(epochs=2, batch_size=2)
    update = local_update(model, images, training)
    assert_sent(replay_map(model, training, 4)(*one_hot(images))[0], update)
    with pytest.raises(InputError, match="model: expected BatchNorm layers"):
        replay_map(model, training, 4, statistics=True)
    with pytest.raises(InputError, match="update: expected buffers .* got none"):
        shared_statistics(update)


def test_layers_in_eval_mode_keep_their_statistics():
    model = with_norm()
    model[1].eval()  # as when the first layers are frozen
    images, training = private(4), recipe(epochs=2)
    update = local_update(model, images, training)
    changes = shared_statistics(update)
    assert [tuple(c.shape) for c in changes] == [(5,), (5,)]
    mapped = replay_map(model, training, 4, statistics=True)
    assert_sent(mapped(*one_hot(images))[0], update, *changes)


def test_statistics_beside_a_gradient():
    model, images = with_norm(), private(4)
    update = local_update(model, images)
    mapped = replay_map(model, LocalTraining(), 4, statistics=True)
    assert_sent(mapped(*one_hot(images))[0], update, *shared_statistics(update))
    assert_derivative(mapped, *dummies(1, 4))


# --- several clients --------------------------------------------------------------


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("norm", [False, True], ids=["chain", "norm"])
def test_clients_are_averaged_as_the_server_does(optimiser, batch_size, norm):
    sizes = (2, 4) if norm else (2, 1, 3)
    training = recipe(optimiser=optimiser, epochs=2, batch_size=batch_size)
    for recipe_ in (training, dataclasses.replace(training, epochs=1)):
        model = with_norm() if norm else chain()
        images = private(6)
        parts = [
            Images(x, y, images.class_names)
            for x, y in zip(
                images.pixels.split(sizes), images.labels.split(sizes), strict=True
            )
        ]
        update = gi.aggregate([local_update(model, part, recipe_) for part in parts])
        assert update.group_sizes == sizes
        mapped = replay_map(model, recipe_, 6, group_sizes=sizes, statistics=norm)
        changes = shared_statistics(update) if norm else []
        found, _ = mapped(*one_hot(images))
        # Adam divides small gradients, and their rounding, by themselves.
        assert_sent(found, update, *changes, atol=1e-11 if norm else 1e-14)
        if optimiser == "sgd":
            assert_derivative(mapped, *dummies(2, 6))


@pytest.mark.parametrize("model", [chain(), with_norm()], ids=["chain", "norm"])
def test_gradients_of_clients(model):
    """BatchNorm in train mode sees each client's images alone."""
    images, sizes = private(6), (2, 4)
    parts = [
        Images(images.pixels[:2], images.labels[:2], images.class_names),
        Images(images.pixels[2:], images.labels[2:], images.class_names),
    ]
    update = gi.aggregate([local_update(model, part) for part in parts])
    mapped = replay_map(model, LocalTraining(), 6, group_sizes=sizes)
    assert_sent(mapped(*one_hot(images))[0], update)
    assert_derivative(mapped, *dummies(1, 6))


def test_clients_with_known_orders():
    training, sizes = recipe(epochs=2, batch_size=2), (3, 2)
    model, images = chain(), private(5)
    parts = [
        Images(images.pixels[:3], images.labels[:3], images.class_names),
        Images(images.pixels[3:], images.labels[3:], images.class_names),
    ]
    update = gi.aggregate(
        [local_update(model, p, training, seed=s) for s, p in enumerate(parts)]
    )
    order = [local_batches(n, training, seed=s) for s, n in enumerate(sizes)]
    mapped = replay_map(model, training, 5, group_sizes=sizes, order=order)
    assert_sent(mapped(*one_hot(images))[0], update)


def test_normalised_clients():
    training, sizes = recipe(batch_size=2), (3, 2)
    model, images = chain(), private(5)
    parts = [
        Images(images.pixels[:3], images.labels[:3], images.class_names),
        Images(images.pixels[3:], images.labels[3:], images.class_names),
    ]
    update = gi.aggregate(
        [gi.normalize(local_update(model, part, training)) for part in parts]
    )
    mapped = replay_map(model, training, 5, group_sizes=sizes, normalized=True)
    assert_sent(mapped(*one_hot(images))[0], update)
    assert_derivative(mapped, *dummies(2, 5))


# --- an unknown order -------------------------------------------------------------


@pytest.mark.parametrize("order", ["sequential", "first-epoch", "averaged"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_every_order_is_exact_at_one_batch_per_epoch(optimiser, order):
    training = recipe(optimiser=optimiser, epochs=3)
    model, images = chain(), private(4)
    update = local_update(model, images, training, seed=5)
    mapped = replay_map(model, training, 4, order=order)
    for got, wanted in zip(
        mapped(*one_hot(images))[0], update.tensors.values(), strict=True
    ):
        torch.testing.assert_close(got[0], wanted, rtol=1e-9, atol=1e-12)


def test_first_epoch_in_batches_and_then_all_images():
    """Two clients in turn: one epoch by batches, then as many steps on everything."""
    model, images, sent = chain(), private(5), None
    for part in (recipe(batch_size=2), recipe(epochs=6)):
        update = local_update(model, images, part)
        gi.apply_update(model, update)
        tensors = list(update.tensors.values())
        sent = [a + b for a, b in zip(sent, tensors, strict=True)] if sent else tensors
    training = recipe(batch_size=2, epochs=3)
    mapped = replay_map(chain(), training, 5, order="first-epoch")
    for got, wanted in zip(mapped(*one_hot(images))[0], sent, strict=True):
        torch.testing.assert_close(got[0], wanted, **SAME)


@pytest.mark.parametrize("optimiser", ["sgd", "momentum"])
def test_averaged_order_is_right_to_first_order(optimiser):
    """Halving the learning rate quarters its distance from the mean over orders."""
    model, images, trials = chain(), private(4), one_hot(private(4))

    def distance(lr: float) -> float:
        training = recipe(optimiser=optimiser, batch_size=1, lr=lr)
        sent = []
        for order in itertools.permutations(range(4)):
            shuffled = images[list(order)]
            update = local_update(model, shuffled, training)
            sent.append(torch.cat([t.flatten() for t in update.tensors.values()]))
        found, _ = replay_map(model, training, 4, order="averaged")(*trials)
        predicted = torch.cat([g.flatten() for g in found])
        return float((torch.stack(sent).mean(0) - predicted).norm())

    assert distance(0.01) / distance(0.005) == pytest.approx(4, rel=0.05)


def test_averaged_order_does_not_depend_on_the_order():
    training = recipe(epochs=2, batch_size=2, optimiser="adam")
    mapped = replay_map(chain(), training, 4, order="averaged")
    x, y = dummies(1, 4)
    turned = [3, 1, 0, 2]
    pairs = zip(mapped(x, y)[0], mapped(x[:, turned], y[:, turned])[0], strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)


# --- an unknown learning rate -----------------------------------------------------


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_learning_rate_of_one_step(optimiser):
    model, images = chain(), private(3)
    training = recipe(optimiser=optimiser, weight_decay=0.2, lr=0.03)
    update = local_update(model, images, training)
    wrong = dataclasses.replace(training, lr=0.1)
    found, _ = replay_map(model, wrong, 3)(*one_hot(images))
    scale = fit_learning_rate(found, [t[None] for t in update.tensors.values()])
    assert scale.tolist() == pytest.approx([0.3])


def test_learning_rate_of_many_steps_is_found_in_rounds():
    model, images = chain(), private(4)
    training = recipe(epochs=3, batch_size=2, lr=0.4)
    update = local_update(model, images, training)
    target, lr, misses = [t[None] for t in update.tensors.values()], 0.2, []
    for _ in range(8):
        guess = dataclasses.replace(training, lr=lr)
        found, _ = replay_map(model, guess, 4)(*one_hot(images))
        lr *= float(fit_learning_rate(found, target))
        misses.append(abs(lr / 0.4 - 1))
    assert 1e-6 < misses[0] < 0.5
    assert misses[-1] < 1e-3 * misses[0]


def test_learning_rate_of_every_trial():
    target = [torch.tensor([[3.0, 0.0]]), torch.tensor([[[4.0]]])]
    predicted = [
        torch.tensor([[1.5, 0.0], [3.0, 5.0], [-3.0, 0.0]]),
        torch.tensor([[[2.0]], [[4.0]], [[-4.0]]]),
    ]
    scale = fit_learning_rate(predicted, target)
    assert scale.tolist() == pytest.approx([2.0, 0.5, -1.0])


# --- bad input --------------------------------------------------------------------


def test_counts_and_choices_are_checked():
    model, training = chain(), recipe(batch_size=2)
    cases = [
        ({"num_samples": 0}, "num_samples: expected an integer of at least 1"),
        ({"group_sizes": (2, 3)}, "group_sizes: expected counts that add up to"),
        ({"group_sizes": (4, 0)}, "group_sizes: expected an integer of at least 1"),
        ({"order": "sequental"}, "did you mean 'sequential'"),
        ({"training": "fedavg"}, "training: expected a LocalTraining, got str"),
        ({"normalized": True, "statistics": True}, "statistics: expected False"),
        ({"statistics": True}, "model: expected BatchNorm layers"),
        ({"model": nn.Flatten()}, "model: expected at least one trainable"),
    ]
    for changes, message in cases:
        arguments = {"model": model, "training": training, "num_samples": 4} | changes
        with pytest.raises(InputError, match=message):
            replay_map(**arguments)


def test_explicit_orders_are_checked():
    model, training = chain(), recipe(batch_size=2)
    right = local_batches(4, training, seed=0)
    cases: list[tuple] = [
        (right[:1], r"steps of \[2, 2\] images, got \[2\]"),
        ([torch.arange(3), torch.tensor([3])], r"got \[3, 1\]"),
        ([torch.tensor([0, 1]), torch.tensor([1, 2])], "0 to 3 once per epoch"),
        ([torch.tensor([0, 1]), torch.tensor([2, 4])], "0 to 3 once per epoch"),
        ([[0, 1], [2, 3]], "one tensor of indices per local step"),
    ]
    for order, message in cases:
        with pytest.raises(InputError, match=message):
            replay_map(model, training, 4, order=order)
    with pytest.raises(InputError, match="for each of 2 clients, got 1"):
        replay_map(model, training, 4, group_sizes=(2, 2), order=[right])
    with pytest.raises(InputError, match="num_samples"):
        local_batches(0, training)
    with pytest.raises(InputError, match="seed"):
        local_batches(3, training, seed=-1)


def test_trials_of_another_size_are_refused():
    mapped = replay_map(chain(), recipe(), 4)
    with pytest.raises(InputError, match=r"images: expected shape \(T, 4, C, H, W\)"):
        mapped(*dummies(1, 3))


def test_fits_of_other_shapes_are_refused():
    one = torch.ones(2, 3)
    for predicted, target in (([one], []), ([], []), ([one], [torch.ones(2, 4)])):
        with pytest.raises(InputError, match="predicted and target"):
            fit_learning_rate(predicted, target)
    with pytest.raises(InputError, match="predicted and target: expected equal shapes"):
        fit_learning_rate([one], [torch.ones(3, 3)])
    with pytest.raises(InputError, match="a change of zeros"):
        fit_learning_rate([0 * one], [one])
