"""What a client computes and what the server sees of it.

``LocalTraining`` is the recipe, ``local_update`` runs it on private images, and
``SharedUpdate`` is all that leaves the client.
Taught in: notebooks/01_fl_guarantees.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.compute import private_randomness
from gradinv_helpers.data import Images
from gradinv_helpers.encoding import Encoding
from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
)

Optimiser = Literal["sgd", "momentum", "adam"]


@dataclass(frozen=True)
class LocalTraining:
    """How a client turns its images into one update.

    The default is FedSGD: one gradient of the mean cross-entropy over all images of
    the client. With ``sends="delta"`` the client trains and sends the change of its
    weights (FedAvg).

    Args:
        sends: ``gradient`` or ``delta`` (weights after minus weights before).
        lr: Learning rate of the local optimiser; public, as in FedAvg. ``None`` in the
            recipe of an update says that the server does not know it; attacks then
            infer it (``infer_learning_rate``).
        epochs: Passes over the client's images.
        batch_size: Images per local step; ``None`` takes all of them at once.
        optimiser: ``sgd``, ``momentum`` (0.9) or ``adam``.
        weight_decay: L2 penalty of the local optimiser.
        clip_norm: Largest L2 norm of the gradient of a single sample; longer ones are
            scaled down to it before the mean is taken, as in differentially private
            training. For ``sends="gradient"`` only; ``None`` clips nothing.

    Raises:
        InputError: A value is out of range, or a gradient is asked of more than one
            step.

    Source: McMahan et al. (2017), Algorithm 1; Abadi et al. (2016), Algorithm 1, for
    the clipping.
    Taught in: notebooks/01_fl_guarantees.
    """

    sends: Literal["gradient", "delta"] = "gradient"
    lr: float | None = 0.1
    epochs: int = 1
    batch_size: int | None = None
    optimiser: Optimiser = "sgd"
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        check_choice("sends", self.sends, ("gradient", "delta"))
        if self.lr is not None:
            check_number("lr", self.lr, exclusive=True)
        check_count("epochs", self.epochs)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        check_choice("optimiser", self.optimiser, ("sgd", "momentum", "adam"))
        check_number("weight_decay", self.weight_decay)
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, exclusive=True)
            if self.sends == "delta":
                raise InputError("clip_norm", "None for sends='delta'", self.clip_norm)
        one_step = self.epochs == 1 and self.batch_size is None
        if self.sends == "gradient" and not one_step:
            raise InputError(
                "LocalTraining",
                "one epoch and batch_size None for sends='gradient'",
                f"epochs={self.epochs}, batch_size={self.batch_size}",
                "several local steps send a weight change: use sends='delta'",
            )

    @property
    def rate(self) -> float:
        """The learning rate, where a computation needs one.

        Raises:
            InputError: The server does not know it.
        """
        if self.lr is None:
            raise InputError(
                "training.lr",
                "the client's learning rate",
                None,
                "infer_learning_rate finds it in a weight change",
            )
        return self.lr

    def num_steps(self, num_samples: int) -> int:
        """Number of optimiser steps on ``num_samples`` images."""
        batch_size = self.batch_size or num_samples
        return self.epochs * math.ceil(num_samples / batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedUpdate:
    """Exactly what the server sees of one client, or of an aggregate of clients.

    There is no place here for images or labels: the tensors must carry the names and
    shapes of the model's parameters, everything else is numbers of the protocol, and
    the object takes no further attributes.

    Args:
        model: The model before the update, as the server sent it out. A copy is kept.
        tensors: One tensor for every trainable parameter, same names and shapes.
        num_samples: Number of images behind the update; FedAvg makes it public.
        image_shape: Shape (C, H, W) of one input of the model, which all clients
            must agree on.
        training: The recipe, which the server prescribes. Its ``sends`` says whether
            the tensors are a gradient or a weight change.
        group_sizes: Images of each aggregated client, in order; ``None`` for a
            single client.
        normalized: Whether every client scaled its tensors to unit L2 norm.
        noise_std: Standard deviation of the Gaussian noise that a defence is known
            to have added to every entry; 0 for none.
        buffers: Buffers (BatchNorm statistics) after local training, if they are
            sent.
        encoding: How a defence encoded the tensors; ``None`` where they are as
            computed, or where a reader takes them at face value.

    Raises:
        InputError: A tensor is missing, unknown, of a wrong shape, or holds NaN or
            infinite values; a count or the noise is out of range; tensors contradict
            their encoding.

    Source: McMahan et al. (2017), Section 2. Taught in: notebooks/01_fl_guarantees.
    """

    model: nn.Module
    tensors: Mapping[str, Tensor]
    num_samples: int
    image_shape: tuple[int, int, int]
    training: LocalTraining = field(default_factory=LocalTraining)
    group_sizes: tuple[int, ...] | None = None
    normalized: bool = False
    noise_std: float = 0.0
    buffers: Mapping[str, Tensor] | None = None
    encoding: Encoding | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise InputError("model", "a torch.nn.Module", type(self.model).__name__)
        if not isinstance(self.training, LocalTraining):
            raise InputError(
                "training", "a LocalTraining", type(self.training).__name__
            )
        check_count("num_samples", self.num_samples)
        shape = self.image_shape
        if not isinstance(shape, tuple) or len(shape) != 3:
            raise InputError("image_shape", "three integers (C, H, W)", repr(shape))
        for side in shape:
            check_count("image_shape", side)
        check_number("noise_std", self.noise_std)
        if not isinstance(self.normalized, bool):
            raise InputError("normalized", "True or False", repr(self.normalized))
        groups = self.group_sizes
        groups = (self.num_samples,) if groups is None else tuple(groups)
        for size in groups:
            check_count("group_sizes", size)
        if sum(groups) != self.num_samples:
            raise InputError(
                "group_sizes",
                f"counts that add up to num_samples={self.num_samples}",
                f"{groups} with sum {sum(groups)}",
            )
        expected = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        tensors = _checked("tensors", self.tensors, expected)
        buffers = self.buffers
        if buffers is not None:
            buffers = _checked("buffers", buffers, dict(self.model.named_buffers()))
        if self.encoding is not None:
            if not isinstance(self.encoding, Encoding):
                got = type(self.encoding).__name__
                raise InputError("encoding", "an Encoding or None", got)
            self.encoding.check(tensors)
        model = _without_caches(self.model, shape)
        for name, value in {
            "model": model,
            "tensors": tensors,
            "group_sizes": groups,
            "buffers": buffers,
        }.items():
            object.__setattr__(self, name, value)

    @property
    def kind(self) -> str:
        """``gradient`` or ``delta``."""
        return self.training.sends

    @property
    def num_bytes(self) -> int:
        """Bytes that travel: buffers, and all tensors as they are encoded."""
        buffers = (self.buffers or {}).values()
        besides = sum(b.numel() * b.element_size() for b in buffers)
        if self.encoding is not None:
            return besides + self.encoding.num_bytes(self.tensors)
        return besides + sum(
            t.numel() * t.element_size() for t in self.tensors.values()
        )

    @property
    def is_gradient(self) -> bool:
        """Whether the update states a gradient, by itself or by one step of SGD."""
        if self.encoding is not None and not self.encoding.exact:
            return False
        if self.kind == "gradient":
            return True
        one_step = max(map(self.training.num_steps, self.group_sizes or ())) == 1
        return one_step and self.training.optimiser != "adam" and not self.normalized

    def gradient(self) -> dict[str, Tensor]:
        """The mean gradient that the update states, where it states one exactly.

        A gradient is returned as it is. A weight change after a single step of SGD
        (with or without momentum) gives the gradient back by
        ``-delta / lr - weight_decay * weights``.

        Raises:
            InputError: The change comes from several steps or from Adam, so it is
                not the gradient at any one point; or the tensors are encoded.
        """
        if self.encoding is not None and not self.encoding.exact:
            raise InputError(
                "update",
                "a gradient as it was computed",
                f"one that is encoded ({self.encoding.kind})",
                "use attack 'gaussian-map', which reads the encoding; "
                "dataclasses.replace(update, encoding=None) takes it at face value",
            )
        if self.kind == "gradient":
            return dict(self.tensors)
        recipe = self.training
        if not self.is_gradient:
            steps = max(map(recipe.num_steps, self.group_sizes or ()))
            what = "normalised change" if self.normalized else "change"
            raise InputError(
                "update",
                "a gradient, or the weight change of one SGD step",
                f"the {what} of {steps} {recipe.optimiser} steps",
                "such a change is not the gradient at one point",
            )
        weights = dict(self.model.named_parameters())
        return {
            name: -delta / recipe.rate - recipe.weight_decay * weights[name].detach()
            for name, delta in self.tensors.items()
        }

    def __repr__(self) -> str:
        entries = sum(t.numel() for t in self.tensors.values())
        return (
            f"SharedUpdate({self.kind} of {self.num_samples} samples, "
            f"{entries} numbers for {type(self.model).__name__})"
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Read-only mappings cannot be pickled; the checks run again on the way back.
        fields = {name: getattr(self, name) for name in self.__slots__}
        for name in ("tensors", "buffers"):
            fields[name] = fields[name] and dict(fields[name])
        return (_rebuilt, (fields,))

    def replace_tensors(
        self, tensors: Mapping[str, Tensor], **changes: object
    ) -> SharedUpdate:
        """A copy with other tensors, and further fields changed by name."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return SharedUpdate(**(fields | {"tensors": tensors} | changes))


def _refuse_attribute(update: SharedUpdate, name: str, value: object) -> None:
    raise AttributeError(
        f"SharedUpdate.{name} cannot be set: an update takes no changes and no "
        "further attributes; use replace_tensors for a changed copy"
    )


# The classes that frozen=True and slots=True make together answer with an unrelated
# TypeError for names that are no fields.
SharedUpdate.__setattr__ = _refuse_attribute  # type: ignore[assignment]


def _rebuilt(fields: dict[str, object]) -> SharedUpdate:
    return SharedUpdate(**fields)  # type: ignore[arg-type]


def _without_caches(model: nn.Module, image_shape: tuple[int, ...]) -> nn.Module:
    """Copy a model without what an earlier forward pass may have left on it.

    Parameters, buffers and constants are kept. Plain attributes that are batches of
    images, or that belong to a graph of activations, become ``None``.
    """
    flat = (math.prod(image_shape),)
    state = {id(t) for t in (*model.parameters(), *model.buffers())}
    memo: dict[int, object] = {}  # deepcopy returns what stands here

    def look(value: object) -> None:
        if isinstance(value, Tensor):
            is_batch = value.dim() > 1 and value.shape[-1:] == flat
            is_batch |= tuple(value.shape[-3:]) == image_shape
            if (is_batch or not value.is_leaf) and id(value) not in state:
                memo[id(value)] = None
        elif isinstance(value, Mapping):
            look(list(value.values()))
        elif isinstance(value, list | tuple | set):
            for entry in value:
                look(entry)

    for module in model.modules():
        own = {"_parameters", "_buffers", "_modules"}
        look([value for name, value in vars(module).items() if name not in own])
    return copy.deepcopy(model, memo)


def _checked(
    argument: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Detached read-only copies of ``given``, in the order of ``expected``."""
    if not isinstance(given, Mapping):
        raise InputError(
            argument, "a mapping from parameter names to tensors", type(given).__name__
        )
    for name in given:
        if name not in expected:
            raise InputError(argument, "only names of the model", repr(name))
    copies = {}
    for name, reference in expected.items():
        label = f"{argument}[{name!r}]"
        tensor = given.get(name)
        if not isinstance(tensor, Tensor):
            raise InputError(label, "a tensor", type(tensor).__name__)
        if tensor.shape != reference.shape:
            raise InputError(
                label,
                f"shape {tuple(reference.shape)} as in the model",
                tuple(tensor.shape),
            )
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise InputError(
                label,
                "finite numbers",
                f"{bad} NaN or infinite values of {tensor.numel()}",
                "the client's training diverged or the file is damaged",
            )
        copies[name] = tensor.detach().clone()
    return MappingProxyType(copies)


def local_update(
    model: nn.Module,
    images: Images,
    training: LocalTraining | None = None,
    *,
    seed: int | None = None,
) -> SharedUpdate:
    """Compute what a client with ``images`` sends to the server.

    Args:
        model: The model received from the server; it is left as it was.
        images: The client's private images; pixels (N, C, H, W) in [0, 1].
        training: The recipe; one full-batch gradient (FedSGD) by default.
        seed: Shuffles the images before every epoch and drives any dropout; ``None``
            keeps the order, and dropout takes torch's global random state.

    Returns:
        The update, free of images and labels.

    Raises:
        InputError: No images, labels outside the model's classes, a weight change
            without a learning rate, or training that ends in NaN.

    Source: McMahan et al. (2017), Algorithm 1 (ClientUpdate).
    Taught in: notebooks/01_fl_guarantees.
    """
    training = training or LocalTraining()
    if len(images) == 0:
        raise InputError("images", "at least one image", "none")
    worker = _without_caches(model, images.shape)
    trained = {n: p for n, p in worker.named_parameters() if p.requires_grad}
    if not trained:
        raise InputError("model", "at least one trainable parameter", "none")
    first = next(iter(trained.values()))
    pixels = images.pixels.to(first.device, first.dtype)
    labels = images.labels.to(first.device)

    with ExitStack() as stack:
        if seed is not None:
            stack.enter_context(private_randomness(seed, first.device))
        if training.sends == "gradient":
            bound = training.clip_norm
            found = (
                _gradient(worker, list(trained.values()), pixels, labels)
                if bound is None
                else _clipped_mean(
                    worker, list(trained.values()), pixels, labels, bound
                )
            )
            tensors = dict(zip(trained, found, strict=True))
        else:
            before = {name: p.detach().clone() for name, p in trained.items()}
            optimiser = local_optimiser(training, list(trained.values()))
            for chosen in _batches(len(images), training, seed):
                optimiser.zero_grad()
                _cross_entropy(worker, pixels[chosen], labels[chosen]).backward()
                optimiser.step()
            tensors = {n: p.detach() - before[n] for n, p in trained.items()}

    buffers = _statistics(model, worker) if worker.training else {}
    return SharedUpdate(
        model=model,
        tensors=tensors,
        num_samples=len(images),
        image_shape=images.shape,
        training=training,
        buffers=buffers or None,
    )


def _gradient(
    worker: nn.Module, weights: list[nn.Parameter], pixels: Tensor, labels: Tensor
) -> list[Tensor]:
    """Gradient of the mean loss; zeros for weights that nothing uses."""
    loss = _cross_entropy(worker, pixels, labels)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    pairs = zip(found, weights, strict=True)
    return [torch.zeros_like(w) if g is None else g for g, w in pairs]


def _clipped_mean(
    worker: nn.Module,
    weights: list[nn.Parameter],
    pixels: Tensor,
    labels: Tensor,
    bound: float,
) -> list[Tensor]:
    """Mean of the samples' gradients, each of them no longer than ``bound``."""
    batch_norm = nn.modules.batchnorm._BatchNorm
    if any(isinstance(m, batch_norm) and m.training for m in worker.modules()):
        raise InputError(
            "training.clip_norm",
            "None where BatchNorm is in train mode, which gives samples no gradient "
            "of their own",
            bound,
            "call model.eval(), or use GroupNorm",
        )
    total = [torch.zeros_like(w) for w in weights]
    for image, label in zip(pixels, labels, strict=True):
        own = _gradient(worker, weights, image[None], label[None])
        norm = float(torch.stack([g.double().norm() for g in own]).norm())
        scale = min(1.0, bound / max(norm, 1e-300)) / len(pixels)
        total = [t + scale * g for t, g in zip(total, own, strict=True)]
    return total


def _statistics(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """All buffers, of which only the statistics of normalisation layers are new.

    A buffer of any other kind may hold what went through the model.
    """
    buffers = dict(before.named_buffers())
    for name, module in after.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            prefix = f"{name}." if name else ""
            for own, value in module.named_buffers(recurse=False):
                buffers[prefix + own] = value
    return buffers


def _cross_entropy(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    logits = model(pixels)
    if int(labels.max()) >= logits.shape[1]:
        raise InputError(
            "images.labels",
            f"labels below the model's {logits.shape[1]} classes",
            int(labels.max()),
        )
    return F.cross_entropy(logits, labels)


def local_optimiser(
    training: LocalTraining, parameters: list[Tensor]
) -> torch.optim.Optimizer:
    """Give the optimiser that a client trains these parameters with.

    Args:
        training: The client's recipe.
        parameters: What it changes.

    Taught in: notebooks/01_fl_guarantees.
    """
    if training.optimiser == "adam":
        return torch.optim.Adam(
            parameters, lr=training.rate, weight_decay=training.weight_decay
        )
    return torch.optim.SGD(
        parameters,
        lr=training.rate,
        momentum=0.9 if training.optimiser == "momentum" else 0.0,
        weight_decay=training.weight_decay,
    )


def _batches(
    num_samples: int, training: LocalTraining, seed: int | None
) -> Iterator[Tensor]:
    """Indices of every local step, epoch after epoch."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batch_size = training.batch_size or num_samples
    for _ in range(training.epochs):
        order = torch.arange(num_samples)
        if generator is not None:
            order = torch.randperm(num_samples, generator=generator)
        yield from order.split(batch_size)
