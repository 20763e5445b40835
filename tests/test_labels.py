"""Labels come out of updates right, or an error says why they do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradinv_helpers.attacks.labels import (
    LABEL_METHODS,
    infer_label_counts,
    infer_labels,
)
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.defences import GaussianNoise, defend
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate, normalize
from gradinv_helpers.models import MODELS, build_model
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

CLASSES = 7


def one_image(label: int, num_classes: int = CLASSES) -> Images:
    generator = torch.Generator().manual_seed(label)
    pixels = torch.rand(1, 1, 8, 8, generator=generator)
    names = tuple("abcdefghij"[:num_classes])
    return Images(pixels, torch.tensor([label]), names)


def without_bias(
    activation: nn.Module, num_classes: int = CLASSES, seed: int = 0
) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 16),
        activation,
        nn.Linear(16, num_classes, bias=False),
    )


@pytest.mark.parametrize("label", range(CLASSES))
@pytest.mark.parametrize("name", MODELS)
def test_every_class_of_every_model(name: str, label: int) -> None:
    model = build_model(name, in_channels=1, image_size=8, num_classes=CLASSES)
    found = infer_labels(local_update(model, one_image(label)))
    assert found.shape == (1,)
    assert found.dtype == torch.int64
    assert int(found) == label


@pytest.mark.parametrize("label", range(CLASSES))
@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.ReLU()])
def test_no_bias_and_positive_features(activation, label: int) -> None:
    model = without_bias(activation)
    assert int(infer_labels(local_update(model, one_image(label)))) == label


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("label", range(CLASSES))
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU(), nn.Identity()])
def test_no_bias_and_features_of_any_sign(activation, label: int, seed: int) -> None:
    """Row k is (p_k - y_k) h: only the true row points against all others."""
    model = without_bias(activation, seed=seed)
    assert int(infer_labels(local_update(model, one_image(label)))) == label


@pytest.mark.parametrize("label", range(2))
def test_two_classes(label: int) -> None:
    images = one_image(label, num_classes=2)
    biased = build_model("mlp", in_channels=1, image_size=8, num_classes=2)
    assert int(infer_labels(local_update(biased, images))) == label
    model = without_bias(nn.Sigmoid(), num_classes=2)
    assert int(infer_labels(local_update(model, images))) == label


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("label", range(2))
def test_two_classes_without_bias_and_sign_are_never_guessed_wrong(
    label: int, seed: int
) -> None:
    """Rows +h and -h are all there is: without knowing h, either could be true."""
    model = without_bias(nn.Tanh(), num_classes=2, seed=seed)
    with pytest.raises(InputError, match="update: expected a bias, .*features"):
        infer_labels(local_update(model, one_image(label, num_classes=2)))


@pytest.mark.parametrize("label", range(CLASSES))
@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("bias", [True, False])
def test_noise(bias: bool, noise: float, label: int) -> None:
    if bias:
        model = build_model("lenet", in_channels=1, image_size=8, num_classes=CLASSES)
    else:
        model = without_bias(nn.Sigmoid())
    generator = torch.Generator().manual_seed(label)
    update = defend(
        local_update(model, one_image(label)),
        GaussianNoise(noise),
        generator=generator,
    )
    assert int(infer_labels(update)) == label


def test_noise_that_hides_the_label_is_named() -> None:
    model = build_model("lenet", in_channels=1, image_size=8, num_classes=CLASSES)
    update = local_update(model, one_image(3))
    wrong = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        noisy = defend(update, GaussianNoise(1.0), generator=generator)
        try:
            wrong += int(infer_labels(noisy)) != 3
        except InputError as error:
            assert "too noisy" in str(error)
            break
    else:
        pytest.fail("noise was never noticed")


@pytest.mark.parametrize(
    "recipe",
    [
        LocalTraining("delta", lr=0.05),
        LocalTraining("delta", lr=0.05, optimiser="momentum"),
        LocalTraining("delta", lr=0.05, weight_decay=0.5),
    ],
)
@pytest.mark.parametrize("label", [0, 4])
def test_change_after_one_step(recipe: LocalTraining, label: int) -> None:
    model = build_model("mlp", in_channels=1, image_size=8, num_classes=CLASSES)
    assert int(infer_labels(local_update(model, one_image(label), recipe))) == label


def test_normalised_updates_and_aggregates_of_one() -> None:
    model = build_model("lenet", in_channels=1, image_size=8, num_classes=CLASSES)
    update = normalize(local_update(model, one_image(5)))
    assert int(infer_labels(update)) == 5
    assert int(infer_labels(aggregate([update]))) == 5


def test_the_last_layer_is_the_one_that_ran_last() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 12)
            self.head = nn.Linear(12, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.first(x.flatten(1))))

    torch.manual_seed(0)
    for label in range(CLASSES):
        assert int(infer_labels(local_update(Model(), one_image(label)))) == label


def test_frozen_bias_leaves_the_weight() -> None:
    model = build_model("lenet", in_channels=1, image_size=8, num_classes=CLASSES)
    model[7].bias.requires_grad_(False)
    for label in range(CLASSES):
        assert int(infer_labels(local_update(model, one_image(label)))) == label


# --- what it refuses --------------------------------------------------------------


def test_several_samples() -> None:
    model = build_model("mlp", in_channels=1, image_size=8, num_classes=CLASSES)
    one, two = (local_update(model, one_image(label)) for label in (1, 2))
    with pytest.raises(
        InputError, match="update of one sample .* got one of 2 samples"
    ):
        infer_labels(aggregate([one, two]), method="idlg")


def test_several_steps() -> None:
    model = build_model("mlp", in_channels=1, image_size=8, num_classes=CLASSES)
    recipe = LocalTraining("delta", epochs=3)
    update = local_update(model, one_image(1), recipe)
    with pytest.raises(InputError, match="one SGD step, got the change of 3 sgd steps"):
        infer_labels(update, method="idlg")
    with pytest.raises(InputError, match="one SGD step, got the change of 3 sgd steps"):
        infer_labels(update, method="moments")
    assert infer_labels(update).tolist() == [1]


def test_no_linear_layer() -> None:
    model = nn.Sequential(nn.Conv2d(1, CLASSES, 8), nn.Flatten())
    message = "ends with a trainable torch.nn.Linear, got Sequential; use the attack"
    with pytest.raises(InputError, match=message):
        infer_labels(local_update(model, one_image(1)))


def test_frozen_last_layer() -> None:
    model = build_model("lenet", in_channels=1, image_size=8, num_classes=CLASSES)
    for parameter in model[7].parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="ends with a trainable torch.nn.Linear"):
        infer_labels(local_update(model, one_image(1)))


def with_bias_gradient(values: list[float]) -> SharedUpdate:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, len(values)))
    return SharedUpdate(
        model=model,
        tensors={
            "1.weight": torch.zeros(len(values), 4),
            "1.bias": torch.tensor(values),
        },
        num_samples=1,
        image_shape=(1, 2, 2),
    )


@pytest.mark.parametrize(
    ("values", "negatives"),
    [
        ([0.0, 0.0, 0.0], 0),
        ([0.1, 0.2, 0.3], 0),
        ([0.7, -0.3, -0.4], 2),
        ([0.9, -0.45, -0.45], 2),
    ],
)
def test_no_class_stands_out(values: list[float], negatives: int) -> None:
    message = f"one class with a negative gradient .* got {negatives} such classes"
    with pytest.raises(InputError, match=message):
        infer_labels(with_bias_gradient(values))


def test_small_wrong_signs_are_passed_over() -> None:
    assert int(infer_labels(with_bias_gradient([0.9, -0.8, -0.01, -0.09]))) == 1


def test_unknown_method() -> None:
    with pytest.raises(InputError, match=r"method: expected one of auto, idlg, signs"):
        infer_labels(with_bias_gradient([1.0, -1.0]), method="lgl")


@pytest.mark.parametrize("method", ["signs", "llg", "llg*", "moments"])
def test_nothing_in_the_gradient(method: str) -> None:
    update = with_bias_gradient([0.0, 0.0, 0.0])
    with pytest.raises(InputError, match="non-zero gradient in the last layer"):
        infer_label_counts(update, method=method)


# --- batches ----------------------------------------------------------------------

DIGITS = load_images("digits", split="test")
GRADIENT_METHODS = ("auto", "llg", "llg*", "moments")


def digits(*labels: int, seed: int = 0) -> Images:
    """Test images with these labels, a different one each time."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(DIGITS), generator=generator)
    taken: list[int] = []
    for label in labels:
        of_class = [i for i in order.tolist() if int(DIGITS.labels[i]) == label]
        taken.append(next(i for i in of_class if i not in taken))
    return DIGITS[taken]


def model_for_digits(name: str = "mlp") -> nn.Module:
    return build_model(name, in_channels=1, image_size=8, num_classes=10)


def counts_of(images: Images) -> list[int]:
    return [images.labels.tolist().count(k) for k in range(10)]


@pytest.mark.parametrize("name", ["lenet", "mlp", "convnet", "resnet20", "vit"])
@pytest.mark.parametrize(
    "labels", [(3, 1), (5, 5, 0, 9), (2, 2, 2, 8, 8, 1, 0, 4), (7,) * 9 + (1,) * 7]
)
def test_untrained_models_give_all_labels_away(name, labels) -> None:
    update = local_update(model_for_digits(name), digits(*labels))
    found = infer_labels(update)
    assert found.dtype == torch.int64
    assert found.tolist() == sorted(labels)
    counts = infer_label_counts(update, method="moments")
    assert counts.tolist() == [labels.count(k) for k in range(10)]


@pytest.mark.parametrize("method", LABEL_METHODS)
def test_counts_are_whole_and_add_up(method: str) -> None:
    images = digits(0) if method == "idlg" else digits(4, 4, 1, 7)
    recipe = LocalTraining("delta", epochs=3) if method == "trajectory" else None
    update = local_update(model_for_digits(), images, recipe)
    counts = infer_label_counts(update, method=method)
    assert counts.dtype == torch.int64
    assert counts.shape == (10,)
    assert int(counts.min()) >= 0
    assert int(counts.sum()) == len(images)
    labels = infer_labels(update, method=method)
    assert labels.tolist() == sorted(labels.tolist())
    assert labels.bincount(minlength=10).tolist() == counts.tolist()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=12), st.randoms())
def test_order_within_a_batch_changes_nothing(labels, shuffler) -> None:
    images, model = digits(*labels), model_for_digits().double()
    order = list(range(len(labels)))
    shuffler.shuffle(order)
    updates = [local_update(model, images), local_update(model, images[order])]
    for method in GRADIENT_METHODS:
        one, other = (infer_label_counts(u, method=method) for u in updates)
        assert one.tolist() == other.tolist()


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=12),
    st.permutations(range(10)),
)
def test_renamed_classes_rename_the_counts(labels, names) -> None:
    images, model = digits(*labels), model_for_digits().double()
    new = torch.tensor(names)
    renamed = model_for_digits().double()
    renamed.load_state_dict(model.state_dict())
    with torch.no_grad():
        renamed[3].weight[new] = model[3].weight
        renamed[3].bias[new] = model[3].bias
    relabelled = Images(images.pixels, new[images.labels], images.class_names)
    for method in ("auto", "llg", "moments"):
        before = infer_label_counts(local_update(model, images), method=method)
        after = infer_label_counts(local_update(renamed, relabelled), method=method)
        assert after[new].tolist() == before.tolist()


def test_aggregates_count_the_labels_of_all_clients() -> None:
    model = model_for_digits()
    clients = [digits(1, 1, 2), digits(3, 4), digits(5, 5, 5, 5, 6, 7, 8)]
    update = aggregate([local_update(model, images) for images in clients])
    expected = [sum(column) for column in zip(*map(counts_of, clients), strict=True)]
    assert infer_label_counts(update).tolist() == expected


@pytest.mark.parametrize("labels", [(4, 4), (0, 1, 1, 7), (2, 2, 2, 3, 3, 9, 9)])
def test_normalised_batches_below_the_number_of_classes(labels) -> None:
    update = normalize(local_update(model_for_digits("convnet"), digits(*labels)))
    assert infer_labels(update).tolist() == sorted(labels)
    assert infer_labels(update, method="moments").tolist() == sorted(labels)


@pytest.mark.parametrize("sends", ["gradient", "delta"])
@pytest.mark.parametrize("method", ["auto", "idlg", "llg", "moments"])
def test_one_normalised_sample_of_either_sign(method: str, sends) -> None:
    recipe = LocalTraining(sends)
    update = normalize(local_update(model_for_digits(), digits(6), recipe))
    assert infer_labels(update, method=method).tolist() == [6]


def test_normalised_clients_of_unknown_scale() -> None:
    model = model_for_digits()
    one = normalize(local_update(model, digits(1, 1, 4, 4, 4, 2)))
    two = normalize(local_update(model, digits(8, 8, 8, 8, 9, 9)))
    both = aggregate([one, two])
    counts = infer_label_counts(both)
    assert counts.tolist() == infer_label_counts(both, method="llg").tolist()
    with pytest.raises(InputError, match="fewer than 10 samples where the scale is"):
        infer_label_counts(both, method="moments")
    with pytest.raises(InputError, match="known scale for method 'llg\\*'"):
        infer_label_counts(both, method="llg*")
    with pytest.raises(InputError, match="known scale for method 'trajectory'"):
        infer_label_counts(both, method="trajectory")


def test_unique_labels_by_signs() -> None:
    update = local_update(model_for_digits(), digits(9, 3, 5, 0))
    assert infer_labels(update, method="signs").tolist() == [0, 3, 5, 9]
    repeated = local_update(model_for_digits(), digits(*(3,) * 11))
    with pytest.raises(InputError, match="at most 10 samples, one per class"):
        infer_labels(repeated, method="signs")


@pytest.mark.parametrize("std", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("method", [*GRADIENT_METHODS, "signs"])
def test_noise_never_breaks_a_method(method: str, std: float) -> None:
    update = local_update(model_for_digits(), digits(1, 1, 2, 3, 4, 4, 4, 0))
    generator = torch.Generator().manual_seed(0)
    counts = infer_label_counts(
        defend(update, GaussianNoise(std), generator=generator), method=method
    )
    assert int(counts.sum()) == 8
    assert int(counts.min()) >= 0


def test_little_noise_hides_no_label() -> None:
    labels = (1, 1, 2, 3, 4, 4, 4, 0)
    update = local_update(model_for_digits(), digits(*labels))
    generator = torch.Generator().manual_seed(0)
    noisy = defend(update, GaussianNoise(0.01, relative=True), generator=generator)
    assert infer_labels(noisy).tolist() == sorted(labels)


@pytest.mark.parametrize("name", ["lenet", "mlp"])
def test_without_a_bias_the_rows_must_do(name: str) -> None:
    model = model_for_digits(name)
    model[-1].bias.requires_grad_(False)
    labels = (1, 1, 2, 3)
    update = local_update(model, digits(*labels))
    assert infer_labels(update).tolist() == sorted(labels)
    with pytest.raises(InputError, match="that the gradient of the last layer separa"):
        infer_labels(update, method="exact")


def test_another_number_of_samples_may_be_supposed() -> None:
    update = local_update(model_for_digits(), digits(1, 2, 2))
    assert int(infer_label_counts(update, num_samples=6).sum()) == 6
    with pytest.raises(InputError, match="num_samples: expected an integer of at leas"):
        infer_label_counts(update, num_samples=0)


def test_statistics_of_the_model_are_left_alone() -> None:
    """Dummy images pass a copy, also where BatchNorm is in training mode."""
    model = model_for_digits("resnet20").train()
    labels = (3, 3, 3, 8, 1, 1)
    update = local_update(model, digits(*labels))
    before = {k: v.clone() for k, v in update.model.state_dict().items()}
    state = torch.random.get_rng_state()
    assert infer_labels(update, method="moments").tolist() == sorted(labels)
    assert torch.equal(torch.random.get_rng_state(), state)
    after = update.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_last_linear_layer_that_makes_no_logits() -> None:
    class Twofold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.flatten(1)).repeat(1, 2)

    update = local_update(Twofold(), digits(1, 1, 2, 2, 3, 3, 4, 4))
    with pytest.raises(InputError, match="makes the logits .N, K., got Twofold"):
        infer_labels(update, method="moments")
