"""FFN ranks by one rule for all linears, with one number that the budget decides, instead of least total loss.

* ``tolerance``: the same relative truncation error for every linear, the uniform tolerance of PGSVD (Solgi et al., arXiv 2510.05544).
* ``effective-rank``: ranks in proportion to the effective rank of each linear's spectrum, with a floor, after Swift-SVD (Qi et al., arXiv
  2604.01609). How the paper weighs it with the importance of layers is not known here; importance is left out.

Either way the number is found by bisection, ranks are rounded up to multiples, and a linear whose factors would cost as much as
itself stays dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from infoprune.allocate import Option
from infoprune.architecture import FFNSite
from infoprune.options import CompressionOptions
from infoprune.plan import FFNDecision, max_rank
from infoprune.site_costs import SiteCosts
from infoprune.solve import SolvedSite
from infoprune.spectrum import effective_rank, ks_truncation

STEPS = 60  # of bisection: closer than two spectra can differ


@dataclass(frozen=True)
class FactorizableLinear:
    """A linear of an FFN, or gate and up above each other.

    Attributes:
        site: The FFN.
        name: Of its rank in :class:`infoprune.plan.FFNDecision`.
        energies: (n,) squared singular values, descending.
        dense: Cost per example as it is.
        factorised: Cost per example at a rank.
    """

    site: FFNSite
    name: str
    energies: torch.Tensor
    dense: float
    factorised: Callable[[int], float]

    @property
    def top(self) -> int:
        """Largest rank that saves anything."""
        return max_rank(self.site, self.name)

    def cost(self, rank: int | None) -> float:
        """Cost per example at a rank; ``None``: dense."""
        return self.dense if rank is None else self.factorised(rank)


def linears_of(site: FFNSite, spectra: dict[str, torch.Tensor], costs: SiteCosts) -> list[FactorizableLinear]:
    """The linears that were factorised; gate and up together where both structures were solved."""
    inputs, down = costs.linears(site)
    names = [name for name in spectra if "joint_rank" not in spectra or name in ("joint_rank", "down_rank")]
    dense = {"joint_rank": inputs, "down_rank": down} | dict.fromkeys(("gate_rank", "up_rank"), inputs / site.num_inputs)

    def factorised(name: str, rank: int) -> float:
        return costs.ffn(site, FFNDecision.model_validate({name: rank})) - (inputs + down - dense[name])

    return [FactorizableLinear(site, name, spectra[name], dense[name], partial(factorised, name)) for name in names]


def ranks_by_tolerance(linears: Sequence[FactorizableLinear], budget: float, multiple: int, least: Sequence[int]) -> list[int | None]:
    """The smallest rank r with sum_{i > r} s_i^2 <= eps^2 sum_i s_i^2, for the smallest eps that the budget allows.

    Args:
        linears: What may be factorised.
        budget: Cost per example of all of them.
        multiple: Ranks are rounded up to multiples of it.
        least: Ignored: the tolerance alone decides.

    Returns:
        Rank of each linear; ``None``: dense. Those of eps = 1 where even that is more than the budget.
    """
    curves = [ks_truncation(linear.energies) for linear in linears]

    def ranks(tolerance: float) -> list[int | None]:
        found = (int((curve > tolerance**2).sum()) + 1 for curve in curves)
        return [_rounded(linear, rank, multiple) for linear, rank in zip(linears, found, strict=True)]

    return _within(ranks, linears, budget, strict=1.0, loose=0.0)


def ranks_by_effective_rank(linears: Sequence[FactorizableLinear], budget: float, multiple: int, least: Sequence[int]) -> list[int | None]:
    """Rank r = max(floor, c eRank) for the largest c that the budget allows; eRank of the energies.

    Args:
        linears: What may be factorised.
        budget: Cost per example of all of them.
        multiple: Ranks are rounded up to multiples of it.
        least: The floor of each linear.

    Returns:
        Rank of each linear; ``None``: dense. The floors where even they are more than the budget.
    """
    effective = [effective_rank(linear.energies) for linear in linears]

    def ranks(scale: float) -> list[int | None]:
        found = [max(floor, int(scale * value)) for floor, value in zip(least, effective, strict=True)]
        return [_rounded(linear, rank, multiple) for linear, rank in zip(linears, found, strict=True)]

    enough = max(linear.top / value for linear, value in zip(linears, effective, strict=True)) + 1 if linears else 0.0
    return _within(ranks, linears, budget, strict=0.0, loose=2 * enough)


def _rounded(linear: FactorizableLinear, rank: int, multiple: int) -> int | None:
    """A rank that saves something, or ``None``; the least multiple may be more than a small linear has."""
    if rank > linear.top:
        return None
    rounded = max(-(-rank // multiple) * multiple, multiple)
    found = rounded if rounded <= linear.top else (linear.top if rounded == multiple else None)
    return None if found is None or linear.cost(found) >= linear.dense else found  # fewer FLOPs always; less time not always


def _within(
    ranks: Callable[[float], list[int | None]], linears: Sequence[FactorizableLinear], budget: float, *, strict: float, loose: float
) -> list[int | None]:
    """Ranks at the number nearest to ``loose`` (everything stays) that the budget allows; ``strict`` costs the least."""

    def cost(number: float) -> float:
        return sum(linear.cost(rank) for linear, rank in zip(linears, ranks(number), strict=True))

    if cost(loose) <= budget:
        return ranks(loose)
    for _ in range(STEPS):
        middle = (strict + loose) / 2
        strict, loose = (middle, loose) if cost(middle) <= budget else (strict, middle)
    return ranks(strict)


RULES = {"tolerance": ranks_by_tolerance, "effective-rank": ranks_by_effective_rank}


def ruled_options(
    solved: Sequence[SolvedSite], costs: SiteCosts, options: CompressionOptions, budget: float, share: float, floor: float
) -> list[list[Option]]:
    """The one way to treat each linear of the FFNs under the rule that ``options.allocation`` names.

    Args:
        solved: FFNs.
        costs: What they cost.
        options: How to compress.
        budget: Cost per example of all of the FFNs.
        share: Uniform share, of which ``floor`` says how much each linear keeps at least, where the rule has a floor.
        floor: See :class:`infoprune.options.CompressionOptions`.
    """
    owners, linears = [], []
    for item in solved:
        assert isinstance(item.site, FFNSite) and item.spectra is not None
        found = linears_of(item.site, item.spectra, costs)
        owners += [item] * len(found)
        linears += found
    least = [int(floor * share * (linear.top + 1)) for linear in linears]
    ranks = RULES[options.allocation](linears, budget, options.rank_multiple, least)
    return [[_option(item, linear, rank)] for item, linear, rank in zip(owners, linears, ranks, strict=True)]


def _option(item: SolvedSite, linear: FactorizableLinear, rank: int | None) -> Option:
    if rank is None:
        return Option(linear.dense, 0.0)
    assert item.tails is not None
    return Option(linear.cost(rank), 0.5 * float(item.tails[linear.name][rank]) * item.tokens, (item.site.path, {linear.name: rank}))
