"""Figures and a picture of a model's heads and FFN spectra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from infoprune.criteria.heads import block_of, conditional_rate_score, erank_score, ks_score, rate_score, single_losses
from infoprune.errors import InfoPruneError
from infoprune.model import VLM
from infoprune.options import CompressionOptions
from infoprune.progress import SILENT, Progress
from infoprune.solve import solve_sites, tokens_per_example
from infoprune.spectrum import effective_rank, normalize, rank_for_ks
from infoprune.steps import calibration_statistics

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@torch.no_grad()
def examine(
    vlm: VLM, data: str, *, num_examples: int = 64, seed: int = 0, skip_bad: bool = False, progress: Progress = SILENT
) -> dict[str, Any]:
    """Scores of every head and spectra of every FFN, as plain numbers.

    Args:
        vlm: A dense model.
        data: Calibration data.
        num_examples: Questions to run.
        seed: Seed of their draw.
        skip_bad: Go on without bad records of the data.
        progress: Shows the steps.

    Returns:
        ``attention``: per block ``erank``, ``ks``, ``rate``, ``conditional_rate`` and ``loss_nats`` (per example, after
        compensation) of each unit; ``ffn``: per block and linear the normalised spectrum, its eRank and the rank at KS 0.1.
    """
    options = CompressionOptions(flops=1.0, heads="none", ffn="low-rank", examples=num_examples, rare=0.0, seed=seed, skip_bad=skip_bad)
    statistics, _ = calibration_statistics(vlm, data, options, progress)
    architecture = vlm.architecture
    assert architecture is not None
    generator = torch.Generator().manual_seed(seed)
    attention, ffn = [], []
    with progress.task("scoring heads", len(architecture.attention)) as advance:
        for site in architecture.attention:
            weight = vlm.model.get_submodule(f"{site.path}.{site.names.out}").weight.detach().cpu()
            block = block_of(site, statistics.sites[site.path], weight)
            tokens = tokens_per_example(site, statistics)
            attention.append({
                "path": site.path, "tower": site.tower, "layer": site.layer, "num_units": site.num_units, "unit_width": site.unit_width,
                "erank": erank_score(block, generator), "ks": ks_score(block, generator), "rate": rate_score(block, generator),
                "conditional_rate": conditional_rate_score(block, generator),
                "loss_nats": [loss * tokens for loss in single_losses(block)] if site.num_units > 1 else [],
            })  # fmt: skip
            advance(1)
    with progress.task("FFN spectra", len(architecture.ffn)) as advance:
        for solved in solve_sites(vlm.model, architecture, statistics, options, lambda: advance(1)):
            linears = {
                name.removesuffix("_rank"): {
                    "spectrum": normalize(energies).tolist(),
                    "erank": effective_rank(energies),
                    "rank_at_ks_0.1": rank_for_ks(energies, 0.1),
                }
                for name, energies in (solved.spectra or {}).items()
            }
            ffn.append({"path": solved.site.path, "tower": solved.site.tower, "layer": solved.site.layer, "linears": linears})
    return {"model": vlm.model_id, "data": data, "num_examples": num_examples, "seed": seed, "attention": attention, "ffn": ffn}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw eRank and KS of every unit, and the KS curve of every FFN, one row per tower.

    Raises:
        InfoPruneError: The picture can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    for row, tower in enumerate(("vision", "text")):
        blocks = [block for block in found["attention"] if block["tower"] == tower]
        for column, (key, label) in enumerate((("erank", "effective rank"), ("ks", "KS of removal"))):
            image = axes[row, column].imshow(np.array([block[key] for block in blocks]).T, aspect="auto", cmap="viridis", origin="lower")
            axes[row, column].set(title=f"{tower}: {label}", xlabel="layer", ylabel="unit")
            figure.colorbar(image, ax=axes[row, column])
        axis = axes[row, 2]
        curves = [
            (block["layer"], name, item["spectrum"])
            for block in found["ffn"]
            if block["tower"] == tower
            for name, item in block["linears"].items()
        ]
        for layer, name, spectrum in curves:
            shade = layer / max(len(blocks) - 1, 1)
            axis.plot(np.arange(1, len(spectrum) + 1), np.clip(1 - np.cumsum(spectrum), 1e-6, 1), lw=0.8, color=(shade, 0.3, 1 - shade),
                      ls="--" if name == "down" else "-")  # fmt: skip
        axis.set(title=f"{tower}: KS(r) of FFN linears (dashed: down; blue to red: depth)", xlabel="rank r", yscale="log", ylim=(1e-4, 1))
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise InfoPruneError(f"Can't write the picture {path}: {error}") from error
