from __future__ import annotations

import itertools

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
