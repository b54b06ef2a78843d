from __future__ import annotations

import pytest
import torch

from infoprune.architecture import FFNSite
from infoprune.evaluation.cost import Workload, ffn_flops
from infoprune.families.towers import CLIP_STYLE, LLAMA_STYLE
from infoprune.plan import FFNDecision
from infoprune.rank_rules import linears_of, ranks_by_effective_rank, ranks_by_tolerance
from infoprune.site_costs import FlopCosts
from infoprune.spectrum import effective_rank

WORKLOAD = Workload(vision_tokens=9, prompt_tokens=20, answer_tokens=2, attention={})


def linears():
    """Gate, up and down of four gated FFNs and two plain ones, whose spectra fall at different speeds."""
    found = []
    for layer in range(6):
        site = FFNSite(f"f{layer}", "text", layer, LLAMA_STYLE, 40, 100) if layer < 4 else FFNSite("p", "vision", layer, CLIP_STYLE, 40, 60)
        names = ("gate_rank", "up_rank", "down_rank") if site.gated else ("up_rank", "down_rank")
        speeds = {name: 0.05 + 0.04 * layer + 0.013 * k for k, name in enumerate(names)}
        spectra = {name: 10.0**layer * torch.exp(-speed * torch.arange(40, dtype=torch.float64)) for name, speed in speeds.items()}
        found += linears_of(site, spectra, FlopCosts(WORKLOAD))
    return found


def cost(chosen, ranks):
    return sum(linear.cost(rank) for linear, rank in zip(chosen, ranks, strict=True))


def test_costs_are_those_of_the_decision():
    site = FFNSite("f", "text", 0, LLAMA_STYLE, 40, 100)
    separate = linears_of(site, dict.fromkeys(("gate_rank", "up_rank", "down_rank"), torch.ones(40)), FlopCosts(WORKLOAD))
    assert cost(separate, (3, None, 5)) == ffn_flops(site, FFNDecision(gate_rank=3, down_rank=5), WORKLOAD)
    assert cost(separate, (None, None, None)) == ffn_flops(site, None, WORKLOAD)
    names = ("joint_rank", "gate_rank", "up_rank", "down_rank")
    joint = linears_of(site, dict.fromkeys(names, torch.ones(40)), FlopCosts(WORKLOAD))  # both structures were solved
    assert [linear.name for linear in joint] == ["joint_rank", "down_rank"]
    assert cost(joint, (3, None)) == ffn_flops(site, FFNDecision(joint_rank=3), WORKLOAD)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("share", [0.7, 0.4, 0.2])
def test_every_linear_has_the_same_tolerance(share, multiple):
    chosen = linears()
    budget = share * sum(linear.dense for linear in chosen)
    ranks = ranks_by_tolerance(chosen, budget, multiple, [0] * len(chosen))
    assert 0.9 * budget < cost(chosen, ranks) <= budget
    tails = [linear.energies.flip(0).cumsum(0).flip(0) / linear.energies.sum() for linear in chosen]  # at r = 0, 1, ...
    reached = [float(tail[rank]) for tail, rank in zip(tails, ranks, strict=True) if rank is not None]
    refused = [float(tail[rank - multiple]) for tail, rank in zip(tails, ranks, strict=True) if rank is not None]
    assert max(reached) < min(refused)  # one number lies between: all meet it, none would with a rank less
    for linear, tail, rank in zip(chosen, tails, ranks, strict=True):
        assert rank is not None or float(tail[linear.top // multiple * multiple - 1]) > max(reached)


@pytest.mark.parametrize("share", [0.7, 0.4, 0.2])
def test_ranks_are_in_proportion_to_effective_rank_above_the_floor(share):
    chosen = linears()
    budget = share * sum(linear.dense for linear in chosen)
    least = [int(0.5 * share * (linear.top + 1)) for linear in chosen]
    ranks = ranks_by_effective_rank(chosen, budget, 1, least)
    assert 0.9 * budget < cost(chosen, ranks) <= budget
    factorised = [(r, low, effective_rank(x.energies)) for x, r, low in zip(chosen, ranks, least, strict=True) if r is not None]
    assert all(rank >= max(low, 1) for rank, low, _ in factorised)
    free = [(rank, value) for rank, low, value in factorised if rank > max(low, 1)]
    scale = max(rank / value for rank, value in free)
    assert all(rank == int(scale * value + 1e-9) for rank, value in free)


@pytest.mark.parametrize("rule", [ranks_by_tolerance, ranks_by_effective_rank])
def test_the_ends_of_a_rule(rule):
    chosen = linears()
    dense = sum(linear.dense for linear in chosen)
    nothing = [0] * len(chosen)
    assert rule(chosen, dense, 8, nothing) == [None] * len(chosen)
    assert rule(chosen, 0.0, 8, nothing) == [8] * len(chosen)  # the least it can do, which the caller finds to be too much
    assert rule([], 0.0, 8, []) == []
    costs = [cost(chosen, rule(chosen, share * dense, 8, nothing)) for share in (0.9, 0.6, 0.4)]
    assert costs[0] > costs[1] > costs[2]
