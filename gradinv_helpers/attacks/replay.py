r"""Local training as a differentiable map from images to the update they would send.

A client that takes several local steps sends no gradient at one point. Its weights
move by :math:`\theta_{s+1} = \theta_s - \eta\, d(g(\theta_s; x_s, y_s))`, where
:math:`x_s` are the images of step s and d is what the optimiser makes of their
gradient, and the update is :math:`\Delta = \theta_S - \theta_0`. The server knows the
recipe, so it can run the same training on dummy images, match the result with what
was sent, and differentiate through all S steps. Each of them needs second derivatives
of the loss, as gradient matching does, and none needs third ones.
Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gradinv_helpers.attacks.gradients import (
    GradientMap,
    Gradients,
    Pullback,
    _AutogradMap,
    _named_layers,
    _twice_differentiable,
    gradient_map,
    is_plain_chain,
)
from gradinv_helpers.attacks.matching import normalized_groups
from gradinv_helpers.errors import InputError, check_choice, check_count, check_seed
from gradinv_helpers.updates import LocalTraining, SharedUpdate, _batches

Batches = Sequence[Tensor]  # indices of the images of every local step
_ORDERS = ("sequential", "first-epoch", "averaged")
Order = Literal["sequential", "first-epoch", "averaged"] | Batches | Sequence[Batches]

# The settings of torch.optim that LocalTraining leaves as they are.
_MOMENTUM, _BETA1, _BETA2, _EPSILON = 0.9, 0.9, 0.999, 1e-8


def replay_map(
    model: nn.Module,
    training: LocalTraining,
    num_samples: int,
    *,
    order: Order = "sequential",
    group_sizes: Sequence[int] | None = None,
    normalized: bool = False,
    statistics: bool = False,
) -> GradientMap:
    r"""Build the map from dummy images to the update that training on them sends.

    The client may have shuffled its images before every epoch. Dummy images have no
    order of their own: they may be numbered by their place in the first epoch. So
    ``sequential`` loses nothing for a client that trains for one epoch, or that never
    shuffles. It is wrong about the later epochs of a client that shuffles.

    ``averaged`` favours no order. Every step takes the mean gradient over all images
    of the client, as many times as the client takes steps. To first order in the
    learning rate this is the mean over all orders for SGD, with or without momentum;
    for plain SGD whose batches are equally large it is, to that order, the update of
    each of them. It ignores how the batches of a step differ: what one batch changes
    in the gradient of the next (of second order in the learning rate), the greater
    weight of images in a smaller last batch and, with momentum, in earlier batches,
    the scatter of batch gradients that enlarges Adam's second moments, and the
    statistics that BatchNorm takes of one batch alone. ``first-epoch`` is sequential
    in the first epoch, where that loses nothing, and averaged from the second on.

    On true images, ``first-epoch`` was the nearest of the three to what clients of
    two to five shuffled epochs sent by SGD and momentum with small steps, and
    ``sequential`` for long training by Adam or by large steps, whose last epochs
    change little. The nearest one missed by 1 to 70 percent of the update, more for
    larger steps, and a match closer than that says nothing about the images.

    Adam's first step is close to the sign of the gradient, times the learning rate,
    and its derivative is small there: work in double precision. Where the gradient is
    zero but for rounding, as of a bias in front of BatchNorm in train mode, Adam moves
    the weights by rounding errors of full size, which no replay predicts.

    A single step goes through ``gradient_map``, all trials together. Several steps
    are run trial by trial, and the memory grows with their number.

    Args:
        model: The model before training, in the mode (train or eval) in which the
            client used it. It is not changed; in train mode BatchNorm normalises by
            the statistics of each batch and leaves the running ones alone.
        training: The recipe, of one gradient or of a weight change.
        num_samples: Number B of images behind the update, all clients together.
        order: ``sequential``, ``first-epoch``, ``averaged``, or the indices of the
            images of every local step, as ``local_batches`` gives them. With
            ``group_sizes`` one such list for every client, which counts its own
            images from 0.
        group_sizes: Images of each aggregated client. Each of them trains on its own
            images, which follow one another in this order, and the changes are
            averaged with their numbers as weights; ``None`` for a single client.
        normalized: Whether every client scales its update to unit L2 norm.
        statistics: Whether the changes of BatchNorm's running statistics follow those
            of the parameters, for updates that come with buffers.

    Returns:
        A function of ``images`` (T, B, C, H, W) and class probabilities ``targets``
        (T, B, K), like that of ``gradient_map``: the update of every trial (T, ...)
        per trainable parameter, then, with ``statistics``, the changes of the running
        statistics (T, channels) in the order of ``shared_statistics``; and a
        pull-back to images and targets, which may be used once. Targets are taken to
        add up to 1, and their derivatives hold along such targets.

    Raises:
        InputError: Counts do not add up, an explicit order does not belong to the
            recipe, the model has no trainable parameters, or statistics are asked
            for and the model has none that training moves.

    Source: McMahan et al. (2017), Algorithm 1 (ClientUpdate), whose steps are replayed.
    Taught in: notebooks/04_aggregated_gradients.
    """
    if not isinstance(training, LocalTraining):
        raise InputError("training", "a LocalTraining", type(training).__name__)
    check_count("num_samples", num_samples)
    sizes = _checked_sizes(group_sizes, num_samples)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("model", "at least one trainable parameter", "none")
    if normalized and statistics:
        raise InputError(
            "statistics",
            "False for normalised updates",
            "True",
            "clients scale their weights alone: match the statistics by a second map",
        )
    if statistics and not moving_statistics(model):
        raise InputError(
            "model", "BatchNorm layers with running statistics in train mode", "none"
        )
    steps = _checked_order(order, training, sizes, single=group_sizes is None)
    device = next(model.parameters()).device
    if _one_for_all(model, training, sizes) and not (normalized or statistics):
        sizes, steps = (num_samples,), [[torch.arange(num_samples)]]

    clients = []
    # Weight decay skips weights that nothing uses, which a plain chain has none of.
    short = is_plain_chain(model) or not training.weight_decay
    for batches in steps:
        if len(batches) == 1 and short and not statistics:
            client = _single_step(model, training)
        else:
            own = [chosen.to(device) for chosen in batches]
            client = _Replay(model, training, own, statistics)
        clients.append(client)
    if normalized:
        clients = [
            normalized_groups(client, (size,))
            for client, size in zip(clients, sizes, strict=True)
        ]
    return _mean_of_clients(clients, sizes)


def local_batches(
    num_samples: int, training: LocalTraining, *, seed: int | None = None
) -> list[Tensor]:
    """List the images of every local step that ``local_update`` takes.

    Args:
        num_samples: Images of the client.
        training: The recipe.
        seed: That of ``local_update``; ``None`` keeps the order.

    Returns:
        Indices (batch size,) for each of the steps, epoch after epoch.

    Raises:
        InputError: A count or the seed is out of range.

    Taught in: notebooks/04_aggregated_gradients.
    """
    check_count("num_samples", num_samples)
    if seed is not None:
        check_seed("seed", seed)
    return list(_batches(num_samples, training, seed))


def shared_statistics(update: SharedUpdate) -> list[Tensor]:
    """State how an update moved the running statistics of BatchNorm.

    Returns:
        The changes (channels,) of every mean and variance that training moves, in
        the order in which ``replay_map`` with ``statistics`` predicts them.

    Raises:
        InputError: The update comes without buffers, or has no such statistics.

    Taught in: notebooks/04_aggregated_gradients.
    """
    names = moving_statistics(update.model)
    if update.buffers is None or not names:
        got = "none" if update.buffers is None else "none that training moves"
        raise InputError("update", "buffers with the statistics of BatchNorm", got)
    before = dict(update.model.named_buffers())
    return [update.buffers[name] - before[name] for name in names]


def fit_learning_rate(predicted: Gradients, target: Gradients) -> Tensor:
    r"""Fit the factor by which predicted changes are to be scaled.

    The factor is :math:`s = \langle p, t \rangle / \langle p, p \rangle`, the least
    squares solution of :math:`s\,p \approx t`, and s times the learning rate of the
    prediction is the estimate of the client's. It may be negative where the two point
    apart, as at the start of a search. At the optimum of s the derivative of the loss
    :math:`\lVert s\,p - t \rVert^2` with respect to p is that at fixed s.

    The change of a single step of any of the optimisers is proportional to the
    learning rate, weight decay (if its factor is known) included: the fit is exact.
    That of several steps is proportional to first order only, because each step
    moves the point of the next. Predict again at the estimate and repeat: where the
    learning rate is right, the factor is 1.

    Args:
        predicted: Changes (T, ...) per parameter, as of ``replay_map``.
        target: What was sent, with as many trials or one for all of them.

    Returns:
        One factor per trial (T,).

    Raises:
        InputError: The lists differ, or a predicted change is zero.

    Taught in: notebooks/04_aggregated_gradients.
    """
    if len(predicted) != len(target) or not predicted:
        lengths = f"{len(predicted)} and {len(target)}"
        raise InputError("predicted and target", "equally many tensors", lengths)
    pairs = list(zip(predicted, target, strict=True))
    for p, t in pairs:
        if p.shape[1:] != t.shape[1:] or len(t) not in (1, len(p)):
            shapes = f"{tuple(p.shape)} and {tuple(t.shape)}"
            raise InputError("predicted and target", "equal shapes", shapes)
    along = torch.stack([(p * t).flatten(1).sum(1) for p, t in pairs]).sum(0)
    own = torch.stack([p.square().flatten(1).sum(1) for p, _ in pairs]).sum(0)
    if not bool(own.all()):
        raise InputError("predicted", "non-zero changes", "a change of zeros")
    return along / own


# --- checks -----------------------------------------------------------------------


def _checked_sizes(
    group_sizes: Sequence[int] | None, num_samples: int
) -> tuple[int, ...]:
    if group_sizes is None:
        return (num_samples,)
    for size in group_sizes:
        check_count("group_sizes", size)
    if sum(group_sizes) != num_samples:
        raise InputError(
            "group_sizes",
            f"counts that add up to num_samples={num_samples}",
            f"{tuple(group_sizes)} with sum {sum(group_sizes)}",
        )
    return tuple(group_sizes)


def _checked_order(
    order: Order, training: LocalTraining, sizes: tuple[int, ...], *, single: bool
) -> list[Batches]:
    """Indices of every step of every client."""
    if isinstance(order, str):
        check_choice("order", order, _ORDERS)
        return [_stated_order(order, training, size) for size in sizes]
    given: Sequence = [order] if single else order
    if len(given) != len(sizes):
        expected = f"one list of steps for each of {len(sizes)} clients"
        raise InputError("order", expected, len(given))
    for batches, size in zip(given, sizes, strict=True):
        _check_batches(batches, training, size)
    return list(given)


def _stated_order(order: str, training: LocalTraining, size: int) -> Batches:
    steps = local_batches(size, training)
    exact = {
        "sequential": len(steps),
        "first-epoch": len(steps) // training.epochs,
        "averaged": 0,
    }[order]
    return steps[:exact] + [torch.arange(size)] * (len(steps) - exact)


def _check_batches(batches: Batches, training: LocalTraining, size: int) -> None:
    """Make sure that every epoch takes each image once, in batches as prescribed."""
    wanted = [len(batch) for batch in local_batches(size, training)]
    if not all(isinstance(b, Tensor) and b.dim() == 1 for b in batches):
        raise InputError("order", "one tensor of indices per local step", "others")
    lengths = [len(batch) for batch in batches]
    if lengths != wanted:
        raise InputError("order", f"steps of {wanted} images", lengths)
    every = torch.arange(size)
    for epoch in torch.cat(list(batches)).cpu().split(size):
        if not torch.equal(epoch.sort().values, every):
            expected = f"each of the images 0 to {size - 1} once per epoch"
            raise InputError("order", expected, epoch.tolist())


def moving_statistics(model: nn.Module) -> list[str]:
    """Buffers of BatchNorm that a forward pass moves, in the order of the model."""
    moving = {
        id(buffer)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    }
    return [name for name, buffer in model.named_buffers() if id(buffer) in moving]


def _one_for_all(
    model: nn.Module, training: LocalTraining, sizes: tuple[int, ...]
) -> bool:
    """Whether the aggregate is the update of one client that holds all images.

    It is for single steps that are linear in the gradient, if the model treats every
    image by itself.
    """
    apart = is_plain_chain(model) or not any(m.training for m in model.modules())
    single = all(training.num_steps(size) == 1 for size in sizes)
    return apart and single and training.optimiser != "adam"


# --- the maps ---------------------------------------------------------------------


def _mean_of_clients(
    clients: Sequence[GradientMap], sizes: tuple[int, ...]
) -> GradientMap:
    """The mean of the clients' updates, weighted by their numbers of samples."""
    total = sum(sizes)
    weights = [size / total for size in sizes]

    def mapped(images: Tensor, targets: Tensor) -> tuple[Gradients, Pullback]:
        if images.dim() != 5 or images.shape[1] != total:
            expected = f"shape (T, {total}, C, H, W)"
            raise InputError("images", expected, tuple(images.shape))
        parts_of = images.split(sizes, 1), targets.split(sizes, 1)
        groups = zip(clients, *parts_of, strict=True)
        parts = [client(x, y) for client, x, y in groups]
        if len(parts) == 1:
            return parts[0]
        mean = [
            sum(w * change for w, change in zip(weights, column, strict=True))
            for column in zip(*(changes for changes, _ in parts), strict=True)
        ]

        def pull(cotangents: Gradients) -> tuple[Tensor, Tensor]:
            back = [
                pullback([w * v for v in cotangents])
                for w, (_, pullback) in zip(weights, parts, strict=True)
            ]
            to_images, to_targets = zip(*back, strict=True)
            return torch.cat(to_images, 1), torch.cat(to_targets, 1)

        return mean, pull

    return mapped


def _single_step(model: nn.Module, training: LocalTraining) -> GradientMap:
    """One gradient, or what the optimiser makes of it, for all trials together."""
    gradients_of = gradient_map(model)
    if training.sends == "gradient":
        return gradients_of
    start = [p.detach() for p in model.parameters() if p.requires_grad]

    def mapped(images: Tensor, targets: Tensor) -> tuple[Gradients, Pullback]:
        gradients, pullback = gradients_of(images, targets)
        leaves = [g.detach().requires_grad_() for g in gradients]
        optimiser = _Optimiser(training, start)
        with torch.enable_grad():
            optimiser.step(leaves)

        def pull(cotangents: Gradients) -> tuple[Tensor, Tensor]:
            return pullback(
                list(torch.autograd.grad(optimiser.moved, leaves, cotangents))
            )

        return [change.detach() for change in optimiser.moved], pull

    return mapped


class _Replay:
    """All local steps of one client, trial by trial, with one graph behind them."""

    def __init__(
        self,
        model: nn.Module,
        training: LocalTraining,
        steps: Batches,
        statistics: bool,
    ):
        self.model, self.training, self.steps = model, training, steps
        self.state = _AutogradMap(model)  # parameters and buffers, detached
        self.names = moving_statistics(model) if statistics else []

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Gradients, Pullback]:
        pairs = [
            (x.detach().requires_grad_(), y.detach().requires_grad_())
            for x, y in zip(images, targets, strict=True)
        ]
        with torch.enable_grad():
            rows = [self._train(x, y) for x, y in pairs]

        def pullback(cotangents: Gradients) -> tuple[Tensor, Tensor]:
            back = []
            for trial, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
                reached = [
                    (change, v[trial])
                    for change, v in zip(row, cotangents, strict=True)
                    if change.requires_grad
                ]
                with _named_layers():
                    back.append(
                        torch.autograd.grad(
                            [change for change, _ in reached],
                            pair,
                            [v for _, v in reached],
                            materialize_grads=True,
                        )
                    )
            to_images, to_targets = zip(*back, strict=True)
            return torch.stack(to_images), torch.stack(to_targets)

        columns = zip(*rows, strict=True)
        return [torch.stack(column).detach() for column in columns], pullback

    def _train(self, images: Tensor, targets: Tensor) -> list[Tensor]:
        """Changes by training on images (B, C, H, W), with the graph of all steps."""
        start = list(self.state.trained.values())
        optimiser = _Optimiser(self.training, start)
        buffers = self.state.buffers
        moments = {name: buffers[name] for name in self.names}
        for chosen in self.steps:
            if self.state.training:  # forward overwrites running statistics
                buffers = {name: b.clone() for name, b in buffers.items()}
            weights = [
                (w + m).requires_grad_()
                for w, m in zip(start, optimiser.moved, strict=True)
            ]
            watch = _RunningStatistics(
                {id(buffers[name]): name for name in self.names}, moments
            )
            with _twice_differentiable(), watch:
                loss = self._loss(weights, buffers, images[chosen], targets[chosen])
                gradients = torch.autograd.grad(
                    loss, weights, create_graph=True, allow_unused=True
                )
            if self.training.sends == "delta":
                optimiser.step(gradients)
        changes = optimiser.moved
        if self.training.sends == "gradient":  # after the only step
            pairs = zip(gradients, start, strict=True)
            changes = [torch.zeros_like(w) if g is None else g for g, w in pairs]
        after = [moments[name] - self.state.buffers[name] for name in self.names]
        return [*changes, *after]

    def _loss(
        self,
        weights: list[Tensor],
        buffers: dict[str, Tensor],
        images: Tensor,
        targets: Tensor,
    ) -> Tensor:
        named = dict(zip(self.state.trained, weights, strict=True))
        state = {**named, **self.state.fixed, **buffers}
        logits = functional_call(self.model, state, (images,))
        return -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()


class _Optimiser:
    """The arithmetic of torch.optim, differentiable with respect to the gradients.

    Args:
        training: The recipe.
        start: Weights before the first step.
    """

    def __init__(self, training: LocalTraining, start: Sequence[Tensor]):
        self.training, self.start, self.steps = training, start, 0
        # Changes are added up by themselves: their rounding is not that of weights.
        self.moved = [torch.zeros_like(w) for w in start]
        self.first, self.second = list(self.moved), list(self.moved)

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Move along gradients at the present weights; ``None`` where unused."""
        self.steps += 1
        for i, gradient in enumerate(gradients):
            if gradient is not None:  # others stay, weight decay or not
                self.moved[i] = self.moved[i] - self.training.rate * self._along(
                    i, gradient
                )

    def _along(self, i: int, gradient: Tensor) -> Tensor:
        """What the optimiser makes of the gradient of parameter i."""
        recipe = self.training
        if recipe.weight_decay:
            present = self.start[i] + self.moved[i]
            gradient = gradient + recipe.weight_decay * present
        if recipe.optimiser == "sgd":
            return gradient
        if recipe.optimiser == "momentum":
            self.first[i] = _MOMENTUM * self.first[i] + gradient
            return self.first[i]
        self.first[i] = _BETA1 * self.first[i] + (1 - _BETA1) * gradient
        self.second[i] = _BETA2 * self.second[i] + (1 - _BETA2) * gradient.square()
        left, right = 1 - _BETA1**self.steps, 1 - _BETA2**self.steps
        scale = _root(self.second[i]) / right**0.5 + _EPSILON
        return self.first[i] / left / scale


def _root(squares: Tensor) -> Tensor:
    """Square roots whose derivative at 0 is 0, where torch's is infinite.

    The second moment of Adam is 0 where every gradient was. There its root is the
    length of a vector at the origin, and 0 is among the slopes of that cone.
    """
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


class _RunningStatistics(TorchFunctionMode):
    """Follow the running statistics of BatchNorm as functions of the images.

    torch overwrites them in place and does not differentiate that.

    Args:
        names: Names of the buffers to follow, by the ids of the tensors.
        moments: Their values by name, which are replaced by the next ones.
    """

    def __init__(self, names: dict[int, str], moments: dict[str, Tensor]):
        super().__init__()
        self.names, self.moments = names, moments

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.batch_norm and self.names:
            self._follow(*args, **kwargs)
        return out

    def _follow(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        if not training:
            return
        own = (0, *range(2, input.dim()))
        for running, moment in ((running_mean, torch.mean), (running_var, torch.var)):
            name = self.names.get(id(running))
            if name is not None:
                batch = moment(input, dim=own)
                self.moments[name] = torch.lerp(self.moments[name], batch, momentum)
