"""Sliders that work in a notebook and on a page without Python.

An explorer holds finished pictures. A slider chooses which one is shown, and the link
between them runs in the browser, so that the built book needs no kernel. Three facts
shape the code: ``SelectionSlider`` sends its ``index`` and not its ``value`` to the
browser, so the index is linked; ``Image`` widgets cannot carry an alternative text, so
pictures stand in ``HTML`` widgets; ``Play`` fails on static pages, so there is none.
"""

from __future__ import annotations

import base64
import html
import inspect
import io
import os
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from gradinv_helpers import plots
from gradinv_helpers.errors import InputError

if TYPE_CHECKING:
    from ipywidgets import VBox
    from matplotlib.figure import Figure
    from PIL.Image import Image

    Frame = Figure | bytes | Image

STATIC_PAGE = "GRADINV_STATIC_PAGE"  # set by the book build: no kernel will listen
MAX_FRAMES = 15  # with 30 kB each, a page stays below half a megabyte

Label = TypeVar("Label", bound=Hashable)
_MAX_WIDTH = "640px"
_SIGNATURES = {
    b"\x89PNG": "image/png",
    b"GIF8": "image/gif",
    b"\xff\xd8\xff": "image/jpeg",
}


def explorer(
    frames: Mapping[Label, Frame],
    *,
    name: str,
    alt: Callable[[Label], str] | Mapping[Label, str],
    start: Label | None = None,
) -> VBox:
    """Build a slider that shows one of several finished pictures.

    Make it the last expression of a cell. In ipywidgets 7, which has no ``Stack``,
    the pictures stand in tabs that the slider also moves.

    Args:
        frames: Label -> picture (figure, bytes of a PNG, GIF or JPEG file, or Pillow
            image), at most 15; figures are closed.
        name: What the slider changes, with the unit; shown at its left.
        alt: Alternative text for each label: one sentence on what the picture shows.
        start: Label shown first; the first one by default.

    Returns:
        The slider above the pictures. Its ``links`` hold the browser links.

    Raises:
        InputError: No frames or too many, two labels that read the same, an unknown
            ``start``, an empty alternative text, or bytes that are no picture.

    Taught in: notebooks/02_dlg_four_steps
    """
    import ipywidgets

    labels = list(frames)
    _check_frames(len(labels))
    place = _place(labels, start, "start")
    slider = _slider(labels, name, place)
    pictures = [_picture(frames[label], _alt(alt, label)) for label in labels]
    stack = _stack(pictures, labels, place)
    return _box([slider, stack], [_link(slider, stack)], ipywidgets)


def explorer2(
    frames: Mapping[tuple[Any, Any], Frame],
    *,
    names: tuple[str, str],
    alt: Callable[[tuple[Any, Any]], str] | Mapping[tuple[Any, Any], str],
    start: tuple[Any, Any] | None = None,
) -> VBox:
    """Build two sliders that choose a picture out of a table of finished pictures.

    Args:
        frames: Pairs of labels -> picture, one for every combination of a first and a
            second label, at most 15 in all.
        names: What the first and the second slider change, with the unit.
        alt: Alternative text for each pair: one sentence on what the picture shows.
        start: The pair shown first; the first one by default.

    Returns:
        Both sliders above the pictures. Its ``links`` hold the browser links.

    Raises:
        InputError: As for ``explorer``, or a combination without a picture.

    Taught in: notebooks/02_dlg_four_steps
    """
    import ipywidgets

    _check_frames(len(frames))
    if len(names) != 2:
        raise InputError("names", "two slider names", names)
    first = list(dict.fromkeys(a for a, _ in frames))
    second = list(dict.fromkeys(b for _, b in frames))
    missing = [(a, b) for a in first for b in second if (a, b) not in frames]
    if missing:
        raise InputError("frames", f"a picture for {missing[0]}", "none")
    if start is not None and start not in frames:
        raise InputError("start", f"one of {list(frames)}", repr(start))
    at = start or (first[0], second[0])
    places = first.index(at[0]), second.index(at[1])
    sliders = [
        _slider(labels, name, place)
        for labels, name, place in zip((first, second), names, places, strict=True)
    ]
    inner = []
    for a in first:
        pictures = [_picture(frames[a, b], _alt(alt, (a, b))) for b in second]
        inner.append(_stack(pictures, second, places[1]))
    outer = _stack(inner, first, places[0])
    links = [_link(sliders[0], outer), *(_link(sliders[1], one) for one in inner)]
    return _box([*sliders, outer], links, ipywidgets)


def live(
    function: Callable[..., Figure],
    *,
    button: str = "Run",
    **controls: Any,
) -> VBox | None:
    """Build settings and a button that call a function and show its figure.

    Where the environment variable ``GRADINV_STATIC_PAGE`` is set (the build of the
    book) nothing could answer a click. There the function runs once with the first
    values, and only its figure and a note are shown.

    Args:
        function: Called with one keyword argument per control; returns a figure.
        button: Text of the button.
        **controls: Name of an argument -> ``(low, high)`` or ``(low, high, step)`` for
            a slider, a list of choices, True or False, or any ipywidget with a value.
            The default of the function's argument is the first value where it fits.

    Returns:
        The settings, the button and the output; None on a static page.

    Raises:
        InputError: No control, a control of an unknown kind, or, on a static page, a
            function that returns no figure.

    Taught in: notebooks/02_dlg_four_steps
    """
    if not controls:
        raise InputError("controls", "at least one setting", "none")
    settings = _settings(function, controls)
    if os.environ.get(STATIC_PAGE, "") not in ("", "0"):
        _show_static(function, settings)
        return None
    return _live_box(function, button, settings)


# --- pictures and links -------------------------------------------------------------


def _check_frames(count: int) -> None:
    if not 1 <= count <= MAX_FRAMES:
        hint = "choose fewer values: every picture is stored in the page"
        raise InputError("frames", f"1 to {MAX_FRAMES} pictures", count, hint)


def _place(labels: Sequence[Any], start: Any, argument: str) -> int:
    if start is None:
        return 0
    if start not in labels:
        raise InputError(argument, f"one of {labels}", repr(start))
    return labels.index(start)


def _alt(alt: Callable[[Any], str] | Mapping[Any, str], label: Any) -> str:
    text = alt.get(label, "") if isinstance(alt, Mapping) else alt(label)
    if not isinstance(text, str) or not text.strip():
        raise InputError("alt", f"a sentence for {label!r}", repr(text))
    return text.strip()


def _picture(frame: Frame, alt: str) -> Any:
    """Put a picture with its alternative text into an HTML widget."""
    import ipywidgets

    content = _encoded(frame)
    kinds = [k for start, k in _SIGNATURES.items() if content.startswith(start)]
    if not kinds:
        raise InputError("frames", "PNG, GIF or JPEG bytes", repr(content[:8]))
    data = base64.b64encode(content).decode()
    return ipywidgets.HTML(
        f'<img alt="{html.escape(alt)}" style="max-width:100%;height:auto" '
        f'src="data:{kinds[0]};base64,{data}">',
        layout=ipywidgets.Layout(width="100%"),
    )


def _encoded(frame: Frame) -> bytes:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    if isinstance(frame, bytes):
        return frame
    if isinstance(frame, Figure):
        return plots.to_png(frame)
    if isinstance(frame, Image):
        buffer = io.BytesIO()
        frame.save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()
    expected = "figures, bytes or Pillow images"
    raise InputError("frames", expected, type(frame).__name__)


def _slider(labels: Sequence[Any], name: str, place: int) -> Any:
    import ipywidgets

    texts = [str(label) for label in labels]
    if len(set(texts)) < len(texts):
        raise InputError("frames", "labels that read differently", texts)
    if not name.strip():
        raise InputError("name", "the name of the slider", repr(name))
    return ipywidgets.SelectionSlider(
        options=texts,
        index=place,
        description=name,
        style={"description_width": "initial"},
        layout=_slider_layout(),
    )


def _slider_layout() -> Any:
    import ipywidgets

    return ipywidgets.Layout(width="100%", max_width=_MAX_WIDTH)


def _stack(children: Sequence[Any], labels: Sequence[Any], place: int) -> Any:
    """Show one child at a time: ``Stack``, or ``Tab`` in ipywidgets 7."""
    import ipywidgets

    layout = ipywidgets.Layout(width="100%")
    if hasattr(ipywidgets, "Stack"):
        return ipywidgets.Stack(list(children), selected_index=place, layout=layout)
    tab = ipywidgets.Tab(list(children), selected_index=place, layout=layout)
    for index, label in enumerate(labels):
        tab.set_title(index, str(label))
    return tab


def _link(slider: Any, stack: Any) -> Any:
    import ipywidgets

    return ipywidgets.jslink((slider, "index"), (stack, "selected_index"))


def _box(children: Sequence[Any], links: Sequence[Any], ipywidgets: Any) -> VBox:
    box = ipywidgets.VBox(list(children), layout=ipywidgets.Layout(width="100%"))
    box.links = tuple(links)  # links without an owner could be collected
    return box


# --- live ---------------------------------------------------------------------------


def _settings(
    function: Callable[..., Figure], controls: Mapping[str, Any]
) -> dict[str, Any]:
    """Turn every control into a widget that starts at the function's default."""
    parameters = inspect.signature(function).parameters
    settings = {}
    for name, control in controls.items():
        default = None
        if (
            name in parameters
            and parameters[name].default is not inspect.Parameter.empty
        ):
            default = parameters[name].default
        settings[name] = _control(name, control, default)
    return settings


def _control(name: str, control: Any, default: Any) -> Any:
    import ipywidgets

    common = {
        "description": name.replace("_", " "),
        "style": {"description_width": "initial"},
    }
    if isinstance(control, ipywidgets.Widget) and hasattr(control, "value"):
        return control
    if isinstance(control, bool):
        value = default if isinstance(default, bool) else control
        return ipywidgets.Checkbox(value=value, indent=False, **common)
    common["layout"] = _slider_layout()
    if isinstance(control, list) and control:
        value = default if default in control else control[0]
        return ipywidgets.SelectionSlider(options=control, value=value, **common)
    if isinstance(control, tuple) and _is_range(control):
        low, high = control[:2]
        step = control[2] if len(control) == 3 else None
        whole = all(isinstance(number, int) for number in control)
        kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
        step = step or (1 if whole else (high - low) / 20)
        fits = _is_number(default) and low <= default <= high
        value = default if fits else low
        return kind(value=value, min=low, max=high, step=step, **common)
    expected = "(low, high), (low, high, step), a list of choices, a bool or a widget"
    raise InputError(name, expected, repr(control))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_range(control: tuple[Any, ...]) -> bool:
    if len(control) not in (2, 3) or not all(map(_is_number, control)):
        return False
    return control[0] < control[1] and all(step > 0 for step in control[2:])


def _show_static(function: Callable[..., Figure], settings: Mapping[str, Any]) -> None:
    """Show the figure of the first values and how to move the settings."""
    from IPython.display import HTML, display

    values = {name: widget.value for name, widget in settings.items()}
    for widget in settings.values():
        widget.close()
    figure = function(**values)
    if not hasattr(figure, "savefig"):
        expected = "a function that returns a figure"
        raise InputError("function", expected, type(figure).__name__)
    _forget(figure)
    display(figure)
    listed = ", ".join(f"{name}={value}" for name, value in values.items())
    display(
        HTML(
            "<p>Run this notebook on Colab or locally to move the settings: "
            f"{html.escape(listed)}.</p>"
        )
    )


def _live_box(
    function: Callable[..., Figure], button: str, settings: Mapping[str, Any]
) -> VBox:
    import ipywidgets

    trigger = ipywidgets.Button(description=button, button_style="primary")
    output = ipywidgets.Output()

    def run(_: object) -> None:
        from IPython.display import HTML, display

        trigger.disabled, trigger.description = True, "Running"
        try:
            with output:
                output.clear_output(wait=True)
                values = {name: widget.value for name, widget in settings.items()}
                try:
                    figure = function(**values)
                except InputError as error:
                    display(HTML(f"<p>{html.escape(str(error))}</p>"))
                else:
                    _forget(figure)
                    display(figure)
        finally:
            trigger.disabled, trigger.description = False, button

    trigger.on_click(run)
    return _box([*settings.values(), trigger, output], [], ipywidgets)


def _forget(figure: Figure) -> None:
    """Keep pyplot from showing the figure a second time at the end of the cell."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)
