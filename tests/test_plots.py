"""Figures show what they are given, stay small, and touch no global setting."""

from __future__ import annotations

import io
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from gradinv_helpers import metrics, plots
from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError


def _random(count=3, channels=3, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, side, side, generator=generator)


def _reconstruction(count=2, steps=12, side=8):
    truth = _random(count, side=side)
    start = _random(count, side=side, seed=1)
    share = torch.linspace(0, 1, steps)[:, None, None, None, None]
    frames = share * truth + (1 - share) * start
    return SimpleNamespace(
        images=frames[-1],
        labels=torch.arange(count),
        losses=tuple(10.0**-i for i in range(steps)),
        iterations=tuple(range(steps)),
        snapshots=frames,
        snapshot_iterations=tuple(range(0, 10 * steps, 10)),
    )


def _picture(content):
    return Image.open(io.BytesIO(content))


def _texts(figure):
    """Every visible text of a figure."""
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible()]
    return [t.get_text() for t in texts if t.get_text()]


def _shown(axes):
    return np.asarray(axes.images[0].get_array())


ALL_FIGURES = [
    lambda: plots.image_grid({"truth": _random(), "found": _random(2, channels=1)}),
    lambda: plots.pairs(_random(), _random(seed=2)),
    lambda: plots.snapshots(_reconstruction()),
    lambda: plots.loss_curve(_reconstruction()),
    lambda: plots.strip({"a": [1.0, 2.0], "b": [3.0]}, ylabel="PSNR (dB)", floor=0.5),
    lambda: plots.bars({"a": 1.0, "b": -3.0}, xlabel="gain (dB)", floor=0.5),
]


@pytest.mark.parametrize("build", ALL_FIGURES)
def test_figures_are_white_readable_and_leave_the_settings_alone(build):
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 4}):
        before = dict(matplotlib.rcParams)
        figure = build()
        assert dict(matplotlib.rcParams) == before
        content = plots.to_png(figure)
        assert dict(matplotlib.rcParams) == before
    assert not plt.get_fignums()  # pyplot would show it once more
    picture = np.asarray(_picture(content).convert("RGB"))
    border = [picture[0], picture[-1], picture[:, 0], picture[:, -1]]
    assert all((edge == 255).all() for edge in border)
    for text in figure.findobj(matplotlib.text.Text):
        assert text.get_fontsize() >= 9 or not text.get_text()
    assert len(content) <= plots.PNG_BUDGET
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("build", ALL_FIGURES)
def test_no_text_leaves_the_figure(build):
    figure = build()
    width, height = figure.get_size_inches()
    for dpi in (72, 110):
        figure.savefig(io.BytesIO(), format="png", dpi=dpi)
        box = figure.get_tightbbox()  # inches, everything that is drawn
        assert box.x0 >= 0 and box.x1 <= width
        assert box.y0 >= 0 and box.y1 <= height


def test_grid_shows_the_exact_pixels_with_square_edges():
    colour, grey = _random(2), _random(3, channels=1)
    figure = plots.image_grid(
        {"colour": colour, "grey": grey},
        column_titles=["one", "two", "three"],
        captions={"grey": ["x", "y", "z"]},
    )
    assert len(figure.axes) == 5
    np.testing.assert_array_equal(_shown(figure.axes[1]), colour[1].permute(1, 2, 0))
    np.testing.assert_array_equal(_shown(figure.axes[4]), grey[2, 0])
    assert all(a.images[0].get_interpolation() == "nearest" for a in figure.axes)
    assert figure.axes[4].images[0].get_clim() == (0, 1)
    texts = _texts(figure)
    assert all(word in texts for word in ("colour", "grey", "one", "three", "x", "z"))


def test_pairs_put_each_reconstruction_below_its_truth():
    truth = _random(3)
    found = (truth + 0.01).clamp(0, 1).roll(1, dims=0)
    figure = plots.pairs(truth, found)
    for column in range(3):
        lower = torch.tensor(_shown(figure.axes[3 + column]))
        assert (lower - truth[column].permute(1, 2, 0)).abs().max() < 0.011
    captions = [t for t in _texts(figure) if t.endswith("dB")]
    assert len(captions) == 3 and all(float(t.split()[0]) > 39 for t in captions)


def test_pairs_use_the_given_score():
    truth = _random(2)
    labels = torch.arange(2)
    images = Images(truth, labels, ("a", "b"))
    found = SimpleNamespace(images=truth.flip(0), labels=labels)
    figure = plots.pairs(images, found, metrics.score(found, images))
    assert _texts(figure).count("exact") == 2
    np.testing.assert_array_equal(_shown(figure.axes[2]), truth[0].permute(1, 2, 0))
    with pytest.raises(InputError, match="score: expected the score of 1 images"):
        plots.pairs(truth[:1], truth[:1], metrics.score(found, images))


def test_many_pairs_wrap_and_one_pair_stands_side_by_side():
    many = plots.pairs(_random(12), _random(12, seed=1))
    assert _texts(many).count("truth") == 2 and len(many.axes) == 24
    one = plots.pairs(_random(1), _random(1, seed=1))
    first, second = (axes.get_position() for axes in one.axes)
    assert first.y0 == second.y0 and first.x1 < second.x0


def test_snapshots_keep_the_first_and_the_last_and_match_the_truth():
    reconstruction = _reconstruction(count=2, steps=20)
    truth = reconstruction.images.flip(0)
    figure = plots.snapshots(reconstruction, truth, max_columns=5)
    texts = _texts(figure)
    assert "0" in texts and "190" in texts and "iteration" in texts
    assert len(figure.axes) == 2 * 6
    np.testing.assert_array_equal(_shown(figure.axes[4]), _shown(figure.axes[5]))


def test_loss_curves_are_logarithmic_and_named():
    curves = {
        "a": ([0, 1, 2, 3], [1.0, 0.1, 0.0, float("nan")]),
        "b": ([0, 1], [1, 0.1]),
    }
    figure = plots.loss_curve(curves, ylabel="loss")
    axes = figure.axes[0]
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "loss"
    assert [len(line.get_xdata()) for line in axes.lines] == [2, 2]
    labels = [t for t in axes.texts if t.get_text() in ("a", "b")]
    assert abs(labels[0].xy[1] - labels[1].xy[1]) > 0.05  # equal ends, names apart


def test_powers_of_ten_have_no_small_raised_digits():
    wide = plots.loss_curve({"": ([0, 1], [10.0, 1e-6])})
    narrow = plots.loss_curve({"": ([0, 1], [0.2, 0.6])})
    for figure in (wide, narrow):
        plots.to_png(figure)
    assert {"10", "0.01", "1e-5"} <= set(_texts(wide))
    assert not any("$" in text for text in _texts(wide) + _texts(narrow))
    assert any(text.startswith(("2e-01", "0.2")) for text in _texts(narrow))


def test_many_curves_with_equal_ends_keep_their_names_inside():
    figure = plots.loss_curve({f"seed {i}": ([0, 1], [1.0, 1.0]) for i in range(6)})
    heights = sorted(text.xy[1] for text in figure.axes[0].texts)
    assert heights[0] >= 0 and heights[-1] <= 1
    assert min(np.diff(heights)) > 0.05


def test_strip_draws_each_value_the_median_and_each_floor():
    figure = plots.strip(
        {"one": [1.0, 5.0, 2.0], "two": [7.0]},
        ylabel="PSNR (dB)",
        floor={"one": 0.5, "two": 0.25},
        target=6.0,
    )
    axes = figure.axes[0]
    heights = [
        collection.get_offsets()[:, 1].tolist() for collection in axes.collections
    ]
    assert heights == [[1.0, 5.0, 2.0], [7.0]]
    levels = [line.get_ydata()[0] for line in axes.lines]
    assert levels == [2.0, 0.5, 7.0, 0.25, 6.0]


def test_bars_write_their_values_and_the_floor():
    texts = _texts(plots.bars({"a": 1.25, "b": 3.0}, xlabel="dB", floor=2.0, digits=2))
    assert {"1.25", "3.00", "floor 2.00"} <= set(texts)


def test_png_is_small_even_for_noise_and_not_too_wide():
    figure = plots.image_grid({str(i): _random(8, side=32, seed=i) for i in range(6)})
    content = plots.to_png(figure, dpi=300, max_width=500)
    assert _picture(content).width in (499, 500)
    assert _picture(content).mode == "P"
    again = plots.image_grid({str(i): _random(8, side=32, seed=i) for i in range(6)})
    assert plots.to_png(again, dpi=300, max_width=500) == content


def test_png_closes_a_pyplot_figure():
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"backend": "agg"}):
        figure = plt.figure()
        plots.to_png(figure)
        assert figure.number not in plt.get_fignums()


def test_gif_holds_every_frame_enlarged(tmp_path):
    frames = _reconstruction(count=2, steps=5).snapshots
    path = tmp_path / "snapshots.gif"
    content = plots.snapshot_gif(frames, path, truth=frames[-1], scale=4, duration=100)
    assert (
        path.read_bytes()
        == content
        == plots.snapshot_gif(frames, truth=frames[-1], scale=4, duration=100)
    )
    picture = _picture(content)
    assert picture.n_frames == 5 and picture.size == (2 * 32 + 2, 2 * 32 + 2)
    times = []
    for index in range(5):
        picture.seek(index)
        times.append(picture.info["duration"])
    assert times == [100] * 4 + [500]
    last = np.asarray(picture.convert("RGB")).astype(int)
    assert abs(last[:32] - last[34:]).max() <= 1  # truth above, the same below
    wanted = (frames[-1, 0, :, 0, 0] * 255).numpy()
    assert abs(last[35, 1] - wanted).max() < 40  # within the palette


def test_grey_gif_keeps_its_greys():
    frames = torch.linspace(0, 1, 64).reshape(1, 1, 1, 8, 8)
    picture = np.asarray(_picture(plots.snapshot_gif(frames, scale=1)).convert("L"))
    wanted = (frames[0, 0, 0] * 255).round().numpy()
    assert abs(picture - wanted).max() <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.image_grid({}), "rows: expected at least one row"),
        (lambda: plots.image_grid({"a": _random()[0]}), "add a batch axis"),
        (lambda: plots.image_grid({"a": _random(channels=2)}), "one or three channels"),
        (lambda: plots.image_grid({"a": 3}), "expected images .* got int"),
        (
            lambda: plots.image_grid({"a": _random()}, column_titles=["x"]),
            "column_titles: expected 3 titles, got 1",
        ),
        (
            lambda: plots.image_grid({"a": _random()}, captions={"b": ["x"]}),
            "captions: expected row names out of \\['a'\\], got 'b'",
        ),
        (
            lambda: plots.image_grid({"a": _random()}, captions={"a": ["x"]}),
            "captions: expected 3 texts for row 'a', got 1",
        ),
        (lambda: plots.loss_curve({}), "curves: expected at least one curve"),
        (lambda: plots.loss_curve({"a": ([1], [0.0])}), "positive finite value"),
        (lambda: plots.loss_curve({"a": ([1, 2], [1.0])}), "2 y values, got 1"),
        (lambda: plots.strip({}, ylabel="y"), "values: expected at least one group"),
        (lambda: plots.strip({"a": []}, ylabel="y"), "at least one value"),
        (
            lambda: plots.strip({"a": [1.0]}, ylabel="y", floor={"b": 1.0}),
            "floor: expected a value for 'a'",
        ),
        (lambda: plots.bars({"a": float("nan")}, xlabel="x"), "expected finite values"),
        (lambda: plots.snapshot_gif(_random()), "snapshots: expected shape"),
        (
            lambda: plots.snapshot_gif(_random()[None], truth=_random(2)),
            "truth: expected shape \\(3, 3, 8, 8\\)",
        ),
        (
            lambda: plots.snapshots(SimpleNamespace(snapshots=None)),
            "reconstruction: expected snapshots of shape",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
