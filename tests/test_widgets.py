"""Explorers link the right traits, carry alternative texts, and need no kernel."""

from __future__ import annotations

import base64
import io
import re

import ipywidgets
import pytest
from PIL import Image

from gradinv_helpers import plots, widgets
from gradinv_helpers.errors import InputError


def _png(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def _figure():
    return plots.bars({"a": 1.0}, xlabel="dB")


def _explorer(**changes):
    options = {"name": "iteration", "alt": "After {} steps.".format, **changes}
    return widgets.explorer({0: _png(), 20: _png("blue"), 40: _png("green")}, **options)


def _walk(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from _walk(child)


@pytest.fixture
def shown(monkeypatch):
    """Collect what is displayed outside of widgets."""
    things = []
    monkeypatch.setattr("IPython.display.display", things.append)
    return things


def test_explorer_is_a_slider_above_a_stack():
    slider, stack = _explorer(start=20).children
    assert isinstance(slider, ipywidgets.SelectionSlider)
    assert isinstance(stack, ipywidgets.Stack)
    assert slider.options == ("0", "20", "40") and slider.description == "iteration"
    assert slider.index == stack.selected_index == 1
    assert slider.style.description_width == "initial"
    assert (slider.layout.width, slider.layout.max_width) == ("100%", "640px")
    assert len(stack.children) == 3


def test_the_browser_links_the_index_because_value_is_not_synced():
    box = _explorer()
    (link,) = box.links
    slider, stack = box.children
    assert link.source == (slider, "index")
    assert link.target == (stack, "selected_index")
    assert "index" in slider.keys and "value" not in slider.keys


def test_every_frame_is_an_escaped_responsive_image():
    box = widgets.explorer(
        {"a": _png()}, name="x", alt={"a": 'A "quoted" <b>face</b> & more.'}
    )
    (picture,) = box.children[1].children
    assert isinstance(picture, ipywidgets.HTML)
    assert (
        'alt="A &quot;quoted&quot; &lt;b&gt;face&lt;/b&gt; &amp; more."'
        in picture.value
    )
    assert "max-width:100%" in picture.value and "height:auto" in picture.value
    data = re.search(r"data:image/png;base64,([^\"]+)", picture.value).group(1)
    assert base64.b64decode(data) == _png()


def test_frames_may_be_figures_bytes_or_pillow_images():
    gif = io.BytesIO()
    Image.new("L", (2, 2)).save(gif, format="GIF")
    frames = {"f": _figure(), "g": gif.getvalue(), "p": Image.new("RGB", (2, 2))}
    box = widgets.explorer(frames, name="kind", alt=lambda label: f"Frame {label}.")
    kinds = [
        re.search("data:([^;]+)", w.value).group(1) for w in box.children[1].children
    ]
    assert kinds == ["image/png", "image/gif", "image/png"]


def test_explorer_never_holds_a_play_widget_or_an_image_widget():
    for widget in _walk(_explorer()):
        assert not isinstance(widget, (ipywidgets.Play, ipywidgets.Image))


def test_without_stack_the_pictures_stand_in_tabs(monkeypatch):
    monkeypatch.delattr(ipywidgets, "Stack")
    box = _explorer(start=40)
    slider, tab = box.children
    assert isinstance(tab, ipywidgets.Tab) and tab.selected_index == 2
    assert [tab.get_title(i) for i in range(3)] == ["0", "20", "40"]
    assert box.links[0].source == (slider, "index")
    assert box.links[0].target == (tab, "selected_index")


def test_explorer2_links_the_second_slider_to_every_inner_stack():
    frames = {(a, b): _png() for a in ("x", "y") for b in (1, 2, 3)}
    box = widgets.explorer2(
        frames, names=("first", "second"), alt="{}".format, start=("y", 2)
    )
    one, two, outer = box.children
    assert one.options == ("x", "y") and two.options == ("1", "2", "3")
    assert (one.index, two.index, outer.selected_index) == (1, 1, 1)
    assert [len(stack.children) for stack in outer.children] == [3, 3]
    assert [stack.selected_index for stack in outer.children] == [1, 1]
    targets = [(link.source[0], link.target[0]) for link in box.links]
    assert targets == [(one, outer), *((two, inner) for inner in outer.children)]
    picture = outer.children[1].children[2]
    assert 'alt="(&#x27;y&#x27;, 3)"' in picture.value


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _explorer(start=5), "start: expected one of \\[0, 20, 40\\], got 5"),
        (lambda: _explorer(alt=lambda _: " "), "alt: expected a sentence for 0"),
        (lambda: _explorer(alt={0: "x"}), "alt: expected a sentence for 20"),
        (lambda: _explorer(name=""), "name: expected the name of the slider"),
        (
            lambda: widgets.explorer({}, name="x", alt=str),
            "frames: expected 1 to 15 pictures, got 0",
        ),
        (
            lambda: widgets.explorer(dict.fromkeys(range(16), b""), name="x", alt=str),
            "frames: expected 1 to 15 pictures, got 16",
        ),
        (
            lambda: widgets.explorer({1: _png(), "1": _png()}, name="x", alt=str),
            "frames: expected labels that read differently",
        ),
        (
            lambda: widgets.explorer({1: b"text"}, name="x", alt=str),
            "frames: expected PNG, GIF or JPEG bytes",
        ),
        (
            lambda: widgets.explorer({1: "a.png"}, name="x", alt=str),
            "frames: expected figures, bytes or Pillow images, got str",
        ),
        (
            lambda: widgets.explorer2(
                {(0, 0): _png(), (1, 1): _png()}, names=("a", "b"), alt=str
            ),
            "frames: expected a picture for \\(0, 1\\), got none",
        ),
        (
            lambda: widgets.explorer2(
                {(0, 0): _png()}, names=("a", "b"), alt=str, start=(1, 0)
            ),
            "start: expected one of",
        ),
        (lambda: widgets.live(_figure), "controls: expected at least one setting"),
        (lambda: widgets.live(_figure, x="text"), "x: expected \\(low, high\\)"),
        (lambda: widgets.live(_figure, x=(2, 1)), "x: expected \\(low, high\\)"),
        (lambda: widgets.live(_figure, x=[]), "x: expected \\(low, high\\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_live_builds_controls_that_start_at_the_defaults(monkeypatch):
    monkeypatch.delenv(widgets.STATIC_PAGE, raising=False)

    def draw(steps=30, step_size=0.5, model="mlp", grey=True, own=1):
        return _figure()

    own = ipywidgets.IntText(value=7)
    box = widgets.live(
        draw,
        steps=(10, 50, 10),
        step_size=(0.0, 1.0),
        model=["lenet", "mlp"],
        grey=False,
        own=own,
    )
    steps, size, model, grey, given, button, output = box.children
    assert isinstance(steps, ipywidgets.IntSlider) and steps.value == 30
    assert isinstance(size, ipywidgets.FloatSlider) and size.value == 0.5
    assert size.description == "step size"
    assert model.value == "mlp" and grey.value is True and given is own
    assert isinstance(button, ipywidgets.Button) and button.description == "Run"
    assert isinstance(output, ipywidgets.Output)


def test_live_calls_the_function_with_the_values_on_a_click(monkeypatch, shown):
    monkeypatch.delenv(widgets.STATIC_PAGE, raising=False)
    calls = []

    def draw(steps, model):
        calls.append((steps, model))
        return _figure()

    box = widgets.live(draw, button="Run the attack", steps=(1, 9), model=["a", "b"])
    steps, model, button, _ = box.children
    assert not calls
    steps.value, model.value = 4, "b"
    button.click()
    assert calls == [(4, "b")] and len(shown) == 1
    assert button.description == "Run the attack" and not button.disabled


def test_live_shows_an_input_error_as_one_line(monkeypatch, shown):
    monkeypatch.delenv(widgets.STATIC_PAGE, raising=False)

    def draw(steps):
        raise InputError("steps", "an even number", "<3>")

    box = widgets.live(draw, steps=(1, 9))
    box.children[1].click()
    assert shown[0].data == "<p>steps: expected an even number, got &lt;3&gt;</p>"
    assert not box.children[1].disabled


def test_on_a_static_page_live_shows_the_figure_and_no_slider(monkeypatch, shown):
    monkeypatch.setenv(widgets.STATIC_PAGE, "1")
    calls = []

    def draw(steps=2, model="<b>"):
        calls.append((steps, model))
        return _figure()

    assert widgets.live(draw, steps=(1, 9), model=["a", "<b>"]) is None
    figure, note = shown
    assert calls == [(2, "<b>")]
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "Colab or locally" in note.data
    assert "steps=2, model=&lt;b&gt;" in note.data
    assert not any(isinstance(thing, ipywidgets.Widget) for thing in shown)


def test_a_static_page_needs_a_figure(monkeypatch, shown):
    monkeypatch.setenv(widgets.STATIC_PAGE, "1")
    with pytest.raises(InputError, match="function: expected a function that returns"):
        widgets.live(lambda steps: None, steps=(1, 9))
