"""From solved sites to decisions: one budget for everything, or a tolerance for each. Pure."""

from __future__ import annotations

import math
from functools import partial

from infoprune import widths
from infoprune.allocate import Option, allocate
from infoprune.architecture import AttentionSite, FFNSite
from infoprune.criteria.heads import INFORMATION_LOSS
from infoprune.criteria.neurons import ENERGY
from infoprune.decisions import Decisions, head_decision, round_up
from infoprune.depth import least_influential, without
from infoprune.errors import BudgetError
from infoprune.ks_rule import decide_by_ks
from infoprune.options import NONE, TRAINED, CompressionOptions
from infoprune.plan import FFNDecision, HeadDecision, max_rank
from infoprune.rank_rules import RULES, ruled_options
from infoprune.site_costs import SiteCosts
from infoprune.solve import SolvedSite

HALVINGS = 20  # of what uniform shares and rankings aim at, where costs are not in proportion to sizes


def decide(solved: list[SolvedSite], costs: SiteCosts, dense_total: float, options: CompressionOptions) -> Decisions:
    """Choose heads and ranks or widths, or whole layers, under ``options.flops``, ``options.speedup`` or ``options.ks``.

    Args:
        solved: The sites that may be cut.
        costs: What they cost: FLOPs, or seconds for a speed-up.
        dense_total: What the whole dense model costs, in the same unit; what is no site of ``solved`` stays as it is.
        options: The budget, and what may be cut.

    Raises:
        BudgetError: Not reachable; says the smallest reachable share, or the largest speed-up.
    """
    if options.ks is not None:
        return decide_by_ks(solved, options)
    if options.layers != NONE:
        return _decide_layers(solved, costs, dense_total, options)
    return _decide_by_cost(solved, costs, dense_total, options)


def remove_units(solved: list[SolvedSite], count: int, options: CompressionOptions) -> Decisions:
    """Remove ``count`` units over all blocks, whatever they cost.

    Under ``information-loss`` the least marginal loss goes first, under a ranking the lowest score; losses add up either way.

    Raises:
        BudgetError: There are not that many to remove.
    """
    blocks = [item for item in solved if isinstance(item.site, AttentionSite) and item.removal is not None]
    removals = {item.site.path: item.removal for item in blocks if item.removal}
    candidates = []
    for item in blocks:
        removal = removals[item.site.path]
        for place, unit in enumerate(removal.order):
            marginal = item.tokens * (removal.losses[place + 1] - removal.losses[place])
            candidates.append((marginal if removal.scores is None else removal.scores[unit], item.site.path, place))
    if count > len(candidates):
        raise BudgetError(f"{count} units can't be removed; {len(candidates)} can.")
    taken = dict.fromkeys(removals, 0)
    for _ in range(count):  # within a block the order is fixed, so only its next unit competes
        _, path, _ = min(c for c in candidates if c[2] == taken[c[1]])
        taken[path] += 1
    heads = {i.site.path: head_decision(i.site, removals[i.site.path], taken[i.site.path], options)
             for i in blocks if taken[i.site.path] and isinstance(i.site, AttentionSite)}  # fmt: skip
    return Decisions(heads, {}, sum(i.tokens * removals[i.site.path].losses[taken[i.site.path]] for i in blocks))


# --- budget ------------------------------------------------------------------------------------------------------------------------


def _decide_layers(solved: list[SolvedSite], costs: SiteCosts, dense_total: float, options: CompressionOptions) -> Decisions:
    layers = [item.layer for item in solved if item.layer is not None]
    of_layers = [_dense_cost(layer.attention, costs) + _dense_cost(layer.ffn, costs) for layer in layers]
    dropped = least_influential(layers, of_layers, dense_total - sum(of_layers), options.cost_share * dense_total)
    return Decisions(*without(dropped), sum(layer.loss for layer in dropped))


def _decide_by_cost(solved: list[SolvedSite], costs: SiteCosts, dense_total: float, options: CompressionOptions) -> Decisions:
    cuttable = sum(_dense_cost(item.site, costs) for item in solved)
    if not cuttable:
        raise BudgetError("With these heads, ffn and towers there is nothing in this model that could be cut: let more be cut.")
    budget = options.cost_share * dense_total - (dense_total - cuttable)
    groups = _affordable_groups(solved, costs, options, budget, cuttable)
    smallest = _smallest(groups)
    if smallest > budget:
        raise BudgetError(_out_of_reach((smallest + dense_total - cuttable) / dense_total, options))
    chosen = allocate(groups, budget)
    heads: dict[str, HeadDecision] = {}
    ranks: dict[str, dict[str, int]] = {}
    narrowed: dict[str, int] = {}
    for option in chosen:
        if option.choice is None:
            continue
        path, decision = option.choice
        if isinstance(decision, HeadDecision):
            heads[path] = decision
        elif isinstance(decision, int):
            narrowed[path] = decision
        else:
            ranks.setdefault(path, {}).update(decision)
    ffn = {path: FFNDecision.model_validate(names) for path, names in ranks.items()}
    ffn |= {item.site.path: widths.decision(item, narrowed[item.site.path]) for item in solved if item.site.path in narrowed}
    cost = dense_total - cuttable + sum(option.cost for option in chosen)
    return Decisions(heads, ffn, sum(option.loss for option in chosen), cost)


def _affordable_groups(
    solved: list[SolvedSite], costs: SiteCosts, options: CompressionOptions, budget: float, cuttable: float
) -> list[list[Option]]:
    """Ways to treat every site whose cheapest are within the budget, or the cheapest of all where none are.

    Uniform shares and rankings are set for the share that was asked for, as if cost were in proportion to size. Where the real cost is
    above that (of measured time a part is fixed, and units come whole), they are set for the largest part of it that fits.
    """
    asked = max(budget, 0.0) / cuttable

    def at(part: float) -> list[list[Option]]:
        return _groups_at(solved, costs, options, budget, part * asked, part * options.cost_share)

    if _smallest(groups := at(1.0)) <= budget:
        return groups
    if _smallest(found := at(0.0)) > budget:
        return found
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _smallest(groups := at(middle)) <= budget:
            low, found = middle, groups
        else:
            high = middle
    return found


def _groups_at(
    solved: list[SolvedSite], costs: SiteCosts, options: CompressionOptions, budget: float, share: float, whole: float
) -> list[list[Option]]:
    """Ways to treat every site; floors, which are a safeguard, are lowered until the budget, which is a promise, is met.

    ``share`` of what can be cut, and ``whole`` of the model, are what uniform shares and rankings aim at.
    """
    forced = _forced_heads(solved, costs, options, budget, share, whole)
    fixed = _fixed_widths(solved, costs, options, budget, share, forced)
    floor = options.floor
    while True:
        groups = _groups(solved, costs, options, budget, share, floor, forced | fixed)
        if floor == 0 or _smallest(groups) <= budget:
            return groups
        floor = floor / 2 if floor > 0.05 else 0.0


def _smallest(groups: list[list[Option]]) -> float:
    return sum(min(option.cost for option in group) for group in groups)


def _out_of_reach(share: float, options: CompressionOptions) -> str:
    """What to say where the cheapest options leave ``share`` of the cost, which is too much."""
    mend = "or let more be cut (heads, ffn, towers)."
    if options.speedup is not None:
        fastest = math.floor(1000 / share) / 1000
        return (
            f"speedup={options.speedup:g} is out of reach: the largest speed-up this configuration reaches on this machine is {fastest:g}, "
            f"by what its parts take. Ask for that or less, {mend}"
        )
    smallest = math.ceil(share * 1000) / 1000
    return (
        f"flops={options.flops:g} is out of reach: the smallest share this configuration reaches is {smallest:g}. "
        f"Ask for that or more, {mend}"
    )


def _dense_cost(site: AttentionSite | FFNSite, costs: SiteCosts) -> float:
    return costs.attention(site, site.num_units) if isinstance(site, AttentionSite) else costs.ffn(site, None)


def _groups(
    solved: list[SolvedSite], costs: SiteCosts, options: CompressionOptions, budget: float, share: float, floor: float,
    forced: dict[str, int],
) -> list[list[Option]]:  # fmt: skip
    """Ways to treat every site; a rule for the ranks decides them together, under what heads leave of the budget."""
    if options.allocation not in RULES:
        return [group for item in solved for group in _options(item, costs, options, share, floor, forced)]
    blocks, ffns = ([item for item in solved if isinstance(item.site, kind)] for kind in (AttentionSite, FFNSite))
    heads = [group for item in blocks for group in _options(item, costs, options, share, floor, forced)]
    return heads + ruled_options(ffns, costs, options, budget - sum(group[0].cost for group in heads), share, floor)


def _options(
    item: SolvedSite, costs: SiteCosts, options: CompressionOptions, share: float, floor: float, forced: dict[str, int]
) -> list[list[Option]]:
    site = item.site
    if item.sizes is not None:
        return [[_settled(item, costs)]]
    if isinstance(site, AttentionSite):
        assert item.removal is not None
        counts = [forced[site.path]] if site.path in forced else list(range(len(item.removal.order) + 1))
        return [
            [
                Option(
                    costs.attention(site, site.num_units - k),
                    item.removal.losses[k] * item.tokens,
                    (site.path, head_decision(site, item.removal, k, options)) if k else None,
                )
                for k in counts
            ]
        ]
    if item.neurons is not None:
        cost = partial(costs.ffn, site)
        if site.path in forced:
            return [[widths.option(item, cost, forced[site.path])]]
        return [widths.ladder(item, cost, options.rank_multiple, floor * share)]
    return _ffn_groups(item, site, costs, options, share, floor)


def _settled(item: SolvedSite, costs: SiteCosts) -> Option:
    """The only way to treat an FFN whose sizes are decided already."""
    assert isinstance(item.site, FFNSite) and item.sizes is not None
    if not item.sizes:
        return Option(costs.ffn(item.site, None), 0.0)
    if item.neurons is not None:
        return widths.option(item, partial(costs.ffn, item.site), item.sizes["keep_neurons"])
    assert item.tails is not None
    loss = sum(0.5 * float(item.tails[name][rank]) for name, rank in item.sizes.items()) * item.tokens
    return Option(costs.ffn(item.site, FFNDecision.model_validate(item.sizes)), loss, (item.site.path, item.sizes))


def _ffn_groups(
    item: SolvedSite, site: FFNSite, costs: SiteCosts, options: CompressionOptions, share: float, floor: float
) -> list[list[Option]]:
    tails = item.tails
    assert tails is not None
    dense, (dense_inputs, dense_down) = costs.ffn(site, None), costs.linears(site)

    def ladder(*names: str) -> list[Option]:
        """Options of linears that get the same rank."""
        top = min(max_rank(site, name) for name in names)
        uniform = share * (max_rank(site, names[0]) + 1)
        least = min(max(round_up(int(floor * uniform), options.rank_multiple), options.rank_multiple), max(top, 1))
        ranks: list[int] = list(range(least, top + 1, options.rank_multiple)) or [top]
        if options.allocation == "uniform":
            ranks = [max(min(int(uniform) // options.rank_multiple * options.rank_multiple, top), min(options.rank_multiple, top))]
        result = []
        for rank in ranks:
            decision = dict.fromkeys(names, rank)
            saved = dense - costs.ffn(site, FFNDecision.model_validate(decision))
            covered = dense_inputs if "up_rank" in names or "joint_rank" in names else dense_down
            loss = sum(0.5 * float(tails[name][rank]) for name in names) * item.tokens
            result.append(Option(covered - saved, loss, (site.path, decision)))
        return result

    inputs: list[Option] = []
    if "joint_rank" in tails:
        inputs += ladder("joint_rank")
    if "up_rank" in tails:
        inputs += ladder("gate_rank", "up_rank") if site.gated else ladder("up_rank")
    groups = []
    for cost, found in ((dense_inputs, inputs), (dense_down, ladder("down_rank"))):
        faster = [option for option in found if option.cost < cost]  # fewer FLOPs always; less time not always
        whole = options.allocation == "uniform" and share >= 1
        groups.append([*([] if whole else faster), *([Option(cost, 0.0)] if options.allocation == "global" or whole or not faster else [])])
    return groups


def _fixed_widths(
    solved: list[SolvedSite], costs: SiteCosts, options: CompressionOptions, budget: float, share: float, forced: dict[str, int]
) -> dict[str, int]:
    """Width of each FFN where neurons have a score without a unit, or all FFNs get the same share.

    FFNs get what the blocks of ``forced`` heads leave of the budget or, where heads are free to compete, the share of their cost that
    is asked of all that can be cut.
    """
    narrow = [item for item in solved if item.neurons is not None]
    if not narrow or (options.neurons == ENERGY and options.allocation == "global"):
        return {}
    dense = [_dense_cost(item.site, costs) for item in narrow]
    blocks = [item.site for item in solved if isinstance(item.site, AttentionSite)]
    target = share * sum(dense)
    if all(site.path in forced for site in blocks) and share > 0:
        left = budget - sum(costs.attention(site, site.num_units - forced[site.path]) for site in blocks)
        target = left * share * sum(_dense_cost(item.site, costs) for item in solved) / budget  # all of it at the share asked for
    if options.allocation == "uniform":
        return widths.uniform(narrow, target / sum(dense), options.rank_multiple)
    return widths.ranked(narrow, dense, target, options.rank_multiple)


def _forced_heads(
    solved: list[SolvedSite], costs: SiteCosts, options: CompressionOptions, budget: float, share: float, whole: float
) -> dict[str, int]:
    """Units to remove from each block where that is decided already, by a uniform share, or by a ranking, which has no unit to trade.

    Rankings get the share of the attention's cost that was asked of the model, filled by one global ranking; the FFNs get the rest of
    the budget. Where no FFN may be cut, the ranking goes on until the budget is met.
    """
    decided = {item.site.path: item.fixed for item in solved if item.fixed is not None}
    if options.allocation != "global":
        removals = ((item.site, item.removal) for item in solved if isinstance(item.site, AttentionSite) and item.removal is not None)
        counts = {site: min(len(removal.order), round(site.num_units * (1 - share))) for site, removal in removals}
        return {site.path: _worth_it(site, count, costs) for site, count in counts.items()} | decided
    if decided or options.heads in (INFORMATION_LOSS, TRAINED, NONE):
        return decided
    attention = [item for item in solved if isinstance(item.site, AttentionSite)]
    total = sum(_dense_cost(item.site, costs) for item in attention)
    alone = len(attention) == len(solved)
    least, most = (total - budget, total) if alone else (0.0, (1 - whole) * total)  # cost to save
    candidates = []
    for item in attention:
        assert item.removal is not None and isinstance(item.site, AttentionSite) and item.removal.scores is not None
        steps = [costs.attention(item.site, item.site.num_units - k) for k in range(len(item.removal.order) + 1)]
        candidates += [
            (item.removal.scores[unit], place, item.site.path, steps[place] - steps[place + 1])
            for place, unit in enumerate(item.removal.order)
        ]
    counts = {item.site.path: 0 for item in attention}
    saved = 0.0
    for _, _, path, cost in sorted(candidates, key=lambda c: c[:2]):
        if saved + cost > most * (1 + 1e-9) or (alone and saved >= least * (1 - 1e-9)):
            break
        saved += cost
        counts[path] += 1
    return {
        item.site.path: _worth_it(item.site, counts[item.site.path], costs) for item in attention if isinstance(item.site, AttentionSite)
    }


def _worth_it(site: AttentionSite, count: int, costs: SiteCosts) -> int:
    """The fewest units whose removal saves as much as that of ``count``: measured time may not change with every one."""
    cost = costs.attention(site, site.num_units - count)
    return next(k for k in range(count + 1) if costs.attention(site, site.num_units - k) <= cost)
