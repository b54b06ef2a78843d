"""How many neurons FFNs keep: a ladder of widths for the one budget, or widths that a ranking or a uniform share fixes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from infoprune.allocate import Option
from infoprune.architecture import FFNSite
from infoprune.criteria.neurons import NeuronRemoval
from infoprune.plan import FFNDecision
from infoprune.solve import SolvedSite

MOST_OPTIONS = 32  # of one FFN
Cost = Callable[[FFNDecision | None], float]  # of one FFN under a decision; ``None``: dense


def ladder(item: SolvedSite, cost: Cost, multiple: int, floor: float) -> list[Option]:
    """Widths that compete in the budget, at most :data:`MOST_OPTIONS`: the dense one, and multiples of ``multiple``.

    Args:
        item: A solved FFN.
        cost: What it costs.
        multiple: Widths are multiples of this.
        floor: Least share of the neurons that stays; with 0 the FFN may be dropped whole.

    Returns:
        Options with losses in nats per example; the choice is the path and the width, ``None`` for dense.
    """
    dense = _site(item).intermediate_size
    least = -(-math.ceil(floor * dense) // multiple) * multiple
    step = multiple * max(1, math.ceil((dense - least) / multiple / (MOST_OPTIONS - 1)))
    return [option(item, cost, width) for width in (*range(least, dense, step), dense)]


def option(item: SolvedSite, cost: Cost, width: int) -> Option:
    """One width of a solved FFN; see :func:`ladder`."""
    site, removal = _site(item), _removal(item)
    if width == site.intermediate_size:
        return Option(cost(None), 0.0)
    loss = float(removal.losses[site.intermediate_size - width]) * item.tokens
    of_width = FFNDecision.model_construct(keep_neurons=range(width), num_neurons=site.intermediate_size)  # what costs is how many
    return Option(cost(of_width), loss, (site.path, width))


def decision(item: SolvedSite, width: int) -> FFNDecision:
    """Keep the ``width`` neurons that go last."""
    site = _site(item)
    kept = _removal(item).order[site.intermediate_size - width :].sort().values
    return FFNDecision(keep_neurons=tuple(kept.tolist()), num_neurons=site.intermediate_size)


def ranked(items: Sequence[SolvedSite], dense: Sequence[float], target: float, multiple: int) -> dict[str, int]:
    """Widths within ``target`` by one ranking over the neurons of all FFNs, in groups of ``multiple`` of like score.

    The best group of each FFN stays, then others by their mean score while there is room; what remains of an FFN that is no whole group
    goes first. With groups of one this is the ranking of single neurons.

    Args:
        items: Solved FFNs.
        dense: What each costs; a neuron costs the same share of it.
        target: Upper bound on the cost of all.
        multiple: Neurons of a group.

    Returns:
        Widths by path.
    """
    widths = {_site(item).path: 0 for item in items}
    groups = []
    for item, cost in zip(items, dense, strict=True):
        site, removal = _site(item), _removal(item)
        best_first = removal.scores[removal.order].flip(0)
        for place, group in enumerate(best_first.split(multiple)):
            share = len(group) / site.intermediate_size
            groups.append((place > 0, -float(group.mean()), place, site.path, len(group), cost * share))
    left = target * (1 + 1e-9)
    for later, _, _, path, size, cost in sorted(groups):
        if later and cost > left:
            break
        widths[path] += size
        left -= cost
    return widths


def uniform(items: Sequence[SolvedSite], share: float, multiple: int) -> dict[str, int]:
    """The same share of every FFN's neurons, rounded down to ``multiple`` but to no less than that; widths by path."""
    widths = {}
    for item in items:
        dense = _site(item).intermediate_size
        rounded = int(share * dense * (1 + 1e-9)) // multiple * multiple if share < 1 else dense
        widths[_site(item).path] = max(rounded, min(multiple, dense))
    return widths


def _site(item: SolvedSite) -> FFNSite:
    assert isinstance(item.site, FFNSite)
    return item.site


def _removal(item: SolvedSite) -> NeuronRemoval:
    assert item.neurons is not None
    return item.neurons
