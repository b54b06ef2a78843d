"""Score every way to cut every site: removal orders of attention blocks, factorisations of FFNs. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from infoprune.architecture import Architecture, AttentionSite, FFNSite
from infoprune.criteria.ffn import Factorization, Metric
from infoprune.criteria.heads import INFORMATION_LOSS, Block, Removal, block_of, information_loss, rank_units
from infoprune.criteria.neurons import NeuronRemoval, neurons_of, rank_neurons
from infoprune.depth import Layer
from infoprune.options import NONE, TRAINED, WIDTH, CompressionOptions
from infoprune.plan import FFNDecision
from infoprune.site_statistics import SiteStatistics, Statistics
from infoprune.surgery import factorizations


@dataclass(frozen=True)
class SolvedSite:
    """What deciding knows of one site: a block's removals, an FFN's factorisations by rank name, or an FFN's neurons.

    ``fixed`` is the number of removals that was decided elsewhere, ``sizes`` what sizes an FFN has, by the names of a decision's fields.
    Where layers are dropped whole, ``layer`` is all that is known, and the site is the layer's attention block.
    """

    site: AttentionSite | FFNSite
    tokens: float
    removal: Removal | None = None
    block: Block | None = None
    spectra: dict[str, torch.Tensor] | None = None
    tails: dict[str, torch.Tensor] | None = None
    fixed: int | None = None
    sizes: dict[str, int] | None = None
    neurons: NeuronRemoval | None = None
    layer: Layer | None = None


def tokens_per_example(site: AttentionSite | FFNSite, statistics: Statistics) -> float:
    """Tokens that pass the site for one example; losses per token times this are per example."""
    return statistics.sites[site.path].count / statistics.num_examples


@torch.no_grad()
def solve_sites(
    model: nn.Module,
    architecture: Architecture,
    statistics: Statistics,
    options: CompressionOptions,
    progress: Callable[[], None] = lambda: None,
) -> list[SolvedSite]:
    """Eigenproblems and removal orders of every site that may be cut."""
    if options.layers != NONE:
        return _solve_layers(model, architecture, statistics, options, progress)
    solved: list[SolvedSite] = []
    if options.heads != NONE:
        sites = [s for s in architecture.attention if s.tower in options.towers and s.min_units < s.num_units]
        setwise = options.heads in (INFORMATION_LOSS, TRAINED)  # trained heads are first given the share that the set-wise loss gives them
        scores: dict[str, list[float]] = {}
        if not setwise:  # rankings compare all blocks; each is made twice, as the matrices of all are too large to keep
            every = (block_of_model(model, site, statistics, options) for site in sites)
            scores = rank_units(every, options.heads, alpha=options.alpha, seed=options.seed)
        for site in sites:
            block = block_of_model(model, site, statistics, options)
            removal = information_loss(block, options.compensate) if setwise else _ranked_removal(block, scores[site.path], options)
            # Only the KS rule and gates look at the block again; its matrices are too large to keep for nothing.
            again = options.ks is not None or options.heads == TRAINED
            solved.append(SolvedSite(site, tokens_per_example(site, statistics), removal, block if again else None))
            progress()
    if options.ffn == WIDTH:
        return solved + _solve_widths(model, architecture, statistics, options, progress)
    if options.ffn != NONE:
        for site in architecture.ffn:
            if site.tower in options.towers:
                factors = factorizations_of(model, site, statistics.sites[site.path], options)
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


def block_of_model(model: nn.Module, site: AttentionSite, statistics: Statistics, options: CompressionOptions) -> Block:
    """What criteria see of an attention block of ``model``."""
    out: Any = model.get_submodule(f"{site.path}.{site.names.out}")
    return block_of(site, statistics.sites[site.path], out.weight.cpu(), options.ffn_metric)


def _solve_widths(
    model: nn.Module, architecture: Architecture, statistics: Statistics, options: CompressionOptions, progress: Callable[[], None]
) -> list[SolvedSite]:
    """Orders in which the neurons of every FFN go."""
    solved, generator = [], torch.Generator().manual_seed(options.seed)
    for site in (site for site in architecture.ffn if site.tower in options.towers):
        found: list[Any] = [model.get_submodule(f"{site.path}.{n}") for n in (site.names.up, site.names.gate, site.names.down) if n]
        *inputs, down = (linear.weight.cpu() for linear in found)
        neurons = neurons_of(site, statistics.sites[site.path], tuple(inputs), down, options.ffn_metric, options.centred)
        solved.append(SolvedSite(site, tokens_per_example(site, statistics), neurons=rank_neurons(neurons, options.neurons, generator)))
        progress()
    return solved


def _solve_layers(
    model: nn.Module, architecture: Architecture, statistics: Statistics, options: CompressionOptions, progress: Callable[[], None]
) -> list[SolvedSite]:
    """Influence and second-order loss of every layer that may be dropped: those with a block that must keep a unit stay."""
    solved = []
    for attention, ffn in zip(architecture.attention, architecture.ffn, strict=True):
        if attention.tower in options.towers and not attention.min_units:
            tokens = tokens_per_example(attention, statistics)
            loss = sum(_whole_loss(model, site, statistics.sites[site.path], options.ffn_metric) for site in (attention, ffn))
            influence = 1 - statistics.similarity[attention.path.rpartition(".")[0]]
            solved.append(SolvedSite(attention, tokens, layer=Layer(attention, ffn, influence, loss * tokens)))
        progress()
        progress()
    return solved


def _whole_loss(model: nn.Module, site: AttentionSite | FFNSite, statistics: SiteStatistics, kind: Metric) -> float:
    """1/2 tr(F E[o o^T]) of a block that leaves nothing but its bias, o what it writes beside that; nats per token.

    F is the identity where no gradients were taken, or the metric is.
    """
    if isinstance(site, AttentionSite):
        out: Any = model.get_submodule(f"{site.path}.{site.names.out}")
        weight = out.weight.cpu().double()
        moment = weight @ statistics.pooled("input").second_moment @ weight.T
    else:
        down: Any = model.get_submodule(f"{site.path}.{site.names.down}")
        outputs = statistics.pooled("output")
        mean = outputs.mean if down.bias is None else outputs.mean - down.bias.cpu().double()
        moment = outputs.covariance + torch.outer(mean, mean)
    metric = statistics.output_gradient if kind == "task" else None
    return 0.5 * float(moment.trace() if metric is None else (metric.second_moment * moment).sum())


def _ranked_removal(block: Block, scores: list[float], options: CompressionOptions) -> Removal:
    order = sorted(range(len(scores)), key=lambda unit: scores[unit])[: len(scores) - block.site.min_units]
    return replace(information_loss(block, options.compensate, order), scores=scores)


def factorizations_of(model: nn.Module, site: FFNSite, statistics: SiteStatistics, options: CompressionOptions) -> dict[str, Factorization]:
    """Those of one FFN's linears that may compete under ``options.structure``, by the rank's field name."""
    ffn, names = model.get_submodule(site.path), site.names
    dense: dict[str, Any] = {name: ffn.get_submodule(name) for name in (names.gate, names.up, names.down) if name}
    wanted: dict[str, int] = {"down_rank": 1}
    if site.gated and options.structure in ("joint", "best"):
        result = factorizations(site, statistics, dense, options.ffn_options, FFNDecision(joint_rank=1))
    else:
        result = {}
    if not site.gated or options.structure in ("separate", "best"):
        wanted |= {"gate_rank": 1, "up_rank": 1} if site.gated else {"up_rank": 1}
    return result | factorizations(site, statistics, dense, options.ffn_options, FFNDecision.model_validate(wanted))
