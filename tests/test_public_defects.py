"""One test for every mistake of a public tool that this package must not repeat.

Expected values come from plain autograd and NumPy, not from the package.
"""

from __future__ import annotations

import ast
import copy
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.gradients import gradient_map
from gradinv_helpers.attacks.invert import Reconstruction, invert
from gradinv_helpers.attacks.labels import infer_labels
from gradinv_helpers.attacks.matching import cosine_distance, squared_error
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.defences import GaussianNoise, defend
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate, normalize
from gradinv_helpers.metrics import peak_signal_noise_ratio, score
from gradinv_helpers.models import build_model
from gradinv_helpers.priors.smoothness import total_variation
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

FIRST_ORDER = "inverting-gradients"


def digits(*indices: int) -> Images:
    return load_images("digits", split="test")[list(indices)]


def model_for_digits(name: str = "lenet") -> nn.Module:
    return build_model(name, in_channels=1, image_size=8, num_classes=10)


def update_of(images: Images, name: str = "lenet") -> SharedUpdate:
    return local_update(model_for_digits(name), images)


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def gradient_by_autograd(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the mean cross-entropy as one long vector, in float64."""
    model = copy.deepcopy(model).double()
    loss = F.cross_entropy(model(images.double()), targets)
    return flat(torch.autograd.grad(loss, list(model.parameters())))


def loss_by_autograd(
    update: SharedUpdate, images: Tensor, labels: Tensor, *, cosine: bool = False
) -> float:
    """The matching loss of hard labels, written out once more."""
    dummy = gradient_by_autograd(update.model, images, labels)
    shared = flat(update.tensors.values())
    if cosine:
        return 1 - float(dummy @ shared / (dummy.norm() * shared.norm()))
    return float((dummy - shared).square().sum() / shared.square().sum())


def tv_by_numpy(images: Tensor) -> float:
    array = images.double().numpy()
    down, right = np.diff(array, axis=-2), np.diff(array, axis=-1)
    return float(np.abs(down).mean() + np.abs(right).mean())


# --- the server's mean ------------------------------------------------------------


def test_mean_of_a_hundred_clients_is_the_true_weighted_mean() -> None:
    """breaching: a moving average, whose weights add up to 0.634.

    The first client counts as much as the last, in proportion to its samples.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    rng = np.random.default_rng(0)
    values, sizes = rng.normal(size=(100, 15)), rng.integers(1, 9, size=100)
    updates = [
        SharedUpdate(
            model=model,
            tensors={
                "1.weight": torch.from_numpy(row[:12].reshape(3, 4)),
                "1.bias": torch.from_numpy(row[12:]),
            },
            num_samples=int(size),
            image_shape=(1, 2, 2),
        )
        for row, size in zip(values, sizes, strict=True)
    ]
    found = flat(aggregate(updates).tensors.values()).numpy()
    expected = np.average(values, axis=0, weights=sizes)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    backwards = flat(aggregate(updates[::-1]).tensors.values()).numpy()
    np.testing.assert_allclose(backwards, expected, rtol=1e-12, atol=1e-14)


# --- the cosine distance ----------------------------------------------------------


def test_cosine_distance_is_over_all_layers_as_one_vector() -> None:
    """FederatedScope: a sum of one cosine per layer, large or small."""
    generator = torch.Generator().manual_seed(0)
    shapes, sizes = ((2, 4, 3), (2, 5), (2, 1)), (10.0, 1.0, 0.1)
    dummy, target = (
        [
            (size * torch.randn(shape, generator=generator).double()).requires_grad_()
            for shape, size in zip(shapes, sizes, strict=True)
        ]
        for _ in range(2)
    )
    plain = []
    for trial in range(2):
        a = torch.cat([g[trial].flatten() for g in dummy])
        b = torch.cat([g[trial].flatten() for g in target]).detach()
        plain.append(1 - (a * b).sum() / (a.norm() * b.norm()))
    expected = torch.stack(plain)
    derivatives = torch.autograd.grad(expected.sum(), dummy)
    with torch.no_grad():
        found, slopes = cosine_distance(dummy, target)
        per_layer = torch.stack(
            [
                1 - torch.cosine_similarity(a.flatten(1), b.flatten(1))
                for a, b in zip(dummy, target, strict=True)
            ]
        )
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(slopes, derivatives, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    # The two mistakes would be seen on these numbers.
    assert float((per_layer.sum(0) - found).abs().min()) > 0.1
    assert float((per_layer.mean(0) - found).abs().min()) > 0.1


@pytest.mark.parametrize(
    ("degrees", "distance"), [(0, 0), (60, 0.5), (90, 1), (180, 2)]
)
@pytest.mark.parametrize("length", [1e-3, 1.0, 50.0])
def test_cosine_distance_divides_by_norms_not_by_squares(
    degrees: float, distance: float, length: float
) -> None:
    """breaching: the product is divided by squared norms, so that length matters."""
    angle = math.radians(degrees)
    turned = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    one = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    loss, _ = cosine_distance([length * turned], [one])
    assert float(loss) == pytest.approx(distance, abs=1e-12)


# --- labels -----------------------------------------------------------------------


def test_every_image_of_a_batch_has_a_label_of_its_own() -> None:
    """invertinggradients: one label vector stands for the whole batch."""
    truth = digits(0, 7)
    assert len(set(truth.labels.tolist())) == 2
    found = invert(update_of(truth), attack="dlg")
    assert found.label_source == "fitted with the images"
    assert found.labels.shape == (2,)
    result = score(found, truth)
    assert result.label_correct == (True, True)  # paired by the images
    assert min(result.psnr) > 30


def test_given_labels_belong_to_their_images() -> None:
    """invertinggradients: one label vector for the batch; here label i is image i's."""
    truth = digits(0, 7)
    update = update_of(truth)
    for order in ([0, 1], [1, 0]):
        labels = truth.labels[order]
        found = invert(update, attack="dlg", labels=labels, restarts=1, iterations=40)
        assert found.labels.tolist() == labels.tolist()
        error = peak_signal_noise_ratio(found.images, truth.pixels[order])
        assert float(error.min()) > 30


def test_true_labels_are_used_only_where_they_are_passed_in() -> None:
    """Several tools take the true labels by default."""
    options = {"attack": "dlg", "iterations": 1, "restarts": 1}
    for images in (digits(4), digits(0, 7)):
        update = update_of(images)
        for attack in ("auto", "dlg", FIRST_ORDER):
            found = invert(update, **options | {"attack": attack})
            assert "upper bound" not in found.label_source
        given = invert(update, labels=images.labels, **options)
        assert "upper bound" in given.label_source
        assert torch.equal(given.labels, images.labels)


@pytest.mark.parametrize("method", ["idlg", "auto"])
@pytest.mark.parametrize("indices", [(0, 7), (0, 7, 15, 3)])
def test_a_batch_never_gets_the_one_label_of_idlg(method, indices) -> None:
    """FederatedScope: iDLG answers one label for any batch."""
    update = update_of(digits(*indices))
    if method == "idlg":
        with pytest.raises(InputError, match="one sample for label inference by iDLG"):
            infer_labels(update, method="idlg")
        return
    try:
        labels = infer_labels(update)
    except InputError:
        return
    assert labels.shape == (len(indices),)


@pytest.mark.parametrize("name", ["lenet", "autograd"])
def test_logits_and_soft_labels_keep_their_places_in_the_loss(name: str) -> None:
    """The notebook before this book: cross-entropy of the labels under the logits,
    with the two arguments exchanged."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_for_digits()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = (model_for_digits() if name == "lenet" else Wrapped()).double()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 1, 8, 8, generator=generator).double()
    soft = torch.softmax(3 * torch.randn(3, 10, generator=generator).double(), 1)
    gradients, _ = gradient_map(model)(images[None], soft[None])
    found = flat(gradients)
    expected = gradient_by_autograd(model, images, soft)
    assert float((found - expected).norm() / expected.norm()) < 1e-10
    swapped = F.cross_entropy(soft, torch.softmax(model(images), 1))
    wrong = flat(torch.autograd.grad(swapped, list(model.parameters())))
    assert float((wrong - expected).norm() / expected.norm()) > 0.1


def test_clients_take_the_cross_entropy_of_their_labels() -> None:
    """The other side of the exchanged arguments: what a client sends."""
    truth = digits(0, 7, 15)
    update = update_of(truth)
    assert loss_by_autograd(update, truth.pixels, truth.labels) < 1e-10


# --- the joint attack on images and labels ----------------------------------------


@pytest.fixture(scope="module")
def joint() -> tuple[SharedUpdate, Reconstruction]:
    """A batch of two, images and labels fitted together, four restarts."""
    update = update_of(digits(0, 7))
    return update, invert(update, attack="dlg", restarts=4)


def test_joint_attack_returns_the_labels_that_it_optimised(joint) -> None:
    """breaching: returns the labels of the random start, right only by chance."""
    update, found = joint
    losses = {
        pair: loss_by_autograd(update, found.images, torch.tensor(pair))
        for pair in itertools.product(range(10), repeat=2)
    }
    best = min(losses, key=lambda pair: losses[pair])
    assert tuple(found.labels.tolist()) == best
    assert sorted(losses.values())[1] > 1e-3  # no other labels would do


def test_joint_attack_scores_its_restarts_with_their_own_labels(joint) -> None:
    """breaching: the score of a restart used wrong labels, 1e5 times too high, so
    that restarts were compared by a meaningless number."""
    update, found = joint
    assert found.loss == min(report.loss for report in found.trials) < 1e-8
    again = loss_by_autograd(update, found.images, found.labels)
    assert again < 1e-5


@pytest.mark.parametrize("indices", [(4,), (0, 7)])
def test_joint_attack_with_total_variation_runs_and_adds_it_once(indices) -> None:
    """breaching: an undefined name as soon as the joint attack has a regulariser."""
    truth, weight = digits(*indices), 1e-3
    update = update_of(truth)
    found = invert(update, attack="dlg", tv_weight=weight, restarts=2, iterations=30)
    assert sorted(found.labels.tolist()) == sorted(truth.labels.tolist())
    share = weight * tv_by_numpy(found.images)
    # The rest is a small misfit; neither half nor twice the term would leave that.
    assert 0.9 * share < found.loss < 1.3 * share


# --- restarts ---------------------------------------------------------------------


class Forbidden(nn.Module):
    """LeNet that overflows where the first pixel is brighter than grey."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_for_digits()

    def forward(self, x: Tensor) -> Tensor:
        bright = x[:, :1, 0, 0] > 0.5
        return self.inner(x) * torch.where(bright, torch.nan, 1.0)


@pytest.mark.parametrize("attack", ["dlg", "idlg", FIRST_ORDER])
def test_a_restart_of_nan_does_not_shift_the_choice(attack: str) -> None:
    """invertinggradients: after a NaN the index of the best restart is that of
    another one."""
    truth = digits(4)
    assert float(truth.pixels[0, 0, 0, 0]) == 0  # the truth is not forbidden
    update = local_update(Forbidden().eval(), truth)
    found = invert(
        update, attack=attack, restarts=4, iterations=3, seed=5, tv_weight=0.0
    )
    losses = [report.loss for report in found.trials]
    broken = [not math.isfinite(loss) for loss in losses]
    best = min(loss for loss in losses if math.isfinite(loss))
    assert any(broken[: losses.index(best)])  # a NaN stands before the best
    assert len({loss for loss in losses if math.isfinite(loss)}) > 1
    assert found.loss == best
    cosine = attack == FIRST_ORDER
    again = loss_by_autograd(update, found.images, found.labels, cosine=cosine)
    if attack == "dlg":  # its labels are still soft after so few steps
        assert again < 10 * best
    else:
        assert again == pytest.approx(best, rel=0.05, abs=1e-8)


@pytest.mark.parametrize(
    ("attack", "model"), [("dlg", "lenet"), ("idlg", "lenet"), (FIRST_ORDER, "convnet")]
)
def test_the_restart_of_the_lowest_loss_is_chosen(attack: str, model: str) -> None:
    """LeakPro and Plato: the best restart or step is the one nearest to the truth,
    which no attacker can know."""
    truth = digits(4)
    update = update_of(truth, model)
    found = invert(update, attack=attack, restarts=5, iterations=1, tv_weight=0.0)
    losses = [report.loss for report in found.trials]
    assert len(set(losses)) == 5
    assert found.loss == found.losses[-1] == min(losses)
    if attack != "dlg":
        again = loss_by_autograd(
            update, found.images, found.labels, cosine=attack == FIRST_ORDER
        )
        others = [loss for loss in losses if loss != min(losses)]
        assert abs(again - found.loss) < min(abs(again - loss) for loss in others)


@pytest.mark.parametrize("attack", ["auto", FIRST_ORDER])
def test_what_the_update_does_not_hold_does_not_matter(attack: str) -> None:
    """LeakPro and Plato: choices by the true image. Two truths behind one and the
    same update must give one and the same answer."""

    class LowerHalf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(
                nn.Flatten(), nn.Linear(32, 20), nn.Sigmoid(), nn.Linear(20, 10)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x[..., 4:, :])

    torch.manual_seed(0)
    model, one = LowerHalf(), digits(4)
    pixels = one.pixels.clone()
    pixels[..., :4, :] = 1 - pixels[..., :4, :]
    other = Images(pixels, one.labels, one.class_names)
    updates = [local_update(model, truth) for truth in (one, other)]
    assert torch.equal(*(flat(u.tensors.values()) for u in updates))
    first, second = (
        invert(u, attack=attack, restarts=4, iterations=2) for u in updates
    )
    assert torch.equal(first.images, second.images)
    assert first.trials == second.trials


PACKAGE = Path(__file__).resolve().parents[1] / "gradinv_helpers"
BLINDFOLDED = sorted(
    path for folder in ("attacks", "priors") for path in PACKAGE.glob(f"{folder}/*.py")
)


def imported(tree: ast.AST) -> set[str]:
    """Every module and name that a file imports, inside functions as well."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", BLINDFOLDED, ids=lambda path: path.stem)
def test_no_attack_can_look_at_the_truth(path: Path) -> None:
    """LeakPro, Plato and others hand the true images to the attack; here no attack
    and no prior imports a metric or takes a truth, and no attack imports data."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    closed = {"metrics", "image_metrics", "identifiability", "perceptual"}
    closed |= {"intervals", "experiment", "partition"}
    if path.parent.name == "attacks":
        closed |= {"data", "classifier"}
    for name in imported(tree):
        parts = name.split(".")
        assert not (parts[0] == "gradinv_helpers" and closed & set(parts)), name
        assert parts[0] not in ("torchmetrics", "skimage"), name
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    fields = {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    telling = ("truth", "true_", "_true", "victim", "psnr", "ssim")
    for name in arguments | fields:
        assert not any(part in name for part in telling), name


def test_starts_do_not_come_from_the_truth() -> None:
    """The release of GIDM: the "unknown" noise starts at the true one plus 1e-4."""
    truths = digits(4), digits(7)
    starts = [
        invert(update_of(truth), attack="dlg", restarts=1, iterations=1).snapshots[0]
        for truth in truths
    ]
    assert torch.equal(*starts)


def test_restarts_run_as_one_batch() -> None:
    """breaching: restarts are a loop; here they share every call of the model."""

    class Counting(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.inner = model_for_digits("mlp")

        def forward(self, x: Tensor) -> Tensor:
            Counting.calls += 1
            return self.inner(x)

    update = local_update(Counting().eval(), digits(4))
    counts = {}
    for attack, restarts in ((FIRST_ORDER, 1), (FIRST_ORDER, 6), ("dlg", 6)):
        Counting.calls = 0
        found = invert(update, attack=attack, restarts=restarts, iterations=1)
        assert len(found.trials) == restarts
        counts[attack, restarts] = Counting.calls
    # Before the first batch it is checked, once, that batching changes nothing.
    assert 20 <= counts[FIRST_ORDER, 1] <= counts[FIRST_ORDER, 6]
    assert counts[FIRST_ORDER, 6] <= counts[FIRST_ORDER, 1] + 6
    # Line searches differ in length; the longest decides, not the sum.
    assert counts["dlg", 6] < sum(trial.evaluations for trial in found.trials) / 2


# --- what stands behind an update of n samples ------------------------------------


def test_a_batch_of_32_is_inverted_with_32_images() -> None:
    """The notebook before this book: one dummy image for a batch of 32."""
    truth = digits(*range(32))
    found = invert(update_of(truth), restarts=1, iterations=1)
    assert found.images.shape == (32, 1, 8, 8)
    assert found.labels.shape == (32,)
    assert len({tuple(image.flatten().tolist()) for image in found.images}) == 32


def test_an_aggregate_is_inverted_with_all_its_images() -> None:
    """The notebook before this book: one dummy image for what many clients sent."""
    model, parts = model_for_digits(), (digits(0), digits(1, 2), digits(3, 4, 5))
    update = aggregate([local_update(model, part) for part in parts])
    found = invert(update, restarts=1, iterations=1)
    assert found.images.shape == (6, 1, 8, 8)
    assert found.labels.shape == (6,)


def test_a_mean_of_gradients_is_not_the_gradient_of_a_mean_image() -> None:
    """Why one dummy image cannot stand for a batch: the two gradients differ."""
    truth = digits(*range(32))
    update = update_of(truth, "mlp")
    shared = flat(update.tensors.values())
    labels = F.one_hot(truth.labels, 10).double()
    mean_image, mean_label = truth.pixels.mean(0, True), labels.mean(0, True)
    single = gradient_by_autograd(update.model, mean_image, mean_label)
    assert float((single - shared).norm() / shared.norm()) > 0.5
    losses = []
    for images, targets in (
        (truth.pixels, labels),
        (mean_image.expand(32, -1, -1, -1), mean_label.expand(32, -1)),
    ):
        gradients, _ = gradient_map(update.model)(images[None], targets.float()[None])
        loss, _ = squared_error(gradients, [t[None] for t in update.tensors.values()])
        losses.append(float(loss))
    assert losses[0] < 1e-9 < 0.25 < losses[1]


@pytest.mark.parametrize("attack", ["exact", "dlg", FIRST_ORDER])
def test_several_local_steps_are_not_taken_for_one_gradient(attack: str) -> None:
    """The notebook before this book: a multi-step change inverted as a gradient."""
    recipe = LocalTraining(sends="delta", lr=0.1, epochs=2, batch_size=8)
    update = local_update(model_for_digits(), digits(*range(32)), recipe)
    with pytest.raises(InputError, match="weight change of one SGD step"):
        invert(update, attack=attack)


def test_several_local_steps_are_replayed() -> None:
    """What the attack compares is what training on its images would send."""
    recipe = LocalTraining(sends="delta", lr=0.1, epochs=2, batch_size=1)
    truth = digits(4, 9)
    update = local_update(model_for_digits(), truth, recipe)
    found = invert(update, iterations=20, restarts=1)
    assert found.attack == "gaussian-map"
    trained = local_update(model_for_digits(), truth, recipe)
    images = Images(found.images, found.labels, truth.class_names)
    again = local_update(trained.model, images, recipe)
    sent, replayed = (flat(u.tensors.values()) for u in (update, again))
    assert float((sent - replayed).norm() / sent.norm()) < 0.2


def test_what_the_client_does_to_a_gradient_is_in_the_forward_map() -> None:
    """The release of the Bayes-optimal attack leaves the client's scaling out of the
    forward map; a gradient of unit norm then has no match."""
    truth = digits(4)
    update = normalize(update_of(truth))
    found = invert(update, attack="idlg", restarts=2)
    assert found.loss < 1e-8
    assert min(score(found, truth).psnr) > 40
    dummy = gradient_by_autograd(update.model, found.images, found.labels)
    shared = flat(update.tensors.values())
    assert float((dummy / dummy.norm() - shared).norm()) < 1e-3
    assert float((dummy - shared).norm()) > 0.1  # without the scaling


# --- measures ---------------------------------------------------------------------


def test_one_assignment_serves_all_metrics() -> None:
    """GradAttack and Plato: the best target for each metric, used more than once."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(3, 1, 16, 16, generator=generator)
    grey = torch.full_like(truth[0], 0.5)
    # The grey image is nobody's best match in SSIM and everybody's in MSE.
    images = torch.stack([grey, truth[0], 1 - truth[0]])
    labels = torch.tensor([0, 1, 2])
    found = SimpleNamespace(images=images, labels=labels.flip(0))
    result = score(found, Images(truth, labels, tuple("abc")))
    assert sorted(result.assignment) == [0, 1, 2]
    order = list(result.assignment)
    paired = images[order].double().numpy()
    errors = np.square(paired - truth.double().numpy()).mean((1, 2, 3))
    best = min(
        np.square(images[list(p)].double().numpy() - truth.double().numpy()).mean()
        for p in itertools.permutations(range(3))
    )
    assert errors.mean() == pytest.approx(best, rel=1e-9)
    assert result.mse == pytest.approx(tuple(errors), rel=1e-6, abs=1e-12)
    decibels = [min(200.0, -10 * math.log10(max(e, 1e-30))) for e in errors]
    assert result.psnr == pytest.approx(tuple(decibels), rel=1e-6)
    expected = tuple(bool(labels.flip(0)[i] == k) for k, i in enumerate(order))
    assert result.label_correct == expected
    assert result.ssim is not None
    assert [s > 0.99 for s in result.ssim] == [e < 1e-12 for e in errors]


def test_one_exact_image_does_not_make_the_mean_infinite() -> None:
    """breaching: the PSNR of a batch is infinite as soon as one image is exact."""
    truth = digits(0, 7)
    images = torch.stack([truth.pixels[0], 0.5 * truth.pixels[1]])
    found = SimpleNamespace(images=images, labels=truth.labels)
    result = score(found, truth)
    assert all(math.isfinite(value) for value in result.psnr)
    assert math.isfinite(result.summary()["psnr"]["mean"])
    error = float((0.5 * truth.pixels[1].double()).square().mean())
    assert result.psnr[1] == pytest.approx(-10 * math.log10(error))
    assert result.psnr[0] > 100


# --- total variation and noise ----------------------------------------------------


def test_total_variation_is_divided_by_the_count_once() -> None:
    """FederatedScope: divided by the number of entries twice, so that large images
    and batches count for nothing."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1, 8, 8), (3, 2, 5, 9), (2, 3, 32, 32)):
        images = torch.rand(shape, generator=generator)
        expected = tv_by_numpy(images)
        assert float(total_variation(images)) == pytest.approx(expected, rel=1e-5)
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    for side, count in ((4, 1), (64, 1), (64, 8)):
        images = board[:side, :side].float().expand(count, 3, side, side)
        assert float(total_variation(images)) == pytest.approx(2)


def test_the_weight_of_total_variation_does_not_depend_on_the_batch() -> None:
    """FederatedScope: TV divided twice; its share in the loss must be that of the
    formula for one image and for eight."""
    weight = 0.05
    for indices in ((4,), tuple(range(8))):
        truth = digits(*indices)
        update = update_of(truth)
        found = invert(
            update,
            attack=FIRST_ORDER,
            labels=truth.labels,
            tv_weight=weight,
            restarts=1,
            iterations=1,
            init_scale=0.3,
        )
        matching = loss_by_autograd(update, found.images, found.labels, cosine=True)
        share = weight * tv_by_numpy(found.images)
        # The smoothed absolute value is lower by at most 1e-3 for each of two means.
        assert share - 2e-3 * weight - 1e-6 <= found.loss - matching <= share + 1e-6
        assert share > 20 * 2e-3 * weight


def test_a_larger_noise_parameter_is_more_noise() -> None:
    """Plato: the privacy parameter is used upside down, so that asking for more
    protection gives less."""
    update = update_of(digits(4))
    clean = flat(update.tensors.values())
    sizes = (0.0, 1e-3, 1e-2, 0.1, 1.0)
    for relative in (False, True):
        distances = []
        for size in sizes:
            defence = GaussianNoise(size, relative=relative)
            generator = torch.Generator().manual_seed(0)
            noisy = flat(defend(update, defence, generator=generator).tensors.values())
            distances.append(float((noisy - clean).norm()))
        unit = float(clean.norm()) if relative else math.sqrt(len(clean))
        expected = [size * unit for size in sizes]
        assert distances == pytest.approx(expected, rel=0.05, abs=1e-12)
