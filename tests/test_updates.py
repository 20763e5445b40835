"""What a client computes, and that nothing else leaves it."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

SHAPE = (1, 6, 6)
NUM_CLASSES = 5


def some_images(count: int = 4, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, *SHAPE, generator=generator)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    return Images(pixels, labels, tuple("abcde"))


def softmax_regression(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, NUM_CLASSES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model.to(dtype)


def lenet() -> nn.Module:
    return build_model("lenet", in_channels=1, image_size=6, num_classes=NUM_CLASSES)


class WithNorm(nn.Module):
    """A model with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(48, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).flatten(1))


class Caching(nn.Module):
    """A model that remembers its last batch in every way a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(36, NUM_CLASSES)
        self.mean = torch.tensor([0.5])  # a constant, not a cache
        self.last: Tensor | None = None
        self.flat: Tensor | None = None
        self.logits: Tensor | None = None
        self.seen: list[Tensor] = []
        self.named: dict[str, object] = {}
        self.register_buffer("kept", torch.zeros(4, *SHAPE))
        self.register_buffer("hidden", torch.zeros(4, *SHAPE), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.last, self.flat = x, x.flatten(1)
        self.seen.append(x.detach().clone())
        self.named["batch"] = {"x": (x,)}
        self.kept.copy_(x)
        self.hidden.copy_(x)
        self.logits = self.head(self.flat - self.mean)
        return self.logits


# --- the recipe -------------------------------------------------------------------


def test_default_recipe_is_one_gradient() -> None:
    recipe = LocalTraining()
    assert recipe.sends == "gradient"
    assert recipe.num_steps(7) == 1


@pytest.mark.parametrize(
    ("epochs", "batch_size", "num_samples", "steps"),
    [(1, None, 7, 1), (3, None, 7, 3), (2, 3, 7, 6), (2, 7, 7, 2), (1, 9, 7, 1)],
)
def test_number_of_steps(epochs, batch_size, num_samples, steps) -> None:
    recipe = LocalTraining("delta", epochs=epochs, batch_size=batch_size)
    assert recipe.num_steps(num_samples) == steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sends": "weights"}, "sends: expected one of gradient, delta"),
        ({"lr": 0.0}, "lr: expected a finite number > 0"),
        ({"lr": float("nan")}, "lr: expected a finite number > 0"),
        ({"epochs": 0}, "epochs: expected an integer of at least 1"),
        ({"epochs": 1.5}, "epochs: expected an integer"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1"),
        ({"optimiser": "sgdd"}, "optimiser: .*did you mean 'sgd'"),
        ({"weight_decay": -1.0}, "weight_decay: expected a finite number >= 0"),
        ({"epochs": 2}, "one epoch .* for sends='gradient', got epochs=2.*'delta'"),
        ({"batch_size": 2}, "batch_size None for sends='gradient'"),
    ],
)
def test_bad_recipes(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LocalTraining(**changes)


def test_recipe_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LocalTraining().lr = 1.0  # type: ignore[misc]


# --- what a client computes -------------------------------------------------------


def test_gradient_of_softmax_regression_by_hand() -> None:
    """dL/dW = (p - y)^T x / n and dL/db = mean(p - y)."""
    model, images = softmax_regression(dtype=torch.float64), some_images(7)
    x = images.pixels.double().flatten(1)
    error = torch.softmax(x @ model[1].weight.T + model[1].bias, 1).detach()
    error[torch.arange(7), images.labels] -= 1
    update = local_update(model, images)
    assert update.kind == "gradient"
    assert list(update.tensors) == ["1.weight", "1.bias"]
    assert torch.allclose(update.tensors["1.weight"], error.T @ x / 7, atol=1e-15)
    assert torch.allclose(update.tensors["1.bias"], error.mean(0), atol=1e-15)


def test_one_sgd_step_is_minus_lr_times_the_gradient() -> None:
    model, images = lenet(), some_images()
    gradient = local_update(model, images).tensors
    delta = local_update(model, images, LocalTraining("delta", lr=0.3)).tensors
    for name, change in delta.items():
        assert torch.allclose(change, -0.3 * gradient[name], atol=1e-7), name


def plain_training(model, images, recipe, orders) -> dict[str, Tensor]:
    """The update rules of the textbooks, written out on plain tensors."""
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    start = [w.detach().clone() for w in weights]
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    for step, chosen in enumerate(orders, start=1):
        logits = torch.func.functional_call(
            model, dict(zip(names, weights, strict=True)), (images.pixels[chosen],)
        )
        loss = F.cross_entropy(logits, images.labels[chosen])
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, g, m, v in zip(weights, gradients, first, second, strict=True):
                g = g + recipe.weight_decay * w
                if recipe.optimiser == "sgd":
                    w -= recipe.lr * g
                elif recipe.optimiser == "momentum":
                    m.mul_(0.9).add_(g)
                    w -= recipe.lr * m
                else:
                    m.mul_(0.9).add_(0.1 * g)
                    v.mul_(0.999).add_(0.001 * g * g)
                    scaled = (v / (1 - 0.999**step)).sqrt() + 1e-8
                    w -= recipe.lr * (m / (1 - 0.9**step)) / scaled
    return {
        name: (w - s).detach() for name, w, s in zip(names, weights, start, strict=True)
    }


@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
def test_training_against_a_plain_loop(optimiser: str, weight_decay: float) -> None:
    images, model = some_images(7), softmax_regression().double()
    images64 = types.SimpleNamespace(
        pixels=images.pixels.double(), labels=images.labels
    )
    recipe = LocalTraining(
        "delta",
        lr=0.05,
        epochs=2,
        batch_size=3,
        optimiser=optimiser,
        weight_decay=weight_decay,
    )
    orders = [range(3), range(3, 6), range(6, 7)] * 2
    expected = plain_training(model, images64, recipe, [list(o) for o in orders])
    found = local_update(model, images, recipe).tensors
    for name, change in expected.items():
        assert torch.allclose(found[name], change, rtol=1e-9, atol=1e-12), name


def test_seed_shuffles_every_epoch_anew() -> None:
    images, model = some_images(6), softmax_regression().double()
    recipe = LocalTraining("delta", lr=0.5, epochs=2, batch_size=4)
    generator = torch.Generator().manual_seed(3)
    orders = [
        part.tolist()
        for _ in range(2)
        for part in torch.randperm(6, generator=generator).split(4)
    ]
    assert orders[0] != orders[2]
    as_double = types.SimpleNamespace(
        pixels=images.pixels.double(), labels=images.labels
    )
    expected = plain_training(model, as_double, recipe, orders)
    found = local_update(model, images, recipe, seed=3)
    for name, change in expected.items():
        assert torch.allclose(found.tensors[name], change, atol=1e-12)
    again = local_update(model, images, recipe, seed=3)
    other = local_update(model, images, recipe, seed=4)
    plain = local_update(model, images, recipe)
    bias = "1.bias"
    assert torch.equal(found.tensors[bias], again.tensors[bias])
    assert not torch.equal(found.tensors[bias], other.tensors[bias])
    assert not torch.equal(found.tensors[bias], plain.tensors[bias])


@pytest.mark.parametrize("recipe", [LocalTraining(), LocalTraining("delta", epochs=2)])
def test_model_is_left_as_it_was(recipe: LocalTraining) -> None:
    model = WithNorm().train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    local_update(model, some_images(), recipe, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_running_statistics_are_sent_in_training_mode() -> None:
    model, images = WithNorm().train(), some_images()
    update = local_update(model, images)
    outputs = model.conv(images.pixels).detach()
    mean = outputs.mean((0, 2, 3))
    variance = outputs.transpose(0, 1).flatten(1).var(1)
    assert update.buffers is not None
    assert torch.allclose(update.buffers["norm.running_mean"], 0.1 * mean, atol=1e-6)
    assert torch.allclose(
        update.buffers["norm.running_var"], 0.9 + 0.1 * variance, atol=1e-6
    )
    assert int(update.buffers["norm.num_batches_tracked"]) == 1
    # The model of the update is still the one before.
    assert torch.equal(update.model.norm.running_mean, torch.zeros(3))
    assert local_update(model.eval(), images).buffers is None


def test_bytes_on_the_way() -> None:
    update = local_update(softmax_regression(), some_images())
    assert update.num_bytes == 4 * (36 * 5 + 5)
    with_norm = local_update(WithNorm().train(), some_images())
    parameters = sum(p.numel() for p in WithNorm().parameters())
    assert with_norm.num_bytes == 4 * parameters + 4 * 6 + 8


def test_frozen_and_unused_parameters() -> None:
    model = lenet()
    model[0].weight.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    update = local_update(model, some_images())
    assert "0.weight" not in update.tensors
    assert torch.equal(update.tensors["unused"], torch.zeros(2))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="model: expected at least one trainable"):
        local_update(model, some_images())


def test_labels_outside_of_the_model() -> None:
    images = Images(torch.rand(2, *SHAPE), torch.tensor([1, 6]), tuple("abcdefg"))
    message = "images.labels: expected labels below the model's 5 classes, got 6"
    with pytest.raises(InputError, match=message):
        local_update(lenet(), images)


def test_training_that_diverges_is_refused() -> None:
    recipe = LocalTraining("delta", lr=1e38, epochs=9)
    with pytest.raises(InputError, match="NaN or infinite values.*diverged"):
        local_update(softmax_regression(), some_images(), recipe)


# --- from a weight change back to the gradient ------------------------------------


@pytest.mark.parametrize("optimiser", ["sgd", "momentum"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_gradient_of_one_step_comes_back(optimiser: str, weight_decay: float) -> None:
    model, images = softmax_regression(dtype=torch.float64), some_images()
    recipe = LocalTraining(
        "delta", lr=0.07, optimiser=optimiser, weight_decay=weight_decay
    )
    gradient = local_update(model, images).gradient()
    back = local_update(model, images, recipe).gradient()
    for name, value in gradient.items():
        assert torch.allclose(back[name], value, rtol=1e-10, atol=1e-13)
        assert not back[name].requires_grad


def test_gradient_is_returned_as_it_is() -> None:
    update = local_update(lenet(), some_images())
    gradient = update.gradient()
    assert update.is_gradient
    assert all(gradient[name] is tensor for name, tensor in update.tensors.items())


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        (LocalTraining("delta", epochs=2), "the change of 2 sgd steps"),
        (LocalTraining("delta", batch_size=3), "the change of 2 sgd steps"),
        (LocalTraining("delta", optimiser="adam"), "the change of 1 adam steps"),
    ],
)
def test_other_changes_are_no_gradient(recipe: LocalTraining, what: str) -> None:
    update = local_update(lenet(), some_images(), recipe)
    assert not update.is_gradient
    with pytest.raises(InputError, match=f"one SGD step, got {what}"):
        update.gradient()


def test_normalised_change_is_no_gradient() -> None:
    update = local_update(lenet(), some_images(), LocalTraining("delta"))
    short = update.replace_tensors(update.tensors, normalized=True)
    with pytest.raises(InputError, match="the normalised change of 1 sgd steps"):
        short.gradient()


# --- nothing but the update leaves the client -------------------------------------

_ATOMS = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


def reachable_tensors(start: object) -> list[Tensor]:
    """Every tensor that can be reached from an object by any reference."""
    seen: dict[int, object] = {}
    waiting, found = [start], []
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, _ATOMS):
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            found.append(item.detach())
            waiting.append(item.grad if item.is_leaf else None)
        waiting.extend(gc.get_referents(item))
        if hasattr(item, "__dict__"):
            waiting.append(vars(item))
    return found


def assert_clean(update: SharedUpdate, images: Images) -> None:
    """No tensor below ``update`` is, or holds, a victim's pixels or labels."""
    tensors = reachable_tensors(update)
    assert len(tensors) >= 2 * len(update.tensors)
    for tensor in tensors:
        flat = tensor.double().flatten()
        for image in images.pixels:
            row = image.double().flatten()
            if len(flat) >= len(row):
                windows = flat.unfold(0, len(row), 1)
                distance = (windows - row).abs().amax(1).min()
                assert float(distance) > 1e-6
        if not tensor.is_floating_point() and tensor.dim():
            assert tensor.tolist() != images.labels.tolist()


def test_the_scan_finds_hidden_pixels() -> None:
    """The test below can fail."""
    images, model = some_images(), softmax_regression()
    update = local_update(model, images)
    assert_clean(update, images)
    object.__setattr__(
        update, "model", nn.ModuleDict({"a": WithNorm(), "b": Caching()})
    )
    update.model["b"].seen.append(images.pixels[1:2] * 1.0)
    with pytest.raises(AssertionError):
        assert_clean(update, images)


@pytest.mark.parametrize("make", [softmax_regression, lenet, WithNorm])
@pytest.mark.parametrize(
    "recipe", [LocalTraining(), LocalTraining("delta", epochs=2, batch_size=2)]
)
@pytest.mark.parametrize("training", [False, True])
def test_update_reaches_no_pixel_and_no_label(make, recipe, training) -> None:
    images = some_images()
    update = local_update(make().train(training), images, recipe)
    assert_clean(update, images)


@pytest.mark.parametrize("used_before", ["no", "quietly", "with a graph"])
@pytest.mark.parametrize("training", [False, True])
def test_a_cache_of_the_last_batch_stays_at_home(training, used_before) -> None:
    images, model = some_images(), Caching().train(training)
    if used_before == "quietly":
        with torch.no_grad():
            model(images.pixels)
    elif used_before == "with a graph":
        model(images.pixels)
    model.kept.zero_()
    model.hidden.zero_()
    update = local_update(model, images)
    assert_clean(update, images)
    assert float(update.model.mean) == 0.5  # constants are kept
    assert_clean(copy.deepcopy(update), images)
    for attribute in ("last", "flat"):
        assert getattr(update.model, attribute) is None
    assert update.model(torch.rand(4, *SHAPE)).shape == (4, NUM_CLASSES)


@pytest.mark.parametrize("name", ["images", "labels", "truth", "_cache", "tensors"])
def test_attributes_cannot_be_set(name: str) -> None:
    images = some_images()
    update = local_update(lenet(), images)
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
        setattr(update, name, images)
    with pytest.raises(AttributeError):
        object.__setattr__(update, "images", images)
    assert not hasattr(update, "__dict__")


def fields_of(update: SharedUpdate) -> dict:
    return {f.name: getattr(update, f.name) for f in dataclasses.fields(update)}


def test_fields_are_those_of_the_protocol() -> None:
    update = local_update(lenet(), some_images())
    assert set(fields_of(update)) == {
        "model",
        "tensors",
        "num_samples",
        "image_shape",
        "training",
        "group_sizes",
        "normalized",
        "noise_std",
        "buffers",
        "encoding",
    }


@pytest.mark.parametrize(
    "extra",
    [
        {"images": some_images().pixels},
        {"labels": some_images().labels},
        {"truth": some_images()},
        {"metadata": {}},
    ],
)
def test_no_further_arguments(extra: dict) -> None:
    fields = fields_of(local_update(lenet(), some_images()))
    with pytest.raises(TypeError, match="unexpected keyword"):
        SharedUpdate(**fields, **extra)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tensors", {"images": torch.rand(4, *SHAPE)}, "tensors: .*names of the model"),
        ("tensors", {"labels": torch.ones(4)}, "tensors: .*names of the model"),
        ("tensors", {"1.bias": torch.rand(4, *SHAPE)}, r"'1.bias'\]: .*shape \(5,\)"),
        ("tensors", {"1.bias": torch.tensor(2)}, r"'1.bias'\]: .*shape \(5,\)"),
        ("tensors", {"1.bias": [0.0] * 5}, r"'1.bias'\]: expected a tensor, got list"),
        ("tensors", {"1.bias": None}, r"'1.bias'\]: expected a tensor, got NoneType"),
        ("tensors", None, "tensors: expected a mapping .* got NoneType"),
        ("tensors", torch.rand(3), "tensors: expected a mapping .* got Tensor"),
        ("buffers", {"images": torch.rand(4, *SHAPE)}, "buffers: .*names of the model"),
        ("model", some_images(), "model: expected a torch.nn.Module, got Images"),
        ("training", some_images(), "training: expected a LocalTraining, got Images"),
        ("num_samples", torch.rand(4, *SHAPE), "num_samples: expected an integer"),
        ("num_samples", 0, "num_samples: expected an integer of at least 1"),
        ("image_shape", torch.rand(3), "image_shape: expected three integers"),
        ("image_shape", (1, 6, torch.tensor(6)), "image_shape: expected an integer"),
        ("image_shape", (6, 6), "image_shape: expected three integers"),
        ("group_sizes", some_images(3).labels, "group_sizes: expected an integer"),
        ("group_sizes", (1, 1), r"counts that add up to num_samples=4, got \(1, 1\)"),
        ("group_sizes", (5, -1), "group_sizes: expected an integer of at least 1"),
        ("normalized", torch.ones(3), "normalized: expected True or False"),
        ("noise_std", torch.rand(3), "noise_std: expected a finite number"),
        ("noise_std", float("nan"), "noise_std: expected a finite number"),
        ("noise_std", -1.0, "noise_std: expected a finite number"),
    ],
)
def test_no_field_takes_images_or_labels(field: str, value, message: str) -> None:
    fields = fields_of(local_update(softmax_regression(), some_images()))
    if isinstance(value, dict) and "1.bias" in value:
        value = dict(fields[field]) | value
    with pytest.raises(InputError, match=message):
        SharedUpdate(**fields | {field: value})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(bad: float) -> None:
    fields = fields_of(local_update(softmax_regression(), some_images()))
    damaged = {name: tensor.clone() for name, tensor in fields["tensors"].items()}
    damaged["1.weight"][2, 3:5] = bad
    message = r"tensors\['1.weight'\]: expected finite numbers, got 2 NaN .* of 180; "
    with pytest.raises(InputError, match=message):
        SharedUpdate(**fields | {"tensors": damaged})


def test_missing_tensor() -> None:
    fields = fields_of(local_update(softmax_regression(), some_images()))
    with pytest.raises(InputError, match=r"'1.bias'\]: expected a tensor"):
        SharedUpdate(
            **fields | {"tensors": {"1.weight": fields["tensors"]["1.weight"]}}
        )


def test_later_changes_of_the_caller_do_not_arrive() -> None:
    model = softmax_regression()
    tensors = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    update = SharedUpdate(
        model=model, tensors=tensors, num_samples=1, image_shape=SHAPE
    )
    weights = model[1].weight.detach().clone()
    tensors["1.bias"].fill_(7.0)
    tensors["images"] = torch.rand(1, *SHAPE)
    with torch.no_grad():
        model[1].weight.zero_()
    model.register_buffer("images", torch.rand(1, *SHAPE))
    assert torch.equal(update.tensors["1.bias"], torch.ones(NUM_CLASSES))
    assert list(update.tensors) == ["1.weight", "1.bias"]
    assert torch.equal(update.model[1].weight, weights)
    assert dict(update.model.named_buffers()) == {}


def test_tensors_are_read_only_detached_and_ordered() -> None:
    model = softmax_regression()
    tensors = {
        "1.bias": torch.ones(NUM_CLASSES, requires_grad=True),
        "1.weight": torch.ones(NUM_CLASSES, 36),
    }
    update = SharedUpdate(
        model=model, tensors=tensors, num_samples=1, image_shape=SHAPE
    )
    assert list(update.tensors) == ["1.weight", "1.bias"]
    assert not update.tensors["1.bias"].requires_grad
    for name in ("1.bias", "images"):
        with pytest.raises(TypeError):
            update.tensors[name] = torch.rand(1, *SHAPE)  # type: ignore[index]
    with pytest.raises(TypeError):
        del update.tensors["1.bias"]  # type: ignore[attr-defined]
    assert update.group_sizes == (1,)


@pytest.mark.parametrize(
    "again",
    [
        copy.copy,
        copy.deepcopy,
        lambda u: pickle.loads(pickle.dumps(u)),
        lambda u: dataclasses.replace(u),
        lambda u: u.replace_tensors(u.tensors),
    ],
    ids=["copy", "deepcopy", "pickle", "replace", "replace_tensors"],
)
def test_copies_are_equal_and_clean(again) -> None:
    images = some_images()
    update = local_update(WithNorm().train(), images)
    other = again(update)
    assert_clean(other, images)
    assert other.buffers is not None and update.buffers is not None
    for field in ("tensors", "buffers"):
        ours, theirs = getattr(update, field), getattr(other, field)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name, value in update.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value)
    for field in ("num_samples", "image_shape", "training", "group_sizes", "noise_std"):
        assert getattr(other, field) == getattr(update, field)
    with pytest.raises(TypeError):
        other.tensors["images"] = images.pixels
    with pytest.raises(AttributeError):
        object.__setattr__(other, "images", images)


def test_an_unpickled_update_is_checked_again() -> None:
    update = local_update(softmax_regression(), some_images())
    build, (fields,) = update.__reduce__()
    fields["tensors"] |= {"images": some_images().pixels}
    with pytest.raises(InputError, match="names of the model, got 'images'"):
        build(fields)


def test_replace_tensors_changes_only_what_is_named() -> None:
    update = local_update(softmax_regression(), some_images())
    zeros = {name: torch.zeros_like(t) for name, t in update.tensors.items()}
    other = update.replace_tensors(zeros, noise_std=0.5)
    assert other.noise_std == 0.5
    assert float(other.tensors["1.bias"].abs().sum()) == 0
    assert float(update.tensors["1.bias"].abs().sum()) > 0
    assert other.num_samples == update.num_samples
    with pytest.raises(TypeError):
        update.replace_tensors(zeros, images=some_images())


def test_a_seed_drives_dropout_and_leaves_the_global_state() -> None:
    images = load_images("digits", split="test")[[0, 1, 2]]
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10)]
    model = nn.Sequential(*layers).train()
    state = torch.get_rng_state()
    first = local_update(model, images, seed=1)
    again = local_update(model, images, seed=1)
    other = local_update(model, images, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, again.tensors[name])
    assert not torch.equal(first.tensors["1.weight"], other.tensors["1.weight"])
