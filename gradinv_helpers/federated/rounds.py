"""Federated training in one process, round after round.

Taught in: notebooks/07_iid_noniid.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.compute import cpu_threads, forward_work
from gradinv_helpers.data import Images
from gradinv_helpers.defences import Defence, defend
from gradinv_helpers.errors import (
    InputError,
    check_count,
    check_number,
    check_seed,
)
from gradinv_helpers.federated.aggregation import aggregate, apply_update
from gradinv_helpers.partition import Client
from gradinv_helpers.updates import SharedUpdate, local_update

Combine = Callable[[Sequence[SharedUpdate]], SharedUpdate]

_CHUNK = 256  # images per forward pass without gradients


@dataclass(frozen=True)
class RoundReport:
    """What happened in one round.

    Attributes:
        round: Number of the round, from 1.
        participants: Indices of the clients that took part, ascending.
        accuracy: Share of held-out images that the model predicts right after the
            round, in [0, 1]; ``None`` where nothing was held out or the round was
            left out by ``evaluate_every``.
        loss: Mean cross-entropy on the same images, in nats; or ``None``.
        bytes_up: Bytes that all participants sent, encoded as the updates say.
        bytes_down: Bytes that all participants received: the weights and buffers of
            the model.
        seconds: Wall time of the round without the evaluation.

    Taught in: notebooks/07_iid_noniid.
    """

    round: int
    participants: tuple[int, ...]
    accuracy: float | None
    loss: float | None
    bytes_up: int
    bytes_down: int
    seconds: float


@dataclass(frozen=True, eq=False)
class FederatedRun:
    """A finished run.

    Attributes:
        model: The server's model after the last round.
        rounds: One report per round.

    Taught in: notebooks/07_iid_noniid.
    """

    model: nn.Module
    rounds: tuple[RoundReport, ...]

    @property
    def accuracies(self) -> tuple[tuple[int, float], ...]:
        """Pairs of a round and the accuracy after it, of the rounds evaluated."""
        return tuple(
            (r.round, r.accuracy) for r in self.rounds if r.accuracy is not None
        )

    @property
    def num_bytes(self) -> int:
        """Bytes that travelled in both directions during the whole run."""
        return sum(r.bytes_up + r.bytes_down for r in self.rounds)


def train_federated(
    clients: Sequence[Client],
    model: nn.Module,
    *,
    rounds: int,
    clients_per_round: int | None = None,
    evaluate: Images | None = None,
    evaluate_every: int = 1,
    server_lr: float = 1.0,
    defences: Sequence[Defence] = (),
    combine: Combine = aggregate,
    seed: int = 0,
    on_round: Callable[[RoundReport, tuple[SharedUpdate, ...]], None] | None = None,
) -> FederatedRun:
    r"""Train one model on data that stay with the clients.

    Every round the server sends its model to some clients, each of them answers with
    an update, and the server combines the updates and moves its model:

    .. math::
        w_{r+1} = w_r + \eta_s \sum_{k \in S_r} \frac{n_k}{\sum_j n_j} \Delta_k .

    With ``sends="gradient"`` this is FedSGD, where :math:`\Delta_k = -\eta\, g_k`
    with the learning rate of the recipe; with ``sends="delta"`` it is FedAvg.
    Optimisers start anew in each round. The model stays in its mode: in evaluation
    mode BatchNorm keeps its statistics.

    Args:
        clients: From ``partition``; each has its images and its recipe.
        model: The model that the server starts from; it is left as it was.
        rounds: Number of rounds.
        clients_per_round: Clients drawn without replacement in each round; all of
            them where ``None``.
        evaluate: Held-out images on which the model is judged after a round.
        evaluate_every: Rounds from one evaluation to the next; the last round is
            always evaluated.
        server_lr: Factor of the server's step; 1 is plain FedSGD or FedAvg.
        defences: Applied by every client to its update, in this order.
        combine: Turns the updates of a round into one; the weighted mean by default.
        seed: Seed of the draw of clients, the order of local batches, dropout and
            the randomness of the defences.
        on_round: Called after every round with its report and the updates that
            travelled, in the order of ``participants``. The model of an update is the
            one that the server had sent out.

    Returns:
        The trained model and one report per round. All but the seconds follow from
        the arguments.

    Raises:
        InputError: A bad count, no clients, or training that diverges.

    Source: McMahan et al. (2017), Algorithm 1; Reddi et al. (2021) for the step of
    the server.
    Taught in: notebooks/07_iid_noniid.
    """
    check_count("rounds", rounds)
    check_count("evaluate_every", evaluate_every)
    check_number("server_lr", server_lr, exclusive=True)
    check_seed("seed", seed)
    drawn = _check_draw(clients, clients_per_round)
    model = copy.deepcopy(model)
    work = _largest_work(model, clients)
    reports = []
    for number in range(1, rounds + 1):
        start = time.perf_counter()
        chosen = _participants(len(clients), drawn, seed, number)
        with cpu_threads(work):
            updates = tuple(
                _answer(model, clients[index], defences, (seed, number, index))
                for index in chosen
            )
            _server_step(model, combine(updates), server_lr)
        seconds = time.perf_counter() - start
        accuracy, loss = None, None
        if evaluate is not None and (number % evaluate_every == 0 or number == rounds):
            accuracy, loss = evaluate_model(model, evaluate)
        report = RoundReport(
            round=number,
            participants=chosen,
            accuracy=accuracy,
            loss=loss,
            bytes_up=sum(update.num_bytes for update in updates),
            bytes_down=len(chosen) * model_bytes(model),
            seconds=seconds,
        )
        reports.append(report)
        if on_round is not None:
            on_round(report, updates)
    return FederatedRun(model, tuple(reports))


def evaluate_model(model: nn.Module, images: Images) -> tuple[float, float]:
    """Judge a model in evaluation mode: accuracy and mean cross-entropy.

    Args:
        model: A classifier; it is left as it was.
        images: Images with their labels.

    Returns:
        Share of right predictions in [0, 1], and the loss in nats.

    Taught in: notebooks/07_iid_noniid.
    """
    judge = copy.deepcopy(model).eval()
    first = next(judge.parameters())
    labels = images.labels.to(first.device)
    with torch.no_grad():
        chunks = images.pixels.to(first.device, first.dtype).split(_CHUNK)
        logits = torch.cat([judge(chunk) for chunk in chunks])
    right = (logits.argmax(1) == labels).double().mean()
    return float(right), float(F.cross_entropy(logits, labels))


def model_bytes(model: nn.Module) -> int:
    """Count the bytes of all weights and buffers: what a client downloads.

    Args:
        model: The server's model.

    Taught in: notebooks/07_iid_noniid.
    """
    sent: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in sent)


def _answer(
    model: nn.Module,
    client: Client,
    defences: Sequence[Defence],
    key: tuple[int, int, int],
) -> SharedUpdate:
    """What one client sends; training and defences have random streams of their own."""
    training_seed, defence_seed = _stream(*key).generate_state(2).tolist()
    update = local_update(model, client.images, client.training, seed=training_seed)
    generator = torch.Generator().manual_seed(defence_seed)
    return defend(update, *defences, generator=generator)


def _server_step(model: nn.Module, update: SharedUpdate, server_lr: float) -> None:
    """Move the server's model by a combined update, in place."""
    if update.kind == "delta" and server_lr != 1:
        update = update.replace_tensors(
            {name: server_lr * tensor for name, tensor in update.tensors.items()}
        )
    is_gradient = update.kind == "gradient"
    apply_update(
        model, update, lr=server_lr * update.training.rate if is_gradient else None
    )


def _check_draw(clients: Sequence[Client], clients_per_round: int | None) -> int:
    """Number of clients in a round."""
    if not clients:
        raise InputError("clients", "at least one client", "none")
    if clients_per_round is None:
        return len(clients)
    return check_count("clients_per_round", clients_per_round, maximum=len(clients))


def _participants(total: int, drawn: int, seed: int, number: int) -> tuple[int, ...]:
    """Indices of the clients of one round, ascending."""
    draw = np.random.default_rng(_stream(seed, number))
    return tuple(sorted(draw.permutation(total)[:drawn].tolist()))


def _stream(*key: int) -> np.random.SeedSequence:
    """A source of randomness for one round, or one client in it."""
    seed, *place = key
    return np.random.SeedSequence(seed, spawn_key=place)


def _largest_work(model: nn.Module, clients: Sequence[Client]) -> int:
    """Multiplications of the largest local step, roughly."""
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("model", "at least one trainable parameter", "none")
    most = max(
        min(c.training.batch_size or len(c.images), len(c.images)) for c in clients
    )
    return most * forward_work(model, clients[0].images.shape)
