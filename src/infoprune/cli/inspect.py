"""``infoprune inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape
from rich.table import Table

from infoprune.cli.console import BarProgress, console, print_json


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("inspect")(inspect)


def inspect(
    model: Annotated[str, typer.Argument(help="'demo', a checkpoint folder, or a hub id.")],
    data: Annotated[str, typer.Option("--data", help="Data to look at the model with, as for compress.")] = "easy-vqa",
    examples: Annotated[int, typer.Option(help="Questions to run.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on without bad records of the data; they are counted.")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Write a picture of eRank, KS and spectra (.png, .svg or .pdf).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint ships.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything, spectra included, as JSON to standard output.")] = False,
) -> None:
    """Sites of MODEL: eRank and KS of every head, spectra of every FFN."""
    from infoprune.errors import InfoPruneError
    from infoprune.model import load
    from infoprune.outputs import check_file
    from infoprune.report.inspection import PLOT_SUFFIXES, draw, examine

    if plot is not None and plot.suffix not in PLOT_SUFFIXES:
        raise InfoPruneError(f"Can't draw to '{plot}'; use one of {', '.join(PLOT_SUFFIXES)}.")
    if plot is not None:
        check_file(plot, "the picture")
    progress = BarProgress()
    vlm = load(model, device=device, trust_remote_code=trust_remote_code, notify=progress.note)
    found = examine(vlm, data, num_examples=examples, seed=seed, skip_bad=skip_bad, progress=progress)
    if plot is not None:
        draw(found, plot)
    if json_output:
        print_json(found)
        return
    heads = Table(title="attention: one figure per unit (a key/value head with its query heads)")
    for column in ("block", "units", "eRank", "KS of removal", "loss of removal (nats)"):
        heads.add_column(column)
    for block in found["attention"]:
        heads.add_row(
            block["path"], f"{block['num_units']} x {block['unit_width']}",
            " ".join(f"{v:.1f}" for v in block["erank"]), " ".join(f"{v:.3f}" for v in block["ks"]),
            " ".join(f"{v:.4f}" for v in block["loss_nats"]),
        )  # fmt: skip
    ffn = Table(title="FFN: spectrum in the task's metric")
    for column in ("block", "linears", "eRank", "rank at KS 0.1", "of"):
        ffn.add_column(column)
    for block in found["ffn"]:
        for name, item in block["linears"].items():
            ffn.add_row(block["path"], name, f"{item['erank']:.1f}", str(item["rank_at_ks_0.1"]), str(len(item["spectrum"])))
    console.print(heads, ffn)
    if plot is not None:
        console.print(f"Picture in [bold]{escape(str(plot))}[/].")
