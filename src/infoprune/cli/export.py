"""``infoprune export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infoprune.cli.console import BarProgress, console


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("export")(export)


def export(
    model: Annotated[str, typer.Argument(help="A compressed checkpoint folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    to: Annotated[
        str, typer.Option("--to", help="'dense': a stock checkpoint of the family, as large and as slow as the original.")
    ] = "dense",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
) -> None:
    """Write compressed MODEL for tools that know its family but not infoprune."""
    from infoprune.errors import InfoPruneError
    from infoprune.export import export_dense
    from infoprune.model import load

    if to != "dense":
        raise InfoPruneError(f"Unknown format '{to}'. Known: dense.")
    progress = BarProgress()
    folder = export_dense(load(model, notify=progress.note), output, overwrite=overwrite, notify=progress.note)
    console.print(f"Wrote {folder}: the stock family, dense. It answers as the compressed model does, in the original's size and time.")
