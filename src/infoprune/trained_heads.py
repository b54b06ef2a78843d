"""Heads by training, between calibration and the cut: what gates train on, what they start from, and whether their choice is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from infoprune.architecture import AttentionSite
from infoprune.calibration_batches import CalibrationBatches
from infoprune.criteria.heads import Block, information_loss
from infoprune.decide import decide
from infoprune.decisions import Decisions
from infoprune.errors import BudgetError, InfoPruneError
from infoprune.evaluation.cost import Flops, Workload
from infoprune.learned import attention_share, unit_percentiles, with_choice
from infoprune.model import VLM, dense_architecture
from infoprune.options import CompressionOptions
from infoprune.packing import answer_logits
from infoprune.plan import Compensation, HeadDecision
from infoprune.progress import Clock
from infoprune.site_costs import FlopCosts
from infoprune.site_statistics import Statistics
from infoprune.solve import SolvedSite, block_of_model, tokens_per_example
from infoprune.steps import apply_decisions, statistics_of
from infoprune.training.costs import Costs, flop_costs, time_costs
from infoprune.training.ffn_gates import FFNGates, FFNPart, ffn_parts, sizes_of
from infoprune.training.gates import HeadGates
from infoprune.training.heads import Choice, binarise, check_agreement, masked_logits
from infoprune.training.run import GatedFFNs, LearnedHeads, TrainingRun
from infoprune.training.thinned import ROOM, ROOM_UNITS, Thinning

NOT_TRAINED: dict[str, Any] = {"steps": 0, "questions": 0, "seconds": 0.0, "questions_per_second": None, "validation": {}, "kept": "start"}
NOT_TRAINED |= {"gates": {}, "history": [], "trajectory": []}


@dataclass(frozen=True)
class Ground:
    """What choosing heads starts from.

    Attributes:
        vlm: The dense model.
        solved: Its sites; of attention blocks with their matrices.
        decisions: The training-free ones.
        statistics, inputs: Of calibration.
        workload, dense_flops, probe: Of a typical example.
        options: How to compress.
    """

    vlm: VLM
    solved: list[SolvedSite]
    decisions: Decisions
    statistics: Statistics
    inputs: CalibrationBatches
    workload: Workload
    dense_flops: Flops
    probe: dict[str, torch.Tensor]
    options: CompressionOptions

    @property
    def sites(self) -> list[AttentionSite]:
        """The attention blocks that may lose units."""
        return [item.site for item in self.solved if isinstance(item.site, AttentionSite)]

    def decided(self, choice: Choice) -> Decisions:
        """Decisions with these heads; FFNs get the rest of the budget.

        Raises:
            BudgetError: There is no rest.
        """
        solved = with_choice(self.solved, choice, self.options)
        return decide(solved, FlopCosts(self.workload), self.dense_flops.total, self.options)


@dataclass(frozen=True)
class Start:
    """Where gates start.

    Attributes:
        costs: Of the blocks' units.
        target: Share of their dense cost that stays.
        prior: Place of every unit in the training-free choice under these costs.
        choice: That choice.
        decisions: With it.
    """

    costs: Costs
    target: float
    prior: list[float]
    choice: Choice
    decisions: Decisions


def train_heads(ground: Ground, run: TrainingRun, clock: Clock) -> tuple[Decisions, dict[str, Any]]:
    """Decisions with learned heads, and where asked FFN sizes; figures for the report.

    The choice that gates start from stays where the model that is cut by it answers validation questions better.

    Raises:
        BudgetError: With as many heads as gates start with, FFNs can't meet the budget: told before anything trains.
        InfoPruneError: No attention block can lose a head.
    """
    start, parts = start_of(ground, run), []
    if not any(start.choice.kept.values()):
        run.progress.note("no head stays under this budget: gates have nothing to choose, and do not train")
        return start.decisions, NOT_TRAINED
    if run.options.gate_ffn:
        parts = ffn_parts(ground.vlm.model, ground.solved, ground.statistics, ground.options, FlopCosts(ground.workload))
    if parts:
        learned = _learned_with_ffns(ground, start, parts, run)
    else:
        learned = thinned(ground, start, run).learn(run, ground.options.compensate, start.costs)
    clock.lap("train heads")
    choices = {"trained": learned.choice, "start": start.choice}
    if learned.choice.sizes is not None and learned.choice.kept != start.choice.kept:
        choices["trained heads"] = Choice(learned.choice.kept)
    found: dict[str, Decisions] = {}
    for name, choice in choices.items():
        try:
            found[name] = ground.decided(choice)
        except BudgetError as error:  # gates that pay for time may keep what is too dear in FLOPs; the start is known to fit
            run.progress.note(f"the heads of '{name}' are left out: {error}")
    found = run.processes.same(found)
    best, told = "trained", {}
    if learned.choice != start.choice:

        def cut(name: str) -> VLM:
            return apply_decisions(ground.vlm, found[name], ground.options, ground.statistics, ground.inputs, progress=run.progress)

        best, figures = run.best_cut(cut, list(found))
        told = {"kept": best, "cut": {name: {"accuracy": a, "cross_entropy": c} for name, (a, c) in figures.items()}}
        clock.lap("choose heads")
    agreement = _agreement(ground, found[best], parts)
    return found[best], learned.as_dict() | told | {"agreement": agreement}


def start_of(ground: Ground, run: TrainingRun) -> Start:
    """The training-free choice under the gates' costs, by default with the share that the allocation gives attention.

    Raises:
        BudgetError: With as many heads FFNs can't meet the budget.
        InfoPruneError: No attention block can lose a head.
    """
    sites = ground.sites
    if not sites:
        raise InfoPruneError("heads=trained: no attention block of the chosen towers can lose a head. Take heads=none.")
    target = run.options.attention_share or attention_share(ground.solved, ground.decisions, ground.workload)
    costs = flop_costs(sites, ground.workload)
    if run.options.gate_cost == "time":
        costs = run.measured(costs, lambda: time_costs(ground.vlm.model, sites, ground.probe, ground.workload))
    prior = run.remembered("ranking", lambda: unit_percentiles(ground.solved, costs, target))
    choice = _of_ranking(sites, prior, costs, target) if target > 0 else Choice({site.path: [] for site in sites})
    return Start(costs, target, prior, choice, run.processes.same(ground.decided(choice)))


def _of_ranking(sites: Sequence[AttentionSite], prior: Sequence[float], costs: Costs, target: float) -> Choice:
    """The units of ``sites`` to keep at ``target`` by their places in a ranking."""
    return Choice(binarise(HeadGates(list(sites), torch.tensor(prior)), costs, target))


@dataclass(frozen=True)
class Thinned:
    """What gates train on, see :mod:`infoprune.training.thinned`.

    Attributes:
        vlm: The model; its architecture has the blocks that are left.
        teacher: The dense model; ``None``: ``vlm`` with all gates open.
        thinning: Which units are left.
        blocks: Their matrices, by path.
        costs: Of the units that are left.
        target: Share of their cost that stays.
        prior: Place of every unit in the training-free ranking of this model.
    """

    vlm: VLM
    teacher: VLM | None
    thinning: Thinning
    blocks: dict[str, Block]
    costs: Costs
    target: float
    prior: list[float]

    def learn(self, run: TrainingRun, compensation: Compensation, dense: Costs) -> LearnedHeads:
        """Train gates; what they learn is told of the dense model, whose blocks cost ``dense``."""
        learned = run.learn_heads(
            self.vlm, self.thinning.sites, self.blocks, self.costs, self.target, self.prior, compensation, teacher=self.teacher
        )  # fmt: skip
        return self.thinning.told(learned, dense)


def thinned(ground: Ground, start: Start, run: TrainingRun) -> Thinned:
    """A refitted model with the FFNs aimed at and :data:`infoprune.training.thinned.ROOM` times the attention, calibrated anew."""
    options, architecture = ground.options, dense_architecture(ground.vlm)
    room = min(1.0, max(ROOM * start.target, start.target + ROOM_UNITS * float(start.costs.unit.max()) / start.costs.dense))
    kept = run.remembered("thinning", lambda: _of_ranking(ground.sites, start.prior, start.costs, room).kept)
    thinning = Thinning(tuple(ground.sites), kept)
    heads = {
        site.path: HeadDecision(keep_units=tuple(thinning.kept[site.path]), num_units=site.num_units, compensate=options.compensate)
        for site in ground.sites
        if len(thinning.kept[site.path]) < site.num_units
    }
    decisions = replace(start.decisions, heads=heads)
    cut = apply_decisions(ground.vlm, decisions, options, ground.statistics, ground.inputs, progress=run.progress)
    run.processes.same_weights_(cut.model)
    vlm = replace(cut, architecture=replace(architecture, attention=tuple(thinning.sites)), plan=None)
    attention = replace(vlm, architecture=replace(architecture, attention=tuple(thinning.sites), ffn=()))
    statistics = statistics_of(attention, ground.inputs, replace(options.needs, saliencies=False), run.progress)
    solved = []
    for site in thinning.sites:
        block = block_of_model(vlm.model, site, statistics, options)
        solved.append(SolvedSite(site, tokens_per_example(site, statistics), information_loss(block, options.compensate), block))
    costs = thinning.costs(start.costs)
    target = min(1.0, start.target * start.costs.dense / costs.dense)
    prior = run.remembered("thinned-ranking", lambda: unit_percentiles(solved, costs, target))
    blocks = {item.site.path: item.block for item in solved if item.block is not None}
    return Thinned(vlm, ground.vlm, thinning, blocks, costs, target, prior)


def _learned_with_ffns(ground: Ground, start: Start, parts: list[FFNPart], run: TrainingRun) -> LearnedHeads:
    """Gates on heads and FFN sizes together, trained on the dense model, of whose weights the FFNs' directions are."""
    blocks = {item.site.path: item.block for item in ground.solved if item.block is not None}
    gated = start.costs.dense + sum(float(part.costs.sum()) for part in parts)
    share = 1 - (1 - ground.options.cost_share) * ground.dense_flops.total / gated
    ffn = GatedFFNs(parts, sizes_of(ground.decisions.ffn), share * (1 - 1e-9), ground.options.rank_multiple)
    return run.learn_heads(ground.vlm, ground.sites, blocks, start.costs, start.target, start.prior, ground.options.compensate, ffn)


def _agreement(ground: Ground, decisions: Decisions, parts: list[FFNPart]) -> float:
    """The dense model with gates at 0 and 1 answers like the model that is cut so, without refit; see ``heads.check_agreement``.

    FFNs are compared as far as they have gates.
    """
    vlm, options = ground.vlm, ground.options
    blocks = {item.site.path: item.block for item in ground.solved if item.block is not None}
    heads = decisions.heads
    kept = {s.path: list(heads[s.path].keep_units) if s.path in heads else list(range(s.num_units)) for s in ground.sites}
    ffn = decisions.ffn if parts else {}
    choice, gates = Choice(kept, sizes_of(ffn)), HeadGates(ground.sites).to(vlm.device)
    masked = masked_logits(vlm.model, gates, blocks, choice, ground.inputs[0], options.compensate, FFNGates(parts).to(vlm.device))
    without = apply_decisions(vlm, replace(decisions, ffn=ffn), replace(options, repair=False), ground.statistics, ground.inputs[:1])
    with torch.no_grad():
        return check_agreement(masked, answer_logits(without.model, ground.inputs[0]))
