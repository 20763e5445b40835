"""iDLG names the right class, and says when it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradinv_helpers.attacks.labels import infer_labels
from gradinv_helpers.data import Images
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
        infer_labels(aggregate([one, two]))


def test_several_steps() -> None:
    model = build_model("mlp", in_channels=1, image_size=8, num_classes=CLASSES)
    recipe = LocalTraining("delta", epochs=3)
    with pytest.raises(InputError, match="one SGD step, got the change of 3 sgd steps"):
        infer_labels(local_update(model, one_image(1), recipe))


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
    with pytest.raises(InputError, match="method: expected one of auto, idlg"):
        infer_labels(with_bias_gradient([1.0, -1.0]), method="llg")  # type: ignore[arg-type]
