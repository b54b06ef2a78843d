"""Score every way to cut every site: removal orders of attention blocks, factorisations of FFNs. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from infoprune.architecture import Architecture, AttentionSite, FFNSite
from infoprune.calibrate import SiteStatistics, Statistics
from infoprune.criteria.ffn import Factorization
from infoprune.criteria.heads import INFORMATION_LOSS, Block, Removal, block_of, information_loss, rank_units, removal_loss
from infoprune.options import NONE, TRAINED, CompressionOptions
from infoprune.plan import FFNDecision
from infoprune.surgery import factorizations


@dataclass(frozen=True)
class SolvedSite:
    """What deciding knows of one site: a block's removals, or an FFN's factorisations by rank name.

    ``fixed`` is the number of removals that was decided elsewhere.
    """

    site: AttentionSite | FFNSite
    tokens: float
    removal: Removal | None = None
    block: Block | None = None
    spectra: dict[str, torch.Tensor] | None = None
    tails: dict[str, torch.Tensor] | None = None
    fixed: int | None = None


def tokens_per_example(site: AttentionSite | FFNSite, statistics: Statistics) -> float:
    """Tokens that pass the site for one example; losses per token times this are per example."""
    return statistics.sites[site.path].pooled("input").count / statistics.num_examples


@torch.no_grad()
def solve_sites(
    model: nn.Module,
    architecture: Architecture,
    statistics: Statistics,
    options: CompressionOptions,
    progress: Callable[[], None] = lambda: None,
) -> list[SolvedSite]:
    """Eigenproblems and removal orders of every site that may be cut."""
    solved: list[SolvedSite] = []
    if options.heads != NONE:
        sites = [s for s in architecture.attention if s.tower in options.towers and s.min_units < s.num_units]
        blocks = []
        for site in sites:
            out: Any = model.get_submodule(f"{site.path}.{site.names.out}")
            blocks.append(block_of(site, statistics.sites[site.path], out.weight.cpu()))
        setwise = options.heads in (INFORMATION_LOSS, TRAINED)  # trained heads are first given the share that the set-wise loss gives them
        scores = {} if setwise else rank_units(blocks, options.heads, alpha=options.alpha, seed=options.seed)
        for site, block in zip(sites, blocks, strict=True):
            removal = information_loss(block, options.compensate) if setwise else _ranked_removal(block, scores[site.path], options)
            # Only the KS rule and gates look at the block again; its matrices are too large to keep for nothing.
            again = options.ks is not None or options.heads == TRAINED
            solved.append(SolvedSite(site, tokens_per_example(site, statistics), removal, block if again else None))
            progress()
    if options.ffn != NONE:
        for site in architecture.ffn:
            if site.tower in options.towers:
                factors = _solve_ffn(model, site, statistics.sites[site.path], options)
                solved.append(
                    SolvedSite(
                        site,
                        tokens_per_example(site, statistics),
                        spectra={name: f.energies for name, f in factors.items()},
                        tails={name: f.tails for name, f in factors.items()},
                    )
                )
                progress()
    return solved


def _ranked_removal(block: Block, scores: list[float], options: CompressionOptions) -> Removal:
    order = sorted(range(len(scores)), key=lambda unit: scores[unit])[: len(scores) - block.site.min_units]
    losses = [removal_loss(block, order[:k], options.compensate) for k in range(len(order) + 1)]
    return Removal(order, losses, scores)


def _solve_ffn(model: nn.Module, site: FFNSite, statistics: SiteStatistics, options: CompressionOptions) -> dict[str, Factorization]:
    ffn, names = model.get_submodule(site.path), site.names
    dense: dict[str, Any] = {name: ffn.get_submodule(name) for name in (names.gate, names.up, names.down) if name}
    wanted: dict[str, int] = {"down_rank": 1}
    if site.gated and options.structure in ("joint", "best"):
        result = factorizations(site, statistics, dense, options.ffn_options, FFNDecision(joint_rank=1))
    else:
        result = {}
    if not site.gated or options.structure in ("separate", "best"):
        wanted |= {"gate_rank": 1, "up_rank": 1} if site.gated else {"up_rank": 1}
    return result | factorizations(site, statistics, dense, options.ffn_options, FFNDecision(**wanted))
