from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune.allocate import Option, allocate, useful
from infoprune.errors import BudgetError

options = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10)), min_size=1, max_size=4)
problems = st.lists(options, min_size=1, max_size=4).map(lambda sites: [[Option(c, loss) for c, loss in site] for site in sites])


def brute_force(sites, budget):
    feasible = [sum(o.loss for o in pick) for pick in itertools.product(*sites) if sum(o.cost for o in pick) <= budget]
    return min(feasible, default=None)


@settings(max_examples=150, deadline=None)
@given(problems, st.integers(1, 150))
def test_equals_brute_force(sites, budget):
    best = brute_force(sites, budget)
    if best is None:
        with pytest.raises(BudgetError, match="smallest reachable"):
            allocate(sites, budget)
        return
    chosen = allocate(sites, budget)
    assert sum(o.cost for o in chosen) <= budget
    assert all(o in site for o, site in zip(chosen, sites, strict=True))
    assert sum(o.loss for o in chosen) <= best * (1 + 1e-3) + 1e-6


def exact(sites, budget):
    """Least loss with whole costs and budget, by dynamic programming over every whole cost."""
    best = np.zeros(budget + 1)
    for options in sites:
        found = np.full(budget + 1, np.inf)
        for option in options:
            if option.cost <= budget:
                found[option.cost :] = np.minimum(found[option.cost :], best[: budget + 1 - option.cost] + option.loss)
        best = found
    return best[budget]


@pytest.mark.parametrize("seed", range(6))
def test_coarse_options_are_near_the_optimum(seed):
    """Like heads alone: few options per site, large steps, and a budget that no sum of them meets."""
    generator = np.random.default_rng(seed)
    sites = []
    for _ in range(24):
        step, losses = int(generator.integers(4_000, 9_000)), np.sort(generator.exponential(size=9).cumsum() ** 2)[::-1]
        sites.append([Option(step * kept, float(loss)) for kept, loss in enumerate(losses)])
    budget = int(0.8 * sum(options[-1].cost for options in sites)) + 17
    chosen = allocate(sites, budget)
    assert sum(o.cost for o in chosen) <= budget
    assert sum(o.loss for o in chosen) <= exact(sites, budget) * 1.005


@settings(max_examples=30, deadline=None)
@given(problems)
def test_loss_is_monotone_in_the_budget(sites):
    smallest = sum(min(o.cost for o in site) for site in sites)
    losses = [sum(o.loss for o in allocate(sites, smallest + extra)) for extra in (0, 5, 20, 100)]
    assert all(b <= a * (1 + 1e-3) + 1e-6 for a, b in itertools.pairwise(losses))


def test_dominated_options_are_dropped():
    kept = useful([Option(1, 5), Option(2, 6), Option(3, 1), Option(3, 2)])
    assert [(o.cost, o.loss) for o in kept] == [(1, 5), (3, 1)]


def test_nothing_to_allocate():
    assert allocate([], 10) == []
