"""One budget for everything: choose heads and ranks of both towers at least information loss.

Every site offers options, each with a cost (FLOPs per example) and a loss (nats per example). Minimising total loss subject to total
cost <= budget, one option per site, is a multiple-choice knapsack; its linear relaxation has at most one fractional site, so the
exact integer programme is solved quickly by branch and bound (HiGHS, through SciPy).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from infoprune.errors import BudgetError


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
    flat = [option for options in candidates for option in options]
    owner = np.repeat(np.arange(len(candidates)), [len(options) for options in candidates])
    losses, costs = np.array([o.loss for o in flat]), np.array([o.cost for o in flat])
    one_each = sparse.csr_matrix((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(candidates), len(flat)))
    # Scaled to order one: the solver's tolerances are absolute.
    unit_loss = max(float(losses.max()), 1e-300)
    result = milp(
        losses / unit_loss,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint((costs / budget)[None], -np.inf, 1.0)],
        options={"mip_rel_gap": 1e-4, "time_limit": 30.0},
    )
    if result.x is None:
        raise BudgetError(f"The allocation did not find a solution: {result.message}")
    chosen = []
    for index, options in enumerate(candidates):
        offset = int(np.searchsorted(owner, index))
        chosen.append(options[int(np.argmax(result.x[offset : offset + len(options)]))])
    return _within(chosen, candidates, budget)


def _within(chosen: list[Option], candidates: list[list[Option]], budget: float) -> list[Option]:
    """Undo what the solver's feasibility tolerance let through, by the cheapest losses first."""
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
