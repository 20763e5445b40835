"""The diffusion prior: DDIM, its derivative, folders, training, what ships."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.priors.diffusion import (
    PRETRAINED_DIFFUSION,
    DiffusionPrior,
    TrainingStep,
    train_diffusion,
)

pytest.importorskip("diffusers")

SHIPPED = "diffusion-digits"


def few(count: int = 12, side: int = 8) -> Images:
    return load_images("digits", image_size=side)[:count]


def tiny(seed: int = 0, steps: int = 1, **more) -> DiffusionPrior:
    found = train_diffusion(
        few(), steps=steps, batch_size=4, channels=(8, 16), seed=seed, **more
    )
    return found


@pytest.fixture(scope="module")
def prior() -> DiffusionPrior:
    return tiny()


@pytest.fixture(scope="module")
def shipped() -> DiffusionPrior:
    return DiffusionPrior.load(SHIPPED)


def noise(prior: DiffusionPrior, *leading: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, *prior.image_shape, generator=generator)


def test_reverse_diffusion_is_that_of_diffusers(prior):
    start = noise(prior, 3)
    point = start.clone()
    prior.scheduler.set_timesteps(10)
    classes = torch.full((3,), prior.no_class)
    with torch.no_grad():
        for time in prior.scheduler.timesteps:
            output = prior.unet(point, time, classes).sample
            point = prior.scheduler.step(output, time, point, eta=0.0).prev_sample
        ours = prior.noise_to_image(start, 10)
    torch.testing.assert_close(ours, point / 2 + 0.5, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_kind_of_prediction_splits_a_noisy_image(prior, kind):
    """A network that says the truth makes the split exact, whatever it predicts."""
    clean, rest, level = noise(prior, 2, seed=1), noise(prior, 2, seed=2), 300
    share = float(prior.scheduler.alphas_cumprod[level])
    velocity = math.sqrt(share) * rest - math.sqrt(1 - share) * clean
    truth = {"epsilon": rest, "sample": clean, "v_prediction": velocity}[kind]

    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.config = prior.unet.config

        def forward(self, noisy, times, classes):
            return type("Output", (), {"sample": truth + self.weight})()

    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(
        prior.scheduler.config, prediction_type=kind, clip_sample=False
    )
    oracle = DiffusionPrior(Oracle(), scheduler, no_class=prior.no_class)
    noisy = math.sqrt(share) * clean + math.sqrt(1 - share) * rest
    with torch.no_grad():
        found, left = oracle.predict(noisy, level)
        image = oracle.denoise(noisy, level)
    torch.testing.assert_close(found, clean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(left, rest, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(image, clean / 2 + 0.5, atol=1e-4, rtol=1e-4)


def test_levels_fall_from_the_last_and_are_distinct(prior):
    for steps in (1, 3, 7, 50, 1000):
        levels = prior.levels(steps)
        assert levels[0] == 999 and len(set(levels)) == steps
        assert levels == sorted(levels, reverse=True) and levels[-1] >= 0
    with pytest.raises(InputError, match="steps"):
        prior.levels(1001)


def test_decoding_is_deterministic_and_batching_changes_nothing(prior):
    latents = noise(prior, 2, 3).flatten(-3)
    together = prior.decode(latents)
    assert together.shape == (2, 3, *prior.image_shape)
    assert torch.equal(together, prior.decode(latents))
    torch.testing.assert_close(together[1, 2], prior.decode(latents[1, 2]))


def test_pull_back_is_the_derivative(prior):
    double = prior.to(torch.zeros((), dtype=torch.float64))
    latents = noise(prior, 2).flatten(-3).double()
    slopes = noise(prior, 2, seed=1).double()
    along = noise(prior, 2, seed=2).flatten(-3).double()
    step = 1e-5
    ahead, behind = (
        double.decode(latents + step * along),
        double.decode(latents - step * along),
    )
    expected = ((ahead - behind) / (2 * step) * slopes).sum()
    found = (double.pull_back(latents, slopes) * along).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert next(prior.unet.parameters()).dtype == torch.float32


def test_samples_depend_on_the_seed_only(prior):
    first = prior.sample(3, seed=1, steps=4)
    assert torch.equal(first, prior.sample(3, seed=1, steps=4))
    assert not torch.equal(first, prior.sample(3, seed=2, steps=4))
    assert first.shape == (3, *prior.image_shape)
    assert float(first.min()) >= 0 and float(first.max()) <= 1
    told = prior.given(torch.tensor([3, 1]))
    assert told.sample(3, seed=1, steps=2).shape == (3, 2, *prior.image_shape)


def test_classes_reach_their_own_image(prior):
    latents = noise(prior, 2).flatten(-3)
    several = prior.given(torch.tensor([3, 7])).decode(latents)
    alone = [
        prior.given(torch.tensor([c])).decode(latents[i : i + 1])[0]
        for i, c in enumerate((3, 7))
    ]
    torch.testing.assert_close(several, torch.stack(alone))
    assert not torch.allclose(several, prior.decode(latents), atol=1e-6)
    with pytest.raises(InputError, match="labels: expected classes from 0 to 9"):
        prior.given(torch.tensor([10]))


def test_without_classes_they_are_ignored():
    plain = tiny(class_conditional=False)
    assert not plain.knows_classes and plain.no_class is None
    assert plain.given(torch.tensor([99])) is plain


def test_training_is_reproducible_and_leaves_the_random_state():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    told: list[TrainingStep] = []
    first, second = tiny(steps=2, on_step=told.append), tiny(steps=2)
    assert torch.equal(state, torch.get_rng_state())
    assert [t.step for t in told] == [1, 2] and all(t.loss > 0 for t in told)
    pairs = zip(first.unet.parameters(), second.unet.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other = tiny(seed=1, steps=2)
    assert not torch.equal(first.sample(1, steps=2), other.sample(1, steps=2))


def test_training_lowers_the_denoising_loss():
    images = few(16)
    before = train_diffusion(images, steps=1, channels=(8, 16), batch_size=16)
    after = train_diffusion(images, steps=60, channels=(8, 16), batch_size=16, lr=5e-3)
    assert after.denoising_loss(images) < 0.8 * before.denoising_loss(images)


def test_interrupted_training_keeps_what_it_has():
    def stop(step: TrainingStep) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    found = tiny(steps=50, on_step=stop)
    assert found.about["steps"] == 3
    assert bool(found.sample(1, steps=2).isfinite().all())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"channels": (8, 12)}, "channels: expected multiples of 8"),
        (
            {"channels": (8, 8, 8, 8, 8)},
            "images: expected sides that are multiples of 16",
        ),
        ({"lr": 0}, "lr"),
    ],
)
def test_training_refuses_bad_arguments(more, message):
    with pytest.raises(InputError, match=message):
        train_diffusion(few(), **{"steps": 1, **more})


# --- folders --------------------------------------------------------------------


def test_a_saved_prior_comes_back(prior, tmp_path):
    prior.save(tmp_path / "model")
    again = DiffusionPrior.load(tmp_path / "model", steps=4)
    latents = noise(prior, 2).flatten(-3)
    expected = prior.noise_to_image(noise(prior, 2), 4)
    torch.testing.assert_close(again.decode(latents), expected)
    assert (again.no_class, again.name) == (prior.no_class, prior.name)
    assert again.about["training_images"] == len(few())
    resaved = again.save(tmp_path / "again")
    texts = [p.read_text() for p in resaved.rglob("*.json")]
    assert not [text for text in texts if str(tmp_path) in text]
    names = {p.name for p in (tmp_path / "model").rglob("*") if p.is_file()}
    assert (
        "model_index.json" in names and "diffusion_pytorch_model.safetensors" in names
    )
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_diffusers_reads_what_we_write(tmp_path, capfd):
    from diffusers import DDPMPipeline

    plain = tiny(class_conditional=False)
    plain.save(tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert tuple(pipeline.unet.config.block_out_channels) == (8, 16)


def test_half_precision_halves_the_file_and_hardly_changes_the_images(prior, tmp_path):
    whole, half = prior.save(tmp_path / "a"), prior.save(tmp_path / "b", half=True)
    sizes = [
        (f / "unet/diffusion_pytorch_model.safetensors").stat().st_size
        for f in (whole, half)
    ]
    assert sizes[1] < 0.6 * sizes[0]
    kept = DiffusionPrior.load(half)
    assert next(kept.unet.parameters()).dtype == torch.float32
    torch.testing.assert_close(
        kept.sample(2, steps=4), prior.sample(2, steps=4), atol=0.02, rtol=0
    )


def test_a_plain_ddpm_pipeline_loads(tmp_path):
    """Another scheduler, no class, another prediction, and no file of ours."""
    from diffusers import DDPMPipeline, DDPMScheduler

    unet = tiny(class_conditional=False).unet
    scheduler = DDPMScheduler(num_train_timesteps=100)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    found = DiffusionPrior.load(tmp_path)
    assert found.scheduler.config.prediction_type == "epsilon"
    assert found.levels(10)[0] == 99 and not found.knows_classes
    assert bool(found.sample(1, steps=5).isfinite().all())


def test_the_old_layout_without_folders_loads(prior, tmp_path):
    saved = prior.save(tmp_path / "new")
    flat = tmp_path / "old"
    flat.mkdir()
    for file in [*(saved / "unet").iterdir(), *(saved / "scheduler").iterdir()]:
        (flat / file.name).write_bytes(file.read_bytes())
    (flat / "prior.json").write_bytes((saved / "prior.json").read_bytes())
    loaded = DiffusionPrior.load(flat)
    torch.testing.assert_close(loaded.sample(1, steps=2), prior.sample(1, steps=2))


def test_classes_are_asked_for_where_the_model_wants_them(prior, tmp_path):
    folder = prior.save(tmp_path)
    (folder / "prior.json").unlink()
    found = DiffusionPrior.load(folder)
    with pytest.raises(InputError, match="labels: expected the classes"):
        found.sample(1, steps=2)
    assert found.given(torch.tensor([10])).sample(1, steps=2).shape[0] == 1


def test_no_network_is_one_clear_line(monkeypatch):
    from diffusers import DDPMPipeline

    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub\nand a long story")

    monkeypatch.setattr(DDPMPipeline, "download", offline)
    with pytest.raises(InputError) as caught:
        DiffusionPrior.load("google/ddpm-cifar10-32")
    message = str(caught.value)
    assert message.startswith("prior: expected") and "\n" not in message
    assert "google/ddpm-cifar10-32" in message and "network" in message
    assert "long story" not in message


@pytest.mark.parametrize("source", ["nowhere", "/no/such/folder", "a/b/c", ""])
def test_what_is_no_name_is_never_looked_up(source, monkeypatch):
    from diffusers import DDPMPipeline

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(DDPMPipeline, "download", refuse)
    if source:
        with pytest.raises(InputError, match="prior: expected a shipped prior"):
            DiffusionPrior.load(source)
    else:  # the present folder
        with pytest.raises(InputError, match="prior: expected a folder with"):
            DiffusionPrior.load(source)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(InputError, match="UNet2DModel") as caught:
        DiffusionPrior.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_in_a_bin_file_is_refused(prior, tmp_path):
    folder = prior.save(tmp_path / "model")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    mark = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (mark,)

    torch.save({"bomb": Bomb()}, weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="prior"):
        DiffusionPrior.load(folder)
    assert not mark.exists()


def test_a_missing_library_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"pip install 'gradinv-helpers\[diffusion\]'"):
        DiffusionPrior.load(SHIPPED)


# --- what ships -----------------------------------------------------------------


def test_what_ships_is_small_and_safe():
    import gradinv_helpers

    for name in PRETRAINED_DIFFUSION:
        folder = Path(gradinv_helpers.__file__).parent / "priors/pretrained" / name
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= 5 * 2**20
        assert {path.suffix for path in files} <= {".json", ".safetensors"}


def test_victims_are_not_in_the_training_set(shipped):
    """The recorded images are the train split, and no test image equals one of them."""
    about = shipped.about
    assert (about["dataset"], about["split"], about["image_size"]) == (
        "digits",
        "train",
        16,
    )
    train = load_images("digits", split="train", image_size=16)
    test = load_images("digits", split="test", image_size=16)
    used = about["train_indices"]
    assert used == list(range(len(train))) and about["training_images"] == len(used)
    seen = {hashed(x) for x in train.pixels[used]}
    assert not seen & {hashed(x) for x in test.pixels}
    assert json.dumps(about)


def hashed(image: Tensor) -> str:
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


def test_the_shipped_prior_denoises_unseen_digits(shipped):
    test = load_images("digits", split="test", image_size=16)[:48]
    loss = shipped.denoising_loss(test, draws=4)
    mean = 2 * load_images("digits", image_size=16).pixels.mean(0) - 1
    by_mean = float((2 * test.pixels - 1 - mean).square().mean())
    assert loss < 0.5 * by_mean
    assert loss == pytest.approx(shipped.about["held_out_loss"], rel=0.3)


def test_decoding_undoes_encoding_for_digits(shipped):
    digits = load_images("digits", split="test", image_size=16)[:4]
    told = shipped.given(digits.labels)
    latents = told.encode(digits.pixels)
    assert latents.shape == (4, told.size)
    error = (told.decode(latents) - digits.pixels).square().mean()
    assert float(error) < 0.01
    # The latents look like the noise that they are meant to be.
    assert 0.3 < float(latents.square().mean()) < 3


def test_loading_the_package_does_not_load_diffusers():
    import subprocess
    import sys

    code = (
        "import sys, gradinv_helpers.priors.diffusion as d;"
        "sys.exit('diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
