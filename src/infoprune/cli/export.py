"""``infoprune export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from infoprune.cli.console import BarProgress, console, print_json


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("export")(export)


def export(
    model: Annotated[str, typer.Argument(help="A compressed checkpoint folder; for onnx and openvino also a dense model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    to: Annotated[
        str,
        typer.Option("--to", help="dense: a stock checkpoint of the family, as large and as slow as the original. onnx, openvino: graphs."),
    ] = "dense",
    weights: Annotated[
        str, typer.Option("--weights", help="dense: precision of the written weights, fp32, bf16, fp16 or auto: the checkpoint's own.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON to standard output.")] = False,
) -> None:
    """Write compressed MODEL for tools that know its family but not infoprune."""
    from infoprune.errors import InfoPruneError
    from infoprune.export import export_dense
    from infoprune.graphs import RUNTIMES, export_graphs
    from infoprune.model import load, named_precision

    if to not in ("dense", *RUNTIMES):
        raise InfoPruneError(f"Unknown format '{to}'. Known: dense, {', '.join(RUNTIMES)}.")
    if to != "dense" and weights != "auto":
        raise InfoPruneError("--weights is for dense checkpoints; graphs have the precision that the model computes in.")
    dtype = None if weights == "auto" else named_precision(weights)
    progress = BarProgress()
    vlm = load(model, notify=progress.note)
    if to == "dense":
        written = export_dense(vlm, output, dtype=dtype, overwrite=overwrite, notify=progress.note)
    else:
        written = export_graphs(vlm, output, to, overwrite=overwrite, notify=progress.note)
    if json_output:
        print_json({"output": str(written), "format": to})
        return
    if to == "dense":
        console.print(f"Wrote {escape(str(written))}: the stock family, dense.")
        console.print("It answers as the compressed model does, in the original's size and time.")
        return
    console.print(f"Wrote {escape(str(written))}: graphs of vision tower, embedding, prefill and decode step.")
    console.print("infoprune.graphs.Graphs runs them.")
