"""Federated rounds against hand-written loops and against central training."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradinv_helpers.classifier import accuracy
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.defences import GaussianNoise
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate
from gradinv_helpers.federated.rounds import (
    evaluate_model,
    model_bytes,
    train_federated,
)
from gradinv_helpers.models import build_model
from gradinv_helpers.partition import Client, partition
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

FEDAVG = LocalTraining(sends="delta", lr=0.1, epochs=2, batch_size=8)


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_images("digits", split="train", image_size=8)


@pytest.fixture(scope="module")
def held_out() -> Images:
    return load_images("digits", split="test", image_size=8)


def mlp(seed: int = 0) -> nn.Module:
    return build_model("mlp", in_channels=1, image_size=8, num_classes=10, seed=seed)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- the mathematics --------------------------------------------------------------


def test_fedsgd_is_gradient_descent_on_all_images(digits) -> None:
    """Whatever the partition: n_k-weighted gradients are the gradient of the union."""
    images, lr = digits[:90], 0.2
    clients = partition(
        images, clients=4, scheme="dirichlet", alpha=0.3, training=LocalTraining(lr=lr)
    )
    run = train_federated(clients, mlp(), rounds=3)
    model = mlp()
    for _ in range(3):
        loss = F.cross_entropy(model(images.pixels), images.labels)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for weight, slope in zip(model.parameters(), gradient, strict=True):
                weight -= lr * slope
    assert torch.allclose(weights(run.model), weights(model), atol=1e-5)
    assert not torch.allclose(weights(model), weights(mlp()), atol=1e-2)


def test_fedavg_is_the_weighted_mean_of_the_trained_models(digits) -> None:
    """Three clients without shuffling: one full batch each, three SGD steps."""
    recipe = LocalTraining(sends="delta", lr=0.1, epochs=3)
    parts = [digits[:5], digits[5:25], digits[25:60]]
    run = train_federated([Client(p, recipe) for p in parts], mlp(), rounds=1)
    mean = torch.zeros_like(weights(mlp()))
    for part in parts:
        model = mlp()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            F.cross_entropy(model(part.pixels), part.labels).backward()
            optimiser.step()
        mean += len(part) / 60 * weights(model)
    assert torch.allclose(weights(run.model), mean, atol=1e-6)


@pytest.mark.parametrize("training", [LocalTraining(), FEDAVG])
def test_the_server_step_scales_the_move(digits, training) -> None:
    clients = partition(digits[:40], clients=2, training=training)
    start = weights(mlp())
    full, half = (
        weights(train_federated(clients, mlp(), rounds=1, server_lr=step).model) - start
        for step in (1.0, 0.5)
    )
    assert torch.allclose(half, full / 2, atol=1e-6)
    assert full.norm() > 0.01


def test_ten_clients_come_near_to_central_training(digits, held_out) -> None:
    """As many local steps: one client with all images, and ten with a tenth each."""
    recipe = LocalTraining(sends="delta", lr=0.3, epochs=1, batch_size=32)
    found = []
    for clients in ([Client(digits, recipe)], partition(digits, clients=10)):
        clients = [Client(c.images, recipe) for c in clients]
        run = train_federated(
            clients, mlp(), rounds=12, evaluate=held_out, evaluate_every=12
        )
        found.append(run.rounds[-1].accuracy)
    central, federated = found
    assert central > 0.8
    assert federated > central - 0.15


# --- what is reported -------------------------------------------------------------


def test_reports_count_participants_bytes_and_accuracy(digits, held_out) -> None:
    clients = partition(digits[:60], clients=6, training=FEDAVG)
    seen = []
    run = train_federated(
        clients,
        mlp(),
        rounds=4,
        clients_per_round=2,
        evaluate=held_out,
        evaluate_every=3,
        on_round=lambda report, updates: seen.append((report, updates)),
    )
    size = 4 * sum(p.numel() for p in mlp().parameters())
    assert model_bytes(mlp()) == size
    assert [r.round for r in run.rounds] == [1, 2, 3, 4]
    assert [r.accuracy is None for r in run.rounds] == [True, True, False, False]
    assert [r for r, _ in run.accuracies] == [3, 4]
    for report, updates in seen:
        assert len(set(report.participants)) == 2 == len(updates)
        assert report.bytes_up == report.bytes_down == 2 * size
        for index, update in zip(report.participants, updates, strict=True):
            assert update.num_samples == len(clients[index].images)
    assert run.num_bytes == 4 * 2 * 2 * size
    assert tuple(report for report, _ in seen) == run.rounds
    assert len({r.participants for r in run.rounds}) > 1
    assert run.rounds[-1].accuracy == pytest.approx(accuracy(run.model, held_out))


def test_the_updates_are_those_that_travelled(digits) -> None:
    """Each holds the model that was sent out, and together they make the next one."""
    clients = partition(digits[:60], clients=3, training=FEDAVG)
    starts, ends = [], []

    def keep(_, updates) -> None:
        starts.append(weights(updates[0].model))
        moved = aggregate(updates)
        change = torch.cat([t.flatten() for t in moved.tensors.values()])
        ends.append(starts[-1] + change)

    run = train_federated(clients, mlp(), rounds=3, on_round=keep)
    assert torch.equal(starts[0], weights(mlp()))
    assert torch.allclose(starts[1], ends[0], atol=1e-7)
    assert torch.allclose(starts[2], ends[1], atol=1e-7)
    assert torch.allclose(weights(run.model), ends[2], atol=1e-7)


def test_evaluation_leaves_the_mode_and_the_statistics(held_out) -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10)
    )
    before = copy.deepcopy(model.state_dict())
    found, loss = evaluate_model(model, held_out)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    logits = model.eval()(held_out.pixels)
    assert loss == pytest.approx(F.cross_entropy(logits, held_out.labels).item())
    assert found == pytest.approx(
        float((logits.argmax(1) == held_out.labels).double().mean())
    )


# --- randomness -------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_does_not(digits) -> None:
    clients = partition(digits[:60], clients=5, training=FEDAVG)

    def run(seed: int, **options) -> torch.Tensor:
        found = train_federated(
            clients,
            mlp(),
            rounds=2,
            seed=seed,
            defences=[GaussianNoise(0.01)],
            **options,
        )
        return weights(found.model)

    state = torch.get_rng_state()
    first = run(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, run(0))
    assert not torch.equal(first, run(1))


def test_batches_are_shuffled_anew_in_every_round_and_by_every_client(digits) -> None:
    """Two clients with equal data, and a server that never moves."""
    images = digits[:32]
    clients = [Client(images, FEDAVG), Client(images, FEDAVG)]
    sent = []
    train_federated(
        clients,
        mlp(),
        rounds=2,
        combine=lambda updates: updates[0].replace_tensors(
            {n: torch.zeros_like(t) for n, t in updates[0].tensors.items()}
        ),
        on_round=lambda _, updates: sent.extend(updates),
    )
    firsts = [next(iter(update.tensors.values())) for update in sent]
    for i, one in enumerate(firsts):
        for other in firsts[:i]:
            assert not torch.equal(one, other)


def test_noise_is_added_to_each_update_by_its_client(digits) -> None:
    """The same run without noise tells what was added: the stated deviation."""
    clients = partition(digits[:40], clients=2, training=FEDAVG)
    sent: dict[float, list[SharedUpdate]] = {}
    for std in (0.0, 0.05):
        train_federated(
            clients,
            mlp(),
            rounds=1,
            defences=[GaussianNoise(std)],
            on_round=lambda _, updates, std=std: sent.update({std: list(updates)}),
        )
    noises = []
    for plain, noisy in zip(sent[0.0], sent[0.05], strict=True):
        assert noisy.noise_std == 0.05
        noises.append(
            torch.cat(
                [(noisy.tensors[n] - plain.tensors[n]).flatten() for n in plain.tensors]
            )
        )
    for noise in noises:
        assert float(noise.std()) == pytest.approx(0.05, rel=0.03)
    correlation = torch.corrcoef(torch.stack(noises))[0, 1]
    assert abs(float(correlation)) < 0.05


# --- special clients and models ---------------------------------------------------


def test_a_client_with_one_image_takes_part(digits) -> None:
    """The batch size is larger than its data."""
    clients = [Client(digits[:1], FEDAVG), Client(digits[1:40], FEDAVG)]
    seen = []
    train_federated(
        clients, mlp(), rounds=1, on_round=lambda _, updates: seen.extend(updates)
    )
    steps = dataclasses.replace(FEDAVG, batch_size=None)
    alone = local_update(mlp(), digits[:1], steps)
    for name, tensor in alone.tensors.items():
        assert torch.allclose(seen[0].tensors[name], tensor, atol=1e-7)


def test_statistics_of_batch_norm_are_averaged(digits) -> None:
    torch_model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    parts = [digits[:10], digits[10:40]]
    recipe = LocalTraining(sends="delta", lr=0.1)
    run = train_federated([Client(p, recipe) for p in parts], torch_model, rounds=1)
    norm = run.model[1]
    means = [0.1 * p.pixels.flatten(1).mean(0) for p in parts]
    assert torch.allclose(
        norm.running_mean, 0.25 * means[0] + 0.75 * means[1], atol=1e-6
    )
    assert torch.equal(torch_model[1].running_mean, torch.zeros(64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": []}, "clients: expected at least one client"),
        ({"clients_per_round": 4}, "clients_per_round: expected an integer of at most"),
        ({"clients_per_round": 0}, "clients_per_round: expected an integer of at"),
        ({"rounds": 0}, "rounds: expected"),
        ({"server_lr": 0.0}, "server_lr: expected"),
        ({"evaluate_every": 0}, "evaluate_every: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"model": nn.Flatten()}, "model: expected at least one trainable parameter"),
    ],
)
def test_bad_input_is_refused_in_one_line(digits, options, message) -> None:
    arguments = {
        "clients": partition(digits[:9], clients=3),
        "model": mlp(),
        "rounds": 1,
        **options,
    }
    clients, model = arguments.pop("clients"), arguments.pop("model")
    with pytest.raises(InputError, match=message):
        train_federated(clients, model, **arguments)


def test_training_that_diverges_is_reported(digits) -> None:
    wild = LocalTraining(sends="delta", lr=1e30, epochs=3)
    with pytest.raises(InputError, match="diverged"):
        train_federated([Client(digits[:8], wild)], mlp(), rounds=2)
