"""Between deciding and gates: where gates start, and sites with the one way to treat them that gates chose. Pure."""

from __future__ import annotations

import math
from dataclasses import replace

from infoprune.allocate import Option, allocate
from infoprune.architecture import AttentionSite
from infoprune.criteria.heads import Removal, removal_loss
from infoprune.decisions import Decisions
from infoprune.evaluation.cost import Workload, attention_flops
from infoprune.options import CompressionOptions
from infoprune.solve import SolvedSite
from infoprune.training.costs import Costs
from infoprune.training.heads import Choice


def with_choice(solved: list[SolvedSite], choice: Choice, options: CompressionOptions) -> list[SolvedSite]:
    """The same sites with one way to treat each block: keep the units that ``choice`` lists by path. FFNs compete unless it has sizes.

    Raises:
        KeyError: A block of ``solved`` is not in ``choice``.
    """
    fixed = []
    for item in solved:
        if isinstance(item.site, AttentionSite):
            assert item.block is not None
            removed = [u for u in range(item.site.num_units) if u not in choice.kept[item.site.path]]
            loss = removal_loss(item.block, removed, options.compensate) if removed else 0.0
            item = replace(item, removal=Removal(removed, [loss] * (len(removed) + 1)), fixed=len(removed))
        elif choice.sizes is not None:
            item = replace(item, sizes=choice.sizes.get(item.site.path, {}))
        fixed.append(item)
    return fixed


def attention_share(solved: list[SolvedSite], decisions: Decisions, workload: Workload) -> float:
    """Share of the attention's dense FLOPs that ``decisions`` keep."""
    blocks = [item.site for item in solved if isinstance(item.site, AttentionSite)]
    kept = sum(
        attention_flops(s, len(decisions.heads[s.path].keep_units) if s.path in decisions.heads else s.num_units, workload) for s in blocks
    )
    return kept / sum(attention_flops(site, site.num_units, workload) for site in blocks)


def unit_percentiles(solved: list[SolvedSite], costs: Costs, target: float) -> list[float]:
    """Place of every unit, block by block, among all units: 0 for the first to go, near 1 for the last.

    First come those that go in the cheapest set-wise information loss that meets the budget, then the others, each kind by marginal loss
    per cost; units that must stay come last.

    Args:
        solved: Sites; their attention blocks are those of ``costs``, in its order.
        costs: What blocks and units cost.
        target: Share of their dense cost that remains.

    Raises:
        BudgetError: What must stay takes more.
    """
    blocks = [
        (item.site, item.removal, item.tokens) for item in solved if isinstance(item.site, AttentionSite) and item.removal is not None
    ]
    groups = [
        [Option(costs.block(number, site.num_units - gone), loss * tokens, gone) for gone, loss in enumerate(removal.losses)]
        for number, (site, removal, tokens) in enumerate(blocks)
    ]
    chosen = allocate(groups, target * costs.dense * (1 + 1e-9))
    worth: list[tuple[bool, float]] = []
    for (site, removal, _), group, option in zip(blocks, groups, chosen, strict=True):
        own = [(True, math.inf)] * site.num_units
        for place, unit in enumerate(removal.order):
            saved = max(group[place].cost - group[place + 1].cost, 1e-30)
            own[unit] = (place >= option.choice, (group[place + 1].loss - group[place].loss) / saved)
        worth += own
    order = sorted(range(len(worth)), key=lambda index: worth[index])
    percentiles = [0.0] * len(worth)
    for place, index in enumerate(order):
        percentiles[index] = place / len(worth)
    return percentiles
