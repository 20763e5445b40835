"""What all commands can be told, and how it meets the settings."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gradinv_helpers.config import Settings, load_config
from gradinv_helpers.data import DATASETS

Config = Annotated[
    str | None,
    typer.Option(help="Settings file.  [default: the nearest config.json]"),
]
Dataset = Annotated[str | None, typer.Option(help=f"One of {', '.join(DATASETS)}.")]
DataRoot = Annotated[
    str | None,
    typer.Option(help="Folder of downloads, or of your images for 'folder'."),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the model and of everything random.")
]
OutputDir = Annotated[str | None, typer.Option(help="Folder for all results.")]


def chosen(
    ctx: typer.Context, *, dataset: str, group: str | None = None
) -> dict[str, Any]:
    """What the command is told, by name.

    What the command line leaves out is taken from the settings; what they do not have
    either is left out, and takes the command's own default.

    Args:
        ctx: The command as it was called.
        dataset: The data set where neither names one.
        group: The command's group of the settings.
    """
    given = dict(ctx.params)
    settings = load_config(given.pop("config"))
    root = given["data_root"] or settings.data_root
    for name in ("dataset", "device", "seed"):
        if given[name] is None:
            given[name] = getattr(settings, name)
    if given["dataset"] == "auto":
        given["dataset"] = dataset
    if given["dataset"] == "folder" and given["data_root"] is None:
        # The folder of downloads is no folder of the reader's images.
        root = None if root == Settings().data_root else root
    values = getattr(settings, group).model_dump() if group else {}
    values |= {name: value for name, value in given.items() if value is not None}
    return values | {"data_root": root}
