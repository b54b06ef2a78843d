"""One budget for everything: choose heads and ranks of both towers at least information loss.

Every site offers options, each with a cost (FLOPs per example) and a loss (nats per example). Minimising total loss subject to total
cost <= budget, one option per site, is a multiple-choice knapsack. It is solved by dynamic programming over a fine grid of the budget
(Kellerer, Pferschy & Pisinger, "Knapsack problems", 2004, section 11.5), then trimmed or filled to the exact budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infoprune.errors import BudgetError

GRID = 20_000  # cells of the budget; rounding then moves the budget by less than (sites / GRID), and trimming undoes even that


@dataclass(frozen=True)
class Option:
    """One way to treat a site.

    Attributes:
        cost: FLOPs per example.
        loss: Information lost, nats per example.
        choice: What surgery is told; opaque here.
    """

    cost: float
    loss: float
    choice: Any = None


def useful(options: Sequence[Option]) -> list[Option]:
    """Options that no other option beats in both cost and loss, cheapest first."""
    best: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.loss)):
        if not best or option.loss < best[-1].loss:
            best.append(option)
    return best


def allocate(sites: Sequence[Sequence[Option]], budget: float) -> list[Option]:
    """The option of each site that minimises total loss within ``budget``.

    Args:
        sites: Options per site.
        budget: Upper bound on total cost.

    Returns:
        One option per site, in order.

    Raises:
        BudgetError: Even the cheapest options exceed the budget.
    """
    if not sites:
        return []
    candidates = [useful(options) for options in sites]
    smallest = sum(options[0].cost for options in candidates)
    if smallest > budget:
        raise BudgetError(f"The smallest reachable cost is {smallest:.4g}, above the budget of {budget:.4g}.")
    if sum(options[-1].cost for options in candidates) <= budget:
        return [options[-1] for options in candidates]
    found = _rounded_down(candidates, budget)
    # What has to be undone of the first can be a large piece where steps are coarse; one of those with a few cells less fits as it is.
    fits = next((chosen for chosen in found if sum(o.cost for o in chosen) <= budget), found[0])
    filled = [_fill(_within(chosen, candidates, budget), candidates, budget) for chosen in (found[0], fits)]
    return min(filled, key=lambda chosen: sum(option.loss for option in chosen))


def _rounded_down(candidates: list[list[Option]], budget: float) -> list[list[Option]]:
    """Choices of least loss with costs rounded down to the grid, which may exceed the budget by a cell per site; then of so many less."""
    cells = [[int(option.cost / budget * GRID + 1e-9) for option in options] for options in candidates]
    best = np.zeros(GRID + 1)  # least loss within the first b cells
    picks = np.zeros((len(candidates), GRID + 1), dtype=np.int32)
    for site, options in enumerate(candidates):
        updated = np.full(GRID + 1, np.inf)
        for number, option in enumerate(options):
            width = cells[site][number]
            if width > GRID:
                break
            total = best[: GRID + 1 - width] + option.loss
            better = total < updated[width:]
            updated[width:][better] = total[better]
            picks[site, width:][better] = number
        best = updated
    return [_picked(candidates, cells, picks, left) for left in range(GRID, GRID - len(candidates) - 1, -1) if np.isfinite(best[left])]


def _picked(candidates: list[list[Option]], cells: list[list[int]], picks: np.ndarray, left: int) -> list[Option]:
    """The choices behind the least loss within ``left`` cells."""
    chosen = []
    for site in range(len(candidates) - 1, -1, -1):
        number = int(picks[site, left])
        chosen.append(candidates[site][number])
        left -= cells[site][number]
    return chosen[::-1]


def _fill(chosen: list[Option], candidates: list[list[Option]], budget: float) -> list[Option]:
    """Spend what is left on the steps that save most loss per cost."""
    chosen, left = list(chosen), budget - sum(o.cost for o in chosen)
    while True:
        steps = [
            ((chosen[index].loss - better.loss) / (better.cost - chosen[index].cost), index, better)
            for index, options in enumerate(candidates)
            for better in options[options.index(chosen[index]) + 1 :]
            if better.cost - chosen[index].cost <= left
        ]
        if not steps:
            return chosen
        _, index, better = max(steps, key=lambda step: step[:2])
        left -= better.cost - chosen[index].cost
        chosen[index] = better


def _within(chosen: list[Option], candidates: list[list[Option]], budget: float) -> list[Option]:
    """Undo what rounding to the grid let through, by the cheapest losses first."""
    chosen = list(chosen)
    while sum(o.cost for o in chosen) > budget:
        steps = []
        for index, options in enumerate(candidates):
            place = options.index(chosen[index])
            if place:
                lower = options[place - 1]
                steps.append(((lower.loss - chosen[index].loss) / (chosen[index].cost - lower.cost), index, lower))
        _, index, lower = min(steps, key=lambda step: step[:2])
        chosen[index] = lower
    return chosen
